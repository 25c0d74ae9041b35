"""The loop on a data set: prune, retrain, recalibrate, evaluate, merge, evaluate."""

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import numpy as np

from jaxsms.faults import fault_point
from jaxsms.ingredients import take_ingredients
from jaxsms.meshes import fetch
from jaxsms.metrics import agreement
from jaxsms.pruning import magnitude_masks, phase_sparsity
from jaxsms.sms import Merge, Prune, healthy_copies, merge_phase, prune_phase
from jaxsms.soups import greedy_soup, prediction_ensemble, uniform_soup
from jaxsms.training.failures import averaging_failure
from jaxsms.training.landscape import measure_landscape
from jaxsms.training.loop import Chunk, Saving, train_copies
from jaxsms.training.measurements import (
  Describe,
  Measured,
  Model,
  Predictions,
  Record,
  Splits,
  best_candidate,
  measure,
  of_set,
  one_model,
  predict,
  recalibrated,
  score,
)
from jaxsms.training.merging import named_merge
from jaxsms.training.programs import Programs
from jaxsms.training.state import TrainState
from jaxsms.trees import PyTree, model_at, number_of_models

__all__ = [
  "Measured",
  "Model",
  "Phases",
  "Plan",
  "Predictions",
  "Record",
  "Splits",
  "best_candidate",
  "greedy_merge",
  "measure",
  "merge_candidates",
  "one_model",
  "recalibrated",
  "run_phases",
]

RECALIBRATION = 2**32 - 1  # a stream of the phase's key that no seed uses
# From the phase's pruning record: ingredients of m copies, and learning rates [m, steps].
Plan = Callable[[Record], tuple[dict[str, np.ndarray], np.ndarray]]


class Phases(NamedTuple):
  """The finished phases of a method.

  Attributes:
    model: the last soup.
    masks: its masks.
    records: one of each phase.
  """

  model: Model
  masks: PyTree
  records: list[Record]


def run_phases(
  programs: Programs,
  splits: Splits,
  key: jax.Array,
  dense: Model,
  plan: Plan,
  *,
  goal_sparsity: float,
  phases: int,
  prune: Prune = magnitude_masks,
  merge: Merge = uniform_soup,
  greedy: bool = False,
  merge_name: str | None = None,
  prior: float = 1e-4,
  describe: Describe | None = None,
  landscapes: Collection[int] = (),
  chunk_steps: int = 50,
  on_chunk: Callable[[int, Chunk], None] | None = None,
  on_phase: Callable[[Record], None] | None = None,
  done: Phases | None = None,
  state: TrainState | None = None,
  saving: Saving | None = None,
) -> Phases:
  """Sparse Model Soups of a network on a data set; with one copy, IMP.

  Args:
    programs: of the network on the data set.
    splits: training, validation and test data.
    key: each phase gets `fold_in(key, phase)`, the same for all copies.
    dense: the trained model.
    plan: given a phase's pruning record (`phase`, `sparsity`, `pruned_fraction`,
      `norm_drop`, `relative_norm_drop`), the ingredients (`seed`, `weight_decay`, `steps`,
      each [m]) and learning rates [m, steps] of its copies.
    goal_sparsity: sparsity after the last phase, in [0, 1).
    phases: number of cycles, at least 1.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    merge: of `Model` leaves [m, ...], see `jaxsms.merge_phase`.
    greedy: merges by `jaxsms.greedy_soup` instead, on validation accuracy.
    merge_name: merges by one of `jaxsms.merges.MERGES` instead, see `named_merge`.
    prior: of such a merge, the L2 coefficient of training.
    describe: gives what to record of one model's weights beside its metrics.
    landscapes: phases in which the loss between the candidates is measured.
    chunk_steps: see `train_copies`.
    on_chunk: called with the phase and each chunk of training.
    on_phase: called with each phase's record.
    done: phases that are finished already, to go on after them.
    state: of the training in the phase after those, see `train_copies`.
    saving: what lets the run go on after a break.

  Returns:
    The last soup, its masks, and a record per phase: that of `jaxsms.prune_phase`, metrics
    of `pruned` (before retraining), `pruning_instability` (the share of the test accuracy
    that pruning took), and that of `merge_candidates`; where asked for and possible the
    `landscape`, see `measure_landscape`.

  Raises:
    ValueError: see `jaxsms.prune_phase`.
    FloatingPointError: all copies of a phase diverged.
  """
  model, masks, records = dense, None, []
  if done is not None:
    model, masks, records = done.model, done.masks, list(done.records)
  for phase in range(len(records) + 1, phases + 1):
    phase_key = jax.random.fold_in(key, phase)
    goal = phase_sparsity(goal_sparsity, phase, phases)
    before = accuracy_on_test(programs, splits, model)
    params, masks, record = prune_phase(model.params, masks, goal, prune)
    record = {"phase": phase, **record}
    pruned = measure(
      programs, splits, one_model(Model(params, model.batch_stats)), describe
    ).scores[0]
    record["pruned"] = pruned
    record["pruning_instability"] = instability(before, pruned["test_accuracy"])
    chosen, learning_rates = plan(record)
    candidates = Model(
      *train_copies(
        programs,
        splits.train,
        masks,
        phase_key,
        params,
        model.batch_stats,
        chosen,
        learning_rates,
        chunk_steps=chunk_steps,
        on_chunk=None if on_chunk is None else lambda c, p=phase: on_chunk(p, c),
        state=state,
        saving=saving,
      )
    )
    state = None
    if merge_name is not None:
      base = Model(params, model.batch_stats)
      merge = named_merge(merge_name, programs, splits, phase_key, base, prior)
    model, merged = merge_candidates(
      programs, splits, phase_key, candidates, merge, greedy=greedy, describe=describe
    )
    record |= merged
    if phase in landscapes:
      found = measure_landscape(
        programs,
        splits,
        phase_key,
        candidates,
        [i for i in range(len(merged["weights"])) if i not in merged["diverged"]],
        model.params,
        int(np.sum(chosen["steps"])) * programs.batch_size,
      )
      record |= {} if found is None else {"landscape": found}
    records.append(record)
    if on_phase is not None:
      on_phase(record)
    if saving is not None:
      saving.phase(Phases(model, masks, list(records)))
  return Phases(model, masks, records)


