"""Arrays in .npz files and PyTorch checkpoints, which are archives: read by part."""

import collections
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsms.disk.npz import read_header, read_npz
from jaxsms.disk.storage import first_sentence
from jaxsms.disk.tensors import InFiles, InMemory, Range, Spec, Tensors

STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": jnp.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# Under what training scripts put the weights, beside the epoch and the optimizer.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")


def open_npz(file: str, path: str | os.PathLike) -> Tensors:
  """Opens an .npz file.

  Args:
    file: on a disk.
    path: what messages call it.

  Returns:
    The arrays; in memory where the file is compressed or an array in Fortran's order.

  Raises:
    ValueError: there is no such file, it is damaged, or holds something else than numbers.
  """
  if not os.path.isfile(file):
    raise ValueError(f"there is no file {path}: give an .npz file written by numpy.savez")
  specs, ranges = {}, {}
  try:
    with zipfile.ZipFile(file) as archive:
      damaged = archive.testzip()
      if damaged:
        raise zipfile.BadZipFile(f"{damaged} fails its checksum")
      for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in specs:
          raise zipfile.BadZipFile(f"{name} comes twice")
        shape, fortran, dtype, header = read_header(archive, info)
        if dtype.kind not in "biuf":
          raise zipfile.BadZipFile(f"{name} is {dtype}, not numbers")
        spec = Spec(shape, dtype)
        if info.file_size != header + spec.nbytes:
          raise zipfile.BadZipFile(
            f"{name} is {dtype}{list(shape)}, but has {info.file_size - header} bytes"
          )
        plain = info.compress_type == zipfile.ZIP_STORED and dtype.byteorder != ">"
        if not plain or (fortran and len(shape) > 1):
          return InMemory(path, read_npz(file))
        specs[name], ranges[name] = spec, Range(file, _data_of(file, info) + header)
  except Exception as error:  # zlib, zipfile and numpy raise a dozen kinds
    raise ValueError(
      f"{path} cannot be read ({first_sentence(error)}): give an .npz file of numbers, "
      "written by numpy.savez"
    ) from error
  return InFiles(path, specs, ranges)


def _data_of(file, info):
  """The first byte of a member's data."""
  with open(file, "rb") as handle:
    handle.seek(info.header_offset)
    header = handle.read(30)
  name, extra = struct.unpack("<HH", header[26:30])
  return info.header_offset + 30 + name + extra


class _Storage(NamedTuple):
  """What a pickle says of a member of the archive."""

  dtype: np.dtype
  key: str
  size: int


class _Tensor(NamedTuple):
  """What it says of a tensor: entries of a storage, from `begin` on, by `strides`."""

  storage: _Storage
  begin: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


_KNOWN: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _Tensor(*arguments[:4]),
  ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
  ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
  """Reads tensors and what holds them; runs nothing that the file names."""

  def find_class(self, module, name):
    if module == "torch" and name in STORAGES:
      return np.dtype(STORAGES[name])
    if (module, name) in _KNOWN:
      return _KNOWN[module, name]
    raise pickle.UnpicklingError(f"it holds {module}.{name}")

  def persistent_load(self, pid):
    kind, dtype, key, _, size = pid
    if kind != "storage" or not isinstance(dtype, np.dtype) or type(size) is not int:
      raise pickle.UnpicklingError("it holds something else than tensors")
    return _Storage(dtype, str(key), size)


def open_pytorch(file: str, path: str | os.PathLike) -> Tensors | None:
  """Opens a PyTorch checkpoint, without PyTorch.

  Args:
    file: on a disk.
    path: what messages call it.

  Returns:
    The arrays; None where PyTorch itself has to read it: it is of the kind before 1.6,
    holds other things than tensors, numbers and text, or tensors that do not lie in
    row-major order.

  Raises:
    ValueError: there is no such file, or a tensor reaches beyond its storage.
  """
  if not os.path.isfile(file):
    raise ValueError(f"there is no file {path}: give a PyTorch checkpoint")
  try:
    with zipfile.ZipFile(file) as archive:
      members = {info.filename: info for info in archive.infolist()}
      pickled = next(name for name in members if name.endswith("data.pkl"))
      folder = pickled.removesuffix("data.pkl")
      if (
        members.get(f"{folder}byteorder")
        and archive.read(f"{folder}byteorder") != b"little"
      ):
        return None
      with archive.open(pickled) as stream:
        state = _Unpickler(stream).load()
  except Exception:  # PyTorch itself says what is wrong
    return None
  state = unwrapped(state)
  if not isinstance(state, dict) or not all(isinstance(t, _Tensor) for t in state.values()):
    return None
  specs, ranges = {}, {}
  for name, tensor in state.items():
    info = members.get(f"{folder}data/{tensor.storage.key}")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
      return None
    spec = Spec(tuple(tensor.shape), tensor.storage.dtype)
    if spec.size and not _row_major(tensor):
      return None
    begin = tensor.begin * spec.dtype.itemsize
    if min(begin, *spec.shape, 0) < 0 or begin + spec.nbytes > info.file_size:
      raise ValueError(
        f"{path} cannot be read ({name!r} reaches beyond its {info.file_size} bytes): give "
        "a whole PyTorch checkpoint"
      )
    specs[str(name)] = spec
    ranges[str(name)] = Range(file, _data_of(file, info) + begin)
  return InFiles(path, specs, ranges)


def unwrapped(state: Any) -> Any:
  """The weights of what a training script saved, which may lie in a dict of several."""
  inner = [state.get(key) for key in _WRAPPERS] if isinstance(state, Mapping) else []
  return next((one for one in inner if isinstance(one, Mapping)), state)


def _row_major(tensor):
  expected = [math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape))]
  return all(
    size == 1 or stride == wanted
    for size, stride, wanted in zip(tensor.shape, tensor.strides, expected, strict=True)
  )
