"""Models on disk, with a digest of every leaf. The one place that knows orbax."""

import contextlib
import errno
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxsms import storage
from jaxsms.faults import fault_point
from jaxsms.meshes import fetch
from jaxsms.safetensors import by_path, check_fit, first_sentence
from jaxsms.storage import Damaged
from jaxsms.trees import PyTree

ARRAYS = "arrays"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # lies in a folder while it is written or removed
_one_at_a_time = threading.Lock()  # saves of two threads break one another in orbax


def save(path: str | os.PathLike, tree: PyTree, meta: dict[str, Any] | None = None) -> None:
  """Writes a tree of arrays to a new folder: when this returns, it is on the disk.

  A save that was killed is none: `restore` refuses it, and `remove` takes it away.

  Args:
    path: folder to make, on a disk or (gs://...) an object store; its parent is made
      where it is missing.
    tree: arrays in dicts, lists, tuples.
    meta: what JSON can hold, to be kept beside them.

  Raises:
    ValueError: the folder exists, or a leaf is no array.
    OSError: it cannot be written.
  """
  path = storage.as_path(path)
  if path.exists():
    raise ValueError(f"{path} exists already: choose another folder for this checkpoint")
  tree = fetch(tree)
  leaves = {name: _described(leaf) for name, leaf in by_path(tree).items()}
  try:
    path.mkdir(parents=True)
    (path / UNFINISHED).write_bytes(b"")
    fault_point("save begins")
    if leaves:
      with storage.written_to(path / ARRAYS) as folder, _orbax() as checkpointer:
        checkpointer.save(folder, tree)
    fault_point("save arrays")
    storage.write_json(path / MANIFEST, {"leaves": leaves, "meta": meta or {}})
    (path / UNFINISHED).unlink()
    if not storage.is_remote(path):
      storage.sync(path)
      storage.sync(path.parent)
  except Exception as error:  # orbax and TensorStore raise many kinds
    with contextlib.suppress(Exception):
      remove(path)
    raise OSError(f"checkpoint {path} cannot be written ({_reason(error)})") from error


def restore(path: str | os.PathLike, like: PyTree | None = None) -> Any:
  """Reads a tree that `save` wrote, and checks that it is bit by bit what was saved.

  Args:
    path: its folder.
    like: a tree of arrays or `jax.ShapeDtypeStruct`, whose structure, shapes, dtypes and
      shardings the result takes; None gives dicts and lists as they were saved.

  Returns:
    The tree; of NumPy arrays where `like` has no sharding.

  Raises:
    Damaged: a ValueError; the checkpoint is not what was saved.
    ValueError: there is none, it is of another version, or it does not fit `like`.
  """
  path = storage.as_path(path)
  leaves = read_manifest(path)["leaves"]
  tree: Any = {}
  try:
    if leaves or (path / ARRAYS).exists():
      with storage.read_from(path / ARRAYS) as folder, _orbax() as checkpointer:
        tree = checkpointer.restore(folder)
    found = by_path(tree)
    described = {name: _described(leaf) for name, leaf in found.items()}
  except Exception as error:  # whatever damage makes orbax and TensorStore raise
    raise Damaged(f"checkpoint {path} is damaged ({first_sentence(error)})") from error
  for name in leaves.keys() | described.keys():
    if leaves.get(name) != described.get(name):
      raise Damaged(f"checkpoint {path} is damaged: {name} is not what was saved")
  return tree if like is None else fill(like, found, f"checkpoint {path}")


def restore_plain(path: str | os.PathLike) -> Any:
  """Reads a tree that orbax alone wrote, without a manifest.

  Args:
    path: a folder of a `StandardCheckpointer` or `PyTreeCheckpointer`, or one step of a
      `CheckpointManager`.

  Returns:
    Dicts and lists as they were saved, of NumPy arrays and numbers.

  Raises:
    ValueError: it cannot be read.
  """
  import orbax.checkpoint as ocp

  path = storage.as_path(path)
  item = path / "default"  # what a CheckpointManager calls its only one
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)  # saved on whatever devices
  try:
    with (
      storage.read_from(item if item.is_dir() else path) as folder,
      quiet(),
      ocp.PyTreeCheckpointer() as checkpointer,
    ):
      tree = checkpointer.metadata(folder).item_metadata.tree
      return checkpointer.restore(
        folder, restore_args=jax.tree.map(lambda _: as_numpy, tree)
      )
  except Exception as error:  # orbax and TensorStore raise many kinds
    raise ValueError(
      f"{path} cannot be read ({first_sentence(error)}): give a folder that "
      "jaxsms.checkpoint.save or an orbax StandardCheckpointer wrote"
    ) from error