def merge_candidates(
  programs: Programs,
  splits: Splits,
  key: jax.Array,
  candidates: Model,
  merge: Merge = uniform_soup,
  *,
  greedy: bool = False,
  describe: Describe | None = None,
) -> tuple[Model, Record]:
  """Recalibrates and measures candidates, merges them, and measures what that gives.

  Args:
    programs: of the network.
    splits: the data.
    key: of the phase.
    candidates: leaves [m, ...].
    merge: of them, see `jaxsms.merge_phase`; one candidate is its own soup.
    greedy: merges by `jaxsms.greedy_soup` instead, on validation accuracy.
    describe: gives what to record of one model's weights beside its metrics.

  Returns:
    The soup, and a record: the merge's `weights`, metrics of every one of `candidates`, the
    one of best validation accuracy as `best_candidate`, the mean and the largest of single
    metrics as `mean_candidate` and `max_candidate`, `geometry` (of the candidates'
    parameters), metrics of the `soup` and of the candidates' `prediction_ensemble`, and
    `ensemble_agreement` (share of predictions that soup and ensemble have in common, on
    each split). If greedy, those of the set `selected` as well. Candidates that diverged
    are listed as `diverged` and count in nothing else; their own metrics are NaN. Where
    averaging failed, `averaging_failed` says so, see `averaging_failure`.

  Raises:
    FloatingPointError: all candidates diverged.
  """
  key = jax.random.fold_in(key, RECALIBRATION)
  candidates = recalibrated(programs, splits, key, candidates)
  m, healthy = number_of_models(candidates), healthy_copies(candidates)
  finite = candidates if len(healthy) == m else take_ingredients(candidates, healthy)
  measured, ensemble, predictions = measure(programs, splits, finite, describe)
  lost = jax.tree.map(lambda _: np.nan, measured[0])
  by_copy = dict(zip(healthy, measured, strict=True))
  scores = [by_copy.get(i, lost) for i in range(m)]
  fault_point("merge")
  failure = None
  if m == 1:  # nothing to merge: plain IMP
    model, weights = merge_phase(candidates, uniform_soup)
    soup, of_soup = scores[0], predictions
  else:
    if greedy:
      merge = greedy_merge(programs, splits, key)
    model, weights = merge_phase(candidates, merge)
    alone = recalibrated(programs, splits, key, one_model(model))
    (soup,), _, of_soup = measure(programs, splits, alone, describe)
    model = model_at(alone, 0)
    failure = averaging_failure(
      functools.partial(on_validation, programs, splits, key),
      candidates,
      weights,
      soup,
      scores,
    )
  record = {
    "weights": weights.tolist(),
    "soup": soup,
    "best_candidate": scores[best_candidate(scores)],
    **of_set(measured, finite.params),
    "candidates": scores,
    "diverged": sorted(set(range(m)) - set(healthy)),
    "prediction_ensemble": ensemble,
    "ensemble_agreement": {
      split: float(
        fetch(agreement(on_split.logits[0], prediction_ensemble(predictions[split].logits)))
      )
      for split, on_split in of_soup.items()
    },
  }
  if failure is not None:
    record["averaging_failed"] = failure
  if greedy:
    taken = np.flatnonzero(weights)
    chosen = take_ingredients(candidates.params, taken)
    record["selected"] = of_set([scores[i] for i in taken], chosen)
  return model, record


def greedy_merge(programs: Programs, splits: Splits, key: jax.Array) -> Merge:
  """Merges by the validation accuracy of each average, its batch statistics its own."""

  def validation_accuracy(model):
    return on_validation(programs, splits, key, model)["validation_accuracy"]

  return functools.partial(greedy_soup, evaluate=validation_accuracy)


def on_validation(
  programs: Programs, splits: Splits, key: jax.Array, model: Model
) -> dict[str, float]:
  """Metrics of one model on validation data, its batch statistics estimated anew."""
  model = recalibrated(programs, splits, key, one_model(model))
  return score(programs, {"validation": predict(programs, splits.validation, model)})[0]


def accuracy_on_test(programs: Programs, splits: Splits, model: Model) -> float:
  """That of one model, leaves [...]."""
  on_test = {"test": predict(programs, splits.test, one_model(model))}
  return score(programs, on_test)[0]["test_accuracy"]


def instability(before: float, after: float) -> float:
  """The share of an accuracy that is lost; NaN where there was none.

  References:
    Bartoldson et al., 2020, https://arxiv.org/abs/1906.03728 (pruning instability)
  """
  return (before - after) / before if before else float("nan")
