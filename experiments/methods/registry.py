"""The methods of a run: one entry each, with its name, title, colour and what it trains.

A new method is a generator function and an entry of `METHODS`, here or from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.methods.seeds import (
  RETRAIN,
  SCRATCH,
  Events,
  Run,
  Soup,
  fresh_model,
  metrics_by_phase,
  prune_and_retrain,
  records_of,
  retraining_plan,
  train_dense,
  varied_ingredients,
)
from jaxsms.baselines import imp_reprune, swamp
from jaxsms.dynamic import GradualPruning, prune_during_training
from jaxsms.training import Model

if TYPE_CHECKING:
  from experiments.method_flags import MethodFlags
  from experiments.settings import Settings

SOUP, DENSE = "sms", "dense"  # the names of the soup and of dense training in a run
MASK_STEPS = {"gmp": 100, "dpf": 16}
AVERAGED = 0.25  # share of a round of swamp that its averages over time are taken from


class Look(NamedTuple):
  """How results of a model are shown.

  Attributes:
    title: in tables and figures; `{m}` stands for the number of copies.
    colour: in figures.
    marker: there.
  """

  title: str
  colour: str
  marker: str


class Method(NamedTuple):
  """A method of a run: the soup, or an entry of --baselines.

  Attributes:
    title: in tables and figures; `{m}` stands for the number of copies.
    colour: in figures.
    marker: there.
    run: `run(run, dense)`, a generator that yields chunks, states and phases and returns
      metrics by phase, or by the last phase alone where it makes one model.
    epochs: `epochs(settings, flags)` giving how many it trains for, by the number of copies
      that train at once.
    resumes: whether it goes on where it was after a break; else it is done again.
    traits: what else tells it from the others. `one_copy`: no number depends on m. `dense`:
      nothing is pruned. `ramp`: its sparsity rises smoothly, to one model at the goal.
      `one_schedule`: its copies share one schedule.
  """

  title: str
  colour: str
  marker: str
  run: Callable[[Run, Model], Events]
  epochs: Callable[[Settings, MethodFlags], dict[int, float]]
  resumes: bool = False
  traits: frozenset[str] = frozenset()


def sparse_soup(run: Run, dense: Model) -> Events:
  """Sparse Model Soups. The last soup is handed over, also where a later phase fails."""
  m = run.settings.ingredients
  try:
    records = yield from prune_and_retrain(run, dense, SOUP, m, run.retrain_steps)
  except FloatingPointError:  # the soup of the phase before is still good
    yield from last_soup(run)
    raise
  yield from last_soup(run)
  return metrics_by_phase(records)


def last_soup(run: Run) -> Events:
  """Hands the last soup over, if there is one."""
  if run.work.model is not None:
    yield Soup(*run.work.model, run.work.masks)


def imp(run: Run, dense: Model) -> Events:
  """One copy, as long as each of the soup's."""
  records = yield from prune_and_retrain(run, dense, "imp", 1, run.retrain_steps)
  return metrics_by_phase(records)


def imp_mx(run: Run, dense: Model) -> Events:
  """One copy, as long as all of the soup's together."""
  steps = run.settings.ingredients * run.retrain_steps
  records = yield from prune_and_retrain(run, dense, "imp_mx", 1, steps)
  return metrics_by_phase(records)


def dense_soup(run: Run, dense: Model) -> Events:
  """As the soup, but nothing is pruned: what pruning can be measured against."""
  m = run.settings.ingredients
  records = yield from prune_and_retrain(
    run, dense, "dense_soup", m, run.retrain_steps, goal_sparsity=0.0
  )
  return metrics_by_phase(records)


def reprune(run: Run, dense: Model) -> Events:
  """Copies that prune on their own, averaged and pruned again."""
  m = run.settings.ingredients
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


def gradual(name: str, soup: bool) -> Callable[[Run, Model], Events]:
  """GMP or DPF, from scratch."""

  def method(run, dense):
    settings, task = run.settings, run.task
    lrs = budget_learning_rates(run)
    m = settings.ingredients if soup else 1
    most = min(MASK_STEPS[name], run.engine.chunk_steps)
    pruning = GradualPruning(
      settings.goal_sparsity,
      ramp_steps=max(1, int(task.method.fixed_after * len(lrs))),
      mask_steps=task.method.mask_steps or most,
      prune=run.prune,
    )
    records = yield from records_of(
      prune_during_training(
        run.engine,
        run.stream(SCRATCH),
        fresh_model(run),
        varied_ingredients(run, m, len(lrs)),
        np.broadcast_to(lrs, [m, len(lrs)]),
        pruning,
        feedback_programs=task.variant(feedback=True) if name == "dpf" else None,
        phase=settings.phases,
      )
    )
    return metrics_by_phase(records)

  return method


