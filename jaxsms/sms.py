"""The loop of Sparse Model Soups: prune, retrain m copies, merge, phase after phase.

    params, masks, record = prune_phase(params, masks, sparsity)
    candidates, report    = retrain_phase(key, params, masks, ingredients, retrain)
    params, weights       = merge_phase(candidates)

`sparse_model_soup` is these three lines in a loop. Host-side training loops (streamed data,
checkpoints, progress bars) put their own retraining between the first and the last.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxsms.ingredients import take_ingredients
from jaxsms.meshes import fetch
from jaxsms.pruning import (
  apply_masks,
  check_sparsity,
  magnitude_masks,
  phase_sparsity,
  prunable_flags,
)
from jaxsms.retraining import Retrain, retrain_phase
from jaxsms.soups import soup_weights, uniform_soup
from jaxsms.trees import (
  Prunable,
  PyTree,
  check_finite,
  is_floating,
  is_parameter,
  number_of_models,
)

Prune = Callable[..., PyTree]
Merge = Callable[[PyTree], Any]


class SparseSoup(NamedTuple):
  """What `sparse_model_soup` gives.

  Attributes:
    params: the soup of the last phase, exactly 0 where `masks` is False.
    masks: tree of bool arrays with the structure of `params`, True where kept.
    history: one dict per phase: `phase` (from 1), `sparsity` (share of zeros among the
      prunable weights), `pruned_fraction` (of the weights that remained before it),
      `norm_drop`, `relative_norm_drop`, `weights` (float [m], of the merge) and `retrain`
      (what the retraining reported, leaves [m, ...]; None where it reported nothing).
  """

  params: PyTree
  masks: PyTree
  history: list[dict[str, Any]]


class Weighted(NamedTuple):
  """What a merge may give instead of a model, to say how much each candidate is in it.

  Attributes:
    params: the model.
    weights: float [m], of the candidates.
  """

  params: PyTree
  weights: np.ndarray


class Phase(NamedTuple):
  """What `on_phase` is called with after each phase.

  Attributes:
    params: the soup.
    masks: its masks.
    candidates: the m retrained copies, leaves [m, ...].
    record: the entry of `SparseSoup.history`.
  """

  params: PyTree
  masks: PyTree
  candidates: PyTree
  record: dict[str, Any]


def sparse_model_soup(
  key: jax.Array,
  params: PyTree,
  retrain: Retrain,
  *,
  ingredients: PyTree | Callable[[int], PyTree],
  goal_sparsity: float,
  phases: int,
  prune: Prune = magnitude_masks,
  merge: Merge = uniform_soup,
  mesh: jax.sharding.Mesh | None = None,
  on_phase: Callable[[Phase], None] | None = None,
  masks: PyTree | None = None,
  prunable: Prunable | None = None,
) -> SparseSoup:
  """Turns a trained dense model into a sparse one: prune, retrain m copies, average.

  The sparsity after phase t is `phase_sparsity(goal_sparsity, t, phases)`. Nothing is
  rewound: each phase starts from the soup of the one before.

  Args:
    key: typed key. In a phase all copies get the same key derived from it, so that they
      differ only in their ingredient: `fold_in(key, ingredient["seed"])`.
    params: a trained model's tree; it may hold other leaves, such as batch statistics,
      which are handed to `retrain` and averaged like parameters.
    retrain: the caller's own jittable training of one copy,
      `retrain(key, params, masks, ingredient)`, giving params or (params, report).
      It is compiled once for all phases; pass the same function object again to share
      that compilation with a later call.
    ingredients: what varies, a tree of arrays with leading axis m, such as
      {"seed": jnp.arange(m)}; or a function of the phase (from 1) that gives one.
    goal_sparsity: sparsity after the last phase, in [0, 1).
    phases: number of prune-retrain-merge cycles, at least 1.
    prune: `prune(params, sparsity, masks=masks)` giving new masks.
    merge: of leaves [m, ...], giving a model, or (model, indices merged) as
      `functools.partial(greedy_soup, evaluate=...)` does.
    mesh: None for one device, else as `jaxsms.make_mesh` gives.
    on_phase: called after each phase, to evaluate, log or save.
    masks: of a model that is sparse already; None means dense.
    prunable: which leaves to prune and count, handed on to `prune`; None means
      `jaxsms.prunable`.

  Returns:
    The soup, its masks and a record of each phase.

  Raises:
    ValueError: sparsity or phases out of range, no ingredient, nothing prunable, values
      that are not finite, or a `retrain` that gives another tree than it got. Raised
      before any training.
    FloatingPointError: all copies of a phase diverged. Copies with values that are not
      finite are left out of the merge and have weight 0 in the record.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, algorithm 1
  """
  check_sparsity(goal_sparsity, "goal_sparsity")
  phases = operator.index(phases)
  phase_sparsity(goal_sparsity, 1, phases)
  check_finite(params)
  prunable_flags(params, prunable)

  history = []
  for phase in range(1, phases + 1):
    varied = ingredients(phase) if callable(ingredients) else ingredients
    sparsity = phase_sparsity(goal_sparsity, phase, phases)
    params, masks, record = prune_phase(params, masks, sparsity, prune, prunable)
    candidates, report = retrain_phase(
      jax.random.fold_in(key, phase), params, masks, varied, retrain, mesh
    )
    params, weights = merge_phase(candidates, merge)
    record = {"phase": phase, **record, "weights": weights, "retrain": report}
    history.append(record)
    if on_phase is not None:
      on_phase(Phase(params, masks, candidates, record))
  return SparseSoup(params, masks, history)


def prune_phase(
  params: PyTree,
  masks: PyTree | None,
  sparsity: float,
  prune: Prune = magnitude_masks,
  prunable: Prunable | None = None,
) -> tuple[PyTree, PyTree, dict[str, float]]:
  """Prunes a model further, once.

  Args:
    params: one model.
    masks: what was removed so far; None means nothing.
    sparsity: share of the prunable weights to be removed afterwards, in [0, 1).
    prune: `prune(params, sparsity, masks=masks)` giving new masks.
    prunable: which leaves to prune and count, handed on to `prune`; None means
      `jaxsms.prunable`.

  Returns:
    The pruned parameters, their masks, and a record: `sparsity` (share of the prunable
    weights that are removed), `pruned_fraction` (share of those that remained before
    which this step removed), `norm_drop` (norm of what it removed), and
    `relative_norm_drop` (relative to the norm of all weights and biases).

  Raises:
    ValueError: see `magnitude_masks`.
  """
  flags = prunable_flags(params, prunable)
  if prunable is not None:
    prune = functools.partial(prune, prunable=prunable)
  new = prune(params, sparsity, masks=masks)
  pruned = apply_masks(params, new)
  total, before, after = _count_kept(flags, masks, new, params)
  parameters = [
    (leaf, pruned_leaf)
    for (path, leaf), pruned_leaf in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(pruned), strict=True
    )
    if is_parameter(path, leaf)
  ]
  norm, drop = fetch(_norm_and_drop(parameters))
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
    ValueError: `merge` gives something else.
  """
  m, healthy = number_of_models(candidates), healthy_copies(candidates)
  if len(healthy) < m:
    left_out = sorted(set(range(m)) - set(healthy))
    logging.warning("copies %s diverged and are left out of the soup", left_out)
    candidates = take_ingredients(candidates, healthy)
  merged = merge(candidates)
  if isinstance(merged, Weighted) and _is_one_of(candidates, merged.params):
    weights = np.zeros([m])
    weights[healthy] = merged.weights
    return merged.params, weights
  if _is_one_of(candidates, merged):
    return merged, soup_weights(healthy, m)
  if isinstance(merged, tuple) and len(merged) == 2 and _is_one_of(candidates, merged[0]):
    soup, indices = merged
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
  if jax.tree.structure(stacked) != jax.tree.structure(model):
    return False
  pairs = zip(jax.tree.leaves(stacked), jax.tree.leaves(model), strict=True)
  return all(np.shape(one) == np.shape(many)[1:] for many, one in pairs)


