"""Models on disk, with a digest of every leaf."""

import contextlib
import errno
import hashlib
import os
from typing import Any, TypedDict, cast

import jax
import numpy as np

from jaxsms.checks import check_outside_jit
from jaxsms.devices.meshes import fetch
from jaxsms.disk import storage
from jaxsms.disk.by_name import by_path, check_fit
from jaxsms.disk.faults import fault_point
from jaxsms.disk.orbax_writer import open_checkpointer, quiet
from jaxsms.disk.storage import Damaged, first_sentence
from jaxsms.trees import PyTree

ARRAYS = "arrays"
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # lies in a folder while it is written or removed


class LeafRecord(TypedDict):
  """The entry of a leaf in a manifest."""

  shape: list[int]
  dtype: str
  sha256: str


class Manifest(TypedDict):
  """What is stored with the arrays of a checkpoint: `meta`, and a record of each leaf."""

  leaves: dict[str, LeafRecord]
  meta: dict[str, Any]


def save(path: storage.Path, tree: PyTree, meta: dict[str, Any] | None = None) -> None:
  """Writes a tree of arrays to a new folder; when this returns, it is on the disk.

  `restore` refuses a save that was killed, and `remove` deletes it.

  Args:
    path: folder to make, on a disk or (gs://...) an object store; its parent is made
      where it is missing.
    tree: arrays in dicts, lists, tuples.
    meta: values that JSON can hold, to store with them.

  Raises:
    ValueError: the folder exists, a leaf is no array or not of numbers, or values are
      traced.
    OSError: it cannot be written.

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> jaxsms.checkpoint.save(folder, {"kernel": np.ones((2, 3))}, {"epoch": 7})
    >>> jaxsms.checkpoint.read_manifest(folder)["meta"]
    {'epoch': 7}
  """
  check_outside_jit("save", tree, "call it outside of jit, on what the program gives")
  root = storage.as_path(path)
  if root.exists():
    raise ValueError(f"{root} exists already: choose another folder for this checkpoint")
  tree = jax.tree.map(_native, fetch(tree))
  by_name = by_path(tree)
  _check_dtypes(by_name)
  leaves = {name: _described(leaf) for name, leaf in by_name.items()}
  try:
    root.mkdir(parents=True)
    storage.write_bytes(root / UNFINISHED, b"")
    fault_point("save begins")
    if leaves:
      with storage.written_to(root / ARRAYS) as folder, open_checkpointer() as checkpointer:
        checkpointer.save(folder, jax.tree.map(_storable, tree))
    fault_point("save arrays")
    storage.write_json(root / MANIFEST, {"leaves": leaves, "meta": meta or {}})
    (root / UNFINISHED).unlink()
    if not storage.is_remote(root):
      storage.sync(root)
      storage.sync(root.parent)
  except Exception as error:  # orbax and TensorStore raise many kinds
    with contextlib.suppress(Exception):
      remove(root)
    raise OSError(f"checkpoint {root} cannot be written ({_reason(error)})") from error


