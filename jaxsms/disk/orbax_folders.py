"""Checkpoints of orbax and of this library, read array by array."""

import collections
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsms import checkpoint
from jaxsms.disk.storage import first_sentence
from jaxsms.disk.tensors import Spec, Tensors
from jaxsms.trees import is_array, path_string

_METADATA = "_METADATA"  # in every folder with arrays that orbax wrote
_ITEMS = ("default", "params", "model", "state")  # of a step, the first that is there
_STEP = re.compile(r"^(?:\w*_)?(\d+)$")
_HELD = 4  # pieces in memory, so that several threads may read on
_PIECE = 2**24  # entries that are read at once where chunks are smaller
_ADVICE = (
  "give a folder in Hugging Face's layout, or one of jaxsms.checkpoint.save or of orbax"
)


class Chunks(Tensors):
  """Arrays in orbax's chunks, of which the last few are held.

  Args:
    path: for messages.
    folder: that orbax wrote, on a disk.
    leaves: what orbax says of each array, by name.
    digests: SHA-256 of each array that has one.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    folder: str,
    leaves: Mapping[str, Any],
    digests: Mapping[str, str],
  ):
    specs = {name: Spec(tuple(x.shape), np.dtype(x.dtype)) for name, x in leaves.items()}
    super().__init__(path, specs, layout="checkpoint")
    with open(os.path.join(folder, _METADATA), encoding="utf-8") as file:
      kinds = json.load(file)
    self._driver = "zarr3" if kinds.get("use_zarr3") else "zarr"
    self._is_database = kinds.get("use_ocdbt", True)
    self._folder, self._leaves, self._digests = folder, leaves, digests
    self._pieces: collections.OrderedDict = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(
    self, name: str, start: int, stop: int, into: np.ndarray | None = None
  ) -> np.ndarray:
    spec, rows = self.specs[name], self._rows(name)
    entries = rows * max(spec.size // max(spec.shape[0], 1), 1) if spec.shape else 1
    first, last = start // entries, max(stop - 1, start) // entries
    with self._lock:
      pieces = [self._piece(name, i, rows) for i in range(first, last + 1)]
    values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return values[start - first * entries : stop - first * entries]

  def _rows(self, name):
    """How many rows are read at once: whole chunks, or all where there is a digest."""
    shape, leaf = self.specs[name].shape, self._leaves[name]
    storage = getattr(leaf, "storage", None)
    if not shape:
      return 1
    if name in self._digests or storage is None or not storage.chunk_shape:
      return max(shape[0], 1)
    chunk = max(storage.chunk_shape[0], 1)
    row = max(self.specs[name].size // max(shape[0], 1), 1)
    return min(chunk * max(_PIECE // (chunk * row), 1), shape[0])

  def _piece(self, name, number, rows):
    key = name, number
    if key in self._pieces:
      self._pieces.move_to_end(key)
      return self._pieces[key]
    try:
      store = self._open(name)
      stop = min((number + 1) * rows, store.shape[0]) if store.ndim else 0
      part = store[number * rows : stop] if store.ndim else store
      values = np.ascontiguousarray(part.read().result()).reshape(-1)
    except Exception as error:  # TensorStore raises many kinds
      raise ValueError(
        f"{self.path} cannot be read ({first_sentence(error)}): give a whole checkpoint"
      ) from error
    digest = self._digests.get(name)
    if digest and hashlib.sha256(values.view(np.uint8).data).hexdigest() != digest:
      raise ValueError(
        f"checkpoint {self.path} is damaged: {name} is not what was saved, give a whole one"
      )
    self._pieces[key] = values
    if len(self._pieces) > _HELD:
      self._pieces.popitem(last=False)
    return values

  def _open(self, name):
    import tensorstore

    folder, key = self._folder.rstrip("/"), self._leaves[name].name
    store = {"driver": "file", "path": f"{folder}/{key}/"}
    if self._is_database:
      store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{key}/"}
    spec = {"driver": self._driver, "kvstore": store}
    found = tensorstore.open(spec, open=True, read=True).result()
    if tuple(found.shape) != self.specs[name].shape:
      raise ValueError(f"{name} is {list(found.shape)} and not what its metadata say")
    return found


def open_checkpoint(local: str, path: str | os.PathLike) -> Tensors:
  """Opens a folder that `jaxsms.checkpoint.save` or orbax wrote.

  Args:
    local: the folder, on a disk; that of a CheckpointManager stands for its newest step.
    path: what messages call it.

  Raises:
    ValueError: it holds no checkpoint, or a damaged one.
  """
  if os.path.exists(os.path.join(local, checkpoint.MANIFEST)):
    leaves = checkpoint.read_manifest(local)["leaves"]
    folder = os.path.join(local, checkpoint.ARRAYS)
    digests = {name: leaf["sha256"] for name, leaf in leaves.items()}
  elif checkpoint.holds_nothing(local):
    raise ValueError(
      f"{path} cannot be read (it is empty, or a save was interrupted): {_ADVICE}"
    )
  else:
    folder, digests = _arrays_of(local, path), {}
  try:
    found = Chunks(path, folder, _array_metadata(folder), digests)
    if digests and found.specs.keys() != digests.keys():
      raise ValueError("its arrays are not those that were saved")
    return found
  except Exception as error:  # orbax raises many kinds
    raise ValueError(
      f"{path} cannot be read ({first_sentence(error)}): give a folder that "
      "jaxsms.checkpoint.save or an orbax StandardCheckpointer wrote"
    ) from error


def _arrays_of(folder, path):
  """The folder in which orbax's arrays lie."""
  steps = {
    int(match[1]): name
    for name in os.listdir(folder)
    if (match := _STEP.match(name)) and os.path.isdir(os.path.join(folder, name))
  }
  if steps and not os.path.exists(os.path.join(folder, _METADATA)):
    folder = os.path.join(folder, steps[max(steps)])
  if os.path.exists(os.path.join(folder, _METADATA)):
    return folder
  items = sorted(
    name
    for name in os.listdir(folder)
    if os.path.exists(os.path.join(folder, name, _METADATA))
  )
  known = [name for name in _ITEMS if name in items]
  if not known and len(items) != 1:
    holds = f"several items, {', '.join(items[:5])}" if items else "no checkpoint"
    raise ValueError(f"{path} cannot be read (it holds {holds}): {_ADVICE}")
  return os.path.join(folder, (known or items)[0])


def _array_metadata(folder):
  """What orbax says of each array by name; what is no array is left out."""
  import orbax.checkpoint as ocp

  with checkpoint.quiet(), ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(folder).item_metadata.tree
  leaves = jax.tree.leaves_with_path(tree)
  return {path_string(path): leaf for path, leaf in leaves if is_array(leaf)}
