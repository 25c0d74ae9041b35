"""What the soup is compared with: a function for each name of --baselines.

Each gives the metrics of its model by phase, or by the last phase alone where it makes one
model of the goal sparsity only.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from experiments.method_flags import MethodFlags, bimp_epochs
from experiments.retraining import (
  RETRAIN,
  SCRATCH,
  Run,
  chunk_steps,
  fresh_model,
  prune_and_retrain,
  retraining_plan,
  train_dense,
  varied,
)
from experiments.settings import Settings
from jaxsms import report
from jaxsms.baselines import imp_reprune, swamp
from jaxsms.dynamic import prune_during_training
from jaxsms.training.measurements import Model, Record

MASK_STEPS = {"gmp": 100, "dpf": 16}
AVERAGED = 0.25  # share of a round of swamp that its averages over time are taken from
ByPhase = dict[int, Record]


class Baseline(NamedTuple):
  """An entry of --baselines.

  Attributes:
    run: `run(run, dense)` giving metrics by phase.
    epochs: `epochs(settings, method)` giving how many it trains for, by the number of
      copies that train at once.
    resumes: whether it goes on where it was after a break; else it is done again.
  """

  run: Callable[[Run, Model], ByPhase]
  epochs: Callable[[Settings, MethodFlags], dict[int, float]]
  resumes: bool = False


def imp(run: Run, dense: Model) -> ByPhase:
  """One copy, as long as each of the soup's."""
  return _soups(prune_and_retrain(run, dense, "imp", 1, _retrain_steps(run)).records)


def imp_mx(run: Run, dense: Model) -> ByPhase:
  """One copy, as long as all of the soup's together."""
  steps = run.settings.ingredients * _retrain_steps(run)
  return _soups(prune_and_retrain(run, dense, "imp_mx", 1, steps).records)


def run_imp_reprune(run: Run, dense: Model) -> ByPhase:
  """Copies that prune on their own, averaged and pruned again."""
  settings, task, m = run.settings, run.task, run.settings.ingredients
  _, records = imp_reprune(
    task.variant(own_masks=True),
    task.splits,
    jax.random.fold_in(run.key, RETRAIN),
    dense,
    retraining_plan(run, m, _retrain_steps(run)),
    m,
    goal_sparsity=settings.goal_sparsity,
    phases=settings.phases,
    **run.on("imp_reprune"),
  )
  return _soups(records)


def dense_soup(run: Run, dense: Model) -> ByPhase:
  """As the soup, but nothing is pruned: what pruning can be measured against."""
  m, steps = run.settings.ingredients, _retrain_steps(run)
  return _soups(prune_and_retrain(run, dense, "dense_soup", m, steps, 0.0).records)


def gradual(method: str, soup: bool) -> Callable[[Run, Model], ByPhase]:
  """GMP or DPF, from scratch."""
  name = f"{method}_soup" if soup else method

  def baseline(run, dense):
    settings, task = run.settings, run.task
    lrs = budget_learning_rates(run)
    m = settings.ingredients if soup else 1
    ramp_steps = max(1, int(task.method.fixed_after * len(lrs)))
    options = run.on(name)
    on_chunk, on_phase = options.pop("on_chunk"), options.pop("on_phase")
    most = min(MASK_STEPS[method], chunk_steps(settings))
    _, _, record = prune_during_training(
      task.programs,
      task.splits,
      jax.random.fold_in(run.key, SCRATCH),
      fresh_model(run),
      varied(settings, task.method, m, len(lrs), task.steps_per_epoch),
      np.broadcast_to(lrs, [m, len(lrs)]),
      goal_sparsity=settings.goal_sparsity,
      ramp_steps=ramp_steps,
      mask_steps=task.method.mask_steps or most,
      feedback_programs=task.variant(feedback=True) if method == "dpf" else None,
      on_chunk=lambda chunk: on_chunk(settings.phases, chunk),
      **options,
    )
    record = {"phase": settings.phases, **record}
    on_phase(record)
    return _soups([record])

  return baseline


def bimp(soup: bool) -> Callable[[Run, Model], ByPhase]:
  """A shorter dense training, then prune-retrain cycles, all in one training's budget."""
  name = "bimp_soup" if soup else "bimp"

  def baseline(run, dense):
    epochs, cycle = bimp_epochs(run.settings, run.task.method)
    lrs = resampled(run.task.pretrain_lrs, epochs * run.task.steps_per_epoch)
    shorter = train_dense(run, name, lrs, SCRATCH)
    # The cycles' schedules read the record of that training.
    warmup_steps = run.task.warmup_steps * len(lrs) // len(run.task.pretrain_lrs)
    task = run.task._replace(pretrain_lrs=lrs, warmup_steps=warmup_steps)
    m, steps = run.settings.ingredients if soup else 1, cycle * task.steps_per_epoch
    _, _, records = prune_and_retrain(run._replace(task=task), shorter, name, m, steps)
    return _soups(records[-1:])

  return baseline


