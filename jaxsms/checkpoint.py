"""Models on disk. The one place that knows orbax."""

import os
from typing import Any

import jax

from jaxsms.trees import PyTree


def save(path: str | os.PathLike, tree: PyTree) -> None:
  """Writes a tree of arrays to a new folder; a killed save leaves none of that name.

  Args:
    path: folder to make; its parent is made where it is missing.
    tree: arrays in dicts, lists, tuples.

  Raises:
    ValueError: the folder exists.
  """
  import orbax.checkpoint as ocp

  path = os.path.abspath(path)
  if os.path.exists(path):
    raise ValueError(f"{path} exists already: choose another folder for this checkpoint")
  with _alone(ocp) as checkpointer:
    checkpointer.save(path, tree)


def restore(path: str | os.PathLike, like: PyTree | None = None) -> Any:
  """Reads a tree that `save` wrote.

  Args:
    path: its folder.
    like: a tree of arrays or `jax.ShapeDtypeStruct`, whose structure, shapes, dtypes and
      shardings the result takes; None gives dicts and lists as they were saved.

  Returns:
    The tree.

  Raises:
    ValueError: there is no such folder.
  """
  import orbax.checkpoint as ocp

  path = os.path.abspath(path)
  if not os.path.isdir(path):
    raise ValueError(f"there is no checkpoint {path}: give a folder that save() wrote")
  with _alone(ocp) as checkpointer:
    return checkpointer.restore(path, like)


def _alone(ocp):
  """A checkpointer for one process, whatever others do."""
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
  return ocp.StandardCheckpointer(multiprocessing_options=options)
