"""Soups of checkpoints on disk: against NumPy's means, and what is refused."""

import os
import re
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import store
from soup_runs import run

from experiments import soup
from jaxsms import checkpoint, compact, data, models, pretrained
from jaxsms.disk.by_name import by_path
from jaxsms.disk.safetensors import read_safetensors, save_safetensors
from jaxsms.export import save_compact, save_cut

pytestmark = pytest.mark.usefixtures("quick_compilation")
DIGITS = ("--dataset=digits", "--hidden=8", "--batch_size=64")
KERNELS = ("params/Dense_0/kernel", "params/Dense_1/kernel")


def make(seed, mask_seed=0, kept=0.3):
  """An MLP for digits, of random numbers, sparse by a mask of its own seed."""
  rng, mask_rng = np.random.default_rng(seed), np.random.default_rng(mask_seed)
  params = {}
  for i, shape in enumerate([(64, 8), (8, 10)]):
    kernel = rng.standard_normal(shape, np.float32)
    kernel[mask_rng.random(shape) > kept] = 0
    bias = rng.standard_normal(shape[1], np.float32)
    params[f"Dense_{i}"] = {"bias": bias, "kernel": kernel}
  return {"params": params}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Models of one mask in every format, and one of another mask, `other.npz`."""
  folder = tmp_path_factory.mktemp("models")
  one, two, three, four = (make(seed) for seed in range(4))
  masks = jax.tree.map(lambda x: x != 0, one["params"])
  checkpoint.save(folder / "one", {**one, "masks": masks})
  save_safetensors(folder / "two.safetensors", two)
  save_compact(folder / "three.safetensors", three)
  np.savez(folder / "four.npz", **by_path(four))
  np.savez(folder / "other.npz", **by_path(make(5, mask_seed=1, kept=0.5)))
  return folder


def mean(*trees, weights=None):
  """By NumPy alone, in float64."""
  columns = zip(*(by_path(tree).items() for tree in trees), strict=True)
  return {
    column[0][0]: np.average(
      [x.astype(np.float64) for _, x in column], axis=0, weights=weights
    )
    for column in columns
  }


def assert_close(found, expected):
  assert found.keys() == expected.keys()
  for name, array in found.items():
    np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_uniform_soup_of_every_format_is_numpys_mean(folder, tmp_path, capsys):
  paths = [folder / n for n in ("one", "two.safetensors", "three.safetensors", "four.npz")]
  expected = mean(*(make(seed) for seed in range(4)))
  for out in ("soup", "soup.safetensors", "deep/soup.npz"):
    assert run(*paths, f"--out={tmp_path / out}") == 0
  tree = checkpoint.restore(tmp_path / "soup")
  found = by_path({"params": tree["params"]})
  assert_close(found, expected)
  assert_close(read_safetensors(tmp_path / "soup.safetensors"), expected)
  assert_close(dict(np.load(tmp_path / "deep" / "soup.npz")), expected)
  for name in KERNELS:
    zeros = by_path(make(0))[name] == 0
    np.testing.assert_array_equal(found[name] == 0, zeros)
    np.testing.assert_array_equal(by_path({"params": tree["masks"]})[name], ~zeros)
  shown = capsys.readouterr().out
  share = np.mean(np.concatenate([by_path(make(0))[n].ravel() == 0 for n in KERNELS]))
  assert shown.count(f"{share:.2%}") == 3 * 5
  flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(make(s))]) for s in range(4)]
  apart = [np.linalg.norm(a - b) for i, a in enumerate(flat) for b in flat[:i]]
  assert f"models: {min(apart):.4g} to {max(apart):.4g}," in shown
  to_soup = np.linalg.norm(flat[0] - np.mean(flat, axis=0))
  assert f"{to_soup:.4g}" in shown
  assert "Batch statistics" not in shown
  assert shown.count("No barrier was measured: ") == 3  # runs


def test_cut_networks_are_merged_in_their_full_shapes(tmp_path, capsys):
  module = models.create("mlp", 10, hidden=(8,), dropout=0.0)

  def cut(name, seed, kept):
    variables = make(seed, kept=1)["params"]
    hidden = np.isin(np.arange(8), kept)
    variables["Dense_0"]["kernel"] *= hidden
    variables["Dense_0"]["bias"] *= hidden
    variables["Dense_1"]["kernel"] *= hidden[:, None]
    masks = jax.tree.map(lambda x: x != 0, variables)
    masks["Dense_1"]["bias"][:] = True
    tree = {"params": variables}
    network = compact(module.apply, tree, {"params": masks}, jnp.ones((1, 8, 8, 1)))
    assert network.params["params"]["Dense_0"]["kernel"].shape == (64, len(kept))
    save_cut(tmp_path / name, network)
    return tree

  trees = [cut(f"{i}.safetensors", i, [1, 2, 6]) for i in range(2)]
  cut("other.safetensors", 2, [1, 2, 5])
  save_safetensors(tmp_path / "whole.safetensors", trees[1])
  for second in ("1.safetensors", "whole.safetensors"):
    for flags in ((), DIGITS):
      paths, out = (tmp_path / "0.safetensors", tmp_path / second), tmp_path / "soup.npz"
      assert run(*paths, *flags, f"--out={out}") == 0
      assert_close(dict(np.load(out)), mean(*trees))
      out.unlink()
  paths = (tmp_path / "0.safetensors", tmp_path / "other.safetensors")
  assert run(*paths, f"--out={tmp_path / 'no'}") == 2
  assert "do not share a mask" in capsys.readouterr().err


def test_soups_in_an_object_store_and_in_the_home_folder(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  address, home = store.bucket("soups", tmp_path / "bucket"), tmp_path / "home"
  shutil.copytree(folder / "one", tmp_path / "bucket" / "one")
  paths = [f"{address}/one", folder / "four.npz"]
  for name in ("a", "a.safetensors", "deep/a.npz"):
    assert run(*paths, f"--out={address}/{name}") == 0
    assert run(*paths, f"--out=~/{name}") == 0
    assert run(*paths, f"--out=~/{name}") == 2  # it exists
    for found in (tmp_path / "bucket" / name, home / name, f"{address}/{name}"):
      assert_close(pretrained.load_arrays(found), mean(make(0), make(3)))
  assert os.listdir(".") == []
  assert run(f"{address}/none", *paths, f"--out={address}/b") == 2


def test_weights(folder, tmp_path):
  out = tmp_path / "a.npz"
  two = folder / "two.safetensors"
  assert run(folder / "one", two, f"--out={out}", "--weights=0.75,0.25") == 0
  assert_close(dict(np.load(out)), mean(make(0), make(1), weights=[0.75, 0.25]))
  # One of weight 0 may have any mask.
  out, other = tmp_path / "b.npz", folder / "other.npz"
  assert run(folder / "one", other, f"--out={out}", "--weights=1,0") == 0
  assert_close(dict(np.load(out)), mean(make(0)))


def test_masks_that_differ_are_refused_pruned_or_kept(folder, tmp_path, capsys):
  paths, other = [folder / "one", folder / "other.npz"], make(5, mask_seed=1, kept=0.5)
  weights = [by_path(make(0))[n] for n in KERNELS]
  others = [by_path(other)[n] for n in KERNELS]
  differing = sum(
    np.sum((a == 0) != (b == 0)) for a, b in zip(weights, others, strict=True)
  )
  assert run(*paths, f"--out={tmp_path / 'a.npz'}") == 2
  message = capsys.readouterr().err
  assert f"do not share a mask ({differing} of 592 weights" in message
  assert message.count(". ") == 0 and not os.listdir(tmp_path)
  assert run(*paths, "--masks=keep", f"--out={tmp_path / 'keep.npz'}") == 0
  average = mean(make(0), other)
  assert_close(dict(np.load(tmp_path / "keep.npz")), average)
  n, zeros = 592, sum(np.sum(x == 0) for x in weights)
  for flags, removed in (([], zeros), (["--sparsity=0.9"], round(0.9 * n))):
    out = tmp_path / f"prune{removed}.npz"
    assert run(*paths, "--masks=prune", *flags, f"--out={out}") == 0
    found = dict(np.load(out))
    size = np.concatenate([np.abs(average[name]).ravel() for name in KERNELS])
    threshold = np.sort(size)[removed]
    for name in KERNELS:
      kept = np.where(np.abs(average[name]) >= threshold, average[name], 0)
      np.testing.assert_allclose(found[name], kept, rtol=1e-5, atol=1e-6)
    assert sum(np.sum(found[name] == 0) for name in KERNELS) == removed


@pytest.fixture(scope="module")
def pictures():
  """Digits as the network sees them: validation and test images, and their labels."""
  digits = data.load("digits")
  _, validation = data.train_validation_split(len(digits.train_labels))

  def seen(images):
    images = (images / 255 - np.array(digits.mean)) / np.array(digits.std)
    return images.reshape(len(images), -1)

  return (
    (seen(digits.train_images[validation]), digits.train_labels[validation]),
    (seen(digits.test_images), digits.test_labels),
  )


def accuracy(arrays, split):
  """Of an MLP of two layers, by NumPy alone."""
  images, labels = split
  layers = [[arrays[f"params/Dense_{i}/{n}"] for n in ("kernel", "bias")] for i in (0, 1)]
  hidden = np.maximum(images @ layers[0][0] + layers[0][1], 0)
  logits = hidden @ layers[1][0] + layers[1][1]
  return np.mean(np.argmax(logits, axis=1) == labels)


def greedy(models, evaluate):
  """Wortsman et al.'s recipe, by NumPy alone."""
  order = sorted(range(len(models)), key=lambda i: -evaluate(mean(models[i])))
  taken, best = order[:1], evaluate(mean(models[order[0]]))
  for i in order[1:]:
    score = evaluate(mean(*(models[j] for j in [*taken, i])))
    if score >= best:
      taken, best = [*taken, i], score
  return taken


