"""Arrays in safetensors files, the format in which most weights are published."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.checks import check_outside_jit
from jaxsms.disk import storage
from jaxsms.disk.by_name import by_path
from jaxsms.disk.files import on_disk, output_file
from jaxsms.disk.storage import first_sentence
from jaxsms.trees import PyTree

_MAX_HEADER = 100_000_000  # bytes, as the format's own library allows
_DTYPES = {
  "BOOL": "bool",
  "U8": "uint8",
  "I8": "int8",
  "U16": "uint16",
  "I16": "int16",
  "F16": "float16",
  "BF16": "bfloat16",
  "U32": "uint32",
  "I32": "int32",
  "F32": "float32",
  "U64": "uint64",
  "I64": "int64",
  "F64": "float64",
}
_CODES = {name: code for code, name in _DTYPES.items()}


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads all arrays of a safetensors file.

  Args:
    path: the file.

  Returns:
    The arrays by name, read-only. They are views of the file: what is not used is not
    read, and the file must not be written in place while they are.

  Raises:
    ValueError: there is no such file, or it is damaged: its header is no JSON object with
      a known dtype, a shape and a range of bytes for each name, names come twice, or the
      ranges do not cover the rest of the file, each byte once.

  References:
    https://github.com/huggingface/safetensors#format

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/arrays.safetensors"
    >>> write_safetensors(path, {"kernel": np.array([1.0, 2.0])})
    >>> read_safetensors(path)["kernel"].tolist()
    [1.0, 2.0]
  """
  return read_with_metadata(path)[0]


def read_with_metadata(
  path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads all arrays of a safetensors file, and the text that is stored with them.

  Args:
    path: the file.

  Returns:
    The arrays as `read_safetensors` gives them, and the metadata; {} where there is none.

  Raises:
    ValueError: see `read_safetensors`.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/arrays.safetensors"
    >>> write_safetensors(path, {"kernel": np.ones(2)}, metadata={"format": "pt"})
    >>> read_with_metadata(path)[1]
    {'format': 'pt'}
  """
  file = storage.as_path(path)
  with reading(file, path), on_disk(file) as local:
    return _read(local)


@contextlib.contextmanager
def reading(file: storage.Path, path: str | os.PathLike) -> Iterator[None]:
  """Puts what goes wrong while a safetensors file is read into one ValueError.

  Args:
    file: where it lies.
    path: what messages call it.
  """
  if not storage.is_file(file):
    raise ValueError(f"there is no file {path}: give a .safetensors file")
  try:
    yield
  except (OSError, ValueError, OverflowError, RecursionError) as error:
    raise ValueError(
      f"{path} cannot be read ({first_sentence(error)}): give a whole .safetensors file"
    ) from error


class Place(NamedTuple):
  """Where an array lies in a safetensors file.

  Attributes:
    dtype: of its entries, little endian.
    shape: as the header has it.
    begin: its first byte, counted from the start of the file.
    end: the byte after its last.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int


def read_header(path: str | os.PathLike) -> tuple[dict[str, Place], dict[str, str]]:
  """Reads the header of a safetensors file, without the arrays.

  Args:
    path: the file, on a disk.

  Returns:
    Where each array lies, by name, and the metadata; {} where there is none.

  Raises:
    ValueError: see `read_safetensors`.
    OSError: it cannot be read.
  """
  if os.path.exists(path) and not os.path.isfile(path):  # a pipe may never end
    raise ValueError("it is no file")
  with open(path, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
      raise ValueError(f"it has {size} bytes, too few for a header")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MAX_HEADER):
      raise ValueError(f"its header would have {length} bytes, and the file has {size}")
    text = file.read(length).decode()
  if not text.startswith("{"):
    raise ValueError("its header is no JSON object")
  header = json.loads(text, object_pairs_hook=unique)
  metadata = header.pop("__metadata__", {})
  _check_metadata(metadata)
  entries = {name: _entry(name, entry) for name, entry in header.items()}
  covered = 0
  for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
    if begin != covered:
      raise ValueError(f"{name!r} begins at byte {begin}, not at {covered}")
    covered = end
  start = 8 + length
  if covered != size - start:
    raise ValueError(f"it holds {size - start} bytes of data, but names {covered}")
  places = {
    name: Place(dtype, tuple(shape), start + begin, start + end)
    for name, (dtype, shape, begin, end) in entries.items()
  }
  return places, metadata


def _read(path):
  places, metadata = read_header(path)
  data = np.memmap(path, np.uint8, "r").view(np.ndarray)
  return {name: _view(name, data, *place) for name, place in places.items()}, metadata


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object as a dict; ValueError where a name comes twice."""
  result = dict(pairs)
  if len(result) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"a name comes twice in its header: {twice!r}")
  return result


def _check_metadata(metadata):
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise ValueError("its __metadata__ are not strings by name")


def _entry(name, entry):
  """The dtype, shape, first byte and end of an entry, each checked on its own."""
  try:
    code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = jnp.dtype(_DTYPES[code]).newbyteorder("<")
    numbers = [*shape, begin, end]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{name!r} has no dtype of {', '.join(_DTYPES)}, shape and pair of data_offsets"
    ) from error
  # type() and not isinstance(): True is an int too.
  if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or len(shape) > 64:
    raise ValueError(f"{name!r} has a shape or data_offsets out of range")
  if math.prod(shape) * dtype.itemsize != end - begin:
    raise ValueError(f"{name!r} is {code}{shape}, but has {end - begin} bytes")
  return dtype, shape, begin, end


def _view(name, data, dtype, shape, begin, end):
  values = data[begin:end]
  if dtype.kind == "b" and values.size and values.max() > 1:
    raise ValueError(f"{name!r} is BOOL, but has bytes other than 0 and 1")
  return values.view(dtype).reshape(shape)


def write_safetensors(
  path: str | os.PathLike,
  arrays: Mapping[str, jax.Array | np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes arrays to a safetensors file; a killed write leaves no file of that name.

  Args:
    path: the file; its folder is made where it is missing, and an older file replaced.
    arrays: floating (not complex), integer or bool arrays, of JAX or NumPy, by name.
    metadata: text to store with them, by name.

  Raises:
    ValueError: a name or dtype that the format does not have.

  Example:
    >>> import os, tempfile
    >>> path = tempfile.mkdtemp() + "/arrays.safetensors"
    >>> write_safetensors(path, {"kernel": np.ones(2)}, metadata={"format": "pt"})
    >>> os.path.exists(path)
    True
  """
  check_dtypes(arrays)
  text, places = make_header(arrays, metadata or {})
  with output_file(path) as file:
    file.write(text)
    for name in places:
      file.write(as_bytes(np.asarray(arrays[name])).data)


def as_bytes(values: np.ndarray) -> np.ndarray:
  """The bytes of an array [n] as they lie in files, uint8."""
  values = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
  return values.reshape(-1).view(np.uint8)


def make_header(
  arrays: Mapping[str, Any], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Place]]:
  """The first bytes of a safetensors file, and where its arrays go.

  Args:
    arrays: what has a shape and a dtype, by name.
    metadata: text to store with them, by name.

  Returns:
    The bytes, and the places in the order in which they lie in the file.
  """
  # Largest items first: then each array lies at a multiple of its item size.
  names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
  header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  begin, places = 0, {}
  for name in names:
    shape, dtype = tuple(arrays[name].shape), arrays[name].dtype
    end = begin + math.prod(shape) * dtype.itemsize
    entry = {"dtype": _CODES[dtype.name], "shape": shape, "data_offsets": [begin, end]}
    header[name], places[name] = entry, Place(dtype, shape, begin, end)
    begin = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  text = len(text).to_bytes(8, "little") + text
  moved = {
    name: place._replace(begin=place.begin + len(text), end=place.end + len(text))
    for name, place in places.items()
  }
  return text, moved