def fill(like: PyTree, arrays: dict[str, np.ndarray], what: str) -> PyTree:
  """Arrays by name (see `jaxsms.safetensors.by_path`) as a tree.

  Args:
    like: see `restore`.
    arrays: the leaves.
    what: where they come from, for the message.

  Returns:
    The tree.

  Raises:
    ValueError: names or shapes differ.
  """
  expected = by_path(like)
  check_fit(f"{what} holds another model", expected, arrays, "give one that fits")

  def leaf(name, wanted):
    value, sharding = arrays[name], getattr(wanted, "sharding", None)
    if value.dtype != wanted.dtype:
      value = value.astype(wanted.dtype)
    return value if sharding is None else jax.device_put(value, sharding)

  leaves = [leaf(name, wanted) for name, wanted in expected.items()]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """Reads what lies beside the arrays of a checkpoint.

  Args:
    path: a folder that `save` wrote.

  Returns:
    `meta`, as it was saved, and `leaves`: shape, dtype and SHA-256 of each by its name.

  Raises:
    Damaged: a ValueError; it is not what was saved.
    ValueError: there is no checkpoint, or it is of another version.
  """
  path = storage.as_path(path)
  if not path.is_dir() or is_unfinished(path):
    raise ValueError(f"there is no checkpoint {path}: give a folder that save() wrote")
  try:
    manifest = storage.read_json(path / MANIFEST)
  except OSError as error:
    raise Damaged(
      f"checkpoint {path} is damaged: its {MANIFEST} cannot be read, or another version "
      "wrote it"
    ) from error
  if not all(isinstance(manifest.get(key), dict) for key in ("leaves", "meta")):
    raise Damaged(f"checkpoint {path} is damaged: its {MANIFEST} lacks leaves or meta")
  return manifest


def is_unfinished(path: str | os.PathLike) -> bool:
  """Whether a folder is what a killed save or removal left.

  Args:
    path: an existing folder.

  Returns:
    True where it is empty or marked as unfinished.
  """
  path = storage.as_path(path)
  return (path / UNFINISHED).exists() or not any(path.iterdir())


def remove(path: str | os.PathLike) -> None:
  """Removes a checkpoint; what a kill leaves of it is unfinished, not damaged.

  Args:
    path: a folder that `save` wrote.
  """
  path = storage.as_path(path)
  (path / UNFINISHED).write_bytes(b"")
  for child in path.iterdir():
    fault_point("remove")
    if child.name != UNFINISHED:
      child.rmtree() if child.is_dir() else child.unlink()
  (path / UNFINISHED).unlink()
  if path.exists():  # an object store has no empty folders
    path.rmdir()


def _described(leaf):
  """A leaf's shape, dtype and digest."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  array = np.ascontiguousarray(leaf)
  data = array.reshape(-1).view(np.uint8)
  return {
    "shape": list(np.shape(leaf)),
    "dtype": str(array.dtype),
    "sha256": hashlib.sha256(data).hexdigest(),
  }


def _reason(error):
  """Why something cannot be written, in a few words."""
  for known in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
    if os.strerror(known) in str(error):
      return os.strerror(known)
  return first_sentence(error)


@contextlib.contextmanager
def _orbax():
  """A checkpointer of this process alone, whose errors are raised and not logged."""
  import orbax.checkpoint as ocp

  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
  with quiet(), ocp.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
    yield checkpointer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps out what orbax would log, and other threads that use it."""

  def from_elsewhere(record):
    return "orbax" not in record.pathname

  logger = logging.getLogger("absl")
  with _one_at_a_time:
    logger.addFilter(from_elsewhere)
    try:
      yield
    finally:
      logger.removeFilter(from_elsewhere)
