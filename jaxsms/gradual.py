"""A schedule of sparsity inside an optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsms.checks import check_phases, check_sparsity
from jaxsms.mask_trees import match_masks
from jaxsms.pruning import magnitude_masks, with_all_kept
from jaxsms.transforms import masked
from jaxsms.trees import Prunable, PyTree, is_concrete


class PrunedState(NamedTuple):
  """The state of `pruned`.

  Attributes:
    count: int32 [], updates so far.
    masks: tree of bool arrays for the leaves of the parameters, True where kept.
    inner: the state of the transformation inside.
  """

  count: jax.Array  # type: ignore[assignment]  # not the count of a tuple
  masks: PyTree
  inner: Any


def pruned(
  transformation: optax.GradientTransformation,
  schedule: Callable[[jax.Array], jax.Array],
  every: int = 1,
  prune: Callable[..., PyTree] = magnitude_masks,
  prunable: Prunable | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Any optax transformation, under masks that follow a schedule of sparsity.

  This is for a training loop of your own that goes from dense to sparse. At every step
  that is a multiple of `every`, the masks become
  `prune(params, schedule(step), masks=masks)`. In every step the inner transformation
  is kept inside the masks, as by `masked`, whose docstring also explains chains. The
  masks are in the state: `optax.tree_utils.tree_get(state, "masks")`.

  Under `jax.vmap` over states, new masks are computed in every step, because vmap
  computes both sides of a condition that differs between copies. They are still used
  only at multiples of `every`.

  Args:
    transformation: any optax transformation.
    schedule: sparsity in [0, 1) by step (from 0), such as
      `optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=1000)`, the cubic
      schedule of gradual magnitude pruning. It gets a traced step and returns float32.
      The number of weights to remove is rounded in this precision.
    every: steps between new masks, at least 1. Between them the sparsity stays the
      same.
    prune: `prune(params, sparsity, masks=masks)` giving new masks. It is traced, and
      the sparsity is a traced value.
    prunable: which leaves to prune, passed on to `prune`; None means `jaxsms.prunable`.

  Returns:
    A transformation with a `PrunedState`; its `update` needs params.

  Raises:
    ValueError: no transformation, no schedule, or `every` below 1. Later: `init` finds
      a first sparsity out of range, or `update` gets no params, or gets masks.

  References:
    Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878

  >>> schedule = optax.polynomial_schedule(0.0, 0.75, power=3, transition_steps=2)
  >>> optimizer = jaxsms.pruned(optax.sgd(0.1), schedule)
  >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
  >>> state = optimizer.init(params)
  >>> for step in range(3):
  ...   updates, state = optimizer.update(params, state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> state.masks["kernel"].tolist()
  [[False, False], [False, True]]
  """
  if not callable(schedule):
    raise ValueError(
      f"schedule is {schedule!r}: give a function of the step, such as "
      "optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=1000), or use "
      "masked(optimizer, masks) for a sparsity that stays"
    )
  if (every := check_phases(every, "every")) < 1:
    raise ValueError(f"every is {every}: new masks come at least 1 step apart")
  inner = masked(transformation)
  options = {} if prunable is None else {"prunable": prunable}

  def init(params):
    first = schedule(cast(jax.Array, np.int32(0)))
    if is_concrete(first):
      check_sparsity(first, "the schedule's sparsity at step 0")
    masks = with_all_kept(params, {})
    return PrunedState(jnp.zeros([], jnp.int32), masks, inner.init(params))

  def update(updates, state, params=None, *, masks=None, **extra):
    if params is None:
      raise ValueError("pruned() needs params: call update(updates, state, params)")
    if masks is not None:
      raise ValueError("pruned() makes its own masks: leave masks out, or use masked()")

    def renew():
      sparsity = schedule(state.count)
      new = prune(params, sparsity, masks=state.masks, **options)
      return match_masks(state.masks, new)

    masks = jax.lax.cond(state.count % every == 0, renew, lambda: state.masks)
    updates, kept = inner.update(updates, state.inner, params, masks=masks, **extra)
    return updates, PrunedState(optax.safe_increment(state.count), masks, kept)

  return optax.GradientTransformationExtraArgs(init, update)
