"""Which leaves of a tree are weights, and where their inputs and outputs lie."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from jaxsms.trees import (
  Path,
  Prunable,
  PyTree,
  is_array,
  is_floating,
  is_parameter,
  path_names,
  path_string,
)
from jaxsms.trees import prunable as default_prunable
from jaxsms.weight_names import OWNED_WEIGHT_NAMES, WEIGHT_NAMES, is_bias, is_weight

Axis = int | Callable[[Path, Any], int]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Which leaves are weights, and their axes, in one place for every function.

  Pass it as `prunable=`. `n_m_masks` and `filter_masks` also take their `axis` from it,
  where none is given to them.

  Attributes:
    prunable: which leaves to prune, called with key path and leaf; None means
      `jaxsms.prunable`.
    inputs: axis of the inputs, or a function of key path and leaf that gives it; None
      means -2, as in Flax's and Haiku's kernels. 1 in Equinox's and PyTorch's.
    outputs: axis of the outputs; None means -1. 0 in Equinox's and PyTorch's.

  >>> torch_layout = Weights(inputs=1, outputs=0)
  >>> params = {"weight": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
  >>> jaxsms.n_m_masks(params, 0.5, prunable=torch_layout)["weight"].tolist()
  [[False, False, True, True]]
  """

  prunable: Prunable | None = None
  inputs: Axis | None = None
  outputs: Axis | None = None

  def __call__(self, path: Path, leaf: Any) -> bool:
    return (self.prunable or default_prunable)(path, leaf)


def prunable_flags(params: PyTree, prunable: Prunable | None = None) -> list[bool]:
  """For each leaf, in the order of `jax.tree.leaves`, whether it is prunable.

  Raises:
    ValueError: no leaf is, or one that is has no entries, or none that are real and
      floating.
  """
  if isinstance(prunable, Weights):
    prunable = prunable.prunable
  leaves = jax.tree.leaves_with_path(params)
  if prunable is None:
    passed_over = _in_other_modules(params)
    flags = [
      is_array(leaf) and not other and default_prunable(path, leaf)
      for (path, leaf), other in zip(leaves, passed_over, strict=True)
    ]
    for path, leaf in leaves:
      if _is_integer_weight(path, leaf):
        _reject(path, leaf, "weights are floating: turn it into floats")
  else:
    flags = [bool(is_array(leaf) and prunable(path, leaf)) for path, leaf in leaves]
  if not any(flags):
    raise ValueError(
      f"none of the {len(flags)} leaves of params is prunable ({_first_names(params)}): "
      "weights are recognised by the names kernel, w and weight, and others by their "
      "rank, so rename them, or pass your own, such as prunable=lambda path, leaf: "
      "leaf.ndim > 1"
    )
  for (path, leaf), flag in zip(leaves, flags, strict=True):
    if flag:
      _check_weight(path, leaf)
  return flags


def warn_of_unpruned_matrices(params: PyTree, prunable: Prunable | None) -> None:
  """Logs, once for each structure, the matrices that the default choice leaves out."""
  if isinstance(prunable, Weights):
    prunable = prunable.prunable
  if prunable is not None:
    return
  leaves = jax.tree.leaves_with_path(params)
  flags = prunable_flags(params)
  left_out = tuple(
    f"{path_string(path)} {list(leaf.shape)}"
    for (path, leaf), flag in zip(leaves, flags, strict=True)
    if not flag and _is_matrix(path, leaf)
  )
  if left_out:
    _warn_once(left_out)


@functools.lru_cache(maxsize=256)
def _warn_once(left_out: tuple[str, ...]) -> None:
  named = ", ".join(left_out[:8]) + (", ..." if len(left_out) > 8 else "")
  logging.warning(
    "not pruned are %s: pass prunable= to choose otherwise, such as "
    "prunable=lambda path, leaf: leaf.ndim > 1",
    named,
  )


def _is_matrix(path: Path, leaf: Any) -> bool:
  """Whether a leaf is trained and could be taken for a weight, which a bias is not."""
  if not is_parameter(path, leaf) or sum(n > 1 for n in leaf.shape) < 2:
    return False
  names = path_names(path)
  return not (names and is_bias(names[-1]))


def _check_weight(path: Path, leaf: Any) -> None:
  if not is_floating(leaf):
    _reject(path, leaf, "weights are floating: leave it out with prunable")
  if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
    _reject(
      path, leaf, "weights are real: keep real and imaginary part as leaves of their own"
    )
  if leaf.size == 0:
    _reject(path, leaf, "there is nothing in it to prune: leave it out with prunable")


def _is_integer_weight(path: Path, leaf: Any) -> bool:
  """Whether an integer leaf has the name of a weight in one of the frameworks."""
  if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.integer):
    return False
  names = path_names(path)
  by_name = names and names[-1] in WEIGHT_NAMES | OWNED_WEIGHT_NAMES
  return bool(by_name) and is_weight(names, leaf.shape)


def _reject(path: Path, leaf: Any, why: str) -> None:
  raise ValueError(f"{path_string(path)} is {leaf.dtype}{list(leaf.shape)}: {why}")


def _first_names(params: PyTree) -> str:
  paths = [path_string(path) for path, _ in jax.tree.leaves_with_path(params)]
  return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")


def _in_other_modules(node: PyTree) -> Iterator[bool]:
  """For each leaf whether it lies directly in a module whose class is no weight layer.

  In Equinox a layer norm or an embedding in a list has the path of a dense layer. A dense
  layer inside an embedding of patches is a weight layer.
  """
  name = type(node).__name__
  other = name.endswith(("Norm", "Embedding")) and "Patch" not in name

  def is_leaf_or_module(x):
    return x is not node and not isinstance(x, (dict, list, tuple))

  for child in jax.tree.leaves(node, is_leaf=is_leaf_or_module):
    if jax.tree_util.all_leaves([child]):
      yield other
    else:
      yield from _in_other_modules(child)
