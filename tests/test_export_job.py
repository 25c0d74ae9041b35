"""Exports of a run's soup, and what it says of sizes and times."""

import json
import os
import re
import shutil
import sys

import flax.linen as nn
import jax
import main_job
import numpy as np
import pytest
import soup_runs
from absl import flags
from sklearn.datasets import load_digits

from experiments import export, soup
from experiments.config.run_config import NEWER
from experiments.costs.inference_times import measure_inference
from jaxsms import checkpoint, models, pretrained
from jaxsms import export as library
from jaxsms.data import load
from jaxsms.disk import storage
from jaxsms.disk.by_name import by_path, nested
from jaxsms.disk.safetensors import read_safetensors, read_with_metadata
from jaxsms.export import load_compact

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_figures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A small run, its soup, and its network."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  flags = ("--hidden=16", "--epochs=1", "--retrain_epochs=1", "--phases=1", "--seed=3")
  flags += ("--ingredients=2", "--batch_size=64", "--goal_sparsity=0.9", "--baselines=")
  flags += ("--mesh=none",)
  assert main_job.run(*flags, f"--workdir={workdir}") == 0
  soup = checkpoint.restore(workdir / "soup" / "seed_3")
  return workdir, soup, models.create("mlp", 10, hidden=(16,), dropout=0.0)


def run(*words):
  """Exports inside this process; exit status."""
  main_job.unparse("out", "format", "cut", "int8", "phase")
  return main_job.exit_status(export.main, flags.FLAGS(["export", *map(str, words)]))


def assert_same(a, b):
  a, b = by_path(a), by_path(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], strict=True)


@pytest.mark.slow
def test_compact_and_safetensors_hold_the_soup(finished, tmp_path, capsys):
  workdir, soup, _ = finished
  params, out = {"params": soup["params"]}, tmp_path / "deep" / "compact.safetensors"
  assert run(workdir, f"--out={out}") == 0
  tree, masks = load_compact(out)
  assert_same(tree, params)
  assert_same(masks, {"params": soup["masks"]})
  n, size = 64 * 16 + 16 * 10, out.stat().st_size
  assert f"compact.safetensors: {size:,} bytes; the arrays have {4 * (n + 26):,}" in (
    capsys.readouterr().out
  )
  out = tmp_path / "dense.safetensors"
  assert run(workdir, "--format=safetensors", "--seed=3", f"--out={out}") == 0
  assert_same(nested(read_safetensors(out)), params)
  kept = round(0.1 * n)
  assert sum(np.count_nonzero(x) for x in jax.tree.leaves(params) if x.ndim == 2) == kept


@pytest.mark.slow
def test_one_shot_soups_of_all_sparsities_are_kept_and_exported(tmp_path, capsys):
  workdir = tmp_path / "run"
  flags = (*main_job.SMALL, "--phase_sparsities=0.5,0.8", "--baselines=one_shot_soup")
  flags = [flag for flag in flags if "phases=" not in flag and "goal" not in flag]
  assert main_job.run(*flags, f"--workdir={workdir}") == 0
  phases = main_job.results(workdir)["seeds"][0]["phases"]
  digits = load("digits")
  images = (digits.test_images / 255 - digits.mean) / digits.std
  inputs, kept = images.reshape(len(images), -1), []
  for phase, sparsity in ((1, 0.5), (2, 0.8)):
    folder = workdir / "soup" / "one_shot" / f"phase_{phase}" / "seed_0"
    model = checkpoint.restore(folder)
    first, last = (model["params"][name] for name in ("Dense_0", "Dense_1"))
    hidden = np.maximum(inputs @ first["kernel"] + first["bias"], 0)
    logits = hidden @ last["kernel"] + last["bias"]
    accuracy = np.mean(logits.argmax(-1) == digits.test_labels)
    record = phases[phase - 1]["one_shot_soup"]
    assert record["test_accuracy"] == pytest.approx(accuracy, abs=2 / len(images))
    zeros = [np.mean(layer["kernel"] == 0) for layer in (first, last)]
    assert np.average(zeros, weights=[64 * 16, 160]) == pytest.approx(sparsity, abs=1e-3)
    kept.append(np.concatenate([np.ravel(m) for m in jax.tree.leaves(model["masks"])]))
    out = tmp_path / f"{phase}.safetensors"
    assert run(workdir, f"--phase={phase}", f"--out={out}") == 0
    assert_same(load_compact(out)[0], {"params": model["params"]})
  assert not (kept[1] & ~kept[0]).any()
  # One pruning to the first sparsity is the soup's first phase; the last soup is its own.
  assert phases[0]["one_shot_soup"]["test_loss"] == pytest.approx(
    phases[0]["soup"]["test_loss"], abs=1e-5
  )
  last = checkpoint.restore(workdir / "soup" / "seed_0")
  assert set(last) == {"params", "batch_stats", "masks"} == set(model)
  assert not np.array_equal(last["params"]["Dense_0"]["kernel"], first["kernel"])
  capsys.readouterr()
  assert run(workdir, "--phase=3", f"--out={tmp_path / 'three.safetensors'}") == 2
  assert "holds no one-shot soup of phase 3" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torch_gives_pytorchs_network_the_same_logits(finished, tmp_path, ending):
  import torch

  workdir, soup, module = finished
  out = tmp_path / f"soup.{ending}"
  assert run(workdir, "--format=torch", f"--out={out}") == 0
  if ending == "pth":
    state = torch.load(out, weights_only=True)
  else:
    arrays, metadata = read_with_metadata(out)
    assert metadata == {"format": "pt"}
    state = {name: torch.tensor(x) for name, x in arrays.items()}
  layers = torch.nn.Sequential()
  for name, layer in (
    ("flatten", torch.nn.Flatten()),
    ("fc1", torch.nn.Linear(64, 16)),
    ("relu", torch.nn.ReLU()),
    ("fc2", torch.nn.Linear(16, 10)),
  ):
    layers.add_module(name, layer)
  layers.load_state_dict(state)
  images = np.random.default_rng(0).standard_normal((5, 8, 8, 1), np.float32)
  theirs = layers(torch.tensor(images.transpose(0, 3, 1, 2))).detach().numpy()
  ours = module.apply({"params": soup["params"]}, images)
  np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
  assert_same(pretrained.load_model(out, module, (8, 8, 1))["params"], soup["params"])


