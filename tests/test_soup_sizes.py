"""Soups by part: sharded files, exact pruning, every merge, damage, and little memory."""

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import main_job
import numpy as np
import orbax.checkpoint as ocp
import pytest
from soup_runs import run

import jaxsms
from experiments import soup
from experiments.merging import output as soup_output
from experiments.merging.model_checks import have_same_arrays
from jaxsms import checkpoint, magnitude_masks, merges
from jaxsms.disk import merging, passes, tensors, writing
from jaxsms.disk.by_name import by_path
from jaxsms.disk.opening import open_tensors
from jaxsms.disk.other_writers import ToMemory
from jaxsms.disk.rules import RULES
from jaxsms.disk.safetensors import read_safetensors, save_safetensors, write_safetensors
from jaxsms.models import create

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Arrays of a test are read in several parts as well."""
  monkeypatch.setattr(passes, "BLOCK", 64)


def network(seed, dtype=np.float32, sparse=0.0, mask_seed=0):
  """Arrays under the names of a language model."""
  rng, mask_rng = np.random.default_rng(seed), np.random.default_rng(mask_seed)
  arrays = {
    "model.embed_tokens.weight": rng.standard_normal((20, 8)),
    "model.norm.weight": rng.standard_normal(8),
    "model.steps": np.array(3 + seed),
  }
  for i in range(3):
    kernel = rng.standard_normal((8, 24))
    kernel[mask_rng.random(kernel.shape) < sparse] = 0
    arrays[f"model.layers.{i}.mlp.up_proj.weight"] = kernel
  return {n: x.astype(dtype) if x.dtype.kind == "f" else x for n, x in arrays.items()}


WEIGHTS = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]


def write_shards(folder, arrays, files=2):
  """A folder in Hugging Face's layout."""
  folder.mkdir()
  names = sorted(arrays)
  weight_map = {}
  for i in range(files):
    file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
    shard = {name: arrays[name] for name in names[i::files]}
    write_safetensors(folder / file, shard, {"format": "pt"})
    weight_map |= dict.fromkeys(shard, file)
  document = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(document))
  (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32", "n": 1}))
  (folder / "tokenizer.json").write_text("{}")
  return folder


def read_all(path):
  """The arrays of a model, by name."""
  with contextlib.ExitStack() as stack:
    found = open_tensors(path, stack)
    return {n: found.read(n, 0, s.size).reshape(s.shape) for n, s in found.specs.items()}


def mean(models):
  return {
    name: np.mean([m[name].astype(np.float64) for m in models], axis=0)
    for name in models[0]
    if models[0][name].dtype.kind != "i"
  }


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
  for name, array in expected.items():
    np.testing.assert_allclose(
      np.asarray(found[name], np.float64), array, rtol=rtol, atol=atol, err_msg=name
    )


@pytest.fixture
def family(tmp_path):
  """Three dense models in Hugging Face's layout."""
  models = [network(seed) for seed in range(3)]
  return models, [write_shards(tmp_path / f"m{i}", m) for i, m in enumerate(models)]


def test_shards_in_and_out(family, tmp_path, capsys):
  models, paths = family
  out = tmp_path / "out"
  assert run(*paths, f"--out={out}", "--shard_size=1000") == 0
  found = read_all(out)
  assert_close(found, mean(models))
  assert found["model.steps"] == models[0]["model.steps"]
  index = json.loads((out / INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  assert len(files) > 1 and set(index["weight_map"]) == set(models[0])
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in models[0].values())
  for file in files:
    shard = read_safetensors(out / file)
    assert sum(x.nbytes for x in shard.values()) <= 1000 or len(shard) == 1
  assert (out / "tokenizer.json").read_text() == "{}"
  card = (out / "README.md").read_text()
  for path in paths:
    assert f"| `{path}` | 0.333333 |" in card
  assert "python -m experiments.soup" in card
  assert "Sparsity" in capsys.readouterr().out
  # The library of the format reads them, with the metadata that were there.
  safe_open = pytest.importorskip("safetensors").safe_open
  with safe_open(out / files[0], framework="np") as file:
    assert file.metadata() == {"format": "pt"}
  # By the index's own path, and into one file.
  assert run(paths[0] / INDEX, *paths[1:], f"--out={tmp_path / 'one.safetensors'}") == 0
  assert_close(read_safetensors(tmp_path / "one.safetensors"), mean(models))


def layers(seed, dtype=np.float32):
  """An MLP for digits under our names."""
  rng = np.random.default_rng(seed)
  return {
    f"params/Dense_{i}/{name}": rng.standard_normal(shape).astype(dtype)
    for i, (rows, columns) in enumerate([(64, 8), (8, 10)])
    for name, shape in (("kernel", (rows, columns)), ("bias", (columns,)))
  }


DIGITS = ("--dataset=digits", "--hidden=8", "--batch_size=64")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_with_data_the_layout_that_came_in_stays(tmp_path):
  models = [layers(i, jnp.bfloat16) for i in range(2)]
  paths = [write_shards(tmp_path / f"h{i}", m) for i, m in enumerate(models)]
  out, plain = tmp_path / "out", tmp_path / "plain"
  assert run(*paths, *DIGITS, "--shard_size=1KB", f"--out={out}") == 0
  assert run(*paths, "--shard_size=1KB", f"--out={plain}") == 0
  assert sorted(os.listdir(out)) == sorted(os.listdir(plain))
  assert (out / "config.json").read_text() == (paths[0] / "config.json").read_text()
  index = json.loads((out / INDEX).read_text())
  assert len(set(index["weight_map"].values())) > 1
  found = read_all(out)
  for name, array in models[0].items():
    total = array.astype(np.float32) + models[1][name].astype(np.float32)
    expected = (total / 2).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found[name], expected, strict=True)
  for path in paths:
    assert f"| `{path}` | 0.5 |" in (out / "README.md").read_text()
  safe_open = pytest.importorskip("safetensors").safe_open
  files = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "soup")]
  for file, model in zip(files[:2], models, strict=True):
    write_safetensors(file, model, {"origin": file.name})
  assert run(*files[:2], *DIGITS, f"--out={files[2]}") == 0
  with safe_open(files[2], framework="np") as file:
    assert file.metadata() == {"origin": "a.safetensors"}