@jax.jit
def finite_models(stacked: PyTree) -> jax.Array:
  """Whether all floating values of each model are finite: leaves [m, ...] -> bool [m]."""
  flags = [jnp.ones([number_of_models(stacked)], bool)]
  flags += [
    jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1)
    for x in jax.tree.leaves(stacked)
    if is_floating(x)
  ]
  return jnp.stack(flags).all(axis=0)


def _count_kept(flags, masks, new, params) -> tuple[int, int, int]:
  """How many prunable entries there are, were kept before, and are kept now."""
  sizes = [int(np.prod(np.shape(x))) for x in jax.tree.leaves(params)]
  total = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)

  def kept(tree):
    if tree is None:
      return total
    chosen = [m for m, flag in zip(jax.tree.leaves(tree), flags, strict=True) if flag]
    return int(_count_true(chosen))

  return total, kept(masks), kept(new)


@jax.jit
def _count_true(masks):
  return sum(jnp.count_nonzero(mask) for mask in masks)


@jax.jit
def _norm_and_drop(pairs):
  """The norm of the first of each pair, and of the difference of both."""

  def square(x):  # float16 would overflow
    return jnp.sum(jnp.abs(x).astype(jnp.promote_types(x.dtype, jnp.float32)) ** 2)

  norm = sum(square(a) for a, _ in pairs)
  drop = sum(square(a - b) for a, b in pairs)
  return jnp.sqrt(norm), jnp.sqrt(drop)
