"""The main job in two processes on one machine: the same numbers, one run directory."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soup_of_processes
from test_data import pairs_of_several_sizes, prepare

from jaxsms import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = (
  "--hidden=8", "--epochs=1", "--retrain_epochs=1", "--phases=1", "--ingredients=3",
  "--batch_size=64", "--goal_sparsity=0.75", "--baselines=", "--merge=greedy",
)  # fmt: skip


def start(*flags):
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.sms", *FLAGS, *flags],
    cwd=ROOT,
    env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # they compile most
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def free_port():
  with socket.socket() as server:
    server.bind(("localhost", 0))
    return server.getsockname()[1]


def start_two(*flags):
  common = (f"--coordinator=localhost:{free_port()}", "--processes=2", *flags)
  return [start(*common, f"--process={i}") for i in range(2)]


def finish(process, seconds=1800):
  """Exit status, output and errors; both pipes are read, so that none fills up."""
  output, errors = process.communicate(timeout=seconds)
  return process.returncode, output, errors


def finish_all(processes, seconds=1800):
  """The same of each, all read at once: none waits for another one's reader."""
  with ThreadPoolExecutor(len(processes)) as pool:
    return list(pool.map(functools.partial(finish, seconds=seconds), processes))


@pytest.mark.slow
def test_a_soup_on_a_mesh_over_two_processes_equals_that_of_one(tmp_path):
  """Whole and the same in both, from arrays of the host and from ones in parts."""
  script, port = ROOT / "tests" / "soup_of_processes.py", free_port()
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  two = [
    subprocess.Popen(
      [sys.executable, script, str(port), str(i), str(tmp_path / f"{i}.npz")],
      env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  for status, _, errors in finish_all(two, 100):
    assert status == 0, errors
  wanted = soup_of_processes.soup(soup_of_processes.dense())
  first, second = (dict(np.load(tmp_path / f"{i}.npz")) for i in range(2))
  for of in ("host", "shared"):
    for name, value in wanted.items():
      got = first[f"{of}: {name}"]
      np.testing.assert_array_equal(second[f"{of}: {name}"], got)
      np.testing.assert_allclose(got, value, atol=1e-5, err_msg=name)
  assert len(first) == 2 * len(wanted)


def results(workdir):
  return json.loads((workdir / "results.json").read_text())["seeds"]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
  alone = start(f"--workdir={tmp_path / 'alone'}", "--mesh=none")
  status, _, errors = finish(alone)
  assert status == 0, errors
  two = start_two(f"--workdir={tmp_path / 'two'}", "--cpu_devices=2", "--mesh=2x2")
  statuses, outputs, errors = zip(*finish_all(two), strict=True)
  assert statuses == (0, 0), errors[0]
  assert ["Sparse soup" in output for output in outputs] == [True, False]
  assert "SMS phase 1/1" not in errors[1]
  (got,), (wanted,) = results(tmp_path / "two"), results(tmp_path / "alone")
  pairs = [(got["dense"], wanted["dense"])]
  pairs += [(got["phases"][0][k], wanted["phases"][0][k]) for k in ("soup", "pruned")]
  for ours, theirs in pairs:
    numbers = {k: v for k, v in ours.items() if not isinstance(v, dict)}
    assert numbers == pytest.approx({k: theirs[k] for k in numbers}, rel=1e-3, abs=2e-3)
  soups = [
    checkpoint.restore(tmp_path / run / "soup" / "seed_0") for run in ("two", "alone")
  ]
  for a, b in zip(*(s["params"]["Dense_0"].values() for s in soups), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_networks_shrink_in_two_processes_as_in_one(tmp_path):
  """The copies over both of them, and the parameters of each copy in parts."""
  flags = ("--criterion=channels", "--shrink", "--phases=2", "--merge=uniform",
           "--landscape=none")  # fmt: skip
  wide = ("--cpu_devices=2", "--mesh=2x2")
  parts = ("--cpu_devices=1", "--mesh=1x2", "--split_params")
  settings = {"wide": wide, "parts": parts}
  alone = start(*flags, f"--workdir={tmp_path / 'alone'}", "--mesh=none")
  two = {
    name: start_two(*flags, *own, f"--workdir={tmp_path / name}")
    for name, own in settings.items()
  }
  everyone = [alone, *two["wide"], *two["parts"]]
  for status, _, errors in finish_all(everyone):
    assert status == 0, errors
  (wanted,) = results(tmp_path / "alone")
  soup = checkpoint.restore(tmp_path / "alone" / "soup" / "seed_0")
  assert wanted["phases"][1]["parameters"] < wanted["phases"][0]["parameters"]
  for name in settings:
    (got,) = results(tmp_path / name)
    for ours, theirs in zip(got["phases"], wanted["phases"], strict=True):
      assert ours["sparsity"] == theirs["sparsity"]
      assert ours["parameters"] == theirs["parameters"]
      loss = [phase["soup"]["validation_loss"] for phase in (ours, theirs)]
      assert loss[0] == pytest.approx(loss[1], rel=1e-3)
    found = checkpoint.restore(tmp_path / name / "soup" / "seed_0")
    for of in ("params", "masks"):
      for a, b in zip(*(s[of]["Dense_0"].values() for s in (found, soup)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_what_processes_cannot_share(tmp_path):
  for flags, words in (
    (("--mesh=none",), "several processes need a mesh"),
    (("--mesh=1x1",), "leaves some of the 4 devices out"),
  ):
    two = start_two(*flags, "--cpu_devices=2", f"--workdir={tmp_path / 'no'}")
    for status, _, errors in finish_all(two, 100):
      assert status == 2 and words in errors


@pytest.mark.slow
def test_a_streamed_data_set_through_the_main_job(tmp_path):
  """Images of several sizes, that never are on the device together."""
  pairs = pairs_of_several_sizes()
  prepare(tmp_path, {"train": pairs, "validation": pairs[:9]})
  job = start(
    "--dataset=tiny", f"--data_dir={tmp_path}", "--stream", "--image_size=8",
    "--model=mlp", "--batch_size=9", "--cpu_devices=2", "--mesh=2x1",
    f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  status, _, errors = finish(job)
  assert status == 0, errors
  (seed,) = results(tmp_path / "run")
  assert len(seed["phases"][0]["candidates"]) == 3
  assert 0 <= seed["phases"][0]["soup"]["test_accuracy"] <= 1
  assert seed["phases"][0]["sparsity"] == pytest.approx(0.75, abs=1e-3)
