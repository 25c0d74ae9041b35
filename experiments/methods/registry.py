"""The methods of a run: one entry each, with its name, title, colour and what it trains.

A new method is a generator function and an entry of `METHODS`, here or from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxsms import Phase
from jaxsms.baselines import imp_reprune, swamp
from jaxsms.dynamic import GradualPruning, prune_during_training
from jaxsms.one_shot import one_shot_soups
from jaxsms.training import Model

from .epochs import (
  all_bimp_epochs,
  bimp_epochs,
  by_copies,
  copies_epochs,
  gradual_epochs,
  imp_epochs,
  imp_mx_epochs,
  longest,
  swamp_epochs,
)
from .in_phases import in_phases, soup_classifier, soup_distilled, sparse_soup
from .seeds import (
  RETRAIN,
  SCRATCH,
  SOUP,
  Events,
  Run,
  Soup,
  averaged,
  fresh_model,
  merging_for,
  metrics_by_phase,
  prune_and_retrain,
  records_of,
  retraining_plan,
  train_dense,
  varied_ingredients,
)

if TYPE_CHECKING:
  from ..config.run_config import Config

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
    epochs: `epochs(config)` giving how many it trains for, by the number of copies
      that train at once.
    resumes: whether it goes on where it was after a break; else it is done again.
    traits: what else tells it from the others. `one_copy`: no number depends on m. `dense`:
      nothing is pruned. `ramp`: its sparsity rises smoothly, to one model at the goal.
      `one_schedule`: its copies share one schedule.
      `own_masks`: its masks are not those of one model between phases. `cycles`: it
      prunes in cycles within --budget_epochs, and the last one's model counts. `rewinds`:
      its rounds begin at an earlier epoch. `averaged`: its copies end as averages of
      their steps. `distilled`: its last model learns from its candidates. `last_alone`: its
      last model alone differs from the soup's. `labels`: it counts those of all classes.
  """

  title: str
  colour: str
  marker: str
  run: Callable[[Run, Model], Events]
  epochs: Callable[[Config], dict[int, float]]
  resumes: bool = False
  traits: frozenset[str] = frozenset()


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


# In the order of tables. Colours are told apart by those who are colour-blind (Okabe and
# Ito), markers in black and white.
METHODS: dict[str, Method] = {
  SOUP: Method("Sparse soup", "#D55E00", "o", sparse_soup, copies_epochs, True),
  "imp": Method(
    "IMP", "#009E73", "v", in_phases("imp"), imp_epochs, True, frozenset({"one_copy"})
  ),
  "imp_mx": Method(
    "IMP {m}x", "#CC79A7", "D", in_phases("imp_mx", longer=True), imp_mx_epochs, True
  ),
  "imp_ema": Method(
    "IMP with EMA", "#009E73", "^", in_phases("imp_ema", average="ema"),
    imp_epochs, True, frozenset({"one_copy", "averaged"}),
  ),
  "imp_mx_ema": Method(
    "IMP {m}x with EMA", "#CC79A7", "p",
    in_phases("imp_mx_ema", longer=True, average="ema"), imp_mx_epochs, True,
    frozenset({"averaged"}),
  ),
  "soup_ema": Method(
    "Sparse soup with EMA", "#D55E00", "H",
    in_phases("soup_ema", soup=True, average="ema"), copies_epochs, True,
    frozenset({"averaged"}),
  ),
  "soup_distilled": Method(
    "Distilled soup", "#0072B2", "P", soup_distilled,
    lambda c: by_copies((c.ingredients, c.phases * longest(c)), (1, c.distill_epochs)),
    True, frozenset({"distilled", "last_alone"}),
  ),
  "soup_classifier": Method(
    "Soup, classifier", "#E69F00", "s", soup_classifier,
    lambda c: by_copies((c.ingredients, c.phases * longest(c)), (1, c.retrain_epochs)),
    True, frozenset({"last_alone", "labels"}),
  ),
  "imp_reprune": Method(
    "IMP-RePrune", "#009E73", "X", reprune, copies_epochs, False, frozenset({"own_masks"})
  ),
  "one_shot_soup": Method(
    "One-shot soup", "#56B4E9", "d", one_shot_soup,
    lambda c: {c.phases * c.ingredients: longest(c)}, False, frozenset({"own_masks"}),
  ),
  "swamp": Method(
    "SWAMP", "#E69F00", "P", rewinding_soup, swamp_epochs, False,
    frozenset({"one_schedule", "own_masks", "rewinds"}),
  ),
  "gmp": Method(
    "GMP", "#56B4E9", "<", gradual("gmp", False), lambda c: gradual_epochs(c, 1),
    False, frozenset({"one_copy", "ramp", "own_masks"}),
  ),
  "gmp_soup": Method(
    "GMP soup", "#0072B2", "<", gradual("gmp", True),
    lambda c: gradual_epochs(c, c.ingredients), False,
    frozenset({"ramp", "one_schedule", "own_masks"}),
  ),
  "dpf": Method(
    "DPF", "#E69F00", ">", gradual("dpf", False), lambda c: gradual_epochs(c, 1),
    False, frozenset({"one_copy", "ramp", "own_masks"}),
  ),
  "dpf_soup": Method(
    "DPF soup", "#D55E00", ">", gradual("dpf", True),
    lambda c: gradual_epochs(c, c.ingredients), False,
    frozenset({"ramp", "one_schedule", "own_masks"}),
  ),
  "bimp": Method(
    "BIMP", "#CC79A7", "h", bimp("bimp", False), lambda c: all_bimp_epochs(c, 1), False,
    frozenset({"one_copy", "cycles"}),
  ),
  "bimp_soup": Method(
    "BIMP soup", "#000000", "h", bimp("bimp_soup", True),
    lambda c: all_bimp_epochs(c, c.ingredients), False,
    frozenset({"one_schedule", "cycles"}),
  ),
  "dense_soup": Method(
    "Dense soup", "#000000", "d",
    in_phases("dense_soup", soup=True, goal_sparsity=0.0, phase_sparsities=None),
    copies_epochs, True, frozenset({"dense"}),
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
