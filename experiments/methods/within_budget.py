"""Methods that train from scratch, within --budget_epochs: GMP, DPF, BIMP and SWAMP."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxsms.baselines import swamp
from jaxsms.dynamic import GradualPruning, prune_during_training
from jaxsms.training import Model

from ..setup.seed_streams import RETRAIN, SCRATCH
from .epochs import bimp_epochs
from .seeds import (
  Events,
  Run,
  averaged,
  fresh_model,
  metrics_by_phase,
  prune_and_retrain,
  records_of,
  train_dense,
  varied_ingredients,
)

MASK_STEPS = {"gmp": 100, "dpf": 16}
AVERAGED = 0.25  # share of a round of swamp that its averages over time are taken from


def gradual(name: str, soup: bool) -> Callable[[Run, Model], Events]:
  """GMP or DPF, from scratch."""

  def method(run, dense):
    config, task = run.config, run.task
    lrs = budget_learning_rates(run)
    m = config.ingredients if soup else 1
    most = min(MASK_STEPS[name], run.engine.chunk_steps)
    pruning = GradualPruning(
      config.goal_sparsity,
      ramp_steps=max(1, int(config.fixed_after * len(lrs))),
      mask_steps=config.mask_steps or most,
      prune=run.prune,
    )
    records = yield from records_of(
      prune_during_training(
        run.engine,
        run.stream(SCRATCH),
        fresh_model(run),
        averaged(config, varied_ingredients(run, m, len(lrs))),
        np.broadcast_to(lrs, [m, len(lrs)]),
        pruning,
        feedback_programs=task.variant(feedback=True) if name == "dpf" else None,
        phase=config.phases,
      )
    )
    return metrics_by_phase(records)

  return method


def bimp(name: str, soup: bool) -> Callable[[Run, Model], Events]:
  """A shorter dense training, then prune-retrain cycles, all in one training's budget."""

  def method(run, dense):
    epochs, cycle = bimp_epochs(run.config)
    lrs = resampled(run.task.pretrain_lrs, epochs * run.task.steps_per_epoch)
    shorter = yield from train_dense(run, lrs, SCRATCH)
    # The cycles' schedules read the record of that training.
    warmup_steps = run.task.warmup_steps * len(lrs) // len(run.task.pretrain_lrs)
    task = run.task._replace(pretrain_lrs=lrs, warmup_steps=warmup_steps)
    m, steps = run.config.ingredients if soup else 1, cycle * task.steps_per_epoch
    run = run._replace(task=task)
    records = yield from prune_and_retrain(run, shorter, name, m, steps)
    return metrics_by_phase(records[-1:])

  return method


def rewinding_soup(run: Run, dense: Model) -> Events:
  """SWAMP: rounds from one early checkpoint, averaged over copies and over time."""
  task, m = run.task, run.config.ingredients
  lrs = budget_learning_rates(run)
  early = run.config.rewind_epochs * task.steps_per_epoch
  ticket = fresh_model(run)
  if early:
    ticket = yield from train_dense(run, lrs[:early], SCRATCH)
  rest = lrs[early:].copy()
  average_after = int((1 - AVERAGED) * len(rest))
  rest[average_after:] = rest[average_after]
  chosen = varied_ingredients(run, m, len(rest))
  records = yield from records_of(
    swamp(
      run.engine,
      run.stream(RETRAIN),
      ticket,
      lambda record: (chosen, np.broadcast_to(rest, [m, len(rest)])),
      run.sparsities,
      average_after=average_after,
      prune=run.prune,
    )
  )
  return metrics_by_phase(records)


def budget_learning_rates(run: Run) -> np.ndarray:
  """The schedule of dense training, over the budget of those that start from scratch."""
  epochs = run.config.budget_epochs
  return resampled(run.task.pretrain_lrs, epochs * run.task.steps_per_epoch)


def resampled(learning_rates: np.ndarray, steps: int) -> np.ndarray:
  """The same schedule in another number of steps."""
  return learning_rates[np.arange(steps) * len(learning_rates) // steps]
