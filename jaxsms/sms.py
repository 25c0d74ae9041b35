"""The loop of Sparse Model Soups: prune, retrain m copies, merge, phase after phase.

`soup_phases` is the loop, for a caller's own training function, for the engine, and for
what both are compared with. `sparse_model_soup` is the loop with `prune_phase`,
`retrain_phase` and `merge_phase` in it.
"""

import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxsms import counts
from jaxsms.checks import (
  check_call,
  check_goal,
  check_indices,
  check_outside_jit,
  check_phases,
)
from jaxsms.ingredients import take_ingredients
from jaxsms.meshes import fetch, gather
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
  Arrays,
  Prunable,
  PyTree,
  check_finite,
  is_floating,
  is_parameter,
  mask_leaves,
  number_of_models,
)

Prune = Callable[..., PyTree]
Merge = Callable[[PyTree], Any]
Record = dict[str, Any]
Retraining = Generator[Any, None, tuple[PyTree, Record]]


class SparseSoup(NamedTuple):
  """What `sparse_model_soup` gives.

  Attributes:
    params: the soup of the last phase, exactly 0 where `masks` is False.
    masks: tree of bool arrays with the structure of `params`, True where kept.
    history: one dict per phase: `phase` (from 1), `sparsity` (share of zeros among the
      prunable weights), `pruned_fraction` (of the weights that remained before it),
      `norm_drop`, `relative_norm_drop`, `weights` (float [m], of the merge) and `retrain`
      (what the retraining reported, leaves [m, ...]; None where it reported nothing).
    candidates: the m retrained copies of the last phase, leaves [m, ...]; None where they
      were not kept.
  """

  params: PyTree
  masks: PyTree
  history: list[dict[str, Any]]
  candidates: PyTree | None = None


