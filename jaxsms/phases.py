"""Parts of a phase: prune a model, merge its retrained copies. Between: `retrain_phase`."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxsms import counts
from jaxsms.checks import check_indices, check_outside_jit
from jaxsms.devices.ingredients import take_ingredients
from jaxsms.devices.meshes import fetch
from jaxsms.mask_trees import mask_leaves
from jaxsms.pruning import apply_masks, magnitude_masks, prunable_flags
from jaxsms.soups import soup_weights, uniform_soup
from jaxsms.trees import (
  Arrays,
  Prunable,
  PyTree,
  is_floating,
  is_parameter,
  number_of_models,
  same_structure,
  small_leaves_joined,
  widened,
)

Prune = Callable[..., PyTree]
Merge = Callable[[PyTree], Any]


class Weighted(NamedTuple):
  """A merged model and the weight of each candidate in it; what a merge may return.

  Attributes:
    params: the model.
    weights: float [m], of the candidates.
  """

  params: PyTree
  weights: np.ndarray | jax.Array


def prune_phase(
  params: PyTree,
  masks: PyTree | None,
  sparsity: float,
  prune: Prune = magnitude_masks,
  prunable: Prunable | None = None,
  regrow: bool = False,
) -> tuple[PyTree, PyTree, dict[str, float]]:
  """Prunes a model further, once.

  Args:
    params: one model.
    masks: what was removed so far; None means nothing.
    sparsity: share of the prunable weights to be removed afterwards, in [0, 1).
    prune: `prune(params, sparsity, masks=masks)` giving new masks.
    prunable: which leaves to prune and count, handed on to `prune`; None means
      `jaxsms.prunable`.
    regrow: allows `prune` to keep weights that were removed before.

  Returns:
    The pruned parameters, their masks, and a record: `sparsity` (share of the prunable
    weights that are removed), `pruned_fraction` (share of those that remained before
    which this step removed), `norm_drop` (norm of what it removed), and
    `relative_norm_drop` (relative to the norm of all weights and biases).

  Raises:
    ValueError: see `magnitude_masks`; or `prune` removes every weight, or keeps what was
      removed before, or values are traced.

  Example:
    >>> params = {"kernel": jnp.array([[0.0, 3.0], [4.0, 12.0]])}
    >>> params, masks, record = jaxsms.prune_phase(params, None, 0.5)
    >>> params["kernel"].tolist()
    [[0.0, 0.0], [4.0, 12.0]]
    >>> record["sparsity"], record["norm_drop"]
    (0.5, 3.0)
  """
  check_outside_jit(
    "prune_phase",
    (params, masks, sparsity),
    "call it outside of jit, or magnitude_masks and apply_masks inside",
  )
  flags = prunable_flags(params, prunable)
  if prunable is not None:
    prune = functools.partial(prune, prunable=prunable)
  new = prune(params, sparsity, masks=masks)
  pruned = apply_masks(params, new)
  if masks is not None and not regrow:
    _check_nested(params, masks, new)
  total, before, after = _count_kept(flags, masks, new, params)
  if after == 0:
    raise ValueError(
      f"prune removed all {total:,} prunable weights at sparsity {float(sparsity):g}: ask "
      "for less"
    )
  leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(pruned), strict=True)
  pairs = [(leaf, left) for (path, leaf), left in leaves if is_parameter(path, leaf)]
  norm, drop = fetch(norm_and_drop(pairs))
  record = {
    "sparsity": 1 - after / total,
    "pruned_fraction": (before - after) / before if before else 0.0,
    "norm_drop": float(drop),
    "relative_norm_drop": float(drop / norm) if norm else 0.0,
  }
  return pruned, new, record


def merge_phase(
  candidates: PyTree, merge: Merge = uniform_soup
) -> tuple[PyTree, np.ndarray]:
  """Merges the candidates of one phase, leaving out those that diverged.

  Args:
    candidates: tree with leaves [m, ...].
    merge: gives a model, (model, indices merged), or `Weighted`.

  Returns:
    The soup, leaves [...], and float [m], the weight of each candidate in it.

  Raises:
    FloatingPointError: every candidate has values that are not finite.
    ValueError: `merge` gives something else, or values are traced.

  Example:
    >>> candidates = {"kernel": jnp.array([[1.0], [3.0], [jnp.nan]])}  # the third diverged
    >>> soup, weights = jaxsms.merge_phase(candidates)
    >>> soup["kernel"].tolist(), weights.tolist()
    ([2.0], [0.5, 0.5, 0.0])
  """
  check_outside_jit(
    "merge_phase", candidates, "call it outside of jit, or uniform_soup inside"
  )
  m, healthy = number_of_models(candidates), healthy_copies(candidates)
  if len(healthy) < m:
    left_out = sorted(set(range(m)) - set(healthy))
    logging.warning("copies %s diverged and are left out of the soup", left_out)
    candidates = take_ingredients(Arrays(candidates), healthy).tree
  merged = merge(candidates)
  if isinstance(merged, Weighted) and _is_one_of(candidates, merged.params):
    weights = np.zeros([m])
    weights[healthy] = fetch(merged.weights)
    return merged.params, weights
  if _is_one_of(candidates, merged):
    return merged, soup_weights(healthy, m)
  if isinstance(merged, tuple) and len(merged) == 2 and _is_one_of(candidates, merged[0]):
    soup, indices = merged
    indices = check_indices(indices, len(healthy))
    return soup, soup_weights([healthy[i] for i in indices], m)
  raise ValueError(
    "merge gave neither one model, with the structure and shapes of its candidates, nor "
    f"(model, indices), but {jax.tree.map(np.shape, merged)}"
  )


def healthy_copies(candidates: PyTree) -> list[int]:
  """Indices of the models, leaves [m, ...], whose values are all finite.

  Raises:
    FloatingPointError: there is none.
  """
  finite = fetch(finite_models(candidates))
  if not finite.any():
    raise FloatingPointError(
      f"all {len(finite)} copies diverged to values that are not finite: lower the "
      "learning rate"
    )
  return np.flatnonzero(finite).tolist()


def _is_one_of(stacked: PyTree, model: PyTree) -> bool:
  """Whether a tree has the structure and the shapes of each of the stacked ones."""
  if not same_structure(stacked, model):
    return False
  pairs = zip(jax.tree.leaves(stacked), jax.tree.leaves(model), strict=True)
  return all(np.shape(one) == np.shape(many)[1:] for many, one in pairs)


def finite_models(stacked: PyTree) -> jax.Array:
  """Whether all floating values of each model are finite: leaves [m, ...] -> bool [m]."""
  return _finite_models(Arrays(stacked))


@jax.jit
def _finite_models(stacked: Arrays) -> jax.Array:
  flags = [jnp.ones([number_of_models(stacked)], bool)]
  flags += [
    jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
    for x in small_leaves_joined([x for x in jax.tree.leaves(stacked) if is_floating(x)])
  ]
  return jnp.stack(flags).all(axis=0)


def entries(flags: list[bool], params: PyTree) -> int:
  """How many entries the leaves have that are flagged."""
  leaves = zip(jax.tree.leaves(params), flags, strict=True)
  return sum(math.prod(np.shape(x)) for x, flag in leaves if flag)


def _count_kept(flags, masks, new, params) -> tuple[int, int, int]:
  """How many prunable entries there are, were kept before, and are kept now."""
  total = entries(flags, params)

  def kept(tree):
    if tree is None:
      return total
    chosen = zip(jax.tree.leaves(params), mask_leaves(params, tree), flags, strict=True)
    kept_entries = _count_true([_full(mask, leaf) for leaf, mask, flag in chosen if flag])
    return counts.on_host(fetch(kept_entries))

  return total, kept(masks), kept(new)


def _check_nested(params: PyTree, masks: PyTree, new: PyTree) -> None:
  """Raises ValueError where new masks keep what earlier ones removed."""
  earlier, now = mask_leaves(params, masks), mask_leaves(params, new)
  leaves = zip(jax.tree.leaves(params), earlier, now, strict=True)
  pairs = [(_full(old, x), _full(mask, x)) for x, old, mask in leaves if old is not None]
  if pairs and (regrown := counts.on_host(fetch(_count_regrown(pairs)))):
    raise ValueError(
      f"prune keeps {regrown:,} weights that were removed before: let it hand on the masks "
      "it is given, or pass regrow=True"
    )


def _full(mask, leaf):
  """The mask of a leaf, of its shape, True where there is none."""
  if mask is None or mask is True:
    return np.ones(np.shape(leaf), bool)
  if np.shape(mask) == np.shape(leaf):
    return mask
  return jnp.broadcast_to(mask, np.shape(leaf))


@jax.jit
def _count_regrown(pairs):
  return counts.count([new & ~old for old, new in pairs])


_count_true = jax.jit(counts.count)


@jax.jit
def norm_and_drop(
  pairs: list[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
  """The norm of the first of each pair, and of the difference of both."""

  def square(x):  # float16 would overflow
    return jnp.sum(widened(jnp.abs(x)) ** 2)

  norm = sum(square(a) for a, _ in pairs)
  drop = sum(square(a - b) for a, b in pairs)
  return jnp.sqrt(norm), jnp.sqrt(drop)
