"""The loop on a data set: prune, retrain, recalibrate, evaluate, merge, evaluate."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.faults import fault_point
from jaxsms.geometry import soup_geometry
from jaxsms.ingredients import ingredient, take_ingredients
from jaxsms.meshes import fetch
from jaxsms.metrics import agreement
from jaxsms.pruning import magnitude_masks, phase_sparsity
from jaxsms.sms import Merge, Prune, finite_models, merge_phase, prune_phase
from jaxsms.soups import greedy_soup, prediction_ensemble, uniform_soup
from jaxsms.training import streamed
from jaxsms.training.failures import averaging_failure
from jaxsms.training.loop import Chunk, Saving, train_copies
from jaxsms.training.programs import Programs
from jaxsms.training.state import Data, TrainState
from jaxsms.training.streamed import StreamedData
from jaxsms.trees import PyTree, number_of_models

RECALIBRATION = 2**32 - 1  # a stream of the phase's key that no seed uses
Record = dict[str, Any]
# From the phase's pruning record: ingredients of m copies, and learning rates [m, steps].
Plan = Callable[[Record], tuple[dict[str, np.ndarray], np.ndarray]]


class Splits(NamedTuple):
  """The parts of a data set, resident on the device or streamed from the host."""

  train: Data | StreamedData
  validation: Data | StreamedData
  test: Data | StreamedData


class Predictions(NamedTuple):
  """What m models say about the examples of a split.

  Attributes:
    logits: float [m, n, classes].
    labels: int [n].
  """

  logits: jax.Array
  labels: jax.Array


class Model(NamedTuple):
  """One model with what it needs to be run, or (leaves [m, ...]) several.

  Attributes:
    params: parameters.
    batch_stats: batch statistics, an empty dict where there are none.
  """

  params: PyTree
  batch_stats: PyTree


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
      `relative_norm_drop`), the ingredients (`seed`, `weight_decay`, `steps`, each [m])
      and learning rates [m, steps] of its copies.
    goal_sparsity: sparsity after the last phase, in [0, 1).
    phases: number of cycles, at least 1.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    merge: of `Model` leaves [m, ...], see `jaxsms.merge_phase`.
    greedy: merges by `jaxsms.greedy_soup` instead, on validation accuracy.
    chunk_steps: see `train_copies`.
    on_chunk: called with the phase and each chunk of training.
    on_phase: called with each phase's record.
    done: phases that are finished already, to go on after them.
    state: of the training in the phase after those, see `train_copies`.
    saving: what lets the run go on after a break.

  Returns:
    The last soup, its masks, and a record per phase: that of `jaxsms.prune_phase`, the
    merge's `weights`, metrics of `pruned` (before retraining), of every one of
    `candidates`, their mean as `mean_candidate`, the one of best validation accuracy as
    `best_candidate`, of the `soup` and of the candidates' `prediction_ensemble`,
    `ensemble_agreement` (share of predictions that soup and ensemble have in common, on
    each split), and `geometry` (of the candidates' parameters). Candidates that diverged
    are listed as `diverged` and count in nothing else; their own metrics are NaN. Where
    averaging failed, `averaging_failed` says so, see `averaging_failure`.

  Raises:
    ValueError: see `jaxsms.prune_phase`.
    FloatingPointError: all copies of a phase diverged.
  """
  model, masks, records = dense, None, []
  if done is not None:
    model, masks, records = done.model, done.masks, list(done.records)
  for phase in range(len(records) + 1, phases + 1):
    phase_key = jax.random.fold_in(key, phase)
    recalibration_key = jax.random.fold_in(phase_key, RECALIBRATION)
    goal = phase_sparsity(goal_sparsity, phase, phases)
    params, masks, record = prune_phase(model.params, masks, goal, prune)
    record = {"phase": phase, **record}
    (pruned,), _ = measure(programs, splits, one_model(Model(params, model.batch_stats)))
    candidates = Model(
      *train_copies(
        programs,
        splits.train,
        masks,
        phase_key,
        params,
        model.batch_stats,
        *plan(record),
        chunk_steps=chunk_steps,
        on_chunk=None if on_chunk is None else lambda c, p=phase: on_chunk(p, c),
        state=state,
        saving=saving,
      )
    )
    state = None
    candidates = recalibrated(programs, splits, recalibration_key, candidates)
    finite = fetch(finite_models(candidates))
    healthy = [i for i, is_finite in enumerate(finite) if is_finite]
    scores, predictions = measure(programs, splits, candidates)
    scores = [
      s if ok else dict.fromkeys(s, np.nan) for s, ok in zip(scores, finite, strict=True)
    ]
    ensemble = {
      split: Predictions(prediction_ensemble(_only(healthy, logits))[None], labels)
      for split, (logits, labels) in predictions.items()
    }
    fault_point("merge")
    if len(scores) == 1:  # nothing to merge: plain IMP
      model, weights = merge_phase(candidates, uniform_soup)
      soup, of_soup = scores[0], predictions
    else:
      if greedy:
        merge = greedy_merge(programs, splits, recalibration_key)
      model, weights = merge_phase(candidates, merge)
      alone = recalibrated(programs, splits, recalibration_key, one_model(model))
      (soup,), of_soup = measure(programs, splits, alone)
      model = ingredient(alone, 0)
      failure = averaging_failure(
        functools.partial(on_validation, programs, splits, recalibration_key),
        candidates,
        weights,
        soup,
        scores,
      )
      record |= {"averaging_failed": failure} if failure else {}
    of_healthy = geometry(_only(healthy, candidates.params))
    record |= {
      "weights": weights.tolist(),
      "pruned": pruned,
      "soup": soup,
      "mean_candidate": {k: float(np.mean([scores[i][k] for i in healthy])) for k in soup},
      "best_candidate": scores[best_candidate(scores)],
      "candidates": scores,
      "diverged": [i for i in range(len(scores)) if i not in healthy],
      "prediction_ensemble": score(programs, ensemble)[0],
      "ensemble_agreement": {
        split: float(fetch(agreement(of_soup[split].logits[0], ensemble[split].logits[0])))
        for split in ensemble
      },
      "geometry": {k: float(v) for k, v in fetch(of_healthy).items()},
    }
    records.append(record)
    if on_phase is not None:
      on_phase(record)
    if saving is not None:
      saving.phase(Phases(model, masks, list(records)))
  return Phases(model, masks, records)