def restore(path: storage.Path, like: PyTree | None = None) -> Any:
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

  Example:
    >>> import tempfile
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> jaxsms.checkpoint.save(folder, {"kernel": np.array([[1.0, 2.0]])})
    >>> jaxsms.checkpoint.restore(folder)["kernel"].tolist()
    [[1.0, 2.0]]
  """
  root = storage.as_path(path)
  leaves = read_manifest(root)["leaves"]
  tree: Any = {}
  try:
    if leaves or (root / ARRAYS).exists():
      with storage.read_from(root / ARRAYS) as folder, open_checkpointer() as checkpointer:
        tree = checkpointer.restore(folder)
    found = {k: _restored_leaf(x, leaves.get(k)) for k, x in by_path(tree).items()}
    tree = jax.tree.unflatten(jax.tree.structure(tree), found.values())
    described = {name: _described(leaf) for name, leaf in found.items()}
  except Exception as error:  # whatever damage makes orbax and TensorStore raise
    raise Damaged(f"checkpoint {root} is damaged ({first_sentence(error)})") from error
  for name in leaves.keys() | described.keys():
    if leaves.get(name) != described.get(name):
      raise Damaged(f"checkpoint {root} is damaged: {name} is not what was saved")
  return tree if like is None else fill(like, found, f"checkpoint {root}")


def restore_plain(path: storage.Path) -> Any:
  """Reads a tree that orbax alone wrote, without a manifest.

  Args:
    path: a folder of a `StandardCheckpointer` or `PyTreeCheckpointer`, or one step of a
      `CheckpointManager`.

  Returns:
    Dicts and lists as they were saved, of NumPy arrays and numbers.

  Raises:
    ValueError: it cannot be read.

  Example:
    >>> import orbax.checkpoint, tempfile
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    ...   checkpointer.save(folder, {"kernel": np.array([[1.0, 2.0]])})
    >>> jaxsms.checkpoint.restore_plain(folder)["kernel"].tolist()
    [[1.0, 2.0]]
  """
  import orbax.checkpoint as ocp

  root = storage.as_path(path)
  item = root / "default"  # what a CheckpointManager calls its only one
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)  # saved on whatever devices
  try:
    with (
      storage.read_from(item if item.is_dir() else root) as folder,
      quiet(),
      ocp.PyTreeCheckpointer() as checkpointer,
    ):
      tree = checkpointer.metadata(folder).item_metadata.tree
      return checkpointer.restore(
        folder, restore_args=jax.tree.map(lambda _: as_numpy, tree)
      )
  except Exception as error:  # orbax and TensorStore raise many kinds
    raise ValueError(
      f"{root} cannot be read ({first_sentence(error)}): give a folder that "
      "jaxsms.checkpoint.save or an orbax StandardCheckpointer wrote"
    ) from error


def fill(like: PyTree, arrays: dict[str, np.ndarray], what: str) -> PyTree:
  """Arrays by name (see `jaxsms.disk.by_name.by_path`) as a tree.

  Args:
    like: see `restore`.
    arrays: the leaves.
    what: where they come from, for the message.

  Returns:
    The tree.

  Raises:
    ValueError: names or shapes differ.

  Example:
    >>> like = {"Dense_0": {"kernel": jax.ShapeDtypeStruct((1, 2), jnp.bfloat16)}}
    >>> arrays = {"Dense_0/kernel": np.array([[1.0, 2.0]])}
    >>> jaxsms.checkpoint.fill(like, arrays, "this file")["Dense_0"]["kernel"].dtype.name
    'bfloat16'
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


def read_manifest(path: storage.Path) -> Manifest:
  """Reads what is stored with the arrays of a checkpoint.

  Args:
    path: a folder that `save` wrote.

  Returns:
    `meta`, as it was saved, and `leaves`: shape, dtype and SHA-256 of each by its name.

  Raises:
    Damaged: a ValueError; it is not what was saved.
    ValueError: there is no checkpoint, or it is of another version.

  Example:
    >>> import hashlib, tempfile
    >>> folder, kernel = tempfile.mkdtemp() + "/model", np.ones((2, 3), np.float32)
    >>> jaxsms.checkpoint.save(folder, {"kernel": kernel})
    >>> record = jaxsms.checkpoint.read_manifest(folder)["leaves"]["kernel"]
    >>> record["shape"], record["dtype"]
    ([2, 3], 'float32')
    >>> record["sha256"] == hashlib.sha256(kernel.tobytes()).hexdigest()
    True
  """
  root = storage.as_path(path)
  if not root.is_dir() or is_unfinished(root):
    raise ValueError(f"there is no checkpoint {root}: give a folder that save() wrote")
  try:
    manifest = storage.read_json(root / MANIFEST)
  except OSError as error:
    raise Damaged(
      f"checkpoint {root} is damaged: its {MANIFEST} cannot be read, or another version "
      "wrote it"
    ) from error
  if not all(isinstance(manifest.get(key), dict) for key in ("leaves", "meta")):
    raise Damaged(f"checkpoint {root} is damaged: its {MANIFEST} lacks leaves or meta")
  return cast(Manifest, manifest)


