"""Baselines of Sparse Model Soups besides IMP, on the same loop.

IMP is the loop with one copy, the dense soup is it with goal sparsity 0, and BIMP is it
after a shorter dense training. Pruning during training: `jaxsms.dynamic`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.phases import Merge, Prune, healthy_copies, prune_phase
from jaxsms.pruning import apply_masks, magnitude_masks
from jaxsms.sms import soup_phases
from jaxsms.soups import uniform_soup
from jaxsms.training.averaging import averaged_ingredients
from jaxsms.training.candidates import merge_candidates
from jaxsms.training.engine import Engine, Model, Plan, Record, start_each, trained
from jaxsms.training.loop import train_copies
from jaxsms.training.merging import Merging
from jaxsms.trees import PyTree, stack, unstack


class Runs(NamedTuple):
  """The m runs of IMP-RePrune after a phase.

  Attributes:
    models: of each run, `Model`s with leaves [...].
    masks: of each run; None before the first phase.
    healthy: indices of the runs that have not diverged.
    pruning: of each run, the record of its last pruning.
    average: of the runs, pruned again; what the method gives.
    sparsity: that the runs were pruned to last.
  """

  models: list[Model]
  masks: list[PyTree | None]
  healthy: list[int]
  pruning: list[Record]
  average: Model
  sparsity: float = 0.0


def imp_reprune(
  engine: Engine,
  key: jax.Array,
  dense: Model,
  plan: Plan,
  sparsities: Mapping[int, float],
  copies: int,
  *,
  prune: Prune = magnitude_masks,
) -> Iterator[Any]:
  """IMP-RePrune: m runs of IMP, averaged and pruned again to their sparsity.

  The runs never see the average: each goes on from itself, with its own masks. One that
  diverges is left out of this phase's average and of all that follow.

  Args:
    engine: its programs made with `own_masks`.
    key: each phase gets `fold_in(key, phase)`, as in `training_phases`.
    dense: the trained model that all runs start from.
    plan: see `training_phases`; asked once for each copy, with that copy's pruning record.
    sparsities: by phase, see `jaxsms.sms.phase_sparsities`.
    copies: m.
    prune: `prune(params, sparsity, masks=masks)` giving masks.

  Yields:
    Chunks of training, and after each phase a `jaxsms.Phase`. Its params are `Runs`. Its
    record holds `phase`, `sparsity` and what `merge_candidates` gives, the runs as
    candidates and their average pruned again as `soup`.

  Raises:
    ValueError: see `jaxsms.prune_phase`.
    FloatingPointError: all runs diverged.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, section 3
  """

  def prune_each(runs, masks, sparsity):
    pruned = {
      i: prune_phase(runs.models[i].params, runs.masks[i], sparsity, prune)
      for i in runs.healthy
    }
    # What diverged before stays as it is, and keeps its place among the copies.
    first = pruned[runs.healthy[0]]
    everyone = range(copies)
    models = [
      m._replace(params=pruned[i][0]) if i in pruned else m
      for i, m in enumerate(runs.models)
    ]
    masks = [pruned.get(i, first)[1] for i in everyone]
    records = [pruned.get(i, first)[2] for i in everyone]
    runs = runs._replace(models=models, masks=masks, pruning=records, sparsity=sparsity)
    return runs, masks, {"sparsity": first[2]["sparsity"]}

  def retrain_each(key, runs, masks, record):
    plans = [plan({**record, **pruning}) for pruning in runs.pruning]
    end = yield from train_copies(
      engine,
      stack(masks),
      key,
      start_each(engine, stack(runs.models)),
      plans[0][0],
      np.stack([rates[i] for i, (_, rates) in enumerate(plans)]),
      phase=record["phase"],
    )
    return runs._replace(models=unstack(trained(end))), {}

  def average(key, runs, record):
    candidates, reprune = stack(runs.models), repruned(runs.sparsity, prune)
    merging = Merging(lambda engine, key, base: reprune)
    soup, merged = merge_candidates(engine, key, candidates, merging)
    return runs._replace(healthy=healthy_copies(candidates), average=soup), merged

  start = Runs([dense] * copies, [None] * copies, list(range(copies)), [], dense)
  return soup_phases(
    key, start, sparsities, prune=prune_each, retrain=retrain_each, merge=average
  )


def repruned(sparsity: float, prune: Prune = magnitude_masks) -> Merge:
  """The mean of models whose masks differ, pruned again to a sparsity.

  Args:
    sparsity: share of the prunable weights that are removed afterwards, in [0, 1).
    prune: `prune(params, sparsity, masks=masks)` giving masks.

  Returns:
    A merge of candidates, `Model` leaves [m, ...], into one model.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788 (IMP-RePrune)

  Example:
    >>> Model = jaxsms.training.Model
    >>> candidates = Model({"kernel": jnp.array([[[0.0, 8.0]], [[2.0, 4.0]]])}, {})
    >>> jaxsms.baselines.repruned(0.5)(candidates).params["kernel"].tolist()
    [[0.0, 6.0]]
  """

  def merge(candidates: Model) -> Model:
    soup = uniform_soup(candidates)
    return soup._replace(params=prune_phase(soup.params, None, sparsity, prune)[0])

  return merge


def swamp(
  engine: Engine,
  key: jax.Array,
  ticket: Model,
  plan: Plan,
  sparsities: Mapping[int, float],
  *,
  average_after: int,
  prune: Prune = magnitude_masks,
) -> Iterator[Any]:
  """SWAMP: IMP with rewinding, each round the average over several particles and over time.

  All particles of a round start from the same ticket, a checkpoint of early training,
  within the masks of the average of the round before; the first round is dense.

  Args:
    engine: the network and its data.
    key: round t gets `fold_in(key, t)`, the dense one counting 0.
    ticket: the checkpoint that every round rewinds to.
    plan: ingredients and learning rates of a round's particles, see `training_phases`.
    sparsities: of the rounds after the dense one, see `jaxsms.sms.phase_sparsities`.
    average_after: steps of a round after which the parameters at the end of each epoch, and
      at the very end, enter a particle's average over time.
    prune: `prune(params, sparsity, masks=masks)` giving masks.

  Yields:
    Chunks of training, and after each round, the dense one too, a `jaxsms.Phase`. Its
    record holds that of `jaxsms.prune_phase` and of `merge_candidates`, the particles'
    averages over time as candidates.

  Raises:
    ValueError: see `jaxsms.prune_phase`.
    FloatingPointError: all particles of a round diverged.

  References:
    Choi et al., 2024, https://arxiv.org/abs/2305.14852
    Izmailov et al., 2018, https://arxiv.org/abs/1803.05407 (averages over time)
    Frankle et al., 2020, https://arxiv.org/abs/1912.05671 (rewinding)
  """

  def rewind(model, masks, sparsity):
    if masks is None:  # the dense round
      everything = jax.tree.map(lambda x: jnp.ones(x.shape, bool), ticket.params)
      return ticket, everything, {}
    _, masks, record = prune_phase(model.params, masks, sparsity, prune)
    return ticket._replace(params=apply_masks(ticket.params, masks)), masks, record

  def retrain(key, model, masks, record):
    chosen, learning_rates = plan(record)
    chosen = averaged_ingredients(chosen, after=average_after, every=engine.steps_per_epoch)
    end = yield from train_copies(
      engine,
      masks,
      key,
      engine.start(model, len(chosen["steps"])),
      chosen,
      learning_rates,
      phase=record["phase"],
    )
    return trained(end), {}

  def merge(key, candidates, record):
    return merge_candidates(engine, key, candidates)

  rounds = {0: 0.0, **sparsities}
  return soup_phases(key, ticket, rounds, prune=rewind, retrain=retrain, merge=merge)
