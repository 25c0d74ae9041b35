"""What would take for ever, or more memory than there is, is refused at once."""

import io
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from main_job import ROOT, config_of, exit_status, parse, unparse

from experiments.config.grid_flags import read_grid
from experiments.run import flag_files, lock, run_directory
from experiments.run.lock import Lock, Moved
from jaxsms import data, pretrained
from jaxsms.disk import npz, storage
from jaxsms.disk.series import Series


def test_devices_of_a_cpu_are_bounded_before_anything_starts(rejects):
  with rejects("--cpu_devices is 100000: give at most 256"):
    config_of("--cpu_devices=100000")
  assert config_of("--cpu_devices=256").cpu_devices == 256


def bomb(path, shape=(60_000, 200, 200, 3), zeros=None):
  """An .npz whose first array says that it has 7 GB; a few bytes of it are there."""
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    header, {"shape": shape, "fortran_order": False, "descr": "|u1"}
  )
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("train_images.npy", header.getvalue() + bytes(zeros or 10))
    for name in ("train_labels", "test_images", "test_labels"):
      array = io.BytesIO()
      np.save(array, np.zeros(2, np.uint8))
      archive.writestr(f"{name}.npy", array.getvalue())


def test_arrays_that_do_not_fit_into_memory_are_refused_from_their_headers(
  tmp_path, rejects, monkeypatch
):
  monkeypatch.setattr(npz, "available_memory", lambda: 5e9)
  bomb(tmp_path / "a.npz")
  with rejects("a.npz unpacks to 7.2 GB, and 5.0 GB of memory are available"):
    data.load(tmp_path / "a.npz")
  # What the zip says counts as well: all of it is unpacked to find that it is too long.
  monkeypatch.setattr(npz, "available_memory", lambda: 1e6)
  bomb(tmp_path / "b.npz", (3, 2, 2, 1), zeros=4_000_000)
  assert os.path.getsize(tmp_path / "b.npz") < 10_000
  with rejects("b.npz unpacks to 0.0 GB"):
    data.load(tmp_path / "b.npz")
  # Arrays that nobody asks for do not count.
  assert npz.read_npz(tmp_path / "a.npz", ("test_labels",))["test_labels"].shape == (2,)


def testavailable_memory_is_that_of_this_machine():
  found = npz.available_memory()
  assert found is None or 2**20 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf(
    "SC_PHYS_PAGES"
  )


@pytest.mark.parametrize("ending", ["npz", "safetensors", "pt"])
def test_pipes_and_folders_are_no_inputs(ending, tmp_path, rejects):
  pipe, folder = tmp_path / f"pipe.{ending}", tmp_path / f"folder.{ending}"
  os.mkfifo(pipe)
  folder.mkdir()
  with rejects("no file"):
    pretrained.load_arrays(pipe)
  if ending == "npz":
    for path in (pipe, folder):
      with rejects(f"{path} is no file"):
        data.load(path)
  assert run_directory.weights_digest(pipe) == "unreadable"
  with rejects("is no file", OSError):
    storage.content_digest(pipe)


def test_flag_files_that_are_none(tmp_path, capsys):
  binary, pipe = tmp_path / "binary", tmp_path / "pipe"
  binary.write_bytes(b"\xff\xfe\x00--seed=1")
  os.mkfifo(pipe)
  for words, problem in (
    ([f"--flagfile={binary}"], f"{binary} is not text"),
    (["--flagfile", str(binary)], f"{binary} is not text"),
    ([f"--flagfile={pipe}"], f"{pipe} is no file"),
    ([f"--flagfile={tmp_path}"], f"{tmp_path} is no file"),
  ):
    assert exit_status(flag_files._parsed, ["sms", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --flagfile {problem}: give")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_commands_read_their_flags_so(tmp_path):
  (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
  for name in ("sms", "compare", "soup", "export", "bench"):
    command = [sys.executable, "-m", f"experiments.{name}"]
    command.append(f"--flagfile={tmp_path / 'binary'}")
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), name
    assert "is not text" in found.stderr


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--sparsities=1"], "--sparsities is 1"),
    (["--sparsities=0.5,-1"], "--sparsities is -1"),
    (["--goal_sparsity=1"], "--goal_sparsity is 1"),
    (["--copies=0"], "--copies is 0"),
    (["--sparsities="], "--sparsities is empty"),
    (["--copies="], "--copies is empty"),
    (["--copies=,"], "--copies is"),
  ],
)
def test_the_grid_names_the_flag_that_was_given(flags, words, rejects):
  unparse("sparsities", "copies")
  parse(*flags)
  with rejects(words):
    read_grid()
  unparse("sparsities", "copies")


def test_numbers_are_those_that_can_be_read(tmp_path, rejects):
  with rejects("--hidden is 2\N{SUPERSCRIPT TWO}: give whole numbers"):
    config_of("--hidden=2\N{SUPERSCRIPT TWO}")
  parse()
  (tmp_path / "\N{SUPERSCRIPT TWO}").mkdir()
  assert Series(tmp_path).newest().number is None


def test_a_process_that_has_not_said_who_it_is(tmp_path, rejects):
  first, second = Lock(tmp_path), Lock(tmp_path)
  first.acquire()
  (tmp_path / lock.HOLDER).unlink()
  with rejects(f"another process runs in {tmp_path}: wait for it"):
    second.acquire()
  first.release()


def test_a_folder_that_was_renamed_is_noticed(tmp_path, rejects):
  old, new = tmp_path / "old", tmp_path / "new"
  old.mkdir()
  held = Lock(old)
  held.acquire()
  held.check()
  old.rename(new)
  with rejects("was renamed or removed", Moved):
    held.check()
  old.mkdir()  # another one of its name
  with rejects("was renamed or removed", Moved):
    held.check()
  held.release()
  assert list(old.iterdir()) == []


def test_empty_checkpoints_are_no_run(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  assert run_directory.read_run(tmp_path) is None
  (tmp_path / "checkpoints").rmdir()
  pathlib.Path(tmp_path / "checkpoints").write_bytes(b"")
  assert run_directory.read_run(tmp_path) is None