def _only(healthy: list[int], stacked: PyTree) -> PyTree:
  """Leaves [m, ...] without the copies that diverged."""
  if len(healthy) == number_of_models(stacked):
    return stacked
  return take_ingredients(stacked, healthy)


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


def best_candidate(scores: list[dict[str, float]]) -> int:
  """Index of the best validation accuracy; among equals, of the lowest loss.

  One that diverged, whose metrics are NaN, is not looked at.
  """
  return min(
    (i for i, s in enumerate(scores) if not np.isnan(s["validation_accuracy"])),
    key=lambda i: (-scores[i]["validation_accuracy"], scores[i]["validation_loss"]),
  )


def measure(
  programs: Programs, splits: Splits, models: Model
) -> tuple[list[dict[str, float]], dict[str, Predictions]]:
  """What m models do on validation and test data.

  Returns:
    A flat dict of metrics for each model, and predictions on each split.
  """
  predictions = {
    split: predict(programs, getattr(splits, split), models)
    for split in ("validation", "test")
  }
  return score(programs, predictions), predictions


def predict(programs: Programs, data: Data | StreamedData, models: Model) -> Predictions:
  """Predictions of m models on one split."""
  if isinstance(data, StreamedData):
    return Predictions(*streamed.predict(programs, data, *models))
  return Predictions(programs.predict(data.images, *models), data.labels)


def score(
  programs: Programs, predictions: dict[str, Predictions]
) -> list[dict[str, float]]:
  """A flat dict of metrics for each of m models, from their predictions on some splits."""
  named = {}
  for split, on_split in predictions.items():
    metrics = programs.evaluate(*on_split)
    named |= {f"{split}_{name}": metric for name, metric in metrics.items()}
  named = fetch(named)
  m = len(next(iter(predictions.values())).logits)
  return [{name: float(values[i]) for name, values in named.items()} for i in range(m)]


def recalibrated(
  programs: Programs, splits: Splits, key: jax.Array, models: Model
) -> Model:
  """The same models with batch statistics estimated anew."""
  if not jax.tree.leaves(models.batch_stats):
    return models
  if isinstance(splits.train, StreamedData):
    statistics = streamed.recalibrate(programs, splits.train, key, *models)
  else:
    statistics = programs.recalibrate(splits.train, key, *models)
  return Model(models.params, statistics)


def one_model(model: Model) -> Model:
  """Adds the leading axis of length 1."""
  return jax.tree.map(lambda x: jnp.asarray(x)[None], model)


geometry = jax.jit(soup_geometry)