def bimp(name: str, soup: bool) -> Callable[[Run, Model], Events]:
  """A shorter dense training, then prune-retrain cycles, all in one training's budget."""

  def method(run, dense):
    epochs, cycle = bimp_epochs(run.settings, run.task.method)
    lrs = resampled(run.task.pretrain_lrs, epochs * run.task.steps_per_epoch)
    shorter = yield from train_dense(run, lrs, SCRATCH)
    # The cycles' schedules read the record of that training.
    warmup_steps = run.task.warmup_steps * len(lrs) // len(run.task.pretrain_lrs)
    task = run.task._replace(pretrain_lrs=lrs, warmup_steps=warmup_steps)
    m, steps = run.settings.ingredients if soup else 1, cycle * task.steps_per_epoch
    run = run._replace(task=task)
    records = yield from prune_and_retrain(run, shorter, name, m, steps)
    return metrics_by_phase(records[-1:])

  return method


def rewinding_soup(run: Run, dense: Model) -> Events:
  """SWAMP: rounds from one early checkpoint, averaged over copies and over time."""
  task, m = run.task, run.settings.ingredients
  lrs = budget_learning_rates(run)
  early = task.method.rewind_epochs * task.steps_per_epoch
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
  epochs = run.task.method.budget_epochs
  return resampled(run.task.pretrain_lrs, epochs * run.task.steps_per_epoch)


def resampled(learning_rates: np.ndarray, steps: int) -> np.ndarray:
  """The same schedule in another number of steps."""
  return learning_rates[np.arange(steps) * len(learning_rates) // steps]


def bimp_epochs(s: Settings, method: MethodFlags) -> tuple[int, int]:
  """Epochs of BIMP's dense training and of each of its cycles, within the budget."""
  cycle = int(method.budget_epochs * (1 - method.fixed_after) / s.phases)
  return method.budget_epochs - cycle * s.phases, cycle


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


# In the order of tables. Colours are told apart by those who are colour-blind (Okabe and
# Ito), markers in black and white.
METHODS: dict[str, Method] = {
  SOUP: Method("Sparse soup", "#D55E00", "o", sparse_soup, _copies_epochs, True),
  "imp": Method(
    "IMP", "#009E73", "v", imp, lambda s, f: {1: s.phases * s.retrain_epochs}, True,
    frozenset({"one_copy"}),
  ),
  "imp_mx": Method(
    "IMP {m}x", "#CC79A7", "D", imp_mx,
    lambda s, f: {1: s.ingredients * s.phases * s.retrain_epochs}, True,
  ),
  "imp_reprune": Method("IMP-RePrune", "#009E73", "X", reprune, _copies_epochs),
  "swamp": Method(
    "SWAMP", "#E69F00", "P", rewinding_soup, _swamp_epochs, False,
    frozenset({"one_schedule"}),
  ),
  "gmp": Method(
    "GMP", "#56B4E9", "<", gradual("gmp", False), lambda s, f: _gradual_epochs(s, f, 1),
    False, frozenset({"one_copy", "ramp"}),
  ),
  "gmp_soup": Method(
    "GMP soup", "#0072B2", "<", gradual("gmp", True),
    lambda s, f: _gradual_epochs(s, f, s.ingredients), False,
    frozenset({"ramp", "one_schedule"}),
  ),
  "dpf": Method(
    "DPF", "#E69F00", ">", gradual("dpf", False), lambda s, f: _gradual_epochs(s, f, 1),
    False, frozenset({"one_copy", "ramp"}),
  ),
  "dpf_soup": Method(
    "DPF soup", "#D55E00", ">", gradual("dpf", True),
    lambda s, f: _gradual_epochs(s, f, s.ingredients), False,
    frozenset({"ramp", "one_schedule"}),
  ),
  "bimp": Method(
    "BIMP", "#CC79A7", "h", bimp("bimp", False), lambda s, f: _bimp_epochs(s, f, 1), False,
    frozenset({"one_copy"}),
  ),
  "bimp_soup": Method(
    "BIMP soup", "#000000", "h", bimp("bimp_soup", True),
    lambda s, f: _bimp_epochs(s, f, s.ingredients), False, frozenset({"one_schedule"}),
  ),
  "dense_soup": Method(
    "Dense soup", "#000000", "d", dense_soup, _copies_epochs, True, frozenset({"dense"})
  ),
}  # fmt: skip


# The models that a phase of the soup is measured by.
SOUP_MODELS = {
  "soup": Look(*METHODS[SOUP][:3]),
  "mean_candidate": Look("Mean candidate", "#0072B2", "s"),
  "best_candidate": Look("Best candidate", "#56B4E9", "^"),
  "prediction_ensemble": Look("Ensemble", "#888888", "*"),
}


def looks() -> dict[str, Look]:
  """How everything that results.json holds of a phase is shown, by name, in order."""
  of_methods = {name: Look(*m[:3]) for name, m in METHODS.items() if name != SOUP}
  return SOUP_MODELS | of_methods


def baselines() -> tuple[str, ...]:
  """The names that --baselines takes."""
  return tuple(name for name in METHODS if name != SOUP)


def having(trait: str) -> tuple[str, ...]:
  """The names of the methods with a trait."""
  return tuple(name for name, method in METHODS.items() if trait in method.traits)