def test_a_first_model_of_integers_does_not_say_what_the_soup_is():
  arrays = layers(0)
  ours = tensors.InMemory("ours", arrays)
  bias = "params/Dense_0/bias"
  for change, same in (
    ({}, True),
    ({bias: arrays[bias].astype(np.float16)}, True),
    ({bias: arrays[bias].astype(np.int32)}, False),
    ({bias: arrays[bias][None]}, False),
    ({"params/more": arrays[bias]}, False),
  ):
    assert have_same_arrays(tensors.InMemory("first", arrays | change), ours) == same


@pytest.mark.usefixtures("quick_compilation")
def test_with_data_what_describes_foreign_names_is_left_behind(tmp_path):
  """PyTorch's names become ours: no configuration, and no metadata, but a card."""
  models = [layers(i) for i in range(2)]
  order = {"kernel": "weight", "bias": "bias"}
  paths = []
  for i, model in enumerate(models):
    state = {}
    for name, array in model.items():
      kind = order[name.split("/")[-1]]
      state[f"fc{1 + ('Dense_1' in name)}.{kind}"] = array.T
    paths.append(write_shards(tmp_path / f"h{i}", state))
  assert run(*paths, *DIGITS, f"--out={tmp_path / 'own'}") == 0
  assert_close(by_path({"params": checkpoint.restore(tmp_path / "own")["params"]}),
               mean(models))  # fmt: skip
  out = tmp_path / "shards"
  assert run(*paths, *DIGITS, "--shard_size=1GB", f"--out={out}") == 0
  assert sorted(os.listdir(out)) == ["README.md", "model.safetensors"]
  assert_close(read_all(out), mean(models))


@pytest.mark.torch
def test_a_folder_of_pytorchs_files_becomes_one_of_safetensors(tmp_path):
  import torch

  models = [network(i) for i in range(2)]
  for i, model in enumerate(models):
    folder = tmp_path / f"m{i}"
    folder.mkdir()
    weight_map = {}
    for j, names in enumerate((sorted(model)[::2], sorted(model)[1::2])):
      file = f"pytorch_model-{j + 1:05d}-of-00002.bin"
      torch.save({name: torch.tensor(model[name]) for name in names}, folder / file)
      weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
  assert run(tmp_path / "m0", tmp_path / "m1", f"--out={tmp_path / 'out'}") == 0
  assert "model.safetensors" in os.listdir(tmp_path / "out")
  assert_close(read_all(tmp_path / "out"), mean(models))


def test_a_folder_of_one_file_needs_no_index(tmp_path):
  for i in range(2):
    (tmp_path / f"m{i}").mkdir()
    save_safetensors(tmp_path / f"m{i}" / "model.safetensors", network(i))
  assert run(tmp_path / "m0", tmp_path / "m1", f"--out={tmp_path / 'out'}") == 0
  assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "model.safetensors"]
  assert_close(read_all(tmp_path / "out"), mean([network(0), network(1)]))