class Phase(NamedTuple):
  """A finished phase: what `soup_phases` yields, and `on_phase` is called with.

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


def soup_phases(
  key: jax.Array,
  params: PyTree,
  sparsities: Mapping[int, float],
  *,
  prune: Callable[[PyTree, PyTree | None, float], tuple[PyTree, PyTree, Record]],
  retrain: Callable[[jax.Array, PyTree, PyTree, Record], Retraining],
  merge: Callable[[jax.Array, PyTree], tuple[PyTree, Record]],
  masks: PyTree | None = None,
) -> Iterator[Any]:
  """The loop: params <- merge(retrain(prune(params))), once for each sparsity.

  Everything whose phases follow one another runs through it. What differs is what is
  handed in. It goes on after a break where it is given the soup and masks of a phase and
  the sparsities of the phases after it.

  Args:
    key: typed key; phase t gets `fold_in(key, t)`.
    params: the model that the first phase prunes.
    sparsities: by the number of the phase, in order, see `phase_sparsities`.
    prune: `prune(params, masks, sparsity)` giving the pruned model, its masks and a record.
    retrain: `retrain(key, params, masks, record)`, a generator that yields what it has to
      report on the way and returns the candidates, leaves [m, ...], and a record. `record`
      is that of `prune`, with the number of the `phase`.
    merge: `merge(key, candidates)` giving a model and a record.
    masks: of a model that is sparse already; None means dense.

  Yields:
    What `retrain` yields, and after each phase a `Phase`.

  Example:
    >>> def train(key, params, masks, record):
    ...   return jax.tree.map(lambda x: jnp.stack([x, x]), params), {}
    ...   yield
    >>> model = {"Dense_0": {"kernel": jnp.arange(4.0).reshape(2, 2)}}
    >>> (last,) = soup_phases(
    ...   jax.random.key(0), model, {1: 0.5}, prune=prune_phase, retrain=train,
    ...   merge=lambda key, candidates: (uniform_soup(candidates), {}),
    ... )
    >>> last.params["Dense_0"]["kernel"].tolist()
    [[0.0, 0.0], [2.0, 3.0]]

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, algorithm 1
  """
  for number, sparsity in sparsities.items():
    phase_key = jax.random.fold_in(key, number)
    params, masks, record = prune(params, masks, sparsity)
    record = {"phase": number, **record}
    candidates, report = yield from retrain(phase_key, params, masks, record)
    params, merged = merge(phase_key, candidates)
    yield Phase(params, masks, candidates, {**record, **merged, **report})


def phase_sparsities(goal: float, phases: int, done: int = 0) -> dict[int, float]:
  """The sparsity after each phase, by its number.

  Args:
    goal: sparsity after the last phase, in [0, 1).
    phases: number of cycles, at least 1.
    done: how many of them are finished already.

  Returns:
    `phase_sparsity(goal, t, phases)` of each phase t that is left.

  Raises:
    ValueError: see `phase_sparsity`.

  Example:
    >>> phase_sparsities(0.75, 2)
    {1: 0.5, 2: 0.75}
  """
  return {t: phase_sparsity(goal, t, phases) for t in range(done + 1, phases + 1)}


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
  at_once: int | None = None,
  on_phase: Callable[[Phase], None] | None = None,
  masks: PyTree | None = None,
  prunable: Prunable | None = None,
  regrow: bool = False,
  keep_candidates: bool = False,
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
    mesh: None for one device, else as `jaxsms.make_mesh` gives. In a job of several
      processes each calls this with the same arguments, and gets the whole result.
    at_once: copies that one device trains at the same time; groups of so many follow one
      another in the same program, in less memory. None means all.
    on_phase: called after each phase, to evaluate, log or save.
    masks: of a model that is sparse already; None means dense.
    prunable: which leaves to prune and count, handed on to `prune`; None means
      `jaxsms.prunable`.
    regrow: allows `prune` to keep weights that were removed before.
    keep_candidates: keeps the copies of the last phase; `on_phase` sees those of each.

  Returns:
    The soup, its masks, a record of each phase, and the copies of the last where they are
    kept.

  Raises:
    ValueError: sparsity or phases out of range, a goal that removes every weight, no
      ingredient, nothing prunable, values that are not finite, or a `retrain` that gives
      another tree than it got. Raised before any training. Later: a `prune` that lets
      weights grow back, or a `merge` that gives no model or indices of no candidates.
    FloatingPointError: all copies of a phase diverged. Copies with values that are not
      finite are left out of the merge and have weight 0 in the record.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, algorithm 1
  """
  check_call(key, mesh, retrain=retrain, prune=prune, merge=merge, on_phase=on_phase)
  check_outside_jit(
    "sparse_model_soup",
    (key, params, masks, goal_sparsity, ingredients),
    "call it outside of jit; it compiles retrain itself",
  )
  check_sparsity(goal_sparsity, "goal_sparsity")
  phases = check_phases(phases)
  phase_sparsity(goal_sparsity, 1, phases)
  key, params, masks = gather((key, params, masks))
  check_finite(params)
  flags = prunable_flags(params, prunable)
  check_goal(goal_sparsity, _total(flags, params))

  def retrain_all(key, params, masks, record):
    varied = ingredients(record["phase"]) if callable(ingredients) else ingredients
    candidates, report = retrain_phase(key, params, masks, varied, retrain, mesh, at_once)
    return candidates, {"retrain": report}
    yield  # a generator, as the loop asks for; one program has nothing to report

  def merge_all(key, candidates):
    soup, weights = merge_phase(candidates, merge)
    return soup, {"weights": weights}

  history, candidates = [], None
  for phase in soup_phases(
    key,
    params,
    phase_sparsities(goal_sparsity, phases),
    prune=functools.partial(prune_phase, prune=prune, prunable=prunable, regrow=regrow),
    retrain=retrain_all,
    merge=merge_all,
    masks=masks,
  ):
    params, masks = phase.params, phase.masks
    history.append(phase.record)
    candidates = phase.candidates if keep_candidates else None
    if on_phase is not None:
      on_phase(phase)
  return SparseSoup(params, masks, history, candidates)


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
    merge: gives a model, or (model, indices merged).

  Returns:
    The soup, leaves [...], and float [m], the weight of each candidate in it.

  Raises:
    FloatingPointError: every candidate has values that are not finite.
    ValueError: `merge` gives something else, or values are traced.
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
  if jax.tree.structure(stacked) != jax.tree.structure(model):
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
    for x in jax.tree.leaves(stacked)
    if is_floating(x)
  ]
  return jnp.stack(flags).all(axis=0)


def _total(flags: list[bool], params: PyTree) -> int:
  leaves = zip(jax.tree.leaves(params), flags, strict=True)
  return sum(math.prod(np.shape(x)) for x, flag in leaves if flag)


def _count_kept(flags, masks, new, params) -> tuple[int, int, int]:
  """How many prunable entries there are, were kept before, and are kept now."""
  total = _total(flags, params)

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
  pairs = [(old, _full(mask, x)) for x, old, mask in leaves if old is not None]
  if regrown := int(_count_regrown(pairs)):
    raise ValueError(
      f"prune keeps {regrown:,} weights that were removed before: let it hand on the masks "
      "it is given, or pass regrow=True"
    )


def _full(mask, leaf):
  """The mask of a leaf, True where there is none."""
  return np.ones(np.shape(leaf), bool) if mask is None or mask is True else mask


@jax.jit
def _count_regrown(pairs):
  return sum((jnp.count_nonzero(new & ~old) for old, new in pairs), jnp.int32(0))


@jax.jit
def _count_true(masks):
  return counts.count(masks)


@jax.jit
def _norm_and_drop(pairs):
  """The norm of the first of each pair, and of the difference of both."""

  def square(x):  # float16 would overflow
    return jnp.sum(jnp.abs(x).astype(jnp.promote_types(x.dtype, jnp.float32)) ** 2)

  norm = sum(square(a) for a, _ in pairs)
  drop = sum(square(a - b) for a, b in pairs)
  return jnp.sqrt(norm), jnp.sqrt(drop)
