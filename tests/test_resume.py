"""Runs that are stopped or damaged, and go on: they end as undisturbed ones do."""

import errno
import os
import pathlib
import shutil
import signal

import pytest
import store
from main_job import SMALL, TWO, assert_same_run, config_of, results, run

from experiments.run import checkpointing, environment, lock
from experiments.setup import tuning
from jaxsms import checkpoint
from jaxsms.disk import storage

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_figures")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """A run of two seeds in this process."""
  workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
  assert run(*SMALL, *TWO, f"--workdir={workdir}") == 0
  return workdir


def stopped_with(monkeypatch, chunk, *flags, number=signal.SIGTERM):
  """Starts a run and stops it with a signal after so many chunks: its exit status."""
  passed = []

  def fault_point(name):
    passed.append(name)
    if len(passed) == chunk:
      signal.raise_signal(number)

  with monkeypatch.context() as patched:
    patched.setattr(checkpointing, "fault_point", fault_point)
    return run(*flags)


def stopped_at(monkeypatch, chunk, workdir, *flags, number=signal.SIGTERM):
  """The same of that run of two seeds."""
  flags = (*SMALL, *TWO, f"--workdir={workdir}", *flags)
  return stopped_with(monkeypatch, chunk, *flags, number=number)


def again(workdir, *flags):
  return run(*SMALL, *TWO, f"--workdir={workdir}", *flags)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """That run, stopped in the first phase of the second seed."""
  workdir = tmp_path_factory.mktemp("runs") / "stopped"
  with pytest.MonkeyPatch.context() as monkeypatch:
    assert stopped_at(monkeypatch, 17, workdir) == 143
  return workdir


@pytest.fixture
def copy(stopped, tmp_path):
  """A copy of it."""
  return pathlib.Path(shutil.copytree(stopped, tmp_path / "copy"))


def checkpoints(workdir):
  return sorted((workdir / "checkpoints").iterdir())


METHODS = (
  "--seeds=1", "--baselines=imp,gmp_soup,dense_soup,swamp", "--rewind_epochs=1",
  "--vary=weight_decay", "--values=0,0.001", "--train_metrics", "--phases=1",
)  # fmt: skip


@pytest.mark.slow
def test_other_baselines_are_kept_or_done_again(tmp_path, monkeypatch, capsys):
  undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
  pause, paused = checkpointing.Checkpointer.pause, []

  def run_until(stops, workdir):
    def counted(checkpointer):
      paused.append(checkpointer.seed_state.method)
      if paused.count(stops) == 3:
        signal.raise_signal(signal.SIGTERM)
      pause(checkpointer)

    paused.clear()
    with monkeypatch.context() as patched:
      patched.setattr(checkpointing.Checkpointer, "pause", counted)
      return again(workdir, *METHODS)

  assert run_until("nothing", undisturbed) == 0
  assert set(paused) == {"gmp_soup", "swamp"}
  for method, kept in (("gmp_soup", {"imp"}), ("swamp", {"imp", "gmp_soup", "dense_soup"})):
    assert run_until(method, workdir) == 143
    seed_state = checkpoint.read_manifest(checkpoints(workdir)[-1])["meta"]["work"]
    assert seed_state["method"] == method
    assert set(seed_state["baselines"]) == kept
    assert "stops, to begin this method anew, at the next" in capsys.readouterr().err
  assert run_until("nothing", workdir) == 0
  assert set(paused) == {"swamp"}
  assert_same_run(workdir, undisturbed)
  capsys.readouterr()
  assert again(workdir, *METHODS, "--values=0,0.002") == 2
  assert "--values=0.0,0.001 and not 0.0,0.002" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_with_their_status(number, tmp_path, monkeypatch, capsys):
  before = signal.getsignal(number)
  workdir = tmp_path / "run"
  assert stopped_at(monkeypatch, 3, workdir, number=number) == 128 + number
  assert signal.getsignal(number) is before
  errors = capsys.readouterr().err.splitlines()
  assert "saves and stops at the next chunk" in errors[0]
  assert errors[-1].startswith(
    f"stopped by {signal.Signals(number).name} (no seed finished"
  )
  assert f"--workdir={workdir}" in errors[-1]
  found = checkpoint.read_manifest(checkpoints(workdir)[-1])["meta"]
  assert found["work"]["parts"] == ["state"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_says_so(copy, undisturbed, capsys):
  assert again(copy) == 0
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith(f"resuming {copy}: seed 1, ")
  assert "(1 of 2 seeds finished)" in lines[0]
  assert not any("seed 0" in line for line in lines)
  assert_same_run(copy, undisturbed)


@pytest.mark.slow
def test_a_finished_run_says_so_and_prints_its_table(undisturbed, capsys):
  before = (undisturbed / "results.json").read_bytes()
  assert again(undisturbed) == 0
  printed = capsys.readouterr()
  assert "finished: nothing is left to do" in printed.err
  assert "Sparse soup" in printed.out
  assert (undisturbed / "results.json").read_bytes() == before


@pytest.mark.slow
def test_other_flags_are_refused_and_named(copy, capsys):
  assert again(copy, "--learning_rate=0.2", "--hidden=16,8") == 2
  message = capsys.readouterr().err.strip()
  assert message.count("\n") == 0
  assert "--hidden=16 and not 16,8, --learning_rate=0.1 and not 0.2" in message


@pytest.mark.slow
def test_where_it_computes_and_finds_data_may_differ(copy, undisturbed, tmp_path):
  flags = ("--mesh=2x1", "--chunk_steps=9", "--save_minutes=5", f"--cache_dir={tmp_path}")
  assert again(copy, *flags) == 0
  found, expected = results(copy), results(undisturbed)
  for a, b in zip(found["seeds"], expected["seeds"], strict=True):
    for x, y in zip(a["phases"], b["phases"], strict=True):
      numbers = {k: v for k, v in y["soup"].items() if k != "layer_sparsities"}
      got = {k: x["soup"][k] for k in numbers}
      assert got == pytest.approx(numbers, rel=1e-2, abs=2e-2)  # rounding, through training


def truncate(folder):
  for file in folder.rglob("d/*"):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder):
  largest = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 4
  largest.write_bytes(content)


def lose(folder):
  (folder / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
  "damage", [flip, *(pytest.param(d, marks=pytest.mark.slow) for d in (truncate, lose))]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
  damage, copy, undisturbed, capsys
):
  newest = checkpoints(copy)[-1]
  damage(newest)
  assert again(copy) == 0
  warning = capsys.readouterr().err.splitlines()[0]
  assert warning.startswith(f"warning: checkpoint {newest} is damaged")
  assert warning.endswith(f"set aside as {newest.name}.damaged")
  assert newest.with_name(f"{newest.name}.damaged").is_dir()
  assert_same_run(copy, undisturbed)


@pytest.mark.slow
def test_without_any_whole_checkpoint_finished_seeds_are_kept(copy, undisturbed, capsys):
  for folder in checkpoints(copy):
    lose(folder)
  assert again(copy) == 0
  errors = capsys.readouterr().err
  assert errors.count("is damaged") == 2
  assert "resuming" in errors
  assert "seed 0" not in errors
  assert results(copy)["seeds"] == results(undisturbed)["seeds"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_lost_run_file_is_written_anew_from_a_checkpoint(
  damage, copy, undisturbed, capsys
):
  file = copy / "run.json"
  if damage == "missing":
    file.unlink()
  else:
    file.write_bytes(file.read_bytes().replace(b'"epochs": 2', b'"epochs": 3'))
  assert again(copy, "--epochs=3") == 2
  assert "--epochs=2 and not 3" in capsys.readouterr().err
  assert again(copy) == 0
  assert (copy / "run.json.damaged").exists() == (damage == "flipped")
  assert_same_run(copy, undisturbed)


@pytest.mark.slow
def test_damaged_results_of_a_finished_run_come_from_its_checkpoint(undisturbed, tmp_path):
  copy = pathlib.Path(shutil.copytree(undisturbed, tmp_path / "copy"))
  damaged = (copy / "results.json").read_bytes()[:-40]
  (copy / "results.json").write_bytes(damaged)
  assert again(copy) == 0
  assert (copy / "results.json.damaged").read_bytes() == damaged
  assert_same_run(copy, undisturbed)


@pytest.mark.slow
def test_a_second_process_is_refused(copy, capsys):
  first = lock.Lock(copy)
  first.acquire()
  assert again(copy) == 2
  message = capsys.readouterr().err
  assert message.startswith(f"error: another process (pid {os.getpid()} on ")
  first.release()


@pytest.mark.slow
def test_runs_of_other_versions_are_refused(
  copy, undisturbed, monkeypatch, capsys, tmp_path
):
  with monkeypatch.context() as patched:
    patched.setattr(storage, "FORMAT", storage.FORMAT + 1)
    for workdir in (copy, undisturbed):
      assert again(workdir) == 2
      assert "was written by another version of jaxsms" in capsys.readouterr().err
  (tmp_path / "old").mkdir()
  (tmp_path / "old" / "results.json").write_text("{}")
  assert again(tmp_path / "old") == 2
  assert "holds a run of another version" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("package", ["jaxsms", "jax"])
def test_a_run_that_another_version_began_is_refused(
  package, copy, undisturbed, monkeypatch, capsys
):
  """Unless it may go on: then results.json says which version did which steps."""
  real = environment.environment()
  other = {**real, package: "99.1"}
  monkeypatch.setattr(checkpointing, "environment", lambda: other)
  before = sorted(copy.rglob("*"))
  assert again(copy) == 2
  message = capsys.readouterr().err.strip()
  assert f"holds a run of {package} {real[package]}, and this is {package} 99.1" in message
  assert "--allow_other_version" in message
  assert message.count("\n") == 0
  assert {p for p in copy.rglob("*") if p.name != "lock"} == {
    p for p in before if p.name != "lock"
  }
  assert stopped_at(monkeypatch, 3, copy, "--allow_other_version") == 143
  assert again(copy) == 0  # the same version as the last one
  monkeypatch.setattr(checkpointing, "environment", lambda: real)
  first, second = results(copy)["environments"]
  assert first == {"from": "the start", "environment": real}
  assert second["environment"] == other
  assert second["from"].startswith("seed 1, sms, 0 phases finished, step ")
  assert results(copy)["seeds"] == results(undisturbed)["seeds"]
  assert len(results(undisturbed)["environments"]) == 1


@pytest.mark.slow
def test_a_run_directory_that_is_renamed_is_not_made_again(
  tmp_path, monkeypatch, capsys, undisturbed
):
  """What is saved goes on from its new place; nothing is left at the old one."""
  old, new, passed = tmp_path / "old", tmp_path / "new", []

  def rename(name):
    passed.append(name)
    if len(passed) == 12:
      old.rename(new)

  with monkeypatch.context() as patched:
    patched.setattr(checkpointing, "fault_point", rename)
    assert again(old) == 1
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert f"{old} was renamed or removed while this run was in it" in message
  assert f"--workdir={old}" not in message
  assert not old.exists()
  assert again(new) == 0
  assert_same_run(new, undisturbed)


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch, capsys):
  def read_only(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  monkeypatch.setattr(os, "makedirs", read_only)
  assert again(tmp_path / "run") == 2
  assert "cannot be written (Permission denied)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(
  tmp_path, undisturbed, monkeypatch, capsys
):
  fsync, calls = os.fsync, []

  def full(handle):
    calls.append(handle)
    if len(calls) > 60:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(handle)

  with monkeypatch.context() as patched:
    patched.setattr(os, "fsync", full)
    assert again(tmp_path / "run") == 1
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert message.startswith("error: ")
  assert "No space left on device" in message
  assert again(tmp_path / "run") == 0
  assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_on_an_object_store(tmp_path, undisturbed, monkeypatch, capsys):
  monkeypatch.setattr(lock, "BEAT", 0.05)
  monkeypatch.setattr(lock, "WATCH", 0.5)
  address = store.bucket("runs", tmp_path)
  assert stopped_at(monkeypatch, 17, f"{address}/run") == 143
  assert again(f"{address}/run") == 0
  assert "resuming fake://runs/run: seed 1" in capsys.readouterr().err
  assert_same_run(tmp_path / "run", undisturbed)
  assert (tmp_path / "run" / "accuracy.png").exists()
  assert not (tmp_path / "run" / "holder.json").exists()


def test_a_resumed_run_keeps_the_convolution_that_it_measured():
  config = config_of("--model=resnet8", "--convolution=measure")
  found = tuning.with_fastest_lowering(config, None, before="loop")
  assert found.convolution == "loop"