def test_dtypes_kept_mixed_and_chosen(tmp_path):
  models = [network(0, jnp.bfloat16), network(1, np.float32), network(2, np.float16)]
  paths = [write_shards(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
  assert run(*paths, f"--out={tmp_path / 'a'}") == 0
  found = read_all(tmp_path / "a")
  assert {x.dtype for n, x in found.items() if n != "model.steps"} == {np.dtype("bfloat16")}
  expected = {n: x.astype(jnp.bfloat16).astype(float) for n, x in mean(models).items()}
  assert_close(found, expected, rtol=2**-7)
  assert (
    json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "float32"
  )
  assert run(*paths, f"--out={tmp_path / 'b'}", "--dtype=float16") == 0
  found = read_all(tmp_path / "b")
  assert found[WEIGHTS[0]].dtype == np.float16 and found["model.steps"].dtype.kind == "i"
  assert_close(found, mean(models), rtol=2e-3, atol=1e-3)
  assert (
    json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "float16"
  )


def test_values_too_large_for_a_dtype_are_refused(tmp_path, capsys):
  models = [{n: x * 1e5 for n, x in network(i).items()} for i in range(2)]
  paths = [write_shards(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
  assert run(*paths, f"--out={tmp_path / 'out'}", "--dtype=float16") == 2
  assert "is not finite in float16: choose a wider dtype" in capsys.readouterr().err
  assert sorted(os.listdir(tmp_path)) == ["m0", "m1"]


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "float16"])
def test_pruning_is_that_of_the_library(tmp_path, dtype, scope):
  # Multiples of 1/4: ties everywhere, in all dtypes.
  models = [
    {n: np.round(x * 4) / 4 if x.dtype.kind == "f" else x for n, x in network(i).items()}
    for i in range(2)
  ]
  paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
  for path, model in zip(paths, models, strict=True):
    save_safetensors(
      path, {n: jnp.asarray(x, dtype) if x.ndim else x for n, x in model.items()}
      if dtype != "float64" else model | {n: model[n].astype(float) for n in WEIGHTS}
    )  # fmt: skip
  for sparsity in (0.37, 0.9):
    out = tmp_path / f"{sparsity}.safetensors"
    flags = ["--masks=prune", f"--sparsity={sparsity}", f"--scope={scope}"]
    assert run(*paths, *flags, f"--out={out}") == 0
    found, average = read_safetensors(out), mean(models)
    average = {name: jnp.asarray(average[name], jnp.float32) for name in WEIGHTS}
    masks = magnitude_masks(average, sparsity, scope, prunable=lambda path, leaf: True)
    for name in WEIGHTS:
      expected = np.where(masks[name], average[name], 0)
      np.testing.assert_array_equal(np.asarray(found[name], np.float32), expected)


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.37, 0.9])
def test_what_is_found_on_the_way_is_numpys(sparsity):
  models = [
    {n: np.round(x * 4) / 4 if x.dtype.kind == "f" else x for n, x in network(i).items()}
    for i in range(3)
  ]  # ties everywhere
  models[1][WEIGHTS[0]][:3] = 0
  opened = [tensors.InMemory(f"{i}", model) for i, model in enumerate(models)]
  weights = np.array([0.5, 0.0, 0.5])  # exact in float32
  specs = opened[0].specs
  job = merging.Job(opened, passes.weighted(weights), specs, [0, 2])
  memory = ToMemory(specs)
  thresholds = None
  if sparsity is not None:
    thresholds = merging.find_thresholds(job, sparsity, "global")
  found = merging.merge(job, memory, thresholds)
  result = memory.arrays
  trained = [n for n in models[0] if n != "model.steps"]
  flat = [np.concatenate([m[n].ravel() for n in trained], dtype=float) for m in models]
  of_soup = np.concatenate([result[n].ravel() for n in trained], dtype=float)
  apart = [[np.linalg.norm(a - b) for b in flat] for a in flat]
  np.testing.assert_allclose(found.norms, [np.linalg.norm(a) for a in flat], rtol=1e-5)
  np.testing.assert_allclose(found.distances, apart, rtol=1e-4, atol=1e-2)
  to_soup = [np.linalg.norm(a - of_soup) for a in flat]
  np.testing.assert_allclose(found.to_result, to_soup, rtol=1e-5)
  zero = [np.concatenate([m[n].ravel() == 0 for n in WEIGHTS]) for m in models]
  assert found.zeros.tolist() == [z.sum() for z in zero]
  assert found.shared == (zero[0] & zero[2]).sum()
  assert [sum(d.values()) for d in found.differing] == [(z ^ zero[0]).sum() for z in zero]
  assert found.of_result == sum((result[n] == 0).sum() for n in WEIGHTS)
  if sparsity:
    assert found.of_result >= round(sparsity * found.weights)


def test_sparse_models_keep_their_mask_and_few_zeros_count_as_none(tmp_path, capsys):
  sparse = [network(i, sparse=0.5) for i in range(2)]
  paths = [write_shards(tmp_path / f"s{i}", m) for i, m in enumerate(sparse)]
  assert run(*paths, f"--out={tmp_path / 'sparse'}") == 0
  found = read_all(tmp_path / "sparse")
  for name in WEIGHTS:
    np.testing.assert_array_equal(found[name] == 0, sparse[0][name] == 0)
  dense = [network(i) for i in range(2)]
  dense[0][WEIGHTS[1]][0, :5] = 0
  dense[1][WEIGHTS[2]][3, 3] = 0
  capsys.readouterr()
  paths = [write_shards(tmp_path / f"d{i}", m) for i, m in enumerate(dense)]
  assert run(*paths, f"--out={tmp_path / 'dense'}") == 0
  assert_close(read_all(tmp_path / "dense"), mean(dense))
  shown = capsys.readouterr().out
  assert f"of 576 weights 5 of {paths[0]}, 1 of {paths[1]} are 0" in shown
  other = write_shards(tmp_path / "other", network(1, sparse=0.5, mask_seed=1))
  assert run(tmp_path / "s0", other, f"--out={tmp_path / 'no'}") == 2
  assert "do not share a mask" in capsys.readouterr().err
  assert not [n for n in os.listdir(tmp_path) if n.startswith("no")]
  assert run(tmp_path / "s0", other, "--masks=keep", f"--out={tmp_path / 'keep'}") == 0


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"weighted"}))
def test_every_merge_by_part_is_that_of_stacked_models(tmp_path, name):
  on_data = {"evaluate", "loss"}
  assert RULES.keys() == {
    name for name, entry in merges.MERGES.items() if not on_data & set(entry.needs)
  }
  m = 2 if merges.MERGES[name].two else 3
  models = [network(i, sparse=0.5) for i in range(m)]
  base, squares = network(7), [network(20 + i) for i in range(m)]
  squares = [{n: x**2 if x.dtype.kind == "f" else x for n, x in s.items()} for s in squares]
  for file, arrays in [
    ("base", base),
    *((f"m{i}", x) for i, x in enumerate(models)),
    *((f"q{i}", x) for i, x in enumerate(squares)),
  ]:
    save_safetensors(tmp_path / f"{file}.safetensors", arrays)
  paths = [tmp_path / f"m{i}.safetensors" for i in range(m)]
  needs = merges.MERGES[name].needs
  flags = [f"--merge={name}", "--scale=0.8", "--density=0.3", "--prior=0.05"]
  if "base" in needs:
    flags.append(f"--base={tmp_path / 'base.safetensors'}")
  if "squared_gradients" in needs:
    given = ",".join(str(tmp_path / f"q{i}.safetensors") for i in range(m))
    flags.append(f"--squared_gradients={given}")
  weights = np.array([0.2, 0.5, 0.3]) if m == 3 else np.array([0.3, 0.7])
  if name == "ties":
    weights = np.full(m, 1 / m)
  else:
    flags.append(f"--weights={','.join(map(str, weights))}")
  out = tmp_path / "out.safetensors"
  assert run(*paths, *flags, f"--out={out}") == 0
  stacked = {n: np.stack([model[n] for model in models]) for n in models[0]}
  means = merges.Means(
    weights=weights, base=base, prior=0.05, scale=0.8, density=0.3, t=weights[-1],
    squared_gradients={n: np.stack([s[n] for s in squares]) for n in squares[0]},
  )  # fmt: skip
  merge = merges.bind("weighted" if name == "uniform" else name, means)
  expected = merge(stacked)
  found = read_safetensors(out)
  assert_close(found, {n: np.asarray(x, float) for n, x in expected.items()}, rtol=1e-4)
  for weight in WEIGHTS:
    np.testing.assert_array_equal(found[weight] == 0, models[0][weight] == 0)


