"""Files in an object store, written by what knows disks alone, and read again."""

import os

import numpy as np
import pytest
import store

from jaxsms import checkpoint, export, pretrained, storage
from jaxsms.files import on_disk, whole_file
from jaxsms.safetensors import load_safetensors, read_safetensors, save_safetensors

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
    found = load_safetensors(address, TREE)["params"]["kernel"]
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
    with pytest.raises(KeyboardInterrupt), whole_file(path) as name:
      with open(name, "w") as file:
        file.write("half")
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
