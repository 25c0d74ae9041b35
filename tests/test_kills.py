"""Runs that are killed again and again end as undisturbed ones do."""

import contextlib
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from main_job import SMALL, assert_no_traceback, assert_same_run, run, start
from test_data import pairs_of_several_sizes, prepare
from test_processes import free_port

from experiments import sms
from experiments.reporting import figures
from jaxsms import checkpoint
from jaxsms.disk import faults

IMPORTED = ("orbax.checkpoint", "sklearn.datasets", "hypothesis", "pytest")
SOME = ("save arrays:2", "merge:1", "remove:2")
# Each name is passed so many times after the place where the run was killed before.
KILLS = (
  "write run.json:1",
  "save arrays:2",  # the arrays are there, what belongs to them is not
  "save begins:3",
  "merge:1",
  "remove:2",
  "write manifest.json:1",
  "write results.json:1",
)


def job(fault, said, *flags):
  """The main job, as a process of its own that compiles quickly and draws nothing."""
  os.environ[faults.VARIABLE] = fault
  for stream in (1, 2):
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
  jax.config.update("jax_disable_most_optimizations", True)
  figures.accuracy_figure = lambda results, path: pathlib.Path(path).touch()
  sms.write_report = lambda paths: None
  sys.exit(run(*flags))


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
  """Starts it in a process that has imported everything; gives status and what it said."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["experiments.sms", *IMPORTED])
  folder = tmp_path_factory.mktemp("said")

  def launched(*flags, fault=""):
    said = folder / str(len(list(folder.iterdir())))
    process = context.Process(target=job, args=(fault, said, *flags))
    process.start()
    process.join(300)
    text = said.read_text()
    assert "Traceback" not in text, text
    return process.exitcode, text

  return launched


def tear(workdir):
  """Leaves half a line in metrics.jsonl, as a kill may: it is dropped."""
  with (
    contextlib.suppress(FileNotFoundError),
    open(workdir / "metrics.jsonl", "rb+") as file,
  ):
    file.seek(0, os.SEEK_END)
    file.write(b'{"seed": 0, "meth')


@pytest.mark.slow
@pytest.mark.parametrize("named", [SOME, pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_at_named_places_and_at_random_it_ends_as_if_undisturbed(
  named, tmp_path, launch
):
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  assert launch(*SMALL, f"--workdir={undisturbed}")[0] == 0
  seed = time.time_ns()
  rng = random.Random(seed)
  kills = list(named)
  kills.insert(rng.randint(1, 2), f"chunk:{rng.randint(1, 2)}")
  for fault in kills:
    status, said = launch(*SMALL, f"--workdir={killed}", fault=fault)
    assert status == -signal.SIGKILL, (seed, kills, fault, said)
    tear(killed)
  status, said = launch(*SMALL, f"--workdir={killed}")
  assert status == 0
  assert said.startswith("resuming")
  assert_same_run(killed, undisturbed)


def killed_at_random(workdir, kills, rng, *flags):
  """Kills a run so often, some seconds or chunks after each start, and lets it finish."""
  hit = 0
  for _ in range(10 * kills):
    at_chunk = rng.random() < 0.5
    fault = f"chunk:{rng.randint(1, 20)}" if at_chunk and hit < kills else ""
    process = start(workdir, *flags, fault=fault)
    if hit < kills and not at_chunk:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(1.0, 8.0))
      process.kill()
    assert_no_traceback(process)
    if process.returncode == 0:
      if hit >= kills:
        return hit
      shutil.rmtree(workdir)  # too quick: begin anew, the kills so far count
    else:
      assert process.returncode == -signal.SIGKILL
      hit += 1
  raise AssertionError(f"only {hit} kills hit")


@pytest.mark.slow
def test_soak_of_random_kills(tmp_path):
  flags = (
    "--seeds=2",
    "--baselines=imp,imp_mx",
    "--epochs=4",
    "--phases=3",
    "--goal_sparsity=0.9",
  )
  seed = int(os.environ.get("JAXSMS_SOAK_SEED", time.time()))
  print(f"JAXSMS_SOAK_SEED={seed}")
  undisturbed = start(tmp_path / "undisturbed", *flags)
  assert_no_traceback(undisturbed)
  kills = int(os.environ.get("JAXSMS_SOAK_KILLS", 5))
  killed_at_random(tmp_path / "killed", kills, random.Random(seed), *flags)
  assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # programs that run a few times


def finished(processes):
  """Waits for all: their statuses."""
  outputs = [process.communicate(timeout=1800) for process in processes]
  assert not any("Traceback" in errors for _, errors in outputs), outputs
  return [process.returncode for process in processes]


@pytest.mark.slow
def test_a_run_of_two_processes_is_killed_and_resumed(tmp_path):
  flags = ("--cpu_devices=2", "--mesh=2x2", "--ingredients=3", "--merge=greedy")

  def two(workdir, fault=""):
    at = (f"--coordinator=localhost:{free_port()}", "--processes=2")
    return [
      start(workdir, *flags, *at, f"--process={i}", fault=fault, **QUICK) for i in range(2)
    ]

  assert finished(two(tmp_path / "undisturbed")) == [0, 0]
  for fault in ("save arrays:3", "chunk:2"):
    first, second = two(tmp_path / "killed", fault)
    first.communicate(timeout=1800)
    second.kill()  # it may wait for the first one for ever
    second.communicate()
    assert first.returncode == -signal.SIGKILL, fault
    tear(tmp_path / "killed")
  assert finished(two(tmp_path / "killed")) == [0, 0]
  assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_streamed_run_is_killed_and_resumed(tmp_path):
  """In the midst of an epoch, so that the order of the examples goes on where it was."""
  pairs = pairs_of_several_sizes()
  prepare(tmp_path, {"train": pairs, "validation": pairs[:9]})
  flags = (
    "--dataset=tiny", f"--data_dir={tmp_path}", "--stream", "--image_size=8",
    "--model=mlp", "--batch_size=9", "--chunk_steps=2", "--cpu_devices=2",
    "--mesh=2x1",
  )  # fmt: skip
  assert finished([start(tmp_path / "undisturbed", *flags, **QUICK)]) == [0]
  for fault in ("save arrays:2", "chunk:2", "merge:1"):
    process = start(tmp_path / "killed", *flags, fault=fault, **QUICK)
    assert finished([process]) == [-signal.SIGKILL], fault
    tear(tmp_path / "killed")
  assert finished([start(tmp_path / "killed", *flags, **QUICK)]) == [0]
  assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_killed_while_a_soup_of_averages_learns(streamed, tmp_path, launch):
  flags = [*SMALL, "--phases=1", "--average=ema", "--distill_epochs=2", "--chunk_steps=4"]
  flags += ["--baselines=soup_distilled"]
  kill = "chunk:21"  # after 8 of dense training, 4 and 4 it learns in 8
  if streamed:
    pairs = pairs_of_several_sizes()
    prepare(tmp_path, {"train": pairs, "validation": pairs[:9]})
    flags += ["--dataset=tiny", f"--data_dir={tmp_path}", "--stream", "--image_size=8"]
    flags += ["--model=mlp", "--batch_size=9", "--chunk_steps=1"]
    kill = "chunk:30"  # after 12 of dense training, 6 and 6 it learns in 12
  undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
  assert launch(*flags, f"--workdir={undisturbed}")[0] == 0
  status, said = launch(*flags, f"--workdir={killed}", fault=kill)
  assert status == -signal.SIGKILL, said
  tear(killed)
  newest = sorted((killed / "checkpoints").glob("*/manifest.json"))[-1].parent
  leaves = checkpoint.read_manifest(newest)["leaves"]
  assert any(name.startswith("state/teacher/") for name in leaves)
  assert any(name.startswith("state/average/") for name in leaves)
  status, said = launch(*flags, f"--workdir={killed}")
  assert status == 0
  assert "soup_distilled, 0 phases finished, step " in said
  assert_same_run(killed, undisturbed)
