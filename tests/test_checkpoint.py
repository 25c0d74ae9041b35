"""Trees on disk: what is saved is restored, and damage is noticed."""

import contextlib
import errno
import gc
import json
import os
import pathlib
import resource
import shutil
import tempfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import store
from hypothesis import strategies as st

from jaxsms import checkpoint
from jaxsms.disk import storage


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


@pytest.mark.slow
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


DTYPES = ("bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16",
          "float32", "float64", "complex64", "bfloat16", "float8_e4m3fn")  # fmt: skip


@st.composite
def arrays(draw):
  """An array of any dtype, order of bytes, layout and shape."""
  dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
  shape = draw(st.lists(st.integers(0, 3), max_size=3))
  values = draw(st.integers(0, 2**32 - 1))
  array = np.random.default_rng(values).integers(0, 2, shape) * values % 251
  array = np.asarray(array, dtype, order=draw(st.sampled_from("CF")))
  if dtype.kind != "V" and draw(st.booleans()):
    array = array.astype(dtype.newbyteorder())
  return array[..., ::-1] if shape and draw(st.booleans()) else array


@hypothesis.given(
  st.dictionaries(st.sampled_from("abc"), arrays() | st.lists(arrays(), min_size=1))
)
def test_arrays_of_any_kind_are_restored_as_they_were(tree):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "a"
    checkpoint.save(path, tree)
    for like in (None, tree):
      again = checkpoint.restore(path, like)
      assert jax.tree.structure(again) == jax.tree.structure(tree)
      for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
        assert b.dtype == (a.dtype if like else a.dtype.newbyteorder("="))
        np.testing.assert_array_equal(a, b)
        assert a.shape == b.shape
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(path, like), tree)


@pytest.mark.parametrize("leaf", [np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]")])
def test_what_holds_no_numbers_is_refused_before_anything_is_written(
  leaf, tmp_path, rejects
):
  with rejects(f"leaf a/0 is {leaf.dtype}: give arrays of numbers"):
    checkpoint.save(tmp_path / "new", {"a": [leaf]})
  assert list(tmp_path.iterdir()) == []


def test_keys_and_scalars_are_restored(tmp_path):
  tree = {"key": jax.random.key(3), "n": np.int64(4), "yes": np.bool_(True)}
  checkpoint.save(tmp_path / "a", tree)
  again = checkpoint.restore(tmp_path / "a")
  assert (again["n"], again["yes"]) == (4, True)
  np.testing.assert_array_equal(
    jax.random.key_data(again["key"]), jax.random.key_data(tree["key"])
  )


@contextlib.contextmanager
def small_files(size):
  """No file of this process can be longer: what a disk that fills up does to some."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_nothing_under_way_and_nothing_behind(
  tmp_path, capfd, rejects, caplog
):
  """Of many arrays some can be written and some cannot, at the same time."""
  rng = np.random.default_rng(0)
  tree = {f"l{i}": rng.normal(size=(40 + 200 * (i % 2), 100)) for i in range(24)}
  for number in range(5):
    with small_files(100_000), rejects("File too large", OSError):
      checkpoint.save(tmp_path / "run" / str(number), tree)
    assert list((tmp_path / "run").iterdir()) == []
  gc.collect()  # asyncio complains of what nobody waited for when it goes
  assert caplog.text == ""
  assert capfd.readouterr().err == ""
  assert list((tmp_path / "run").iterdir()) == []
  checkpoint.save(tmp_path / "run" / "0", tree)
  jax.tree.map(
    np.testing.assert_array_equal, checkpoint.restore(tmp_path / "run" / "0"), tree
  )


def test_what_orbax_left_before_its_rename_is_unfinished(saved, rejects):
  """As where a power cut took the mark away, or it could not be written any more."""
  with copied(saved) as (path, _):
    (path / checkpoint.MANIFEST).unlink()
    (path / checkpoint.ARRAYS).rename(path / "arrays.orbax-checkpoint-tmp")
    assert checkpoint.is_unfinished(path)
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