@pytest.mark.parametrize(
  ("command", "words"),
  [
    (["--out=a.safetensors"], "0 run directories are given"),
    (["run", "more", "--out=a.safetensors"], "2 run directories are given"),
    (["run"], "--out is missing"),
    (["run", "--phase=1", "--format=onnx"], "--phase=1 with --format=onnx needs --out"),
    (["run", "--phase=1", "--out=a.safetensors"], "holds no one-shot soup of phase 1"),
    (["run", "--out=a.pth"], "--out is a.pth: it must end in .safetensors"),
    (["run", "--out=a.npz", "--format=torch"], "must end in .pth or .pt or .safetensors"),
    (["run", "--out=a.pth", "--format=torhc"], "did you mean torch?"),
    (["run", "--out=a.safetensors", "--seed=9"], "run has soups of 3"),
    (["run", "--out=a.safetensors", "--cut"], "--cut is not of --format=compact"),
    (["run", "--out=a.pt", "--format=torch", "--int8"], "--int8 is of --format=onnx"),
    (["run", "--out=a.onn", "--format=onnx"], "it must end in .onnx"),
    ([".", "--out=a.safetensors"], ". holds no soup"),
    (["missing", "--out=a.safetensors"], "missing holds no soup"),
  ],
)
def test_wrong_use_gives_one_sentence(finished, monkeypatch, capsys, command, words):
  monkeypatch.chdir(finished[0].parent)
  assert run(*command) == 2
  captured = capsys.readouterr()
  assert words in captured.err and captured.err.count("\n") == 1
  assert captured.out == "" and os.listdir() == ["run"]


def test_nothing_is_overwritten_and_old_runs_are_refused(finished, tmp_path, capsys):
  workdir, soup, _ = finished
  out = tmp_path / "soup.safetensors"
  out.write_text("mine")
  assert run(workdir, f"--out={out}") == 2
  assert "exists already" in capsys.readouterr().err and out.read_text() == "mine"
  checkpoint.save(tmp_path / "old" / "soup" / "seed_0", soup)
  assert run(tmp_path / "old", "--format=torch", f"--out={tmp_path / 'a.pth'}") == 2
  assert "does not tell the flags" in capsys.readouterr().err
  words = tmp_path / "old", "--format=safetensors", f"--out={tmp_path / 'a.safetensors'}"
  assert run(*words) == 2  # nothing says whether it is to be cut
  assert "give --format=compact, or --format=safetensors --nocut" in capsys.readouterr().err
  assert run(*words, "--nocut") == 0
  params = {"params": soup["params"]}
  assert_same(nested(read_safetensors(words[2].removeprefix("--out="))), params)


def test_an_int8_file_is_not_overwritten(finished, tmp_path, capsys):
  out, mine = tmp_path / "soup.onnx", tmp_path / "soup_int8.onnx"
  mine.write_text("mine")
  assert run(finished[0], "--format=onnx", "--int8", f"--out={out}") == 2
  assert f"{mine}, where --int8 would write, exists already" in capsys.readouterr().err
  assert mine.read_text() == "mine" and not out.exists()


