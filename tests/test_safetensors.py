"""Safetensors files: what is written is read, what is damaged is refused."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxsms.disk.safetensors import (
  read_safetensors,
  save_safetensors,
  write_safetensors,
)
from jaxsms.pretrained import load_weights


def file_of(header, data=b"", length=None):
  """A file by the format's definition: length, JSON header, data."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return length.to_bytes(8, "little") + text + data


def entry(dtype, shape, begin, end):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return tmp_path_factory.mktemp("safetensors") / "a.safetensors"


# bfloat16 1.0 is 3f80, 1.5 is 3fc0, little end first.
EXAMPLE = file_of(
  {
    "__metadata__": {"format": "pt"},
    "half": entry("BF16", [2], 8, 12),
    "a.b": entry("F32", [1, 2], 0, 8),
    "flag": entry("BOOL", [], 12, 13),
    "none": entry("I64", [0, 3], 12, 12),
  },
  np.array([1.5, -2], "<f4").tobytes() + b"\x80\x3f\xc0\x3f" + b"\x01",
)


def test_a_file_made_by_hand_is_read(path):
  path.write_bytes(EXAMPLE)
  arrays = load_weights(path)
  assert list(arrays) == ["half", "a.b", "flag", "none"]
  np.testing.assert_array_equal(
    arrays["a.b"], np.array([[1.5, -2]], np.float32), strict=True
  )
  assert arrays["half"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(arrays["half"].astype(np.float32), [1, 1.5])
  assert arrays["flag"].shape == () and arrays["flag"].dtype == bool and arrays["flag"]
  assert arrays["none"].shape == (0, 3) and arrays["none"].dtype == np.int64
  assert not arrays["a.b"].flags.writeable
  path.write_bytes(file_of({}))
  assert read_safetensors(path) == {}


DUPLICATE = b'{"a":%b,"a":%b}' % ((json.dumps(entry("U8", [1], 0, 1)).encode(),) * 2)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (b"", "it has 0 bytes"),
    (b"1234567", "it has 7 bytes"),
    (file_of({}, length=3), "its header would have 3 bytes, and the file has 10"),
    (b"\xff" * 20, "its header would have 18446744073709551615 bytes"),
    (file_of(b"[]"), "no JSON object"),
    (file_of(b" {}"), "no JSON object"),
    (file_of(b""), "no JSON object"),
    (file_of(b"{" * 9), "cannot be read"),
    (file_of(b'{"a":' * 100_000), "cannot be read"),
    (file_of(b'{"a":' + b"[" * 100_000), "cannot be read"),
    (file_of(b'{"a":' + b"9" * 10_000), "cannot be read"),
    (file_of(b'{"\xff":1}'), "cannot be read"),
    (file_of(DUPLICATE, b"1"), "comes twice"),
    (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    (file_of({"__metadata__": ["a"]}), "__metadata__"),
    (file_of({"a": 3}), "'a' has no dtype"),
    (file_of({"a": {}}), "'a' has no dtype"),
    (file_of({"a": entry("F8", [1], 0, 1)}, b"1"), "has no dtype of BOOL, U8"),
    (file_of({"a": entry(["U8"], [1], 0, 1)}, b"1"), "has no dtype"),
    (file_of({"a": entry("U8", 1, 0, 1)}, b"1"), "has no dtype"),
    (file_of({"a": entry("U8", None, 0, 1)}, b"1"), "has no dtype"),
    (file_of({"a": entry("U8", "1", 0, 1)}, b"1"), "out of range"),
    (file_of({"a": entry("U8", {"1": 1}, 0, 1)}, b"1"), "out of range"),
    (file_of({"a": entry("U8", [1.0], 0, 1)}, b"1"), "out of range"),
    (file_of({"a": entry("U8", [True], 0, 1)}, b"1"), "out of range"),
    (file_of({"a": entry("U8", [-1, -1], 0, 1)}, b"1"), "out of range"),
    (file_of({"a": entry("U8", [2**63, 0], 0, 0)}), "out of range"),
    (file_of({"a": entry("U8", [1] * 65, 0, 1)}, b"1"), "out of range"),
    (file_of({"a": entry("U8", [2**62, 2**62, 0], 0, 0)}), "cannot be read"),
    (file_of({"a": entry("U8", [1], -1, 0)}, b"1"), "out of range"),
    (file_of({"a": entry("U8", [1], 0, None)}, b"1"), "out of range"),
    (file_of({"a": {**entry("U8", [1], 0, 1), "data_offsets": [0]}}, b"1"), "no dtype"),
    (file_of({"a": entry("U8", [2], 0, 1)}, b"1"), "U8[2], but has 1 bytes"),
    (file_of({"a": entry("F32", [2], 0, 2)}, b"12"), "F32[2], but has 2 bytes"),
    (file_of({"a": entry("U8", [1], 1, 0)}, b"1"), "but has -1 bytes"),
    (file_of({"a": entry("U8", [2], 0, 2)}, b"1"), "holds 1 bytes of data, but names 2"),
    (file_of({"a": entry("U8", [1], 0, 1)}, b"12"), "holds 2 bytes of data, but names 1"),
    (file_of({"a": entry("U8", [1], 1, 2)}, b"12"), "begins at byte 1, not at 0"),
    (
      file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
      "'b' begins at byte 1, not at 2",
    ),
    (file_of({"a": entry("BOOL", [2], 0, 2)}, b"\x01\x02"), "other than 0 and 1"),
  ],
)
def test_what_is_damaged_is_refused(path, rejects, content, words):
  path.write_bytes(content)
  with rejects(words):
    read_safetensors(path)
  with pytest.raises(ValueError, match=r"a\.safetensors"):
    load_weights(path)


