"""From candidates to a soup: recalibrate, measure, merge, measure what that gives."""

import functools
from typing import NotRequired

import jax
import numpy as np
from absl import logging

from jaxsms.devices.ingredients import take_ingredients
from jaxsms.devices.meshes import fetch
from jaxsms.disk.faults import fault_point
from jaxsms.metrics import agreement
from jaxsms.phases import Merge, healthy_copies, merge_phase
from jaxsms.soups import prediction_ensemble, uniform_soup
from jaxsms.training.engine import Engine, Model, Record, one_model
from jaxsms.training.failures import (
  AveragingFailure,
  Faults,
  averaging_failure,
  collapsed_copies,
  merged_copies,
)
from jaxsms.training.measurements import (
  RECALIBRATION,
  SetRecord,
  best_candidate,
  measure,
  recalibrated,
  set_record,
)
from jaxsms.training.merging import Merging, merging_of, on_validation
from jaxsms.trees import model_at, number_of_models


class MergeRecord(SetRecord, Faults):
  """What `merge_candidates` measures. Means, maxima and geometry are of the candidates.

  Attributes:
    weights: of each candidate in the soup.
    soup: its metrics.
    parameters: of the network as it is stored and run, where they are described.
    multiply_adds: of it.
    best_candidate: metrics of the candidate of best validation accuracy.
    candidates: metrics of each; NaN for those that diverged.
    prediction_ensemble: metrics of the candidates' prediction ensemble.
    uncertainty: of several candidates, see `jaxsms.training.measurements.Measurements`.
    ensemble_agreement: share of predictions that soup and ensemble have in common, by
      split.
    averaging_failed: evidence, where averaging failed, see `averaging_failure`.
    selected: of those that were taken, where the merge selects.
    search: the rungs of the phase, see `jaxsms.training.search.Rung`.
  """

  weights: list[float]
  soup: Record
  parameters: NotRequired[int]
  multiply_adds: NotRequired[int]
  best_candidate: Record
  candidates: list[Record]
  prediction_ensemble: Record
  ensemble_agreement: dict[str, float]
  uncertainty: NotRequired[Record]
  averaging_failed: NotRequired[AveragingFailure]
  selected: NotRequired[SetRecord]
  search: NotRequired[list[Record]]


def merge_candidates(
  engine: Engine,
  key: jax.Array,
  candidates: Model,
  merging: Merging | None = None,
  start: float | None = None,
  base: Model | None = None,
) -> tuple[Model, MergeRecord]:
  """Recalibrates and measures candidates, merges them, and measures what that gives.

  Args:
    engine: the network and its data.
    key: of the phase.
    candidates: leaves [m, ...].
    merging: of them; None means `merging_of("uniform")`. One candidate is its own soup.
    start: validation accuracy of the pruned model that all candidates started from, where
      there is one.
    base: that model, for merges that look at what the candidates have changed.

  Returns:
    The soup and its record. Candidates that diverged or collapsed appear only in their own
    metrics. Where all finite candidates collapsed, they are merged.

  Raises:
    FloatingPointError: all candidates diverged.
  """
  merging = merging or merging_of("uniform")
  key = jax.random.fold_in(key, RECALIBRATION)
  candidates = recalibrated(engine, key, candidates)
  m, healthy = number_of_models(candidates), healthy_copies(candidates)
  finite = candidates if len(healthy) == m else take_ingredients(candidates, healthy)
  measured, ensemble, predictions, uncertainty = measure(engine, finite)
  lost = jax.tree.map(lambda _: np.nan, measured[0])
  by_copy = dict(zip(healthy, measured, strict=True))
  scores = [by_copy.get(i, lost) for i in range(m)]
  faults: Faults = {
    "diverged": sorted(set(range(m)) - set(healthy)),
    "collapsed": collapsed_copies(
      [one["validation_accuracy"] for one in scores],
      np.asarray(fetch(predictions["validation"].labels)),
      start,
    )
    if merging.may_collapse
    else [],
  }
  included = merged_copies({"weights": scores, **faults})
  left_out = sorted(set(healthy) - set(included))
  if left_out:
    logging.warning("copies %s collapsed and are left out", left_out)
    finite = take_ingredients(candidates, included)
    _, ensemble, predictions, uncertainty = measure(engine, finite)
    measured = [by_copy[i] for i in included]
  elif faults["collapsed"]:
    faults["all_collapsed"] = True
  fault_point("merge")
  failure = None
  if m == 1:  # nothing to merge: plain IMP
    model, weights = merge_phase(candidates, uniform_soup)
    soup, of_soup = scores[0], predictions
  else:
    taken = sorted(merging.choose(scores, included))
    left_out = sorted(set(healthy) - set(taken))
    model, weights = merge_some(
      candidates, merging.among(taken, engine, key, base), left_out
    )
    alone = recalibrated(engine, key, one_model(model))
    (soup,), _, of_soup, _ = measure(engine, alone)
    model = model_at(alone, 0)
    failure = averaging_failure(
      functools.partial(on_validation, engine, key),
      candidates,
      weights,
      soup,
      [scores[i] if i in taken else lost for i in range(m)],
    )
  record: MergeRecord = {
    "weights": weights.tolist(),
    "soup": soup,
    "best_candidate": scores[best_candidate(scores)],
    **set_record(measured, finite.params),
    "candidates": scores,
    **faults,
    "prediction_ensemble": ensemble,
    "ensemble_agreement": {
      split: float(
        fetch(agreement(on_split.logits[0], prediction_ensemble(predictions[split].logits)))
      )
      for split, on_split in of_soup.items()
    },
  }
  if "parameters" in soup:
    record["parameters"] = soup["parameters"]
  if "multiply_adds" in soup:
    record["multiply_adds"] = soup["multiply_adds"]
  if uncertainty:
    record["uncertainty"] = uncertainty
  if failure is not None:
    record["averaging_failed"] = failure
  if merging.selects:
    selected = np.flatnonzero(weights)
    chosen = take_ingredients(candidates.params, selected)
    record["selected"] = set_record([scores[i] for i in selected], chosen)
  return model, record


def merge_some(
  candidates: Model, merge: Merge, left_out: list[int]
) -> tuple[Model, np.ndarray]:
  """Merges the candidates except those of these indices, which get weight 0."""
  if not left_out:
    return merge_phase(candidates, merge)
  m = number_of_models(candidates)
  indices, weights = np.setdiff1d(np.arange(m), left_out), np.zeros([m])
  model, weights[indices] = merge_phase(take_ingredients(candidates, indices), merge)
  return model, weights
