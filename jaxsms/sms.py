"""The loop of Sparse Model Soups: prune, retrain m copies, merge, phase after phase.

`soup_phases` is the loop itself. It takes the functions that prune, retrain and merge
as arguments. `sparse_model_soup` runs it with `prune_phase`, `retrain_phase` and
`merge_phase`.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxsms.channels.budgets import check_reachable
from jaxsms.checks import (
  check_call,
  check_goal,
  check_outside_jit,
  check_phases,
  check_sparsity,
)
from jaxsms.devices.meshes import gather
from jaxsms.phases import Merge, Prune, entries, merge_phase, prune_phase
from jaxsms.pruning import magnitude_masks, phase_sparsity, prunable_flags
from jaxsms.retraining import Retrain, retrain_phase
from jaxsms.shrinking import Shrinking, check_takes_cut
from jaxsms.soups import uniform_soup
from jaxsms.trees import Arrays, Prunable, PyTree, check_finite

Record = dict[str, Any]
Retraining = Generator[Any, None, tuple[PyTree, Record]]


class SparseSoup(NamedTuple):
  """What `sparse_model_soup` gives.

  Attributes:
    params: the soup of the last phase, exactly 0 where `masks` is False.
    masks: tree of bool arrays with the structure of `params`, True where kept.
    history: one dict per phase: `phase` (from 1), `sparsity` (share of zeros among the
      prunable weights), `pruned_fraction` (of the weights that remained before the
      phase), `norm_drop`, `relative_norm_drop`, `weights` (float [m], of the merge) and
      `retrain` (what the retraining reported, leaves [m, ...]; None if it reported
      nothing).
    candidates: the m retrained copies of the last phase, leaves [m, ...]; None if they
      were not kept.
    expand: with `shrink`, `expand(tree)` returns params or masks in their full shapes,
      with zeros where the network was cut; else None.
    cut: with `shrink`, `cut(function)` turns a function of full-size params into one of
      the cut params; else None.
  """

  params: PyTree
  masks: PyTree
  history: list[dict[str, Any]]
  candidates: PyTree | None = None
  expand: Callable[[PyTree], PyTree] | None = None
  cut: Callable[[Callable], Callable] | None = None


class Phase(NamedTuple):
  """A finished phase: what `soup_phases` yields, and `on_phase` is called with.

  Attributes:
    params: the soup.
    masks: its masks.
    candidates: the m retrained copies, leaves [m, ...].
    record: the entry of `SparseSoup.history`.
    expand: see `SparseSoup`.
    cut: see `SparseSoup`.
  """

  params: PyTree
  masks: PyTree
  candidates: PyTree
  record: dict[str, Any]
  expand: Callable[[PyTree], PyTree] | None = None
  cut: Callable[[Callable], Callable] | None = None


def soup_phases(
  key: jax.Array,
  params: PyTree,
  sparsities: Mapping[int, float],
  *,
  prune: Callable[[PyTree, PyTree | None, float], tuple[PyTree, PyTree, Record]],
  retrain: Callable[[jax.Array, PyTree, PyTree, Record], Retraining],
  merge: Callable[[jax.Array, PyTree, Record], tuple[PyTree, Record]],
  masks: PyTree | None = None,
  finish: Callable[[jax.Array, PyTree, PyTree, PyTree, Record], Retraining] | None = None,
) -> Iterator[Any]:
  """The loop: params <- merge(retrain(prune(params))), once for each sparsity.

  All methods with consecutive phases run through this loop. They differ in the
  functions that they pass. To resume after a phase, pass the soup and the masks of that
  phase and the sparsities of the phases that are left.

  Args:
    key: typed key; phase t gets `fold_in(key, t)`.
    params: the model that the first phase prunes.
    sparsities: sparsity by number of the phase, in order, see `phase_sparsities`.
    prune: `prune(params, masks, sparsity)` giving the pruned model, its masks and a record.
    retrain: `retrain(key, params, masks, record)`, a generator that yields what it has to
      report on the way and returns the candidates, leaves [m, ...], and a record. `record`
      is that of `prune`, with the number of the `phase`.
    merge: `merge(key, candidates, record)` giving a model and a record.
    masks: of a model that is sparse already; None means dense.
    finish: `finish(key, params, masks, candidates, record)`, a generator that yields what
      it has to report on the way and returns a record and the model that replaces the
      soup, as (model, record).

  Yields:
    What `retrain` and `finish` yield, and after each phase a `Phase`.

  Example:
    >>> def train(key, params, masks, record):
    ...   return jax.tree.map(lambda x: jnp.stack([x, x]), params), {}
    ...   yield
    >>> model = {"Dense_0": {"kernel": jnp.arange(4.0).reshape(2, 2)}}
    >>> (last,) = soup_phases(
    ...   jax.random.key(0), model, {1: 0.5}, prune=prune_phase, retrain=train,
    ...   merge=lambda key, candidates, record: (uniform_soup(candidates), {}),
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
    params, merged = merge(phase_key, candidates, record)
    record = {**record, **merged, **report}
    if finish is not None:
      params, last = yield from finish(phase_key, params, masks, candidates, record)
      record |= last
    yield Phase(params, masks, candidates, record)
    del candidates  # they are as large as those that the next phase trains


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
  shrink: tuple | None = None,
) -> SparseSoup:
  """Turns a trained dense model into a sparse one: prune, retrain m copies, average.

  The sparsity after phase t is `phase_sparsity(goal_sparsity, t, phases)`. Nothing is
  rewound: each phase starts from the soup of the one before.

  Args:
    key: typed key. In a phase all copies get the same key derived from it, so that they
      differ only in their ingredient: `fold_in(key, ingredient["seed"])`.
    params: a trained model's tree. It may hold other leaves, such as batch statistics.
      They are passed to `retrain` and averaged like parameters.
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
    at_once: copies that one device trains at the same time. Groups of this size follow
      one another in the same program, which needs less memory. None means all copies.
    on_phase: called with a `Phase` after each phase, to evaluate, log or save.
    masks: of a model that is sparse already; None means dense.
    prunable: which leaves to prune and count, passed on to `prune`; None means
      `jaxsms.prunable`.
    regrow: allows `prune` to keep weights that were removed before.
    keep_candidates: keeps the copies of the last phase. `on_phase` always gets those of its
      phase.
    shrink: (apply, *inputs), the network and the arguments after its params. If given,
      the network is cut after each pruning. `prune`, by default `channel_masks`, gets
      `groups=` and params in full shapes, with zeros where the network was cut.
      `retrain(key, params, masks, ingredient, cut)` gets the smaller trees, and
      `cut(fn)` turns a function of full-size params into one of the smaller params.
      `retrain` is compiled in each phase.

  Returns:
    The soup, its masks, a record of each phase, and with `keep_candidates` the copies
    of the last phase. With `shrink` their arrays have the cut shapes.

  Raises:
    ValueError: sparsity or phases out of range, a goal that removes every weight, no
      ingredient, nothing prunable, values that are not finite, or a `retrain` that
      returns another tree structure than it got. These are raised before any training.
      Raised later: a `prune` that lets weights grow back, or a `merge` that returns no
      model, or indices that no candidate has.
    FloatingPointError: all copies of a phase diverged. Copies with values that are not
      finite are left out of the merge and have weight 0 in the record.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, algorithm 1

  Example:
    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> def retrain(key, params, masks, ingredient):
    ...   return jaxsms.apply_masks({"kernel": params["kernel"] + ingredient["lr"]}, masks)
    >>> soup = jaxsms.sparse_model_soup(
    ...   jax.random.key(0), params, retrain, ingredients={"lr": jnp.array([0.0, 1.0])},
    ...   goal_sparsity=0.75, phases=2)
    >>> soup.params["kernel"].tolist()  # each phase adds the mean, 0.5, to what is kept
    [[0.0, 0.0], [0.0, 5.0]]
    >>> [record["sparsity"] for record in soup.history]
    [0.5, 0.75]
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
  key, held, masks = gather((key, Arrays(params), masks))
  params = held.tree
  check_finite(params)
  flags = prunable_flags(params, prunable)
  check_goal(goal_sparsity, entries(flags, params))
  if shrink is not None:
    check_takes_cut(retrain)
  network = None if shrink is None else Shrinking(shrink, params, prune)
  prune = prune if network is None else network.prune
  check_reachable(prune, params, goal_sparsity, masks, prunable)
  alone = functools.partial(prune_phase, prune=prune, prunable=prunable, regrow=regrow)
  prune_once = alone if network is None else network.pruning(alone)

  def retrain_all(key, params, masks, record):
    of_copies = ingredients(record["phase"]) if callable(ingredients) else ingredients
    one = retrain if network is None else network.retrain(retrain)
    candidates, report = retrain_phase(
      key, params, masks, of_copies, one, mesh, at_once, keep=network is None
    )
    return candidates, {"retrain": report}
    yield  # a generator, as the loop asks for; one program has nothing to report

  def merge_all(key, candidates, record):
    merge_one = merge if network is None else network.merge(merge)
    soup, weights = merge_phase(candidates, merge_one)
    return soup, {"weights": weights}

  history, candidates = [], None
  for phase in soup_phases(
    key,
    params,
    phase_sparsities(goal_sparsity, phases),
    prune=prune_once,
    retrain=retrain_all,
    merge=merge_all,
    masks=masks,
  ):
    params, masks = phase.params, phase.masks
    history.append(phase.record)
    if keep_candidates and len(history) == phases:
      candidates = phase.candidates
    if network is not None:
      phase = phase._replace(expand=network.expand, cut=network.cut)
    if on_phase is not None:
      on_phase(phase)
    del phase  # and its candidates, before others are trained
  ways = () if network is None else (network.expand, network.cut)
  return SparseSoup(params, masks, history, candidates, *ways)
