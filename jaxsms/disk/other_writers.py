"""Writing .npz files and this library's checkpoints by part."""

import os
import shutil
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxsms import checkpoint
from jaxsms.disk.passes import Block
from jaxsms.disk.tensors import Spec
from jaxsms.disk.writing import ToZip
from jaxsms.export import nested


class ToNpz(ToZip):
  """Writes an .npz file, uncompressed.

  Args:
    file: it does not exist yet.
    specs: of the model.

  Raises:
    ValueError: a dtype is none of NumPy's own.
  """

  def __init__(self, file: str, specs: Mapping[str, Spec]):
    for name, spec in specs.items():
      if spec.dtype.kind == "V":
        raise ValueError(
          f"{name} is {spec.dtype.name}, which .npz files do not have: write a "
          ".safetensors file, or float32"
        )
    super().__init__(file, specs)

  def begin(self, name: str) -> Any:
    spec = self._specs[name]
    info = zipfile.ZipInfo(f"{name}.npy")
    self._member = self._archive.open(info, "w", force_zip64=True)  # closed on errors too
    description = np.lib.format.dtype_to_descr(spec.dtype.newbyteorder("<"))
    header = {"descr": description, "fortran_order": False, "shape": spec.shape}
    np.lib.format.write_array_header_1_0(self._member, header)
    return self._member


class ToCheckpoint:
  """Writes a folder as `jaxsms.checkpoint.save` does, with the masks of what is pruned.

  Arrays wait in files beside it, which are mapped: they take no memory of their own.

  Args:
    folder: it does not exist yet.
    specs: of the model.
    weights: the arrays whose zeros are masks, in the tree "params"; none where there is no
      such tree.
  """

  def __init__(self, folder: str, specs: Mapping[str, Spec], weights: list[str]):
    self._folder, self._waiting = folder, f"{folder}.arrays"
    self._arrays: dict[str, np.ndarray] = {}
    self._masks: dict[str, np.ndarray] = {}
    self._specs, self._weights = specs, frozenset(weights)
    self._with_masks = all(n.split("/")[0] in ("params", "batch_stats") for n in specs)
    self._with_masks &= any(n.startswith("params/") for n in specs)
    nested(dict.fromkeys(specs))  # names that are no tree are refused now

  def __enter__(self):
    os.mkdir(self._waiting)
    return self

  def __exit__(self, *exception):
    self._arrays, self._masks = {}, {}
    shutil.rmtree(self._waiting, ignore_errors=True)

  def write(self, block: Block, values: np.ndarray) -> None:
    name, spec = block.name, self._specs[block.name]
    if name not in self._arrays:
      self._arrays[name] = self._mapped(len(self._arrays), spec.shape, spec.dtype)
      if self._with_masks and name.startswith("params/"):
        number = f"{len(self._arrays)}.mask"
        self._masks[name] = self._mapped(number, spec.shape, np.dtype(bool))
    self._arrays[name].reshape(-1)[block.start : block.stop] = values
    if name in self._masks:
      kept = values != 0 if name in self._weights else True
      self._masks[name].reshape(-1)[block.start : block.stop] = kept

  def _mapped(self, name, shape, dtype):
    if 0 in shape or not shape:
      return np.zeros(shape, dtype)
    file = os.path.join(self._waiting, str(name))
    # As bytes: a map does not take every dtype.
    count = int(np.prod(shape)) * dtype.itemsize
    with open(file, "xb") as whole:  # a map of what a full disk lacks kills the process
      take_space(whole.fileno(), count)
    return np.memmap(file, np.uint8, "r+", shape=(count,)).view(dtype).reshape(shape)

  def finish(self) -> None:
    tree = nested({name: np.asarray(x) for name, x in self._arrays.items()})
    if self._masks:
      masks = {name: np.asarray(x) for name, x in self._masks.items()}
      tree["masks"] = nested(masks)["params"]
    checkpoint.save(self._folder, tree)


def take_space(handle: int, count: int) -> None:
  """Makes an empty file that many bytes long, on the disk where the system can do that.

  Raises:
    OSError: the disk has no room for them.
  """
  if hasattr(os, "posix_fallocate"):
    os.posix_fallocate(handle, 0, count)
  else:
    os.truncate(handle, count)


class ToMemory:
  """Keeps the arrays; where a model fits into memory.

  Args:
    specs: of the model.
  """

  def __init__(self, specs: Mapping[str, Spec]):
    self.arrays = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}

  def write(self, block: Block, values: np.ndarray) -> None:
    self.arrays[block.name].reshape(-1)[block.start : block.stop] = values

  def finish(self) -> None:
    """All of it is there."""
