"""Exports of a run's soup, and what it says of sizes and times."""

import json
import os

import flax.linen as nn
import jax
import main_job
import numpy as np
import pytest

from experiments import export, soup
from experiments.run.latency import measure_inference
from jaxsms import checkpoint, models, pretrained
from jaxsms.disk.by_name import by_path
from jaxsms.disk.safetensors import load_safetensors, read_with_metadata
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
  main_job.unparse("out", "format")
  return main_job.exit_status(export.main, export.FLAGS(["export", *map(str, words)]))


def assert_same(a, b):
  a, b = by_path(a), by_path(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], strict=True)


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
  assert_same(load_safetensors(out, params), params)
  kept = round(0.1 * n)
  assert sum(np.count_nonzero(x) for x in jax.tree.leaves(params) if x.ndim == 2) == kept


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_torch_gives_pytorchs_network_the_same_logits(finished, tmp_path, ending):
  torch = pytest.importorskip("torch")
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
    (["run", "--out=a.pth"], "--out is a.pth: it must end in .safetensors"),
    (["run", "--out=a.npz", "--format=torch"], "must end in .pth or .pt or .safetensors"),
    (["run", "--out=a.pth", "--format=torhc"], "did you mean torch?"),
    (["run", "--out=a.safetensors", "--seed=9"], "run has soups of 3"),
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


def test_a_soup_of_checkpoints_scores_what_the_run_says(finished, tmp_path, capsys):
  workdir, found, _ = finished
  export.save_compact(tmp_path / "a.safetensors", {"params": found["params"]})
  words = [workdir / "soup" / "seed_3", tmp_path / "a.safetensors", "--greedy"]
  words += [f"--flagfile={workdir / 'flags.txt'}", f"--out={tmp_path / 'soup'}"]
  main_job.unparse("out", "masks", "sparsity", "weights")
  soup.main(soup.FLAGS(["soup", *map(str, words)]))
  assert_same(checkpoint.restore(tmp_path / "soup")["params"], found["params"])
  (entry,) = json.loads((workdir / "results.json").read_text())["seeds"]
  score = entry["phases"][-1]["soup"]["test_accuracy"]
  assert capsys.readouterr().out.count(f" {100 * score:.2f} ") == 3
  soup.FLAGS["greedy"].unparse()


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