def orbax_models(tmp_path):
  """The same model in each kind of folder."""
  tree = {"params": {"a": {"kernel": np.arange(12.0, dtype=np.float32).reshape(4, 3)}}}
  tree["params"]["list"] = [{"kernel": np.ones((2, 2), np.float32)}]
  checkpoint.save(tmp_path / "own", tree)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "standard", tree)
  with ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True) as checkpointer:
    checkpointer.save(tmp_path / "zarr3", {**tree, "step": 3})
  with ocp.CheckpointManager(tmp_path / "manager") as manager:
    older = jax.tree.map(lambda x: x * 0 + 5, tree)
    manager.save(9, args=ocp.args.StandardSave(older))
    manager.save(10, args=ocp.args.StandardSave(tree))
  return tree


def test_every_folder_of_orbax_is_read(tmp_path):
  tree = orbax_models(tmp_path)
  for name in ("own", "standard", "zarr3", "manager", "manager/10", "manager/10/default"):
    found = read_all(tmp_path / name)
    expected = by_path(tree)
    assert found.keys() == expected.keys(), name
    for leaf, array in expected.items():
      np.testing.assert_array_equal(found[leaf], array, strict=True)
  assert run(tmp_path / "manager", tmp_path / "own", f"--out={tmp_path / 'out'}") == 0
  soup = checkpoint.restore(tmp_path / "out")
  np.testing.assert_allclose(soup["params"]["a"]["kernel"], tree["params"]["a"]["kernel"])


@pytest.mark.torch
def test_npz_and_pytorch_files_are_read_by_part(tmp_path):
  models = [network(i) for i in range(3)]
  np.savez(tmp_path / "a.npz", **models[0])
  np.savez_compressed(
    tmp_path / "b.npz", **{n: np.array(x, order="F") for n, x in models[1].items()}
  )
  paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
  import torch

  tensors = {n: torch.tensor(x) for n, x in models[2].items()}
  half = {n: x.bfloat16() if x.ndim else x for n, x in tensors.items()}
  torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "c.pt")
  torch.save(half, tmp_path / "half.pt")
  torch.save({"a": torch.ones(4, 3).t(), "b.weight": torch.ones(2, 2)}, tmp_path / "t.pt")
  torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
  for file in ("c.pt", "old.pt"):
    for name, array in read_all(tmp_path / file).items():
      np.testing.assert_array_equal(array, models[2][name], strict=True)
  assert read_all(tmp_path / "half.pt")[WEIGHTS[0]].dtype == jnp.bfloat16
  assert read_all(tmp_path / "t.pt")["a"].shape == (3, 4)
  out = tmp_path / "out.npz"
  assert run(*paths, tmp_path / "c.pt", f"--out={out}") == 0
  assert_close(dict(np.load(out)), mean(models))


@pytest.mark.torch
@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_written_for_pytorch_is_read_by_it(tmp_path, mapped):
  import torch

  models = [network(i) for i in range(2)]
  models = [m | {"empty": np.zeros((0, 3), np.float32)} for m in models]
  for i, model in enumerate(models):
    half = {n: torch.tensor(x) for n, x in model.items()}
    half[WEIGHTS[0]] = half[WEIGHTS[0]].bfloat16()
    torch.save(half, tmp_path / f"{i}.pt")
  out = tmp_path / "out.pth"
  assert run(tmp_path / "0.pt", tmp_path / "1.pt", f"--out={out}") == 0
  found = torch.load(out, weights_only=True, mmap=mapped)
  assert found[WEIGHTS[0]].dtype == torch.bfloat16
  assert found["model.steps"] == 3 and found["empty"].shape == (0, 3)
  assert found[WEIGHTS[1]].data_ptr() % 64 == 0
  arrays = {n: x.float().numpy() for n, x in found.items()}
  assert_close({n: x for n, x in arrays.items() if n != WEIGHTS[0]}, {
    n: x for n, x in mean(models).items() if n != WEIGHTS[0]
  })  # fmt: skip
  np.testing.assert_allclose(
    arrays[WEIGHTS[0]], mean(models)[WEIGHTS[0]], rtol=0.02, atol=0.02
  )


