"""Methods whose phases are those of the soup, of other copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxsms.training import Model
from jaxsms.training.distilling import Distillation

from .seeds import (
  SOUP,
  Events,
  Run,
  Soup,
  metrics_by_phase,
  prune_and_retrain,
  retraining_plan,
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


def imp(run: Run, dense: Model) -> Events:
  """One copy, as long as each of the soup's."""
  records = yield from prune_and_retrain(run, dense, "imp", 1, run.retrain_steps)
  return metrics_by_phase(records)


def imp_mx(run: Run, dense: Model) -> Events:
  """One copy, as long as all of the soup's together."""
  steps = run.config.ingredients * run.retrain_steps
  records = yield from prune_and_retrain(run, dense, "imp_mx", 1, steps)
  return metrics_by_phase(records)


def with_ema(name: str, *, soup: bool, longer: bool) -> Callable[[Run, Model], Events]:
  """IMP, IMP mx or the soup, each copy the exponential average of its training.

  Args:
    name: of the method.
    soup: of m copies, not of one.
    longer: as long as m copies.
  """

  def method(run, dense):
    m = run.config.ingredients
    run = run._replace(config=dataclasses.replace(run.config, average="ema"))
    copies, times = m if soup else 1, m if longer else 1
    steps = times * run.retrain_steps
    records = yield from prune_and_retrain(run, dense, name, copies, steps)
    return metrics_by_phase(records)

  return method


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


def dense_soup(run: Run, dense: Model) -> Events:
  """As the soup, but nothing is pruned: what pruning can be measured against."""
  m = run.config.ingredients
  records = yield from prune_and_retrain(
    run, dense, "dense_soup", m, run.retrain_steps, goal_sparsity=0.0
  )
  return metrics_by_phase(records)
