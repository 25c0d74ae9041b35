"""The checkpoints of a run: which stay, and which is found again."""

import errno
import os
import threading

import numpy as np
import pytest
import store

from jaxsms import checkpoint
from jaxsms.disk import storage
from jaxsms.disk.series import Series


@pytest.fixture(params=["disk", "object store"])
def folder(request, tmp_path):
  """Where the checkpoints go: an address, and the folder on the disk that it is."""
  if request.param == "disk":
    return tmp_path / "run", tmp_path / "run"
  return store.bucket("series", tmp_path) + "/run", tmp_path / "run"


def filled(address, count, keep=2):
  """A series with so many saved; checkpoint i holds i."""
  series = Series(address, keep)
  for i in range(1, count + 1):
    series.save({"x": np.full(9, i)}, {"i": i})
  series.wait()
  return series


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def assert_holds(found, i):
  assert (found.number, found.meta) == (i, {"i": i})
  np.testing.assert_array_equal(found.arrays["x"], np.full(9, i))


def test_the_newest_few_stay_and_the_newest_is_found(folder):
  address, disk = folder
  filled(address, 4)
  assert names(disk) == ["000003", "000004"]
  found = Series(address).newest()
  assert_holds(found, 4)
  assert found.damaged == []


def test_nothing_is_found_where_nothing_is(folder):
  found = Series(folder[0]).newest()
  assert (found.number, found.damaged) == (None, [])


def test_damaged_ones_are_set_aside_and_named(folder):
  address, disk = folder
  filled(address, 4, keep=3)
  (disk / "000004" / checkpoint.MANIFEST).unlink()
  data = max((disk / "000003").rglob("d/*"), key=lambda path: path.stat().st_size)
  data.write_bytes(data.read_bytes()[:-9])
  series = Series(address, keep=3)
  found = series.newest()
  assert_holds(found, 2)
  assert len(found.damaged) == 2
  assert "000004 is damaged" in found.damaged[0]
  assert names(disk) == ["000002", "000003.damaged", "000004.damaged"]
  series.save({"x": np.full(9, 5)}, {"i": 5})
  series.wait()
  assert names(disk) == ["000002", "000003", "000003.damaged", "000004.damaged"]
  assert Series(address).newest().meta == {"i": 5}


def test_where_all_are_damaged_nothing_is_found_and_nothing_deleted(folder):
  address, disk = folder
  filled(address, 2)
  for number in ("000001", "000002"):
    (disk / number / checkpoint.MANIFEST).write_bytes(b"{}")
  assert Series(address).newest().number is None
  assert names(disk) == ["000001.damaged", "000002.damaged"]


@pytest.mark.parametrize(
  "left", [[], [checkpoint.UNFINISHED], [checkpoint.UNFINISHED, "x"]]
)
def test_what_killed_saves_left_is_removed(folder, left):
  address, disk = folder
  filled(address, 1)
  (disk / "000002").mkdir()
  for name in left:
    (disk / "000002" / name).write_bytes(b"")
  assert_holds(Series(address).newest(), 1)
  assert names(disk) == ["000001"]


def test_another_version_is_refused_and_left_alone(folder, monkeypatch, rejects):
  address, disk = folder
  filled(address, 1)
  monkeypatch.setattr(storage, "FORMAT", storage.FORMAT + 1)
  with rejects("another version"):
    Series(address).newest()
  assert names(disk) == ["000001"]


def test_a_failed_save_is_reported_at_the_next_call(tmp_path, monkeypatch, rejects):
  series = filled(tmp_path, 1)

  def full(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patched:
    patched.setattr(os, "fsync", full)
    series.save({"x": np.full(9, 2)}, {"i": 2})
    with rejects("No space left on device", OSError):
      series.save({"x": np.full(9, 3)}, {"i": 3})
  series.wait()
  assert_holds(Series(tmp_path).newest(), 1)


def test_saves_go_on_beside_the_caller(tmp_path, monkeypatch):
  begun, go_on = threading.Event(), threading.Event()
  save = checkpoint.save

  def slow(*arguments):
    begun.set()
    assert go_on.wait(30)
    save(*arguments)

  monkeypatch.setattr(checkpoint, "save", slow)
  series = Series(tmp_path)
  series.save({"x": np.full(9, 1)}, {"i": 1})
  assert begun.wait(30)  # and this thread has not been held up
  go_on.set()
  series.wait()
  assert_holds(Series(tmp_path).newest(), 1)


@pytest.mark.parametrize("moment", ["before it is made", "before orbax"])
def test_a_folder_that_is_renamed_during_a_save_is_not_made_again(
  tmp_path, monkeypatch, moment
):
  """Its parent neither, which may be the directory of a run; what lies beside it stays."""
  old, new = tmp_path / "place" / "old", tmp_path / "new"
  old.mkdir(parents=True)
  series = filled(old / "series", 1)
  save = checkpoint.save

  def rename(*arguments):
    if not new.exists():
      old.rename(new)

  def renamed_first(*arguments):
    rename()
    save(*arguments)

  if moment == "before orbax":
    monkeypatch.setattr(checkpoint, "fault_point", rename)
  else:
    monkeypatch.setattr(checkpoint, "save", renamed_first)
  series.save({"x": np.full(9, 2)}, {"i": 2})
  with pytest.raises(OSError, match=r"renamed or removed|cannot be written"):
    series.wait()
  assert names(tmp_path) == ["new", "place"]
  assert names(tmp_path / "place") == []
  assert_holds(Series(new / "series").newest(), 1)