def is_unfinished(path: storage.Path) -> bool:
  """Whether a folder was left by a save or a removal that did not finish.

  Args:
    path: an existing folder.

  Returns:
    True where it is marked as unfinished, or holds neither arrays nor a manifest.

  Example:
    >>> import pathlib, tempfile
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> jaxsms.checkpoint.save(folder, {"kernel": np.ones((2, 3))})
    >>> jaxsms.checkpoint.is_unfinished(folder)
    False
    >>> pathlib.Path(folder, "unfinished").touch()
    >>> jaxsms.checkpoint.is_unfinished(folder)
    True
  """
  root = storage.as_path(path)
  if (root / UNFINISHED).exists():
    return True
  return not any((root / name).exists() for name in (ARRAYS, MANIFEST))


def holds_nothing(path: storage.Path) -> bool:
  """Whether a folder is empty or holds an unfinished checkpoint of this library.

  Args:
    path: an existing folder.

  Returns:
    True where nothing can be read of it.

  Example:
    >>> import tempfile
    >>> jaxsms.checkpoint.holds_nothing(tempfile.mkdtemp())
    True
  """
  root = storage.as_path(path)
  return (root / UNFINISHED).exists() or not any(root.iterdir())


def remove(path: storage.Path) -> None:
  """Removes a checkpoint; a removal that is killed leaves an unfinished one.

  Args:
    path: a folder that `save` wrote.

  Example:
    >>> import pathlib, tempfile
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> jaxsms.checkpoint.save(folder, {"kernel": np.ones((2, 3))})
    >>> jaxsms.checkpoint.remove(folder)
    >>> pathlib.Path(folder).exists()
    False
  """
  root = storage.as_path(path)
  if not (root / UNFINISHED).exists():
    (root / UNFINISHED).write_bytes(b"")
  for child in root.iterdir():
    fault_point("remove")
    if child.name != UNFINISHED:
      child.rmtree() if child.is_dir() else child.unlink()
  (root / UNFINISHED).unlink()
  if root.exists():  # an object store has no empty folders
    root.rmdir()


def _native(leaf: Any) -> Any:
  """A leaf in this machine's byte order, the only one that is stored."""
  if not isinstance(leaf, np.ndarray | np.generic):
    return leaf
  return np.asarray(leaf, leaf.dtype.newbyteorder("="))


def _check_dtypes(leaves: dict[str, Any]) -> None:
  """Raises ValueError where a leaf holds something else than numbers."""
  kinds = (np.number, np.bool_, jax.dtypes.prng_key)
  for name, leaf in leaves.items():
    if not any(jax.dtypes.issubdtype(leaf.dtype, kind) for kind in kinds):
      raise ValueError(f"leaf {name} is {leaf.dtype}: give arrays of numbers or bools")


def _storable(leaf: Any) -> Any:
  """What is written of a leaf: a zero where it has no elements, which orbax refuses."""
  return leaf if np.size(leaf) else np.zeros([1], np.uint8)


def _restored_leaf(leaf: Any, described: LeafRecord | None) -> Any:
  """A leaf as it was saved: without elements where its entry in the manifest says so."""
  if described is None or 0 not in described["shape"]:
    return leaf
  return np.zeros(described["shape"], described["dtype"])


def _described(leaf: Any) -> LeafRecord:
  """A leaf's shape, dtype and digest."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  array = np.ascontiguousarray(leaf)
  data = array.reshape(-1).view(np.uint8)
  return {
    "shape": list(np.shape(leaf)),
    "dtype": str(array.dtype),
    "sha256": hashlib.sha256(data.data).hexdigest(),
  }


def _reason(error: Exception) -> str:
  """Why something cannot be written, in a few words."""
  for known in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
    if os.strerror(known) in str(error):
      return os.strerror(known)
  return first_sentence(error)