@pytest.mark.slow
def test_a_soup_of_checkpoints_scores_what_the_run_says(finished, tmp_path, capsys):
  workdir, found, _ = finished
  export.save_compact(tmp_path / "a.safetensors", {"params": found["params"]})
  words = [workdir / "soup" / "seed_3", tmp_path / "a.safetensors", "--greedy"]
  words += [f"--flagfile={workdir / 'flags.txt'}", f"--out={tmp_path / 'soup'}"]
  main_job.unparse("out", "masks", "sparsity", "weights")
  soup.main(flags.FLAGS(["soup", *map(str, words)]))
  assert_same(checkpoint.restore(tmp_path / "soup")["params"], found["params"])
  (entry,) = json.loads((workdir / "results.json").read_text())["seeds"]
  score = entry["phases"][-1]["soup"]["test_accuracy"]
  assert capsys.readouterr().out.count(f" {100 * score:.2f} ") == 3
  flags.FLAGS["greedy"].unparse()


def test_a_run_says_what_its_soup_takes(finished, tmp_path):
  workdir, _, _ = finished
  found = json.loads((workdir / "results.json").read_text())["inference"]
  assert found["device"] == jax.devices()[0].device_kind
  assert found["batch"] > 0 and found["image_shape"] == [8, 8, 1]
  sizes = {name: model["bytes"] for name, model in found["models"].items()}
  n, kept = 64 * 16 + 16 * 10, round(0.1 * (64 * 16 + 16 * 10))
  assert found["sparsity"] == pytest.approx(1 - kept / n)
  assert run(workdir, f"--out={tmp_path / 'a.safetensors'}") == 0
  assert sizes == {
    "dense": 4 * (n + 26),
    "soup": 4 * (n + 26),
    "soup, BCOO dense layers": 12 * kept + 4 * 26,
    "soup, compact file": (tmp_path / "a.safetensors").stat().st_size,
  }
  for name, model in found["models"].items():
    assert ("milliseconds" in model) == (name != "soup, compact file")
    if "milliseconds" in model:
      ms = model["milliseconds"]
      assert 0 < ms["min"] <= ms["median"] <= ms["max"]


class Convolution(nn.Module):
  """Nothing but one."""

  @nn.compact
  def __call__(self, images, train):
    return nn.Conv(2, (1, 1))(images)


def test_convolutions_stay_dense():
  params = {"Conv_0": {"kernel": np.ones((1, 1, 1, 2), "f4"), "bias": np.ones(2, "f4")}}
  masks = jax.tree.map(lambda x: x != 0, params)
  found = measure_inference(Convolution(), (4, 4, 1), {"params": params, "masks": masks})
  assert found["models"].keys() == {"dense", "soup", "soup, compact file"}
  assert found["models"]["soup"]["bytes"] == 16
  assert found["sparsity"] == 0


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
  """A run whose network shrinks, and the widths that its soup has left."""
  workdir = tmp_path_factory.mktemp("runs") / "cut"
  flags = ("--hidden=16,12", "--epochs=1", "--retrain_epochs=1", "--phases=1")
  flags += ("--ingredients=2", "--batch_size=64", "--goal_sparsity=0.6", "--baselines=")
  flags += ("--mesh=none", "--criterion=channels", "--shrink")
  assert main_job.run(*flags, f"--workdir={workdir}") == 0
  soup = checkpoint.restore(workdir / "soup" / "seed_0")
  widths = [int(soup["masks"][f"Dense_{i}"]["bias"].sum()) for i in (0, 1)]
  assert widths[0] < 16 and widths[1] < 12
  return workdir, soup["params"], widths


IMAGES = np.random.default_rng(0).standard_normal((5, 8, 8, 1), np.float32)


def logits_of(params):
  """Worked with NumPy, from the full shapes with zeros."""
  x = IMAGES.reshape(5, -1)
  for i in range(3):
    x = x @ np.asarray(params[f"Dense_{i}"]["kernel"]) + np.asarray(
      params[f"Dense_{i}"]["bias"]
    )
    x = np.maximum(x, 0) if i < 2 else x
  return x


@pytest.mark.slow
def test_a_run_that_shrank_is_exported_in_its_small_shapes(cut_run, tmp_path, capsys):
  workdir, params, widths = cut_run
  out = tmp_path / "cut.safetensors"
  assert run(workdir, "--format=safetensors", f"--out={out}") == 0
  assert "load_cut" in capsys.readouterr().out
  module = models.create("mlp", 10, hidden=(16, 12), dropout=0.0)
  network = library.load_cut(out, module.apply)
  shapes = [x.shape for x in jax.tree.leaves(network.params) if x.ndim == 2]
  assert shapes == [(64, widths[0]), tuple(widths), (widths[1], 10)]
  found = network.apply(network.params, IMAGES)
  np.testing.assert_allclose(found, logits_of(params), rtol=1e-4, atol=1e-5)
  whole = tmp_path / "whole.safetensors"
  assert run(workdir, "--format=safetensors", "--nocut", f"--out={whole}") == 0
  assert_same(nested(read_safetensors(whole)), {"params": params})


