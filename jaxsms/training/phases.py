"""The loop on a data set: prune, retrain, recalibrate, evaluate, merge, evaluate."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, cast

import jax
import numpy as np
from absl import logging

from jaxsms.devices.ingredients import take_ingredients
from jaxsms.devices.meshes import fetch
from jaxsms.disk.faults import fault_point
from jaxsms.metrics import agreement
from jaxsms.phases import Merge, Prune, healthy_copies, merge_phase
from jaxsms.pruning import magnitude_masks
from jaxsms.sms import soup_phases
from jaxsms.soups import prediction_ensemble, uniform_soup
from jaxsms.training.cutting import Cut
from jaxsms.training.distilling import Distillation, check_temperature, distil
from jaxsms.training.engine import Engine, Model, Plan, Record, one_model, trained
from jaxsms.training.failures import (
  AveragingFailure,
  Faults,
  averaging_failure,
  collapsed_copies,
  merged_copies,
)
from jaxsms.training.landscape import measure_landscape
from jaxsms.training.loop import train_copies
from jaxsms.training.measurements import (
  RECALIBRATION,
  SetRecord,
  best_candidate,
  measure,
  recalibrated,
  set_record,
)
from jaxsms.training.merging import Merging, merging_of, on_validation
from jaxsms.training.pruned import prune_and_measure
from jaxsms.training.search import (
  Rung,
  Search,
  better_half,
  concluded,
  next_rung,
  search_copies,
)
from jaxsms.training.state import TrainState
from jaxsms.trees import PyTree, model_at, number_of_models


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


class Start(NamedTuple):
  """What the phases begin with; after a break, what the last finished phase left.

  Attributes:
    model: the dense model, or the soup of the phase before.
    masks: of that soup; None means dense.
    state: of the copies in the first of these phases, as `train_copies` gave it; None
      begins at step 0.
    rungs: of a search, those up to that state.
  """

  model: Model
  masks: PyTree | None = None
  state: TrainState | None = None
  rungs: Sequence[Rung] = ()


def training_phases(
  engine: Engine,
  key: jax.Array,
  start: Start,
  plan: Plan,
  sparsities: Mapping[int, float],
  *,
  prune: Prune = magnitude_masks,
  merging: Merging | None = None,
  landscapes: Collection[int] = (),
  shrink: Callable[[Engine, Model, PyTree], Cut] | None = None,
  distillation: Distillation | None = None,
  search: Search | None = None,
) -> Iterator[Any]:
  """Sparse Model Soups of a network on a data set; with one copy, IMP.

  It goes on after a break where it starts from the soup of the last finished phase, and is
  given the sparsities of the phases after it.

  Args:
    engine: the network and its data.
    key: each phase gets `fold_in(key, phase)`, the same for all copies.
    start: the dense model, or what is gone on from.
    plan: given a phase's pruning record (`phase`, `sparsity`, `pruned_fraction`,
      `norm_drop`, `relative_norm_drop`), the ingredients of its copies and their learning
      rates [m, steps].
    sparsities: by phase, see `jaxsms.sms.phase_sparsities`.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    merging: of the candidates; None means `merging_of("uniform")`.
    landscapes: phases in which the loss between the candidates is measured.
    shrink: `shrink(engine, pruned, masks)` giving the smaller network of a phase, see
      `jaxsms.training.cutting.cut_engine`. Models and masks between phases keep their full
      shapes; candidates have those of their phase.
    distillation: of the candidates into the last phase's soup; its plan is given the record
      of that phase.
    search: judges copies on the way; `plan` also gets values, the better half is merged.

  Yields:
    What `train_copies` yields, and after each phase a `jaxsms.Phase`. Its params are a
    `Model`. Its record is that of `jaxsms.prune_phase`, with metrics of `pruned` (before
    retraining), `pruning_instability` (the share of the test accuracy that pruning took),
    that of `merge_candidates`, and where asked for and possible the `landscape`, see
    `measure_landscape`, and the rungs of the `search`.

  Raises:
    ValueError: see `jaxsms.prune_phase`; or, before training, the merging takes images in
      memory and these are streamed, the temperature is not above 0, or see `check_search`.
    FloatingPointError: all copies of a phase diverged.
  """
  merging = merging or merging_of("uniform")
  merging.check(engine)
  if search is not None:
    merging = merging._replace(choose=better_half, selects=True)
  if distillation is not None:
    check_temperature(distillation.temperature)
  cut, base, trained_images = Cut(engine), start.model, 0

  state, before = start.state, start.rungs
  rungs: list[Rung] = []
  # Where the state that is gone on from has a teacher, it is the soup's.
  of_soup, state = (state, None) if state and state.teacher else (None, state)

  def retrain(key, pruned, masks, record):
    nonlocal cut, base, trained_images, state, before, rungs
    cut = Cut(engine) if shrink is None else shrink(engine, pruned, masks)
    base = cut.shrink(pruned)
    chosen, learning_rates = plan(record)
    trained_images = int(np.sum(chosen["steps"])) * engine.programs.batch_size
    copies = number_of_models(chosen, "ingredients")
    begin, judged, state, before = state, before, None, ()
    if of_soup is not None:
      teacher = model_at(of_soup.teacher, 0)
      if search is not None:
        rungs = [*judged, next_rung(key, search, judged, record["phase"], copies)]
      return Model(teacher.params, teacher.batch_stats), {}
    if begin is None:
      begin = cut.engine.start(base, copies)
    masks, phase = cut.masks(masks), record["phase"]
    if search is None:
      end = yield from train_copies(
        cut.engine, masks, key, begin, chosen, learning_rates, phase=phase
      )
    else:
      vary = functools.partial(plan, record)
      end, rungs = yield from search_copies(
        cut.engine, masks, key, begin, search, vary, judged, phase=phase
      )
    return trained(end), {}

  def merge(key, candidates, record):
    accuracy = record["pruned"]["validation_accuracy"]
    soup, merged = merge_candidates(cut.engine, key, candidates, merging, accuracy, base)
    if search is not None:
      merged["search"] = concluded(rungs, merged["candidates"], merged_copies(merged))
    if record["phase"] in landscapes:
      found = measure_landscape(
        cut.engine, key, candidates, merged_copies(merged), soup.params, trained_images
      )
      if found is not None:
        cast(dict[str, Any], merged)["landscape"] = found
    return cut.expand(soup), merged

  def finish(key, soup, masks, candidates, record):
    nonlocal of_soup
    if distillation is None or record["phase"] != max(sparsities):
      return soup, {}
    of_key = jax.random.fold_in(key, RECALIBRATION)
    candidates = recalibrated(cut.engine, of_key, candidates)
    begin, of_soup = of_soup, None
    model, last = yield from distil(
      cut.engine,
      of_key,
      cut.shrink(soup),
      cut.masks(masks),
      candidates,
      record,
      distillation,
      begin,
    )
    return cut.expand(model), last

  return soup_phases(
    key,
    start.model,
    sparsities,
    prune=functools.partial(prune_and_measure, engine, prune),
    retrain=retrain,
    merge=merge,
    masks=start.masks,
    finish=finish,
  )


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
    The soup and its record. Candidates that diverged or collapsed count in nothing but
    their own metrics; where all that did not diverge collapsed, they are merged after all.

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
    "collapsed": []
    if merging.samples is not None  # copies that know their own classes alone are well
    else collapsed_copies(
      [one["validation_accuracy"] for one in scores],
      np.asarray(fetch(predictions["validation"].labels)),
      start,
    ),
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
  """Merges the candidates but for those of these indices, which have weight 0."""
  if not left_out:
    return merge_phase(candidates, merge)
  m = number_of_models(candidates)
  indices, weights = np.setdiff1d(np.arange(m), left_out), np.zeros([m])
  model, weights[indices] = merge_phase(take_ingredients(candidates, indices), merge)
  return model, weights