def damage(folder, kind):
  """Spoils a folder in Hugging Face's layout; words of the message."""
  index = json.loads((folder / INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  names = list(index["weight_map"])
  if kind == "shard missing":
    (folder / files[1]).unlink()
    return f"{files[1]}, which {INDEX} names, is missing"
  if kind == "name twice":
    text = (folder / INDEX).read_text().replace(f'"{names[1]}"', f'"{names[0]}"')
    (folder / INDEX).write_text(text)
    return f"'{names[0]}'"
  if kind == "outside":
    index["weight_map"][names[0]] = "../m1/" + files[0]
    words = "which is no file in its own folder"
  elif kind == "not there":
    index["weight_map"]["model.more"] = files[0]
    words = "says that 'model.more' is in"
  elif kind == "elsewhere":
    index["weight_map"][names[0]] = files[1 - files.index(index["weight_map"][names[0]])]
    words = "but it lies in"
  elif kind == "unnamed":
    del index["weight_map"][names[0]]
    words = f"does not name '{names[0]}'"
  elif kind == "no map":
    del index["weight_map"]
    words = "has no 'weight_map'"
  elif kind == "in two":
    save_safetensors(folder / files[1], read_safetensors(folder / files[0]))
    words = "lies in"
  elif kind == "lie":
    data = (folder / files[0]).read_bytes()
    (folder / files[0]).write_bytes(data[:-4])
    words = "bytes of data, but names"
  (folder / INDEX).write_text(json.dumps(index))
  return words


KINDS = ("shard missing", "name twice", "outside", "not there", "elsewhere", "unnamed",
         "no map", "in two", "lie")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_said_in_a_sentence(family, tmp_path, capsys, kind):
  _, paths = family
  words = damage(paths[0], kind)
  before = sorted(os.listdir(tmp_path))
  assert run(*paths, f"--out={tmp_path / 'out'}") == 2
  message = capsys.readouterr().err
  assert words in message and message.startswith("error: ")
  assert message.count("\n") == 1 and ". " not in message.replace("error: ", "")
  assert sorted(os.listdir(tmp_path)) == before


def test_what_would_lie_in_an_input_is_refused(family, tmp_path, capsys, monkeypatch):
  _, paths = family
  (tmp_path / "link").symlink_to(paths[1])
  save_safetensors(tmp_path / "a.safetensors", network(3))
  before = sorted(tmp_path.rglob("*"))
  for models, out in [
    (paths, f"{paths[0]}/model.safetensors"),
    (paths, f"{paths[2]}/deep/sub"),
    (paths, f"{tmp_path}/link/sub"),
    ([paths[0] / INDEX, *paths[1:]], f"{paths[0]}/sub"),
    ([paths[1], tmp_path / "link"], f"{paths[1]}/sub"),
    ([tmp_path / "link", paths[0]], f"{paths[1]}/sub"),
    ([*paths[:2], "--merge=ties", f"--base={paths[2]}"], f"{paths[2]}/sub"),
  ]:
    assert run(*models, f"--out={out}") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --out {out} lies in {tmp_path}")
    assert message.count("\n") == 1
  assert sorted(tmp_path.rglob("*")) == before
  monkeypatch.chdir(paths[0])
  assert run(".", *paths[1:], "--out=sub") == 2
  # Beside a file that is read, or beside a folder whose name begins alike, is no trouble.
  files = [tmp_path / "a.safetensors"] * 2
  assert run(*files, f"--out={tmp_path / 'soup.safetensors'}") == 0
  assert run(*paths, f"--out={tmp_path / 'm0_soup'}") == 0


def test_five_names_that_differ_are_told(family, tmp_path, capsys):
  """Five in all, of every kind that there is."""
  models, paths = family
  other = {f"{name}.other": x for name, x in models[1].items()}
  write_shards(tmp_path / "other", other | {WEIGHTS[0]: np.zeros((2, 2), np.float32)})
  assert run(paths[0], tmp_path / "other", f"--out={tmp_path / 'out'}") == 2
  message = capsys.readouterr().err
  assert f"; {WEIGHTS[0]} is (2, 2) and should be (8, 24))" in message
  # Of 6 arrays one is there with another shape, so that 5 are missing, and 6 left over.
  words = re.search(r"\(missing: (.*) and 3 more; left over: (.*) and 4 more; ", message)
  missing, left_over = (part.split(", ") for part in words.groups())
  assert len(set(missing)) == 2 and set(missing) < set(models[0])
  assert len(set(left_over)) == 2 and set(left_over) < set(other)


def test_an_index_that_is_none_and_an_out_in_a_file_are_said(family, tmp_path, capsys):
  _, paths = family
  (tmp_path / "file").write_text("mine")
  before = sorted(tmp_path.rglob("*"))
  assert run(*paths, f"--out={tmp_path / 'file' / 'deep' / 'out'}") == 2
  message = capsys.readouterr().err
  assert f"lies in {tmp_path / 'file'}, which is no folder: choose another" in message
  for text in ("[]", '"text"', '{"weight_map": ["a.safetensors"]}'):
    (paths[1] / INDEX).write_text(text)
    assert run(*paths, f"--out={tmp_path / 'out'}") == 2
    message = capsys.readouterr().err
    assert "it is no JSON object with a weight_map of files by tensor" in message
    assert message.count("\n") == 1
  assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_model_names_the_layouts_that_are_read(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes" / "notes.txt").write_text("")
  for name in ("empty", "notes"):
    assert run(tmp_path / name, tmp_path / name, f"--out={tmp_path / 'out'}") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path / name} cannot be read (it ")
    for layout in ("Hugging Face's layout", "jaxsms.checkpoint.save", "orbax"):
      assert layout in message


def test_a_full_disk_leaves_nothing_and_is_said(family, tmp_path, capsys, monkeypatch):
  _, paths = family
  before = sorted(os.listdir(tmp_path))

  def full(handle, data, at):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(writing.os, "pwrite", full)
  assert run(*paths, f"--out={tmp_path / 'out'}") == 1
  assert "--out cannot be written (No space left on device)" in capsys.readouterr().err
  assert sorted(os.listdir(tmp_path)) == before
  usage = type("Usage", (), {"free": 100})
  monkeypatch.setattr(soup_output.shutil, "disk_usage", lambda path: usage)
  assert run(*paths, f"--out={tmp_path / 'out'}") == 1
  assert "bytes, and" in capsys.readouterr().err


def test_what_does_not_reach_the_disk_is_said(family, tmp_path, capsys, monkeypatch):
  """Files are synced in a thread while others are written."""
  _, paths = family
  before = sorted(os.listdir(tmp_path))
  threads = set()

  def broken(handle):
    threads.add(threading.current_thread())
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(writing, "_SYNCED_AT_ONCE", 100)
  monkeypatch.setattr(writing.os, "fsync", broken)
  assert run(*paths, f"--out={tmp_path / 'out'}") == 1
  assert "--out cannot be written (Input/output error)" in capsys.readouterr().err
  assert sorted(os.listdir(tmp_path)) == before
  assert threads - {threading.main_thread()}


@pytest.fixture
def no_file_above(request):
  """The system refuses to let a file grow beyond that, as a full disk does."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("out", ["out", "out.safetensors", "out.npz", "out.pt", "folder"])
def test_what_the_system_does_not_take_is_said(
  family, tmp_path, capsys, no_file_above, out
):
  models, paths = family
  if out == "folder":  # of this library, as the first model's is no shard
    for i, model in enumerate(models):
      write_safetensors(tmp_path / f"{i}.safetensors", model)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
  before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
  no_file_above(700)
  assert run(*paths, f"--out={tmp_path / out}") == 1
  no_file_above(resource.RLIM_INFINITY)
  message = capsys.readouterr().err
  assert message == "error: --out cannot be written (File too large)\n"
  after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
  assert after == before  # nothing is left, and the inputs are as they were


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_of_weight_0_may_hold_anything(tmp_path, capsys, bad):
  models = [network(i, sparse=0.5) for i in range(3)]
  models[0][WEIGHTS[1]][0, 0] = bad
  models[0][WEIGHTS[2]][:] = 0
  models[0]["model.norm.weight"][1] = bad
  paths = [write_shards(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
  squares = [network(20 + i) for i in range(3)]
  squares = [{n: x**2 if x.dtype.kind == "f" else x for n, x in s.items()} for s in squares]
  others = [write_shards(tmp_path / f"q{i}", s) for i, s in enumerate(squares)]
  of_two = mean(models[1:])
  out = tmp_path / "mean"
  assert run(*paths, "--weights=0,0.5,0.5", f"--out={out}") == 0
  assert_close(read_all(out), of_two)
  shown = capsys.readouterr().out
  flat = [
    np.concatenate([m[n].ravel() for n in sorted(m) if m[n].ndim]) for m in models[1:]
  ]
  apart = f"{np.linalg.norm(flat[0] - flat[1]):.4g}"
  assert f"between two models: {apart} to {apart}, angle" in shown
  assert shown.count("not finite") == 1 and "nan" not in shown and "inf" not in shown
  # Its zeros do not say how sparse the soup is to be, nor does it vote on what is kept.
  out = tmp_path / "pruned"
  assert run(*paths, "--weights=0,0.5,0.5", "--masks=prune", f"--out={out}") == 0
  found = read_all(out)
  assert_close(found, of_two)
  shown = capsys.readouterr().out
  assert "nan" not in shown and "inf" not in shown
  zeros = max(sum(np.sum(m[n] == 0) for n in WEIGHTS) for m in models[1:])
  assert sum(np.sum(found[n] == 0) for n in WEIGHTS) == zeros
  for flags in (
    ["--merge=fisher", f"--squared_gradients={','.join(map(str, others))}"],
    ["--merge=task_arithmetic", f"--base={paths[1]}"],
  ):
    out = tmp_path / flags[0]
    assert run(*paths, *flags, "--weights=0,0,1", f"--out={out}") == 0
    expected = {n: x for n, x in models[2].items() if x.dtype.kind != "i"}
    assert_close(read_all(out), expected)
  out = tmp_path / "slerp"
  capsys.readouterr()
  assert run(*paths[:2], "--merge=slerp", "--weights=0,1", f"--out={out}") == 0
  assert_close(read_all(out), mean([models[1]]))
  assert "L2 distance" not in capsys.readouterr().out
  # One that counts is refused as before.
  assert run(*paths, "--weights=0.2,0.4,0.4", f"--out={tmp_path / 'no'}") == 2
  message = capsys.readouterr().err
  assert f"{paths[0]} has NaN or infinite values in " in message


def test_how_often_the_inputs_are_read(family, tmp_path, monkeypatch):
  models, paths = family
  counted = {}
  read = tensors.InFiles.read

  def counting(self, name, start, stop, into=None):
    counted[self.path] = counted.get(self.path, 0) + stop - start
    return read(self, name, start, stop, into)

  monkeypatch.setattr(tensors.InFiles, "read", counting)
  size = sum(x.size for x in models[0].values())
  steps = {f"{paths[i]}": int(i == 0) for i in range(3)}  # a counter: the first one's alone
  prune = ["--masks=prune", "--sparsity=0.9"]
  for number, (flags, most) in enumerate([([], 1), (prune, 3)]):
    counted.clear()
    out = tmp_path / f"out{number}"
    assert run(*paths, *flags, f"--out={out}") == 0
    for path in map(str, paths):
      once = size - 1 + steps[path]
      assert once <= counted[path] <= once + (most - 1) * size
    assert sum(n for path, n in counted.items() if path not in steps) == size  # the check


def test_all_that_is_read_is_reported(family, tmp_path, monkeypatch):
  """Also what is read to find the sparsest model; the weights are float32."""
  models, paths = family
  reported = {}

  @contextlib.contextmanager
  def progress(total):
    reported.update(total=total, bytes=0)

    def add(count):
      reported["bytes"] += count

    yield add

  monkeypatch.setattr(soup, "bytes_progress", progress)
  size = sum(x.nbytes for model in models for x in model.values())
  weights = 4 * sum(model[n].size for model in models for n in WEIGHTS)
  bytes_of = {}
  for name, flags, most in (
    ("all", [], 1),
    ("given", ["--masks=prune", "--sparsity=0.5"], 3),
    ("largest", ["--masks=prune"], 4),
  ):
    assert run(*paths, *flags, f"--out={tmp_path / name}") == 0
    assert reported["total"] == most * size
    bytes_of[name] = reported["bytes"]
  assert bytes_of["all"] == size
  assert bytes_of["given"] == size + 2 * weights  # two passes for the thresholds
  assert bytes_of["largest"] == size + 3 * weights


def test_the_card_and_what_lies_beside_the_weights(family, tmp_path, monkeypatch):
  _, paths = family
  for name in ("merges.txt", "README.md", "pytorch_model.bin", ".hidden", "tf_model.h5"):
    (paths[0] / name).write_text(f"{name} of the first")
  (paths[1] / "vocab.json").write_text("of another")
  (paths[0] / "config.json").write_text('{"n":   1}')
  out = tmp_path / "out"
  words = [*map(str, paths), "--weights=0.5,0.25,0.25", f"--out={out}"]
  monkeypatch.setattr(sys, "argv", ["soup.py", *words])
  assert run(*words) == 0
  left = {"README.md", "config.json", "merges.txt", "model.safetensors", "tokenizer.json"}
  assert set(os.listdir(out)) == left
  assert (out / "config.json").read_text() == '{"n":   1}'
  assert (out / "merges.txt").read_text() == "merges.txt of the first"
  card = (out / "README.md").read_text()
  assert f"    python -m experiments.soup {' '.join(words)}\n" in card
  for path, weight in zip(paths, ("0.5", "0.25", "0.25"), strict=True):
    assert f"| `{path}` | {weight} |" in card
  assert f"jaxsms {jaxsms.__version__}" in card and "of the first" not in card


@pytest.mark.parametrize("out", ["out", "out.safetensors", "out.npz"])
def test_what_was_written_otherwise_does_not_get_its_name(
  family, tmp_path, capsys, monkeypatch, out
):
  _, paths = family
  before = sorted(os.listdir(tmp_path))
  finish = writing.Digests.finish

  def spoil(self):
    finish(self)
    partial = next(tmp_path.glob("*.partial"))
    file = next(partial.glob("*.safetensors")) if partial.is_dir() else partial
    data = bytearray(file.read_bytes())
    data[-200 if out.endswith("npz") else -3] ^= 1
    file.write_bytes(data)

  monkeypatch.setattr(writing.Digests, "finish", spoil)
  if out.endswith("npz"):  # its own checksums are wrong now
    assert run(*paths, f"--out={tmp_path / out}") != 0
  else:
    assert run(*paths, f"--out={tmp_path / out}") == 1
    assert "is not what was written" in capsys.readouterr().err
  assert sorted(os.listdir(tmp_path)) == before


def test_an_interrupted_merge_leaves_nothing_that_looks_whole(
  family, tmp_path, monkeypatch
):
  _, paths = family
  seen = []
  write = writing.ToSafetensors.write

  def interrupted(self, block, values):
    write(self, block, values)
    if block.name == WEIGHTS[1]:
      (partial,) = tmp_path.glob("*.partial")
      for file in partial.glob("*.safetensors"):
        with pytest.raises(ValueError):
          read_safetensors(file)  # as a kill would leave it
        seen.append(file)
      raise KeyboardInterrupt

  monkeypatch.setattr(writing.ToSafetensors, "write", interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(*paths, f"--out={tmp_path / 'out'}")
  assert seen and not list(tmp_path.glob("out*"))


def assert_same_soup(own, found):
  for name in ("params", "masks"):
    expected, got = by_path(own[name]), by_path(found[name])
    assert got.keys() == expected.keys()
    for leaf, array in expected.items():
      np.testing.assert_allclose(got[leaf], array, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_the_soup_of_a_run_is_that_of_its_copies_by_the_job(tmp_path):
  workdir = tmp_path / "run"
  flags = [*main_job.SMALL, "--ingredients=5", "--save_candidates"]
  assert main_job.run(*flags, f"--workdir={workdir}") == 0
  own = checkpoint.restore(workdir / "soup" / "seed_0")
  kept = [workdir / "candidates" / "seed_0" / str(i) for i in range(5)]
  assert sorted(kept[0].parent.iterdir()) == kept
  assert run(*kept, f"--out={tmp_path / 'soup'}") == 0
  assert_same_soup(own, checkpoint.restore(tmp_path / "soup"))
  # In every layout that there is, and measured on the run's data.
  trees = [{"params": checkpoint.restore(path)["params"]} for path in kept]
  paths = [tmp_path / name for name in ("a.safetensors", "b.npz", "c", "d", "e")]
  save_safetensors(paths[0], trees[0])
  np.savez(paths[1], **by_path(trees[1]))
  checkpoint.save(paths[2], trees[2])
  write_shards(paths[3], by_path(trees[3]))
  with ocp.CheckpointManager(paths[4]) as manager:
    manager.save(1, args=ocp.args.StandardSave(trees[4]))
  assert run(*paths, f"--out={tmp_path / 'mixed'}") == 0
  assert_same_soup(own, checkpoint.restore(tmp_path / "mixed"))
  flags = f"--flagfile={workdir / 'flags.txt'}"
  out = tmp_path / "with.safetensors"
  assert run(*paths, flags, f"--out={out}") == 0
  for name, array in by_path({"params": own["params"]}).items():
    np.testing.assert_allclose(read_safetensors(out)[name], array, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "learned_by_layer", "fisher", "slerp"])
def test_merges_on_data_and_the_barrier_before(tmp_path, capsys, name):
  """Copies with their hidden units permuted compute the same and share no basin."""
  module = create("mlp", 10, hidden=(8,))
  params = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  params = jax.tree.map(np.asarray, params)
  order = np.arange(8)[::-1]
  other = {
    "Dense_0": {k: v[..., order] for k, v in params["Dense_0"].items()},
    "Dense_1": params["Dense_1"] | {"kernel": params["Dense_1"]["kernel"][order]},
  }
  for file, tree in (("a", params), ("b", other)):
    save_safetensors(tmp_path / f"{file}.safetensors", {"params": tree})
  paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
  flags = ["--dataset=digits", "--hidden=8", "--batch_size=64", f"--merge={name}"]
  assert run(*paths, *flags, f"--out={tmp_path / 'out.safetensors'}") == 0
  shown = capsys.readouterr().out
  assert shown.startswith("Largest barrier of the validation loss, from ")
  found = read_safetensors(tmp_path / "out.safetensors")
  assert all(np.isfinite(x).all() for x in found.values())
  if name == "slerp":
    stacked = jax.tree.map(lambda *x: np.stack(x), params, other)
    assert_close(found, by_path({"params": merges.slerp(stacked)}))
  if name == "learned":  # the same weight for all of a model
    kernel, bias = found["params/Dense_0/kernel"], found["params/Dense_1/kernel"]
    a, b = params["Dense_0"]["kernel"], other["Dense_0"]["kernel"]
    weight = np.vdot(kernel - b, a - b) / np.vdot(a - b, a - b)
    expected = weight * params["Dense_1"]["kernel"]
    expected = expected + (1 - weight) * other["Dense_1"]["kernel"]
    np.testing.assert_allclose(bias, expected, rtol=1e-3, atol=1e-4)


PROGRAM = """
import resource, sys
sys.argv = ["soup", *sys.argv[1:]]
from absl import app, flags
from experiments import soup
import jaxsms.disk.opening, jaxsms.disk.zips
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = resource.RLIMIT_DATA
resource.setrlimit(size, (BYTES, BYTES))
flags.FLAGS(sys.argv)
soup.main(flags.FLAGS(sys.argv))
print("GREW", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_models_larger_than_the_memory_that_there_is(tmp_path):
  rng = np.random.default_rng(0)
  names = [f"layers.{i}.weight" for i in range(4)]
  for i in range(3):
    arrays = {name: rng.standard_normal((4096, 4096), np.float32) for name in names}
    write_shards(tmp_path / f"m{i}", arrays)  # 268 MB
    del arrays
  paths = [str(tmp_path / f"m{i}") for i in range(3)]
  for flags in ([], ["--masks=prune", "--sparsity=0.9"]):
    out = tmp_path / f"out{len(flags)}"
    limit = 700 * 2**20  # of data; what is imported takes most of it, in threads' stacks
    program = PROGRAM.replace("BYTES", str(limit))
    done = subprocess.run(
      [sys.executable, "-c", program, *paths, *flags, f"--out={out}"],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grew = int(done.stdout.split("GREW")[1])
    assert grew < 150 * 1024, "kilobytes: less than one model"
