"""Arrays in files, read by part: names, shapes and dtypes first, values where needed."""

import math
import os
import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.trees import prunable


class Spec(NamedTuple):
  """What is known of an array before it is read.

  Attributes:
    shape: of the array.
    dtype: of its entries.
  """

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def size(self) -> int:
    """How many entries it has."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """How many bytes they take."""
    return self.size * self.dtype.itemsize

  @property
  def is_floating(self) -> bool:
    """Whether the entries are floating numbers."""
    return jnp.issubdtype(self.dtype, jnp.floating)


class Tensors:
  """A model whose arrays are read by part.

  Attributes:
    path: where it lies, for messages.
    layout: "file" (one file), "shards" (a folder in Hugging Face's layout) or
      "checkpoint" (a folder of orbax or of this library).
    specs: shape and dtype of each array by name.
    metadata: text that lies beside them.
    folder: where configuration and tokenizer lie beside the weights, on a disk; else None.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    specs: Mapping[str, Spec],
    layout: str = "file",
    metadata: Mapping[str, str] | None = None,
    folder: str | None = None,
  ):
    self.path = f"{path}"
    self.specs = dict(specs)
    self.layout = layout
    self.metadata = dict(metadata or {})
    self.folder = folder

  def read(
    self, name: str, start: int, stop: int, into: np.ndarray | None = None
  ) -> np.ndarray:
    """The entries from `start` to `stop`, in row-major order, [stop - start].

    May be called from several threads at once. `into`, of that shape and dtype, may be
    used for them, and need not.

    Raises:
      ValueError: the file is not what it said it was.
    """
    raise NotImplementedError

  def keep(self, names: Iterable[str]) -> None:
    """Forgets all other arrays."""
    self.specs = {name: self.specs[name] for name in names}

  def close(self) -> None:
    """Gives back what is held open."""


class InMemory(Tensors):
  """Arrays that are in memory, or mapped, already."""

  def __init__(
    self, path: str | os.PathLike, arrays: Mapping[str, np.ndarray], **more: Any
  ):
    super().__init__(
      path, {n: Spec(tuple(x.shape), np.dtype(x.dtype)) for n, x in arrays.items()}, **more
    )
    self.arrays = arrays

  def read(
    self, name: str, start: int, stop: int, into: np.ndarray | None = None
  ) -> np.ndarray:
    return np.asarray(self.arrays[name]).reshape(-1)[start:stop]


class Range(NamedTuple):
  """Where the entries of an array lie, one after the other.

  Attributes:
    file: path of the file.
    begin: the first byte.
  """

  file: str
  begin: int


class InFiles(Tensors):
  """Arrays that lie in files as plain bytes.

  Nothing is mapped: what a process maps counts as its memory for as long as the system
  leaves it there.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    specs: Mapping[str, Spec],
    ranges: Mapping[str, Range],
    **more: Any,
  ):
    super().__init__(path, specs, **more)
    self._ranges = ranges
    self._handles: dict[str, int] = {}
    self._lock = threading.Lock()

  def range_of(self, name: str) -> Range:
    """Where an array lies."""
    return self._ranges[name]

  def read(
    self, name: str, start: int, stop: int, into: np.ndarray | None = None
  ) -> np.ndarray:
    file, begin = self._ranges[name]
    values = np.empty([stop - start], self.specs[name].dtype) if into is None else into
    view = values.view(np.uint8).data
    at = begin + start * values.itemsize
    while view:
      count = os.preadv(self._handle(file), [view], at)
      if not count:
        raise ValueError(f"{file} cannot be read (it became shorter): give a whole file")
      view, at = view[count:], at + count
    if values.dtype == bool and values.view(np.uint8).max(initial=0) > 1:
      raise ValueError(
        f"{file} cannot be read ({name!r} is BOOL, but has bytes other than 0 and 1): give "
        "a whole file"
      )
    return values

  def _handle(self, file):
    if file not in self._handles:
      with self._lock:
        if file not in self._handles:
          self._handles[file] = os.open(file, os.O_RDONLY)
    return self._handles[file]

  def close(self) -> None:
    for handle in self._handles.values():
      os.close(handle)
    self._handles = {}


def prunable_names(specs: Mapping[str, Spec]) -> list[str]:
  """The arrays that can be pruned, as `jaxsms.prunable` sees them, in sorted order.

  Args:
    specs: by names of ours, "a/kernel", or of PyTorch's, "a.weight".
  """
  return sorted(name for name, spec in specs.items() if prunable(key_path(name), spec))


def key_path(name: str) -> tuple[jax.tree_util.DictKey, ...]:
  """A name of ours, "a/kernel", or of PyTorch's, "a.weight", as a key path."""
  return tuple(jax.tree_util.DictKey(word) for word in name.replace(".", "/").split("/"))
