"""Searches, distillation and shares of the data: over devices, processes, and streamed."""

import jax
import main_job
import numpy as np
import pytest
from main_job import results, run
from test_data import pairs_of_several_sizes, prepare
from test_kills import QUICK
from test_processes import finish_all, free_port
from test_resume import stopped_with

from jaxsms import checkpoint

SMALL = (
  "--hidden=8", "--epochs=1", "--phases=1", "--batch_size=64", "--goal_sparsity=0.75",
  "--save_minutes=5", "--chunk_steps=50", "--landscape=none",
)  # fmt: skip
SEARCH = (
  *SMALL, "--ingredients=4", "--vary=seed,learning_rate", "--retrain_epochs=2",
  "--rungs=2", "--ranges=learning_rate:0.01:0.1",
)  # fmt: skip


def assert_equal_runs(workdir, other):
  """Equal masks and choices; numbers up to the order in which they are added up."""
  seeds = [results(folder)["seeds"] for folder in (workdir, other)]
  found, wanted = (dict(jax.tree_util.tree_leaves_with_path(s)) for s in seeds)
  assert found.keys() == wanted.keys()
  for path, value in wanted.items():
    name = jax.tree_util.keystr(path)
    if "auroc" in name:  # of ranks, which nearly equal predictions change
      continue
    assert found[path] == pytest.approx(value, rel=1e-3, abs=2e-3, nan_ok=True), name
  soups = [checkpoint.restore(w / "soup" / "seed_0") for w in (workdir, other)]
  for a, b in zip(*(jax.tree.leaves(s["masks"]) for s in soups), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(*(jax.tree.leaves(s["params"]) for s in soups), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation", "quick_figures")
def test_a_search_and_a_distillation_in_parts_give_the_same(tmp_path, monkeypatch):
  """Of averages, on a network that shrinks, stopped after the first rung and gone on."""
  flags = (
    *SEARCH, "--average=ema", "--criterion=channels", "--shrink", "--hidden=8,8",
    "--baselines=soup_distilled",
  )  # fmt: skip
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert run(*flags, "--mesh=none", f"--workdir={whole}") == 0
  flags += ("--mesh=1x2", "--split_params", f"--workdir={parts}")
  assert stopped_with(monkeypatch, 3, *flags) == 143  # a chunk an epoch, one of them dense
  assert run(*flags) == 0
  assert_equal_runs(parts, whole)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation", "quick_figures")
def test_clients_on_two_processes_give_the_same(tmp_path):
  """Shares of unequal size and weight, then one copy's classifier on all data."""
  flags = (
    *SMALL, "--ingredients=3", "--vary=subset", "--subsets=dirichlet", "--imbalance=5",
    "--merge=by_samples", "--batch_size=32", "--retrain_epochs=1",
    "--baselines=soup_classifier",
  )  # fmt: skip
  alone, together = tmp_path / "alone", tmp_path / "together"
  assert run(*flags, "--mesh=none", f"--workdir={alone}") == 0
  flags += ("--cpu_devices=1", "--mesh=2x1", "--processes=2")
  flags += (f"--coordinator=localhost:{free_port()}",)
  two = [main_job.start(together, *flags, f"--process={i}", **QUICK) for i in range(2)]
  for status, _, errors in finish_all(two):
    assert status == 0, errors
  assert_equal_runs(together, alone)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation", "quick_figures")
def test_a_streamed_search_over_devices_gives_the_same(tmp_path):
  pairs = pairs_of_several_sizes()
  prepare(tmp_path, {"train": pairs, "validation": pairs[:9]})
  flags = (
    *SEARCH, "--dataset=tiny", f"--data_dir={tmp_path}", "--stream", "--image_size=8",
    "--model=mlp", "--batch_size=9", "--baselines=",
  )  # fmt: skip
  alone, mesh = tmp_path / "alone", tmp_path / "mesh"
  assert run(*flags, "--mesh=none", f"--workdir={alone}") == 0
  assert run(*flags, "--mesh=2x1", f"--workdir={mesh}") == 0
  assert_equal_runs(mesh, alone)