def test_greedy_soup_is_that_of_numpy(folder, tmp_path, capsys, pictures):
  validation, test = pictures
  trees = [make(seed) for seed in range(3)]
  module = models.create("mlp", 10, hidden=(8,))
  state = pretrained.to_torch({**trees[0], "batch_stats": {}}, module, (8, 8, 1))
  np.savez(tmp_path / "one.npz", **state)  # in PyTorch's names
  paths = [tmp_path / "one.npz", folder / "two.safetensors", folder / "three.safetensors"]
  out = tmp_path / "soup.safetensors"
  assert run(*paths, "--greedy", *DIGITS, f"--out={out}") == 0
  shown = capsys.readouterr().out
  assert "No barrier" not in shown
  taken = greedy(trees, lambda arrays: accuracy(arrays, validation))
  assert 0 < len(taken) < 3  # so that it can go wrong
  expected = mean(*(trees[i] for i in taken))
  assert_close(read_safetensors(out), expected)
  for arrays in (*map(mean, trees), expected):
    for split in (validation, test):
      assert f"{100 * accuracy(arrays, split):.2f} " in shown


def fitted(split, hidden=8):
  """An MLP of random features with a readout by least squares, and the same permuted."""
  images, labels = split
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((64, hidden)).astype(np.float32) / 8
  features = np.maximum(images @ kernel, 0)
  features = np.concatenate([features, np.ones((len(images), 1))], 1)
  solution = np.linalg.lstsq(features, 4 * np.eye(10)[labels], rcond=None)[0]
  out, bias = np.float32(solution[:-1]), np.float32(solution[-1])
  order = np.roll(np.arange(hidden), hidden // 2)
  return [
    {
      "params/Dense_0/kernel": kernel[:, chosen],
      "params/Dense_0/bias": np.zeros(hidden, np.float32),
      "params/Dense_1/kernel": out[chosen],
      "params/Dense_1/bias": bias,
    }
    for chosen in (np.arange(hidden), order)
  ]


def loss(arrays, split):
  """The mean cross-entropy of an MLP of two layers, by NumPy alone."""
  images, labels = split
  layers = [[arrays[f"params/Dense_{i}/{n}"] for n in ("kernel", "bias")] for i in (0, 1)]
  logits = np.maximum(images @ layers[0][0] + layers[0][1], 0) @ layers[1][0] + layers[1][1]
  most = logits.max(axis=1)
  sums = most + np.log(np.exp(logits - most[:, None]).sum(axis=1))
  return np.mean(sums - logits[np.arange(len(labels)), labels])


def test_copies_without_a_common_basin_are_told_before_they_are_merged(
  tmp_path, capsys, pictures, monkeypatch
):
  """Permuted hidden units: the same function, elsewhere; their mean is another one."""
  validation, _ = pictures
  one, two = models_ = fitted(validation)
  for name, arrays in zip("ab", models_, strict=True):
    save_safetensors(tmp_path / f"{name}.safetensors", arrays)
  paths = [tmp_path / f"{name}.safetensors" for name in "ab"]

  def stop(*arguments):
    raise ValueError("nothing is merged yet")

  monkeypatch.setattr(soup, "soup_in_memory", stop)
  out = tmp_path / "out.safetensors"
  assert run(*paths, *DIGITS, f"--out={out}") == 2 and not out.exists()
  between = [
    {name: (1 - t) * one[name] + t * two[name] for name in one} for t in (0.25, 0.5, 0.75)
  ]
  ends = loss(one, validation)
  assert ends == pytest.approx(loss(two, validation), rel=1e-4)
  barrier = max(loss(point, validation) for point in between) - ends
  lost = accuracy(one, validation) - min(accuracy(point, validation) for point in between)
  assert barrier > 0.1 and lost > 0.1
  said = re.match(
    r"Largest barrier of the validation loss, from (.*) to (.*): ([\d.]+)\. Between them "
    r"the validation accuracy falls by ([\d.]+) points: they do not share a basin",
    capsys.readouterr().out,
  )
  assert said and list(said.groups()[:2]) == list(map(str, paths))
  assert float(said[3]) == pytest.approx(barrier, rel=1e-3)
  assert float(said[4]) == pytest.approx(100 * lost, abs=0.01)


def test_the_barrier_is_measured_between_all_pairs_of_a_few_models(
  tmp_path, capsys, pictures, monkeypatch
):
  """The first lies between the two others, which are further apart than from it."""
  validation, _ = pictures
  one, two = fitted(validation)
  middle = {name: (one[name] + two[name]) / 2 for name in one}
  models_ = [middle, one, two]
  for i, arrays in enumerate(models_):
    save_safetensors(tmp_path / f"{i}.safetensors", arrays)
  paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
  positions = np.linspace(0, 1, 5)
  barriers = {}
  for i, j in ((0, 1), (0, 2), (1, 2)):
    a, b = models_[i], models_[j]
    losses = [
      loss({n: (1 - t) * a[n] + t * b[n] for n in a}, validation) for t in positions
    ]
    straight = np.linspace(losses[0], losses[-1], 5)
    barriers[i, j] = max(np.array(losses) - straight)
  of_first, largest = max((0, 1), (0, 2), key=barriers.get), barriers[1, 2]
  assert largest > barriers[of_first] + 0.1  # so that it can go wrong

  def stop(*arguments):
    raise ValueError("nothing is merged yet")

  monkeypatch.setattr(soup, "soup_in_memory", stop)
  out = f"--out={tmp_path / 'out.safetensors'}"
  assert run(*paths, *DIGITS, out) == 2
  said = capsys.readouterr().out
  assert f"from {paths[1]} to {paths[2]}: " in said
  assert float(re.search(r": ([\d.]+)\. ", said)[1]) == pytest.approx(largest, rel=1e-3)
  assert said.endswith(" All 3 pairs were measured.\n")
  assert run(*paths, *[paths[0]] * 3, *DIGITS, out) == 2
  said = capsys.readouterr().out
  assert f"from {paths[0]} to {paths[of_first[1]]}: " in said
  assert said.endswith(" Only pairs with the first model were measured.\n")


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
  """Two small networks with batch statistics, and images for them."""
  folder = tmp_path_factory.mktemp("residual")
  rng = np.random.default_rng(0)
  arrays = {
    "train_images": rng.integers(0, 256, (100, 4, 4, 1), np.uint8),
    "train_labels": np.arange(100) % 2,
    "test_images": rng.integers(0, 256, (10, 4, 4, 1), np.uint8),
    "test_labels": np.arange(10) % 2,
  }
  np.savez(folder / "images.npz", **arrays)
  module = models.create("resnet8", 2, width=2)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4, 4, 1)))
  trees = [
    jax.tree.map(lambda x: np.abs(rng.standard_normal(x.shape, np.float32)), shapes)
    for _ in range(2)
  ]
  for i, tree in enumerate(trees):
    checkpoint.save(folder / str(i), tree)
  return folder, trees, arrays["train_images"]


