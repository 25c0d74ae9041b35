"""Any optax transformation, kept inside a mask."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

from jaxsms.mask_trees import mask_leaves
from jaxsms.pruning import apply_masks
from jaxsms.trees import (
  PyTree,
  is_array,
  is_concrete,
  is_floating,
  path_names,
  path_string,
  same_structure,
)


def masked(
  transformation: optax.GradientTransformation, masks: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
  """Keeps removed entries exactly 0 under any optax transformation.

  Gradients are masked before the inner transformation. After it, the update of a
  removed entry is set to minus its parameter. Every leaf of the state that has a
  parameter's path and shape (momentum, second moments) is set to 0 where that parameter
  is removed. So removed entries stay 0 whatever the inner transformation does with
  them, such as weight decay, sign updates or noise.

  In a chain, `optax.chain(masked(inner, masks), after)`, the later transformations
  change the update again. If the parameters were pruned before, with `apply_masks`, the
  updates of removed entries are 0, and scaling or weight decay keep them 0. Entries
  that are not yet 0 become 0 only if `masked` is outermost:
  `masked(optax.chain(inner, after), masks)`. A transformation that adds noise also has
  to be inside. Outside of `jax.jit` a warning is logged if removed entries are not 0.
  Inside `jax.jit` there is no warning: check the result with `assert_sparse`.

  Args:
    transformation: any optax transformation.
    masks: tree of bool arrays for the leaves of the parameters, True where kept. Masks
      passed here become constants of a jitted program. To make them an argument of the
      program, leave them out here and pass `masks=` to each `update`.

  Returns:
    A transformation with `update(updates, state, params, *, masks=None, **extra)`.
    Masks passed to `update` replace those passed here. Leaves of the parameters that
    are not arrays (functions, None) are left alone; their updates are None.

  Raises:
    ValueError: `transformation` is no optax transformation. Later: `update` gets no
      masks or no params, or they do not fit together.

  >>> params = {"kernel": jnp.array([[1.0, 0.0]])}
  >>> masks = {"kernel": params["kernel"] != 0}
  >>> optimizer = jaxsms.masked(optax.adamw(0.1), masks)
  >>> updates, state = optimizer.update(params, optimizer.init(params), params)
  >>> jaxsms.assert_sparse(optax.apply_updates(params, updates), masks)
  """
  if not hasattr(transformation, "update"):
    raise ValueError(
      f"masked() got {type(transformation).__name__}, not an optax transformation: call "
      "masked(optimizer, masks)"
    )
  inner = optax.with_extra_args_support(transformation)
  default = masks
  watch = _RegrowthWarning()

  def init(params):
    params = _only_arrays(params)
    if default is None:
      return inner.init(params)
    masks = mask_leaves(params, default)
    watch.at_init(params, masks)
    state = inner.init(apply_masks(params, default))
    return _mask_state(state, params, masks)

  def update(updates, state, params=None, *, masks=None, **extra):
    masks = default if masks is None else masks
    if masks is None:
      raise ValueError(
        "masked() got no masks: pass them to masked(...) or to update(..., masks=...)"
      )
    if params is None:
      raise ValueError("masked() needs params: call update(updates, state, params)")
    updates, params = _aligned_arrays(updates, params)
    chosen = mask_leaves(params, masks)
    watch.at_update(params, chosen)
    kept = apply_masks(params, masks)
    updates, state = inner.update(apply_masks(updates, masks), state, kept, **extra)
    leaves, structure = jax.tree.flatten(updates)
    triples = zip(chosen, leaves, jax.tree.leaves(params), strict=True)
    leaves = [u if mask is None else jnp.where(mask, u, -p) for mask, u, p in triples]
    return jax.tree.unflatten(structure, leaves), _mask_state(state, params, chosen)

  return optax.GradientTransformationExtraArgs(init, update)


def assert_sparse(params: PyTree, masks: PyTree) -> None:
  """Asserts that removed entries are exactly 0; for tests and training loops.

  Args:
    params: tree of parameters, leaves [...] or, of m models, [m, ...].
    masks: tree of bool arrays for its leaves, True where kept.

  Raises:
    AssertionError: some removed entries are not 0; the message names their leaves.
    ValueError: masks that do not fit the params, or traced values.

  >>> jaxsms.assert_sparse({"kernel": jnp.zeros(2)}, {"kernel": jnp.array([True, False])})
  """
  if not is_concrete((params, masks)):
    raise ValueError(
      "assert_sparse got traced values: call it outside of jit, on what the program gives"
    )
  names = [path_string(path) for path, _ in jax.tree.leaves_with_path(params)]
  counts = _count_left(params, mask_leaves(params, masks))
  wrong = [f"{n} of {name}" for name, n in zip(names, counts, strict=True) if n]
  if wrong:
    raise AssertionError(
      f"entries that the masks remove are not 0: {', '.join(wrong)}; keep jaxsms.masked "
      "outermost, masked(optax.chain(...), masks), and prune first with apply_masks"
    )


class _RegrowthWarning:
  """Says once, where values can be seen, that removed entries come back."""

  def __init__(self):
    self._masks, self._done = None, False

  def at_init(self, params: PyTree, masks: list[Any]) -> None:
    if not is_concrete((params, masks)) or not sum(_count_left(params, masks)):
      return
    logging.warning(
      "params has entries that the masks remove and that are not 0: masked() removes them "
      "with its first update only where it is outermost, masked(optax.chain(...), masks), "
      "so prune first with jaxsms.apply_masks(params, masks)"
    )

  def at_update(self, params: PyTree, masks: list[Any]) -> None:
    """Looks at the second update with the same masks: the first one may remove."""
    if self._done or not is_concrete((params, masks)):
      return
    before, self._masks = self._masks, masks
    if before is None or any(a is not b for a, b in zip(before, masks, strict=True)):
      return
    self._done = True
    if sum(_count_left(params, masks)):
      logging.warning(
        "removed entries are not 0 after an update of masked(): what follows it in a chain "
        "moves them, so make it outermost, masked(optax.chain(...), masks)"
      )


def _count_left(params: PyTree, masks: list[Any]) -> list[int]:
  """How many removed entries of each leaf are not 0."""
  pairs = zip(jax.tree.leaves(params), masks, strict=True)
  compared = [(0, True) if mask is None else (leaf, mask) for leaf, mask in pairs]
  with jax.ensure_compile_time_eval():  # concrete values stay so inside a jit
    return [int(n) for n in jax.device_get(_count_nonzero_removed(compared))]


@jax.jit
def _count_nonzero_removed(pairs):
  return [jnp.sum(~jnp.asarray(mask, bool) & (leaf != 0)) for leaf, mask in pairs]


def _only_arrays(tree: PyTree) -> PyTree:
  """The tree with None for leaves that are no arrays."""
  return jax.tree.map(lambda x: x if is_array(x) else None, tree)


def _aligned_arrays(updates: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
  """Updates and their parameters in one structure: None where either is no array."""
  updates, params = _only_arrays(updates), _only_arrays(params)
  if same_structure(updates, params):
    return updates, params

  def is_none(x):
    return x is None

  try:
    params = jax.tree.map(
      lambda u, p: None if u is None else p, updates, params, is_leaf=is_none
    )
    updates = jax.tree.map(
      lambda u, p: None if p is None else u, updates, params, is_leaf=is_none
    )
  except ValueError:
    raise ValueError(
      "updates and params have different tree structures: pass the parameters that the "
      "gradients are of"
    ) from None
  return updates, params


def _mask_state(state: PyTree, params: PyTree, masks: list[Any]) -> PyTree:
  """Zeros the removed entries of all state leaves shaped and named like a parameter."""
  by_path = {
    tuple(path_names(path)): (leaf, mask)
    for (path, leaf), mask in zip(jax.tree.leaves_with_path(params), masks, strict=True)
    if mask is not None
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

  return jax.tree.map_with_path(mask_leaf, state)