@given(st.binary(max_size=40), st.data())
def test_random_bytes_give_one_error(path, content, data):
  if data.draw(st.booleans()):
    content = file_of(content, data.draw(st.binary(max_size=4)))
  path.write_bytes(content)
  try:
    assert not read_safetensors(path)  # an empty object, at the most
  except ValueError as error:
    assert "\n" not in str(error) and str(path) in str(error)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
  max_leaves=4,
)
SIZES = st.sampled_from([0, 1, 2, 4, 8, 2**32, 2**62, 2**63, 2**64, -1])
ENTRIES = st.fixed_dictionaries(
  {
    "dtype": st.sampled_from(["U8", "BOOL", "F32", "BF16", "I64"]) | JSON,
    "shape": st.lists(SIZES, max_size=3) | JSON,
    "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
  }
)


@given(st.dictionaries(st.text(max_size=2), ENTRIES | JSON, max_size=2), st.binary())
def test_any_header_gives_one_error_or_arrays_of_its_shapes(path, header, data):
  path.write_bytes(file_of(header, data))
  try:
    arrays = read_safetensors(path)
  except ValueError as error:
    assert "\n" not in str(error) and str(path) in str(error)
  else:
    assert all(list(arrays[name].shape) == header[name]["shape"] for name in arrays)
    assert sum(array.nbytes for array in arrays.values()) == len(data)


@given(st.data())
def test_truncated_and_flipped_files_give_one_error_or_the_same_names(path, data):
  damaged = bytearray(EXAMPLE)
  size = data.draw(st.integers(0, len(EXAMPLE)))
  flips = data.draw(st.lists(st.integers(0, 8 * len(EXAMPLE) - 1), max_size=2))
  for bit in flips:
    damaged[bit // 8] ^= 1 << bit % 8
  path.write_bytes(damaged[:size])
  try:
    arrays = read_safetensors(path)
  except ValueError as error:
    assert "\n" not in str(error) and str(path) in str(error)
  else:
    assert flips or size == len(EXAMPLE), "a truncated file is never read"
    assert sum(array.nbytes for array in arrays.values()) <= len(EXAMPLE)


DTYPES = [
  *(np.dtype(name) for name in ("?", "u1", "i1", "<i2", ">u4", "<i8", "u8")),
  *(np.dtype(name) for name in ("<f2", ">f4", "<f8")),
  np.dtype(jnp.bfloat16),
]


@given(st.data())
def test_what_is_written_is_read(path, data):
  names = data.draw(
    st.lists(st.text(max_size=5).filter("__metadata__".__ne__), max_size=4, unique=True)
  )
  arrays = {}
  for name in names:
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    values = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255)))
    arrays[name] = (values > 100 if dtype == np.bool_ else values).astype(dtype)
    if data.draw(st.booleans()):
      arrays[name] = arrays[name].T  # not contiguous
  write_safetensors(path, arrays)
  again = read_safetensors(path)
  assert again.keys() == arrays.keys()
  for name, array in arrays.items():
    assert again[name].dtype == array.dtype.newbyteorder("<")
    assert again[name].flags.aligned
    np.testing.assert_array_equal(again[name], array)


def test_the_leaves_of_a_tree_lie_under_their_paths(path):
  tree = {
    "params": {"a": [jnp.ones((2, 3)), jnp.zeros(0, jnp.bfloat16)]},
    "batch_stats": {},
    "masks": {"a": np.array([True, False])},
    "count": jnp.int32(3),
  }
  save_safetensors(path, tree)
  found = read_safetensors(path)
  expected = {
    "params/a/0": np.ones((2, 3), np.float32),
    "params/a/1": np.zeros(0, jnp.bfloat16),
    "masks/a": np.array([True, False]),
    "count": np.int32(3),
  }
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], np.asarray(array), strict=True)


def test_where_there_is_no_file_it_is_said(path, rejects):
  with rejects("there is no file"):
    read_safetensors(path.parent / "missing")


def test_what_cannot_be_written_is_refused_and_leaves_the_older_file(path, rejects):
  path.write_bytes(EXAMPLE)
  for tree, words in (
    ({"a": jnp.ones(2, jnp.complex64)}, "'a' is complex64"),
    ({"a": jax.random.key(0)}, "'a' is key<fry>"),
    ({"__metadata__": jnp.ones(2)}, "any name but __metadata__"),
    ({"a": 3.0}, "leaf a is float"),
    ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "leaf a/b comes twice"),
  ):
    with rejects(words):
      save_safetensors(path, tree)
  assert path.read_bytes() == EXAMPLE
  assert os.listdir(path.parent) == [path.name]


def test_a_file_can_be_written_again_from_its_own_arrays(path):
  path.write_bytes(EXAMPLE)
  arrays = read_safetensors(path)
  write_safetensors(path, arrays)
  again = read_safetensors(path)
  for name, array in arrays.items():
    np.testing.assert_array_equal(again[name], array, strict=True)
  assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