@pytest.mark.slow
def test_what_a_run_that_shrank_leaves_is_merged_and_started_from(cut_run, tmp_path):
  """Its saved soup and its cut export: one network, whose soup with itself is itself."""
  workdir, params, widths = cut_run
  cut, merged = tmp_path / "cut.safetensors", tmp_path / "merged.safetensors"
  assert run(workdir, "--format=safetensors", f"--out={cut}") == 0
  saved = workdir / "soup" / "seed_0"
  assert soup_runs.run(saved, saved, f"--out={merged}") == 0
  assert_same(nested(read_safetensors(merged))["params"], params)
  module = models.create("mlp", 10, hidden=(16, 12), dropout=0.0)
  for path in (saved, cut, merged):
    loaded = pretrained.load_model(path, module, (8, 8, 1))
    assert_same({"params": loaded["params"]}, {"params": params})
  flags = ("--hidden=16,12", "--retrain_epochs=1", "--phases=1")
  flags += ("--ingredients=2", "--batch_size=64", "--goal_sparsity=0.8", "--baselines=")
  flags += ("--mesh=none", "--criterion=channels", "--shrink", f"--init={cut}")
  assert main_job.run(*flags, f"--workdir={tmp_path / 'again'}") == 0
  (seed,) = main_job.results(tmp_path / "again")["seeds"]
  (before,) = main_job.results(workdir)["seeds"]
  assert seed["dense"]["test_accuracy"] == before["phases"][0]["soup"]["test_accuracy"]
  after = checkpoint.restore(tmp_path / "again" / "soup" / "seed_0")["masks"]
  for i in (0, 1):
    left = np.asarray(after[f"Dense_{i}"]["bias"])
    assert left.sum() <= widths[i]


@pytest.mark.slow
def test_a_run_from_before_the_newest_flags_is_cut(cut_run, tmp_path, capsys):
  workdir = tmp_path / "old"
  shutil.copytree(cut_run[0], workdir)
  file = storage.as_path(workdir / "run.json")
  old = storage.read_json(file)
  for name in NEWER:
    del old["flags"][name]
  storage.write_json(file, old)
  out = tmp_path / "cut.safetensors"
  assert run(workdir, "--format=safetensors", f"--out={out}") == 0
  assert "load_cut" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.slow
def test_a_run_that_shrank_comes_with_a_module_for_pytorch(cut_run, tmp_path, capsys):
  import torch

  workdir, params, widths = cut_run
  out = tmp_path / "soup.pt"
  assert run(workdir, "--format=torch", f"--out={out}") == 0
  assert f"soup.py loads it: load('{out}')" in capsys.readouterr().out
  names: dict = {}
  exec(compile((tmp_path / "soup.py").read_text(), "soup.py", "exec"), names)
  network = names["load"](out)
  assert network.fc1.weight.shape == (widths[0], 64)
  with torch.no_grad():
    found = network(torch.tensor(IMAGES.transpose(0, 3, 1, 2)))
  np.testing.assert_allclose(found, logits_of(params), rtol=1e-4, atol=1e-5)
  assert run(workdir, "--format=torch", f"--out={tmp_path / 'soup.pth'}") == 2
  assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_exported_as_a_program(cut_run, tmp_path, capsys):
  pytest.importorskip("flatbuffers")
  workdir, params, _ = cut_run
  out = tmp_path / "soup.stablehlo"
  assert run(workdir, "--format=stablehlo", f"--out={out}") == 0
  images = load_digits().images / 16
  (said,) = re.findall(r"divided by \[([0-9.]+)\]", capsys.readouterr().out)
  assert float(said) == pytest.approx(images.std(), rel=0.02)  # over the training split
  found = library.load_stablehlo(out)(IMAGES)
  np.testing.assert_allclose(found, logits_of(params), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_without_jax2onnx_says_what_to_install(cut_run, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
  assert run(cut_run[0], "--format=onnx") == 2
  error = capsys.readouterr().err
  assert "jax2onnx, which is not installed: run `pip install 'jaxsms[onnx]'`" in error
  assert "orbax-checkpoint below 0.11.37" in error and error.count("\n") == 1
  assert not (cut_run[0] / "onnx").exists()