def arrays_of(tree: PyTree) -> dict[str, np.ndarray]:
  """Leaves by path, of a tree that a file can take; ValueError where it cannot."""
  named = by_path(tree)
  check_dtypes(named)
  return {name: np.asarray(leaf) for name, leaf in named.items()}


def check_dtypes(arrays: Mapping[str, Any]) -> None:
  """Raises ValueError where a name or a dtype is none that the format has, or no value."""
  check_outside_jit("save", arrays, "call it outside of jit, on what the program gives")
  for name, array in arrays.items():
    if name == "__metadata__" or array.dtype.name not in _CODES:
      raise ValueError(
        f"{name!r} is {array.dtype.name}: a safetensors file takes {', '.join(_CODES)} "
        "under any name but __metadata__"
      )


def digest_of(arrays: Mapping[str, np.ndarray], text: str) -> str:
  """SHA-256 of arrays with their names, dtypes and shapes, and of a text beside them."""
  digest = hashlib.sha256(text.encode())
  for name in sorted(arrays):
    array = arrays[name]
    digest.update(f"\n{name} {array.dtype.name} {list(array.shape)}\n".encode())
    digest.update(as_bytes(array).data)
  return digest.hexdigest()


def save_safetensors(path: str | os.PathLike, tree: PyTree) -> None:
  """Writes a tree of arrays to a safetensors file, under names such as "params/a/kernel".

  Args:
    path: the file; its folder is made where it is missing, and an older file replaced.
    tree: floating (not complex), integer or bool arrays in dicts, lists, tuples.

  Raises:
    ValueError: a leaf is no such array, or two have the same name.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_safetensors(path, {"params": {"kernel": np.array([1.0, 2.0])}})
    >>> list(read_safetensors(path))
    ['params/kernel']
  """
  write_safetensors(path, by_path(tree))
