"""Trees on disk: what is saved is restored, and damage is noticed."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import store
from hypothesis import strategies as st

from jaxsms import checkpoint, storage


def test_what_is_saved_is_restored(tmp_path):
  tree = {
    "params": {"a": {"kernel": jnp.linspace(0, 1, 6).reshape(2, 3)}},
    "batch_stats": {},
    "masks": {"a": {"kernel": jnp.array([[True, False, True], [False, True, True]])}},
    "half": jnp.ones(3, jnp.bfloat16),
    "count": jnp.int32(3),
  }
  checkpoint.save(tmp_path / "new" / "model", tree)
  for like in (None, tree, jax.eval_shape(lambda: tree)):
    again = checkpoint.restore(tmp_path / "new" / "model", like)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)


def test_nothing_is_overwritten_and_nothing_is_not_restored(tmp_path):
  with pytest.raises(ValueError, match="exists already"):
    checkpoint.save(tmp_path, {"a": jnp.ones(2)})
  with pytest.raises(ValueError, match="there is no checkpoint"):
    checkpoint.restore(tmp_path / "missing")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A checkpoint, the tree in it, and its files."""
  path = tmp_path_factory.mktemp("saved") / "checkpoint"
  rng = np.random.default_rng(0)
  tree = {"a": rng.normal(size=(40, 3)).astype(np.float32), "b": [rng.integers(9, size=50)]}
  checkpoint.save(path, tree, {"step": 3, "note": "x"})
  return path, tree, sorted(p for p in path.rglob("*") if p.is_file())


@contextlib.contextmanager
def copied(saved):
  """A copy of the checkpoint, to be damaged: its path, and its files."""
  path, _, files = saved
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "copy"
    shutil.copytree(path, copy)
    yield copy, [copy / file.relative_to(path) for file in files]


def damaged_or_right(path, tree):
  """Whether a checkpoint is refused in one sentence of ours; else it must be right."""
  try:
    found = checkpoint.restore(path)
  except checkpoint.Damaged as error:
    assert str(path) in str(error)
    assert "\n" not in str(error)
    return True
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
    np.testing.assert_array_equal(a, b)
  return False


def test_meta_lies_beside_the_arrays(saved):
  assert checkpoint.read_manifest(saved[0])["meta"] == {"step": 3, "note": "x"}


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.data())
def test_a_flipped_bit_is_noticed_or_harmless(saved, data):
  with copied(saved) as (path, files):
    file = files[data.draw(st.integers(0, len(files) - 1))]
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    damaged = damaged_or_right(path, saved[1])
    if file.name == checkpoint.MANIFEST:
      # Only white space may change: a digest covers all the rest.
      before = saved[0] / checkpoint.MANIFEST
      assert damaged or json.loads(file.read_bytes()) == json.loads(before.read_bytes())


@hypothesis.given(st.data())
def test_a_truncated_file_is_noticed_or_harmless(saved, data):
  with copied(saved) as (path, files):
    file = files[data.draw(st.integers(0, len(files) - 1))]
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    damaged_or_right(path, saved[1])


def test_a_missing_file_is_noticed_or_harmless(saved):
  missed = []
  for number, original in enumerate(saved[2]):
    with copied(saved) as (path, files):
      files[number].unlink()
      if damaged_or_right(path, saved[1]):
        missed.append(original.relative_to(saved[0]).as_posix())
  assert {checkpoint.MANIFEST, "arrays/manifest.ocdbt", "arrays/_METADATA"} <= set(missed)


def test_other_numbers_of_the_right_shape_are_noticed(saved, tmp_path, rejects):
  tree = saved[1]
  tree = {**tree, "a": np.nextafter(tree["a"], np.float32(9))}
  checkpoint.save(tmp_path / "other", tree)
  with copied(saved) as (path, _):
    shutil.rmtree(path / checkpoint.ARRAYS)
    shutil.copytree(tmp_path / "other" / checkpoint.ARRAYS, path / checkpoint.ARRAYS)
    with rejects("a is not what was saved", checkpoint.Damaged):
      checkpoint.restore(path)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NAMES = st.sampled_from(["leaves", "meta", "format", "digest", "a", "b/0"])


@hypothesis.given(
  st.binary()
  | st.dictionaries(NAMES, JSON | st.dictionaries(NAMES, JSON))
  .map(json.dumps)
  .map(str.encode)
)
def test_any_manifest_is_read_or_refused(saved, content):
  with copied(saved) as (path, _):
    (path / checkpoint.MANIFEST).write_bytes(content)
    assert damaged_or_right(path, saved[1])


@hypothesis.given(st.dictionaries(NAMES, JSON | st.dictionaries(NAMES, JSON)))
def test_any_manifest_with_its_digest_is_read_or_refused(saved, document):
  with copied(saved) as (path, _):
    storage.write_json(storage.as_path(path / checkpoint.MANIFEST), document)
    damaged_or_right(path, saved[1])


def test_another_version_is_refused(saved, monkeypatch, rejects):
  with copied(saved) as (path, _):
    monkeypatch.setattr(storage, "FORMAT", storage.FORMAT + 1)
    with rejects("was written by another version of jaxsms"):
      checkpoint.restore(path)


def test_a_model_of_another_shape_is_refused(saved, rejects):
  path, tree, _ = saved
  with rejects("a is (40, 3) and should be (4, 3)"):
    checkpoint.restore(path, {**tree, "a": np.zeros((4, 3))})
  with rejects("left over: b/0"):
    checkpoint.restore(path, {"a": tree["a"]})


@pytest.mark.parametrize("call", ["fsync", "replace", "makedirs"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_what_cannot_be_written_is_no_checkpoint(
  call, number, tmp_path, monkeypatch, rejects
):
  def fails(*arguments, **options):
    raise OSError(number, os.strerror(number))

  with monkeypatch.context() as patched:
    patched.setattr(os, call, fails)
    with rejects(f"cannot be written ({os.strerror(number)})", OSError):
      checkpoint.save(tmp_path / "new", {"a": np.ones(2)})
  assert not (tmp_path / "new").exists()


def test_an_unfinished_save_is_no_checkpoint(saved, rejects):
  with copied(saved) as (path, _):
    (path / checkpoint.UNFINISHED).write_bytes(b"")
    with rejects("there is no checkpoint"):
      checkpoint.restore(path)
    checkpoint.remove(path)
    assert not path.exists()


def test_on_an_object_store(saved, tmp_path):
  address = store.bucket("checkpoints", tmp_path)
  checkpoint.save(f"{address}/run/one", saved[1])
  assert not damaged_or_right(storage.as_path(f"{address}/run/one"), saved[1])
  shutil.rmtree(tmp_path / "run" / "one" / checkpoint.ARRAYS)
  assert damaged_or_right(storage.as_path(f"{address}/run/one"), saved[1])
