"""Methods whose phases are those of the soup, of other copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsms import Phase
from jaxsms.baselines import imp_reprune
from jaxsms.one_shot import one_shot_soups
from jaxsms.training import Model
from jaxsms.training.classifier import classifier_alone, log_prior
from jaxsms.training.distilling import Distillation
from jaxsms.training.engine import Plan
from jaxsms.training.phases import PhaseRecipe, Start, training_phases

from ..config.pruning_criteria import classifier
from ..setup.seed_streams import CLASSIFIER, RETRAIN
from .seeds import (
  SOUP,
  Events,
  Run,
  Soup,
  merging_for,
  metrics_by_phase,
  prune_and_retrain,
  records_of,
  retraining_plan,
  take_state,
)


def sparse_soup(run: Run, dense: Model) -> Events:
  """Sparse Model Soups. The last soup is handed over, also where a later phase fails."""
  m = run.config.ingredients
  try:
    records = yield from prune_and_retrain(run, dense, SOUP, m, run.retrain_steps)
  except FloatingPointError:  # the soup of the phase before is still good
    yield from last_soup(run)
    raise
  yield from last_soup(run)
  return metrics_by_phase(records)


def last_soup(run: Run) -> Events:
  """Hands the last soup over, if there is one."""
  if run.seed_state.model is not None:
    yield Soup(*run.seed_state.model, run.seed_state.masks)


def in_phases(
  name: str, *, soup: bool = False, longer: bool = False, **changes: Any
) -> Callable[[Run, Model], Events]:
  """A method whose phases are those of the soup: IMP, IMP mx, and either with changes.

  Args:
    name: of the method.
    soup: of m copies, not of one.
    longer: as long as m copies.
    **changes: of the run's configuration, such as average="ema".
  """

  def method(run, dense):
    run = run._replace(config=dataclasses.replace(run.config, **changes))
    m = run.config.ingredients
    copies, times = m if soup else 1, m if longer else 1
    steps = times * run.retrain_steps
    records = yield from prune_and_retrain(run, dense, name, copies, steps)
    return metrics_by_phase(records)

  return method


def reprune(run: Run, dense: Model) -> Events:
  """Copies that prune on their own, averaged and pruned again."""
  m = run.config.ingredients
  own_masks = run.engine._replace(programs=run.task.variant(own_masks=True))
  records = yield from records_of(
    imp_reprune(
      own_masks,
      run.stream(RETRAIN),
      dense,
      retraining_plan(run, m, run.retrain_steps),
      run.sparsities,
      m,
      prune=run.prune,
    )
  )
  return metrics_by_phase(records)


def one_shot_soup(run: Run, dense: Model) -> Events:
  """Soups at the sparsities of all phases, each pruned from the dense model in one go."""
  nested = None
  for event in one_shot_soups(
    run.engine._replace(programs=run.task.variant(own_masks=True)),
    run.stream(RETRAIN),
    dense,
    retraining_plan(run, run.config.ingredients, run.retrain_steps),
    run.sparsities,
    prune=run.prune,
    merging=merging_for(run, run.config.ingredients),
  ):
    if not isinstance(event, Phase):
      yield event
      continue
    nested = event.params
    for parts in zip(nested.models, nested.masks, nested.records.values(), strict=True):
      model, masks, record = parts
      yield Phase(model, masks, None, record)
      yield Soup(*model, masks, record["phase"])
  return metrics_by_phase(list(nested.records.values()))


def soup_distilled(run: Run, dense: Model) -> Events:
  """The soup, its last one trained on its candidates' mean prediction."""
  config, steps = run.config, run.config.distill_epochs * run.task.steps_per_epoch
  records = yield from prune_and_retrain(
    run,
    dense,
    "soup_distilled",
    config.ingredients,
    run.retrain_steps,
    distillation=Distillation(retraining_plan(run, 1, steps), config.temperature),
  )
  return metrics_by_phase(records[-1:])


def soup_classifier(run: Run, dense: Model) -> Events:
  """The soup, the classifier of its last one trained on all data."""
  name, config, seed_state = "soup_classifier", run.config, run.seed_state
  if seed_state.method != name or len(seed_state.phases.get(name, ())) < config.phases:
    m = config.ingredients
    yield from prune_and_retrain(run, dense, name, m, run.retrain_steps)
  records = seed_state.phases[name]
  if len(records) == config.phases:
    training = training_phases(
      run.engine,
      run.stream(CLASSIFIER),
      Start(seed_state.model, seed_state.masks, take_state(run)),
      classifier_plan(run),
      {config.phases: records[-1]["sparsity"]},
      PhaseRecipe(prune=lambda params, sparsity, masks: masks, shrink=run.task.shrink),
    )
    for event in training:
      if isinstance(event, Phase):
        seed_state.model, seed_state.masks = event.params, event.masks
        seed_state.phases[name] = [*records, event.record]
      yield event
  return metrics_by_phase(seed_state.phases[name][-1:])


def classifier_plan(run: Run) -> Plan:
  """That of one copy whose classifier alone is trained, as if all classes were equal."""
  task, params = run.task, run.task.shapes.params
  labels = np.asarray(task.engine.splits.train.labels)
  prior = log_prior(labels, task.module.num_classes)
  plan = retraining_plan(run, 1, run.retrain_steps)

  def of_classifier(record):
    chosen, learning_rates = plan(record)
    return classifier_alone(chosen, params, classifier(params), prior), learning_rates

  return of_classifier
