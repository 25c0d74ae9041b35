"""Files in an object store, written by what knows disks alone, and read again."""

import os
import pathlib
import re
import secrets
import stat

import fake_runs
import numpy as np
import pytest
import store

from experiments.reporting.figures import accuracy_figure
from jaxsms import checkpoint, export, pretrained
from jaxsms.disk import storage, writing
from jaxsms.disk.files import on_disk, output_file
from jaxsms.disk.safetensors import read_safetensors, save_safetensors

TREE = {"params": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The address of a bucket; its folder is beside the current one, which is empty."""
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  return store.bucket("files", tmp_path / "bucket")


def test_stores_that_nobody_knows_are_refused(rejects):
  with rejects("http://host/run is in no store that is known here"):
    storage.as_path("http://host/run")


def test_safetensors_go_to_the_store_and_not_to_a_folder_of_its_name(bucket, tmp_path):
  save_safetensors(f"{bucket}/deep/a.safetensors", TREE)
  export.save_compact(f"{bucket}/b.safetensors", TREE)
  assert os.listdir(".") == []
  assert os.listdir(tmp_path / "bucket" / "deep") == ["a.safetensors"]
  for address in (f"{bucket}/deep/a.safetensors", tmp_path / "bucket/deep/a.safetensors"):
    found = read_safetensors(address)["params/kernel"]
    np.testing.assert_array_equal(found, TREE["params"]["kernel"], strict=True)
  # A view of a copy that is gone by now.
  (array,) = read_safetensors(f"{bucket}/deep/a.safetensors").values()
  np.testing.assert_array_equal(array, TREE["params"]["kernel"])
  tree, _ = export.load_compact(f"{bucket}/b.safetensors")
  np.testing.assert_array_equal(tree["params"]["kernel"], TREE["params"]["kernel"])


def test_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  save_safetensors("~/a.safetensors", TREE)
  assert os.listdir(tmp_path) == ["a.safetensors"]
  assert pretrained.load_arrays("~/a.safetensors").keys() == {"params/kernel"}
  checkpoint.save("~/b", TREE)
  assert pretrained.load_arrays("~/b").keys() == {"params/kernel"}


def test_nothing_is_left_of_a_file_that_was_not_finished(bucket, tmp_path):
  for path in (f"{bucket}/a", tmp_path / "folder" / "a"):
    with pytest.raises(KeyboardInterrupt), output_file(path) as file:
      file.write(b"half")
      raise KeyboardInterrupt
  assert os.listdir(tmp_path / "folder") == []
  assert not (tmp_path / "bucket").exists()


def test_models_of_every_format_are_read_from_a_store(bucket, tmp_path, rejects):
  checkpoint.save(f"{bucket}/seed_0", {**TREE, "masks": TREE["params"]})
  save_safetensors(f"{bucket}/a.safetensors", TREE)
  np.savez(tmp_path / "bucket" / "a.npz", **{"params/kernel": TREE["params"]["kernel"]})
  for name in ("seed_0", "a.safetensors", "a.npz"):
    found = pretrained.load_arrays(f"{bucket}/{name}")
    assert found.keys() == {"params/kernel"}
    np.testing.assert_array_equal(found["params/kernel"], TREE["params"]["kernel"])
  (tmp_path / "bucket" / "torn.npz").write_bytes(b"half")
  with rejects("fake://files/torn.npz cannot be read"):
    pretrained.load_arrays(f"{bucket}/torn.npz")
  with rejects("there is no file fake://files/none.npz"):
    pretrained.load_arrays(f"{bucket}/none.npz")
  with on_disk(f"{bucket}/a.npz") as copy:
    assert not copy.startswith(str(tmp_path / "bucket"))
  assert not os.path.exists(copy)


def test_names_of_partial_files_cannot_be_foreseen_and_links_are_not_followed(
  tmp_path, monkeypatch
):
  victim = tmp_path / "victim"
  victim.write_bytes(b"mine")
  tokens = iter("ab")
  monkeypatch.setattr(secrets, "token_hex", lambda size: next(tokens))
  (tmp_path / "new.a.partial").symlink_to(victim)  # as if it had been foreseen
  with pytest.raises(FileExistsError), output_file(tmp_path / "new") as file:
    file.write(b"theirs")
  assert victim.read_bytes() == b"mine"
  assert sorted(os.listdir(tmp_path)) == ["new.a.partial", "victim"]
  monkeypatch.undo()
  with output_file(tmp_path / "new") as file:
    (partial,) = set(os.listdir(tmp_path)) - {"new.a.partial", "victim"}
    assert partial.startswith("new.")
    assert len(partial) > len("new..partial") + 12
    file.write(b"theirs")
  (tmp_path / "link").symlink_to(victim)  # a name that is a link is replaced, not followed
  storage.write_bytes(storage.as_path(tmp_path / "link"), b"other")
  assert victim.read_bytes() == b"mine"
  assert (tmp_path / "link").read_bytes() == b"other"


WRITERS = {
  "json": lambda path: storage.write_json(storage.as_path(path), {"a": 1}),
  "safetensors": lambda path: save_safetensors(path, TREE),
  "html": lambda path: storage.write_bytes(storage.as_path(path), b"<html>"),
  "png": lambda path: accuracy_figure(RESULTS, path),
}
RESULTS = {"flags": fake_runs.run_flags(), "seeds": [fake_runs.entry(0)]}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_writer_syncs_the_file_and_then_its_folder(ending, tmp_path, monkeypatch):
  """A name that is there before its content would be an empty file after a power cut."""
  path, happened = f"{tmp_path}/a.{ending}", []
  fsync, replace = os.fsync, os.replace

  def synced(handle):
    folder = stat.S_ISDIR(os.fstat(handle).st_mode)
    happened.append("folder" if folder else os.fstat(handle).st_size)
    fsync(handle)

  def renamed(source, target):
    happened.append("renamed")
    replace(source, target)

  monkeypatch.setattr(os, "fsync", synced)
  monkeypatch.setattr(os, "replace", renamed)
  WRITERS[ending](path)
  assert happened == [os.path.getsize(path), "renamed", "folder"]
  assert os.listdir(tmp_path) == [f"a.{ending}"]
  plain = tmp_path / "plain"
  plain.touch()
  assert os.stat(path).st_mode == plain.stat().st_mode  # as any file of this user


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_is_given_to_what_is_on_the_disk(kind, tmp_path, monkeypatch):
  """Every file of a folder, whoever wrote it, and the folder."""
  fsync, rename, synced = os.fsync, os.rename, set()

  def renamed(source, target):
    inside = [source, *pathlib.Path(source).rglob("*")]
    assert {os.stat(x).st_ino for x in inside} <= synced
    rename(source, target)

  monkeypatch.setattr(os, "fsync", lambda f: (fsync(f), synced.add(os.fstat(f).st_ino)))
  monkeypatch.setattr(os, "rename", renamed)
  with writing.partial(str(tmp_path / "out")) as temporary:
    if kind == "folder":
      os.makedirs(os.path.join(temporary, "inner"))
      temporary = os.path.join(temporary, "inner", "config.json")
    pathlib.Path(temporary).write_text("{}")
  out = tmp_path / "out"
  assert (out if kind == "file" else out / "inner" / "config.json").read_text() == "{}"


def test_nothing_else_in_the_two_packages_opens_files_to_write():
  """One atomic write for all: what needs another way is named here."""
  allowed = {
    "jaxsms/disk/storage.py",  # it is there
    "jaxsms/disk/files.py",  # a copy in a folder of its own, to be read
    "jaxsms/checkpoint.py",  # an empty mark
    "jaxsms/disk/writing.py",  # under a temporary name; synced, then renamed
    "jaxsms/disk/other_writers.py",  # as above
    "jaxsms/disk/to_pytorch.py",  # as above
    "experiments/merging/output.py",  # as above
    "experiments/benchmarks/bench_accelerator.py",  # what a command says, as it says it
    "experiments/run/metrics_file.py",  # grows by lines
    "experiments/run/lock.py",  # an empty file, for its lock
  }
  writes = re.compile(
    r"open\([^)]*[\"'][wax]b?[\"']|write_text\(|\.write_bytes\(|os\.rename|os\.replace|mkstemp"
    r"|json\.dump\("
  )
  root = pathlib.Path(storage.__file__).parents[2]
  files = [*root.glob("jaxsms/**/*.py"), *root.glob("experiments/**/*.py")]
  assert allowed <= {str(file.relative_to(root)) for file in files}
  for file in files:
    text = file.read_text().replace("storage.write_bytes(", "")
    if str(file.relative_to(root)) not in allowed:
      assert not writes.search(text), file
