"""Weights from .npz files and PyTorch's checkpoints, whole, damaged and malicious."""

import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsms.pretrained import load_weights


@pytest.mark.torch
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_are_read(tmp_path, wrapper, legacy):
  import torch

  state = OrderedDict(a=torch.arange(3.0), b=torch.ones((), dtype=torch.int64))
  path = tmp_path / "model.PTH.tar"
  content = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {}}
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  weights = load_weights(path)
  assert weights.keys() == {"a", "b"}
  np.testing.assert_array_equal(weights["a"], [0, 1, 2])
  assert weights["b"].dtype == np.int64


class Evil:
  def __reduce__(self):
    return os.mkdir, ("evil",)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_checkpoint_runs_code(tmp_path, monkeypatch, rejects):
  import torch

  monkeypatch.chdir(tmp_path)
  for legacy in (False, True):
    torch.save({"a": Evil()}, "evil.pt", _use_new_zipfile_serialization=not legacy)
    with rejects("evil.pt cannot be read"):
      load_weights("evil.pt")
  (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil()))
  with rejects("evil.bin cannot be read"):
    load_weights("evil.bin")
  assert not os.path.exists("evil")


def test_no_npz_runs_code(tmp_path, monkeypatch, rejects):
  monkeypatch.chdir(tmp_path)
  np.savez("evil.npz", a=np.array([Evil()], object))
  with rejects("evil.npz cannot be read"):
    load_weights("evil.npz")
  assert not os.path.exists("evil")


@pytest.mark.torch
def test_what_is_no_checkpoint_is_refused(tmp_path, rejects):
  import torch

  cyclic = {}
  cyclic["model"] = cyclic
  for content, words in (
    ([torch.zeros(2)], "holds list"),
    ({"a": torch.zeros(2), "epoch": 3}, "'epoch' in"),
    (cyclic, "'model' in"),
  ):
    torch.save(content, tmp_path / "a.pt")
    with rejects(words):
      load_weights(tmp_path / "a.pt")
  whole = (tmp_path / "a.pt").read_bytes()
  for size in (0, 1, 50, len(whole) // 2, len(whole) - 1):
    (tmp_path / "a.pt").write_bytes(whole[:size])
    with rejects("a.pt cannot be read"):
      load_weights(tmp_path / "a.pt")


def test_missing_and_unknown_files_are_refused(tmp_path, rejects):
  for name in ("missing.pt", "missing.npz", "missing.safetensors"):
    with rejects("there is no file"):
      load_weights(tmp_path / name)
  with rejects("model.h5 is none of them"):
    load_weights("model.h5")


def test_without_pytorch_no_checkpoint_is_read(tmp_path, monkeypatch, rejects):
  (tmp_path / "a.pt").write_bytes(b"")
  monkeypatch.setitem(sys.modules, "torch", None)
  with rejects("pip install torch", ImportError):
    load_weights(tmp_path / "a.pt")


@pytest.mark.torch
def test_with_an_unsafe_pytorch_no_checkpoint_is_read(tmp_path, monkeypatch, rejects):
  import torch

  (tmp_path / "a.pt").write_bytes(b"")
  monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
  with rejects("take 2.6 or later", ImportError):
    load_weights(tmp_path / "a.pt")


ARRAYS = {
  "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.array(3),
  "c": np.zeros((0, 4), np.float16),
}


def test_npz_is_read_and_says_what_is_wrong(tmp_path, rejects):
  path = tmp_path / "a.npz"
  np.savez_compressed(path, **ARRAYS)
  weights = load_weights(path)
  assert weights.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(weights[name], array, strict=True)
  np.savez(path, a=np.array(["text"]))
  with rejects("'a' in"):
    load_weights(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a", b"bytes")
  with rejects("a member is no array"):
    load_weights(path)
  member = io.BytesIO()
  np.save(member, np.ones(2))
  with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
    archive.writestr("a.npy", member.getvalue())
    archive.writestr("a.npy", member.getvalue())
  with rejects("a name comes twice"):
    load_weights(path)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
  """A file in a fresh folder, and its content as numpy writes it."""
  path = tmp_path_factory.mktemp("fuzz") / "a.npz"
  np.savez(path, **ARRAYS)
  return path, path.read_bytes()


@given(st.data())
def test_damaged_npz_give_one_error_or_the_arrays(fuzzed, data):
  path, whole = fuzzed
  damaged = bytearray(whole)
  if data.draw(st.booleans()):
    del damaged[data.draw(st.integers(0, len(whole))) :]
  for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 2 ** data.draw(
      st.integers(0, 7)
    )
  path.write_bytes(damaged)
  try:
    weights = load_weights(path)
  except ValueError as error:
    assert "\n" not in str(error) and str(path) in str(error)
  else:  # bits that say nothing of the content, such as dates
    for name, array in weights.items():
      assert name not in ARRAYS or np.array_equal(array, ARRAYS[name])
