"""Masks aligned with the leaves of the trees they are for."""

from typing import Any

import jax
import optax

from jaxsms.trees import Path, PyTree, is_array, path_names, path_string


def match_masks(params: PyTree, masks: PyTree) -> PyTree:
  """Checks masks against the trees they are for, and gives them their structure.

  Args:
    params: a tree of parameters, gradients or updates, or a stack of such.
    masks: tree of bool arrays for the same leaves; the containers may differ (Flax NNX
      hands out the same parameters as State and as plain dicts).

  Returns:
    The masks in the structure of `params`: None where a leaf is no array.

  Raises:
    ValueError: see `mask_leaves`.
  """
  return jax.tree.unflatten(jax.tree.structure(params), mask_leaves(params, masks))


def mask_leaves(params: PyTree, masks: PyTree) -> list[Any]:
  """The mask of each leaf, in the order of `jax.tree.leaves(params)`.

  Args:
    params: a tree of parameters, gradients or updates, or a stack of such. Where it has no
      array (None, a function, `optax.MaskedNode`) masks are not used.
    masks: tree of bool arrays for the same leaves, True where kept; None keeps a leaf.

  Returns:
    Masks; None where a leaf is no array, or has none.

  Raises:
    ValueError: other leaves, shapes that are not those of the last axes, or leaves that
      are not bool.
  """
  leaves, given = _by_names(params), _by_names(masks)
  names, given_names = [x[0] for x in leaves], [x[0] for x in given]
  if names == given_names:
    chosen = [mask for _, _, mask in given]
  else:
    by_name = {name: mask for name, _, mask in given}
    arrays = {name for name, _, leaf in leaves if is_array(leaf)}
    left_out = [name for name, _, leaf in leaves if not is_array(leaf)]
    missing = arrays - by_name.keys()
    unknown = {name for name in by_name.keys() - arrays if by_name[name] is not None}
    if missing or not all(_is_below(name, left_out) for name in unknown):
      raise ValueError(
        "params and masks have different tree structures: make the masks from these params"
      )
    chosen = [by_name.get(name) for name in names]
  for (_, path, leaf), mask in zip(leaves, chosen, strict=True):
    if is_array(leaf) and mask is not None and not isinstance(mask, bool):
      _check_mask(path, leaf, mask)
  pairs = zip(leaves, chosen, strict=True)
  return [
    mask if is_array(leaf) else None for (_, _, leaf), mask in pairs if not _is_empty(leaf)
  ]


def _by_names(tree: PyTree) -> list[tuple[tuple[str, ...], Path, Any]]:
  """The names, the path and the value of each leaf, and of what is empty."""
  leaves = jax.tree.leaves_with_path(tree, is_leaf=_is_empty)
  return [
    (tuple(path_names(path)), path, None if _is_empty(leaf) else leaf)
    for path, leaf in leaves
  ]


def _is_empty(node: Any) -> bool:
  return node is None or isinstance(node, optax.MaskedNode)


def _is_below(name: tuple[str, ...], others: list[tuple[str, ...]]) -> bool:
  return any(name[: len(other)] == other for other in others)


def _check_mask(path: Path, leaf: Any, mask: Any) -> None:
  """Raises ValueError unless a mask is of bool, with the shape of the last axes."""
  if not is_array(mask) or mask.dtype != bool:
    raise ValueError(
      f"the mask of {path_string(path)} is {getattr(mask, 'dtype', type(mask))}: masks "
      "are bool arrays, True where kept"
    )
  if mask.shape != leaf.shape[len(leaf.shape) - len(mask.shape) :]:
    raise ValueError(
      f"params and masks differ in shape at {path_string(path)}: {list(leaf.shape)} and "
      f"{list(mask.shape)}"
    )