def run_swamp(run: Run, dense: Model) -> ByPhase:
  """Rounds from one early checkpoint, averaged over copies and over time."""
  settings, task, m = run.settings, run.task, run.settings.ingredients
  lrs = budget_learning_rates(run)
  early = task.method.rewind_epochs * task.steps_per_epoch
  ticket = train_dense(run, "swamp", lrs[:early], SCRATCH) if early else fresh_model(run)
  rest = lrs[early:].copy()
  average_after = int((1 - AVERAGED) * len(rest))
  rest[average_after:] = rest[average_after]
  chosen = varied(settings, task.method, m, len(rest), task.steps_per_epoch)
  _, records = swamp(
    task.programs,
    task.splits,
    jax.random.fold_in(run.key, RETRAIN),
    ticket,
    lambda record: (chosen, np.broadcast_to(rest, [m, len(rest)])),
    average_after=average_after,
    goal_sparsity=settings.goal_sparsity,
    phases=settings.phases,
    **run.on("swamp"),
  )
  return _soups(records)


def budget_learning_rates(run: Run) -> np.ndarray:
  """The schedule of dense training, over the budget of those that start from scratch."""
  epochs = run.task.method.budget_epochs
  return resampled(run.task.pretrain_lrs, epochs * run.task.steps_per_epoch)


def resampled(learning_rates: np.ndarray, steps: int) -> np.ndarray:
  """The same schedule in another number of steps."""
  return learning_rates[np.arange(steps) * len(learning_rates) // steps]


def _retrain_steps(run: Run) -> int:
  return run.settings.retrain_epochs * run.task.steps_per_epoch


def _soups(records: list[Record]) -> ByPhase:
  """Metrics by phase, with the copies that diverged or collapsed, if any did."""
  return {
    record["phase"]: record["soup"]
    | {name: record[name] for name in report.COPY_FAULTS if record.get(name)}
    for record in records
  }


def longest(s: Settings, method: MethodFlags) -> float:
  """Epochs of the longest copy in a phase."""
  return max(method.values) if method.vary == "epochs" else s.retrain_epochs


def _gradual_epochs(s, method, copies):
  head = method.fixed_after * method.budget_epochs
  return _sum((1, head), (copies, method.budget_epochs - head))


def _bimp_epochs(s, method, copies):
  dense, cycle = bimp_epochs(s, method)
  return _sum((1, dense), (copies, s.phases * cycle))


def _swamp_epochs(s, method):
  rounds = (s.phases + 1) * (method.budget_epochs - method.rewind_epochs)
  return _sum((1, method.rewind_epochs), (s.ingredients, rounds))


def _sum(*parts: tuple[int, float]) -> dict[int, float]:
  total: dict[int, float] = {}
  for copies, epochs in parts:
    total[copies] = total.get(copies, 0) + epochs
  return total


def _copies_epochs(s, method):
  return {s.ingredients: s.phases * longest(s, method)}


BASELINES: dict[str, Baseline] = {
  "imp": Baseline(imp, lambda s, f: {1: s.phases * s.retrain_epochs}, resumes=True),
  "imp_mx": Baseline(
    imp_mx, lambda s, f: {1: s.ingredients * s.phases * s.retrain_epochs}, resumes=True
  ),
  "imp_reprune": Baseline(run_imp_reprune, _copies_epochs),
  "dense_soup": Baseline(dense_soup, _copies_epochs, resumes=True),
  "gmp": Baseline(gradual("gmp", False), lambda s, f: _gradual_epochs(s, f, 1)),
  "gmp_soup": Baseline(
    gradual("gmp", True), lambda s, f: _gradual_epochs(s, f, s.ingredients)
  ),
  "dpf": Baseline(gradual("dpf", False), lambda s, f: _gradual_epochs(s, f, 1)),
  "dpf_soup": Baseline(
    gradual("dpf", True), lambda s, f: _gradual_epochs(s, f, s.ingredients)
  ),
  "bimp": Baseline(bimp(False), lambda s, f: _bimp_epochs(s, f, 1)),
  "bimp_soup": Baseline(bimp(True), lambda s, f: _bimp_epochs(s, f, s.ingredients)),
  "swamp": Baseline(run_swamp, _swamp_epochs),
}
