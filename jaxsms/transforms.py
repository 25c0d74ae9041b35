"""Any optax transformation, kept inside a mask."""

import jax
import jax.numpy as jnp
import optax

from jaxsms.pruning import apply_masks
from jaxsms.trees import PyTree, is_floating, match_masks, path_names


def masked(
  transformation: optax.GradientTransformation, masks: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
  """Keeps removed entries exactly 0 under any optax transformation.

  Gradients are masked before the inner transformation; after it, the update of a removed
  entry is minus its parameter, and every leaf of the state that has a parameter's path
  and shape (momentum, second moments) is 0 where that parameter is removed. So it holds
  whatever the inner transformation does with removed entries: decay, sign, noise.

  Args:
    transformation: any optax transformation.
    masks: tree of bool arrays for the leaves of the parameters, True where kept.
      Masks given here become constants of a jitted program; leave them out and pass
      `masks=` with each `update` to make them an argument of it.

  Returns:
    A transformation whose `update(updates, state, params, *, masks=None, **extra)`
    prefers the masks it is given over those given here.

  Raises:
    ValueError: no optax transformation; later, `update` has no masks or no params, or
      they do not fit together.
  """
  if not hasattr(transformation, "update"):
    raise ValueError(
      f"masked() got {type(transformation).__name__}, not an optax transformation: call "
      "masked(optimizer, masks)"
    )
  inner = optax.with_extra_args_support(transformation)
  default = masks

  def init(params):
    if default is None:
      return inner.init(params)
    masks = match_masks(params, default)
    return _mask_state(inner.init(apply_masks(params, masks)), params, masks)

  def update(updates, state, params=None, *, masks=None, **extra):
    masks = default if masks is None else masks
    if masks is None:
      raise ValueError(
        "masked() got no masks: pass them to masked(...) or to update(..., masks=...)"
      )
    if params is None:
      raise ValueError("masked() needs params: call update(updates, state, params)")
    masks = match_masks(params, masks)
    kept = apply_masks(params, masks)
    updates, state = inner.update(apply_masks(updates, masks), state, kept, **extra)
    updates = jax.tree.map(
      lambda mask, u, p: jnp.where(mask, u, -p), masks, updates, params
    )
    return updates, _mask_state(state, params, masks)

  return optax.GradientTransformationExtraArgs(init, update)


def _mask_state(state: PyTree, params: PyTree, masks: PyTree) -> PyTree:
  """Zeros the removed entries of all state leaves shaped and named like a parameter."""
  by_path = {
    tuple(path_names(path)): (leaf, mask)
    for (path, leaf), mask in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(masks), strict=True
    )
  }
  lengths = sorted({len(names) for names in by_path}, reverse=True)

  def mask_leaf(path, leaf):
    names = tuple(path_names(path))
    for length in lengths:
      suffix = names[len(names) - length :]
      if length <= len(names) and suffix in by_path:
        param, mask = by_path[suffix]
        if is_floating(leaf) and leaf.shape == param.shape:
          return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))
        return leaf
    return leaf

  return jax.tree_util.tree_map_with_path(mask_leaf, state)
