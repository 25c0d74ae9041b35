"""Merges of what models learned beyond a base model: task arithmetic and TIES."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.merges.finite import check_some_finite, without_others
from jaxsms.pruning import magnitude_sort_key
from jaxsms.selection import keep_largest
from jaxsms.soups import uniform_soup
from jaxsms.trees import PyTree, is_concrete, is_parameter, number_of_models


def task_arithmetic(
  stacked: PyTree,
  base: PyTree,
  weights: jax.Array | np.ndarray | None = None,
  *,
  scale: float = 1.0,
) -> PyTree:
  """Adds the models' mean difference from a base model to it.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    base: the model that they were all trained from, leaves [...].
    weights: float [m], summing to 1; None means 1/m each.
    scale: of the difference; 1 gives the weighted mean, m the sum of all differences.

  Returns:
    A tree with leaves [...]; those that are no parameters are averaged plainly.

  Raises:
    ValueError: trees or shapes disagree, or `scale` is not finite.
    FloatingPointError: no model is finite.

  References:
    Ilharco et al., 2023, https://arxiv.org/abs/2212.04089

  Example:
    >>> models = {"w": jnp.array([[1.0, 0.0], [3.0, 0.0]])}
    >>> print(task_arithmetic(models, {"w": jnp.array([1.0, 5.0])}, scale=0.5)["w"])
    [1.5 0. ]
  """
  _check_base(stacked, base, scale)
  finite = check_some_finite(stacked)
  clean = without_others(stacked, finite)
  weights = jnp.ones(len(finite)) if weights is None else jnp.asarray(weights)
  kept = jnp.where(finite, weights, 0)
  return _moved(clean, base, uniform_soup(clean, kept / kept.sum()), scale)


def ties(
  stacked: PyTree, base: PyTree, *, density: float = 0.2, scale: float = 1.0
) -> PyTree:
  """Adds to a base model the differences from it on which the models agree.

  Trim: the largest differences of each model are kept. Elect sign: each entry gets the
  sign of their sum. Disjoint mean: the differences of that sign are averaged.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    base: the model that they were all trained from, leaves [...].
    density: share of a model's differences that is kept, in (0, 1].
    scale: of what is added.

  Returns:
    A tree with leaves [...]; those that are no parameters are averaged plainly.

  Raises:
    ValueError: trees or shapes disagree, or an argument is out of range.
    FloatingPointError: no model is finite.

  References:
    Yadav et al., 2023, https://arxiv.org/abs/2306.01708

  Example:
    >>> models = {"w": jnp.array([[3.0, 1.0], [-1.0, 1.0]])}
    >>> print(ties(models, {"w": jnp.zeros(2)}, density=1.0)["w"])
    [3. 1.]
  """
  _check_base(stacked, base, scale)
  if not 0 < density <= 1:
    raise ValueError(f"density is {density}: it is the share that is kept, in (0, 1]")
  finite = check_some_finite(stacked)
  clean = without_others(stacked, finite)
  return _ties(clean, base, finite, density, scale)


@functools.partial(jax.jit, static_argnames="density")
def _ties(stacked, base, finite, density, scale):
  flat = jax.tree.leaves_with_path(stacked)
  numbers = [i for i, (path, leaf) in enumerate(flat) if is_parameter(path, leaf)]
  bases = jax.tree.leaves(base)
  tasks = []
  for i in numbers:
    leaf = flat[i][1]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    task = leaf.astype(wide) - bases[i].astype(wide)
    chosen = finite.reshape([-1] + [1] * (leaf.ndim - 1))
    tasks.append(jnp.where(chosen & (leaf != 0).any(0), task, 0))
  total = sum(bases[i].size for i in numbers)
  goal = total - round(density * total)

  def trim(one):
    kept = keep_largest(one, [None] * len(one), goal, magnitude_sort_key(tasks))
    return [jnp.where(mask, x, 0) for mask, x in zip(kept, one, strict=True)]

  trimmed = jax.vmap(trim)(tasks)
  moved = [agreed(jnp, x) for x in trimmed]
  weights = finite / finite.sum()
  mean = uniform_soup(stacked, weights)
  leaves = jax.tree.leaves(mean)
  for i, move in zip(numbers, moved, strict=True):
    leaf, wide = flat[i][1], move.dtype
    value = bases[i].astype(wide) + scale * move
    leaves[i] = jnp.where((leaf != 0).any(0), value, 0).astype(leaf.dtype)
  return jax.tree.unflatten(jax.tree.structure(stacked), leaves)


def agreed(numpy: Any, differences: Any) -> Any:
  """The mean of those differences [m, ...] that have the sign of their sum, [...]."""
  sign = numpy.sign(numpy.sum(differences, axis=0))
  same = (numpy.sign(differences) == sign) & (sign != 0)
  total = numpy.sum(numpy.where(same, differences, 0), axis=0)
  return total / numpy.maximum(numpy.sum(same, axis=0), 1).astype(total.dtype)


def _check_base(stacked, base, scale):
  number_of_models(stacked)
  shapes = [np.shape(x)[1:] for x in jax.tree.leaves(stacked)]
  if shapes != [np.shape(x) for x in jax.tree.leaves(base)]:
    raise ValueError(
      "stacked and base have different leaves: give the model that all were trained from"
    )
  if is_concrete(scale) and not np.isfinite(scale):
    raise ValueError(f"scale is {scale}: it must be finite")


@jax.jit
def _moved(stacked, base, mean, scale):
  """base + scale * (mean - base), 0 where all models are."""

  def one(path, leaf, origin, target):
    if not is_parameter(path, leaf):
      return target
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    origin, target = origin.astype(wide), target.astype(wide)
    value = origin + scale * (target - origin)
    return jnp.where((leaf != 0).any(0), value, 0).astype(leaf.dtype)

  return jax.tree.map_with_path(one, stacked, base, mean)