def test_batch_statistics_are_averaged_without_data(residual, tmp_path, capsys):
  folder, trees, _ = residual
  assert run(folder / "0", folder / "1", f"--out={tmp_path / 'soup.npz'}") == 0
  assert_close(dict(np.load(tmp_path / "soup.npz")), mean(*trees))
  shown = capsys.readouterr().out
  assert "Batch statistics were averaged: estimate them anew" in shown
  flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(t["params"])]) for t in trees]
  assert f"models: {np.linalg.norm(flat[0] - flat[1]):.4g} to" in shown


@pytest.mark.slow
def test_batch_statistics_are_estimated_anew(residual, tmp_path, capsys, quick_compilation):
  folder, trees, images = residual
  flags = [f"--dataset={folder / 'images.npz'}", "--model=resnet8", "--width=2"]
  flags += ["--batch_size=9", "--cpu_devices=8", "--mesh=none", f"--out={tmp_path / 's'}"]
  assert run(folder / "0", folder / "1", *flags) == 0
  assert "were estimated anew" in capsys.readouterr().out
  found = checkpoint.restore(tmp_path / "s")
  params, average = by_path({"params": found["params"]}), mean(*trees)
  assert_close(params, {name: average[name] for name in params})
  # The first layer's: the mean over 2 batches of 9, a fifth of all, by hand.
  train, _ = data.train_validation_split(100)
  seen = images[train][:18].astype(np.float64) / 255
  mean_, std = np.mean(images / 255), np.std(images / 255)
  seen = np.pad((seen[..., 0] - mean_) / std, ((0, 0), (1, 1), (1, 1)))
  kernel = average["params/Conv_0/kernel"][:, :, 0]
  windows = np.lib.stride_tricks.sliding_window_view(seen, (3, 3), axis=(1, 2))
  outputs = np.einsum("nhwij,ijc->nhwc", windows, kernel).reshape(2, -1, 2)
  statistics = found["batch_stats"]["BatchNorm_0"]
  np.testing.assert_allclose(
    statistics["mean"], outputs.mean(1).mean(0), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(statistics["var"], outputs.var(1).mean(0), rtol=1e-4)


def test_pytorchs_names_other_dtypes_and_counters_stay(tmp_path):
  rng = np.random.default_rng(0)
  states = [
    {
      "fc.weight": rng.standard_normal((2, 3)) * np.array([0, 1, 1]),
      "fc.half": rng.standard_normal(3).astype(jnp.bfloat16),
      "bn.running_mean": rng.standard_normal(3, np.float32),
      "bn.num_batches_tracked": np.array(2**40 + i),
    }
    for i in range(2)
  ]
  for i, state in enumerate(states):
    save_safetensors(tmp_path / f"{i}.safetensors", state)
  paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
  assert run(*paths, f"--out={tmp_path / 'soup.safetensors'}") == 0
  found = read_safetensors(tmp_path / "soup.safetensors")
  assert {n: x.dtype for n, x in found.items()} == {
    n: x.dtype for n, x in states[0].items()
  }
  expected = (states[0]["fc.weight"] + states[1]["fc.weight"]) / 2
  np.testing.assert_allclose(found["fc.weight"], expected, rtol=1e-15)
  assert found["bn.num_batches_tracked"] == 2**40
  assert run(*paths, f"--out={tmp_path / 'soup.npz'}") == 2  # it has no bfloat16
  assert not os.path.exists(tmp_path / "soup.npz")


@pytest.mark.parametrize(
  ("command", "words"),
  [
    ("one --out=new.npz", "1 checkpoints are given"),
    ("one missing --out=new.npz", "there is no missing"),
    ("one two.safetensors", "--out is missing"),
    ("one two.safetensors --out=new.onnx", "--out is new.onnx: it must end in nothing"),
    ("one two.safetensors --out=four.npz", "--out four.npz exists already"),
    ("one two.safetensors --out=one", "--out one exists already"),
    ("one other.npz --out=new.npz", "give --masks=prune to prune it to"),
    ("one two.safetensors --out=new --masks=drop", "unknown choice of --masks 'drop'"),
    ("one two.safetensors --out=new --sparsity=0.9", "--sparsity goes with --masks=prune"),
    ("one other.npz --out=new --masks=prune --sparsity=1", "--sparsity is 1"),
    ("one two.safetensors --out=new --weights=1", "--weights is 1 for 2 models"),
    ("one two.safetensors --out=new --weights=a,b", "--weights is a,b: give numbers"),
    ("one two.safetensors --out=new --weights=1,1", "that sum to 1"),
    ("one two.safetensors --out=new --weights=-1,2", "0 or above"),
    ("one two.safetensors --out=new --weights=nan,1", "0 or above"),
    ("one two.safetensors --out=new --greedy", "--greedy needs the images"),
    ("one two.safetensors --out=new --model=mlp", "--model needs the images"),
    ("one two.safetensors --out=new --greedy --weights=0,1", "leave --weights out"),
    ("one wide.npz --out=new", "params/Dense_0/kernel is (64, 9) and should be (64, 8)"),
    ("one extra.npz --out=new", "(left over: params/more)"),
    ("one int.npz --out=new", "is int32 in int.npz and float32 in one"),
    ("one nan.npz --out=new", "nan.npz has NaN or infinite values"),
    ("bias.npz bias.npz --out=new", "no array of bias.npz is a weight (bias)"),
    ("one two.safetensors --out=new --merge=tie", "unknown merge 'tie': did you mean ties"),
    ("one two.safetensors --out=new --merge=learned", "--merge=learned needs the images"),
    ("one two.safetensors --out=new --merge=ties", "were trained from: give --base"),
    ("one two.safetensors --out=new --base=one", "--merge=uniform takes no other model"),
    ("one two.safetensors --out=new --merge=ties --base=no", "there is no no: let --base"),
    ("one two.safetensors --out=new --merge=ties --base=one --density=0", "--density is 0"),
    ("one two.safetensors --out=new --merge=ties --base=one --weights=1,0", "leave --weig"),
    ("one one one --out=new --merge=slerp", "and 3 are given: give two"),
    ("one one --out=new --merge=fisher", "--merge=fisher needs squared gradients"),
    ("one one --out=new --merge=fisher --squared_gradients=one", "for 2 models: give one"),
    ("one one --out=new --squared_gradients=one,one", "leave out --squared_gradients"),
    ("one one --out=new --merge=ties --base=wide.npz", "is of another network than one"),
    ("one one --out=new --dtype=float8", "unknown dtype 'float8'"),
    ("one one --out=new --shard_size=big", "--shard_size is big: give a number of bytes"),
    ("one torn.npz --out=new", "torn.npz cannot be read"),
    ("one two.safetensors --out=new --dataset=nothing.npz", "nothing.npz"),
    ("one two.safetensors --out=new --dataset=digits --hidden=9", "does not fit MLP"),
  ],
)
def test_wrong_use_gives_one_sentence_and_no_file(
  folder, monkeypatch, capsys, command, words
):
  monkeypatch.chdir(folder)
  arrays = by_path(make(0))
  bad = {
    "wide": {**arrays, KERNELS[0]: np.zeros((64, 9), np.float32)},
    "extra": {**arrays, "params/more": np.zeros(2)},
    "int": {name: x.astype(np.int32) for name, x in arrays.items()},
    "nan": {**arrays, KERNELS[0]: arrays[KERNELS[0]] * np.nan},
    "bias": {"bias": np.ones(3)},
  }
  for name, content in bad.items():
    if f"{name}.npz" in command and not os.path.exists(f"{name}.npz"):
      np.savez(f"{name}.npz", **content)
  (folder / "torn.npz").write_bytes((folder / "four.npz").read_bytes()[:-9])
  before = sorted(os.listdir())
  assert run(*shlex.split(command)) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.startswith("error: ")
  assert words in captured.err
  assert captured.err.count("\n") == 1 and not re.search(r"\. [A-Z]", captured.err)
  assert sorted(os.listdir()) == before
