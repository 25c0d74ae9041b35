"""Writing PyTorch's checkpoints by part, without PyTorch."""

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxsms.disk.tensors import Spec
from jaxsms.disk.writing import ToZip
from jaxsms.disk.zips import STORAGES

_ALIGNMENT = 64  # of the tensors in the file, as PyTorch has it for mapping them
_ZIP64 = 20  # bytes that a member of unknown size has after its other extra fields


class _Global(NamedTuple):
  """Something that the pickle calls by its name."""

  module: str
  name: str

  def __call__(self):
    """Never called here: a pickle names only what can be."""


class _Storage(NamedTuple):
  key: str
  spec: Spec


class _Tensor:
  def __init__(self, key: str, spec: Spec):
    strides = tuple(math.prod(spec.shape[i + 1 :]) for i in range(len(spec.shape)))
    hooks: collections.OrderedDict = collections.OrderedDict()
    self._arguments = (_Storage(key, spec), 0, spec.shape, strides, False, hooks)

  def __reduce__(self):
    return _Global("torch._utils", "_rebuild_tensor_v2"), self._arguments


class _Pickler(pickle._Pickler):  # the one in Python: what it writes can be changed
  dispatch: ClassVar[Any] = pickle._Pickler.dispatch.copy()

  def persistent_id(self, obj: Any) -> Any:
    if not isinstance(obj, _Storage):
      return None
    kind = next(n for n, x in STORAGES.items() if np.dtype(x) == obj.spec.dtype)
    return "storage", _Global("torch", kind), obj.key, "cpu", obj.spec.size

  def _save_name(self: Any, obj: Any) -> None:
    self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
    self.memoize(obj)

  dispatch[_Global] = _save_name


class ToPytorch(ToZip):
  """Writes a state dict, which torch.load reads.

  Args:
    file: it does not exist yet.
    specs: of the model.

  Raises:
    ValueError: a dtype is none of PyTorch's.
  """

  def __init__(self, file: str, specs: Mapping[str, Spec]):
    known = {np.dtype(dtype) for dtype in STORAGES.values()}
    for name, spec in specs.items():
      if spec.dtype not in known:
        raise ValueError(
          f"{name} is {spec.dtype.name}, which PyTorch's files do not have: write a "
          ".safetensors file"
        )
    super().__init__(file, specs)
    self._keys = {name: str(i) for i, name in enumerate(sorted(specs))}

  def __enter__(self):
    super().__enter__()
    pickled = io.BytesIO()
    tensors = ((name, _Tensor(key, self._specs[name])) for name, key in self._keys.items())
    _Pickler(pickled, 2).dump(collections.OrderedDict(tensors))
    try:
      self._write("data.pkl", pickled.getvalue())
      self._write("byteorder", b"little")
    except OSError as error:
      self.__exit__(type(error))  # nobody else does
      raise
    return self

  def begin(self, name: str) -> Any:
    return self._begin(f"data/{self._keys[name]}")

  def finish(self) -> None:
    self._write("version", b"3\n")
    super().finish()

  def _write(self, name, data):
    with self._begin(name) as member:
      member.write(data)

  def _begin(self, name):
    info = zipfile.ZipInfo(f"archive/{name}")
    file = self._archive.fp
    assert file is not None  # it is open
    begin = file.tell() + 30 + len(info.filename) + 4 + _ZIP64
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return self._archive.open(info, "w", force_zip64=True)
