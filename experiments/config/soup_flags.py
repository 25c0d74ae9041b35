"""Flags of the soup: its copies, its phases, what is pruned and how copies are merged."""

import dataclasses
import math
from typing import Any

from jaxsms.channels.budgets import BUDGETS
from jaxsms.checks import check_sparsity
from jaxsms.data.long_tail import check_ratio
from jaxsms.merges import MERGES
from jaxsms.names import quantity
from jaxsms.pruning import SCOPES
from jaxsms.schedule_registry import RETRAIN_SCHEDULES, starting_anywhere
from jaxsms.sms import phase_sparsities
from jaxsms.training.merging import GIVEN, candidate_merges

from .baseline_flags import refuse_baselines
from .criterion_checks import check_criterion
from .fields import (
  at_least,
  by_dataset,
  define_flags,
  flag,
  from_zero,
  numbers,
  one_of,
  titles,
)
from .pruning_criteria import CRITERIA
from .search_flags import EXAMPLE, SEARCHED

# What may differ between the copies, and the type of its values.
VARIABLES = {
  "seed": int,
  "weight_decay": float,
  "epochs": int,
  "learning_rate": float,
  "subset": float,
}


def _phases(values):
  if values["phase_sparsities"] is not None:
    return len(values["phase_sparsities"])
  return by_dataset(5, 3)(values)


def _goal(values):
  given = values["phase_sparsities"]
  return 0.95 if given is None else given[-1]


def _check_sparsities(name, value):
  given = f"--{name} is {','.join(f'{one:g}' for one in value) or 'empty'}"
  if not value or any(not 0 <= one < 1 for one in value):
    raise ValueError(f"{given}: give a sparsity in [0, 1) for each phase, such as 0.5,0.9")
  if list(value) != sorted(value):
    raise ValueError(f"{given}: what is removed stays removed, no phase may have less")


def _known_variables(name: str, value: str) -> None:
  """Raises ValueError where --vary names what cannot vary, or one thing twice."""
  given = value.split(",")
  one_of("variable", VARIABLES)(name, tuple(given))
  if len(set(given)) < len(given):
    raise ValueError(f"--{name} is {value}: name each variable once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoupFlags:
  """The soup."""

  ingredients: int = flag(
    "m: how many copies are retrained and averaged in each phase.", at_least(1), default=5
  )
  phase_sparsities: tuple[float, ...] | None = flag(
    "Sparsity after each phase, such as 0.5,0.9,0.9, instead of --phases and "
    "--goal_sparsity. A phase with the sparsity of the one before only retrains and "
    "merges.",
    _check_sparsities,
    parse=numbers,
  )
  phases: int = flag(
    "Number of prune-retrain-merge cycles. Default: 5 for digits, else 3.",
    at_least(1),
    fill=_phases,
  )
  goal_sparsity: float = flag(
    "Sparsity after the last phase, in [0, 1). Default: 0.95.",
    lambda name, value: check_sparsity(value, f"--{name}"),
    fill=_goal,
  )
  retrain_epochs: int = flag(
    "Epochs of each phase; 0 only prunes. Default: 2 for digits, else 5.",
    from_zero,
    fill=by_dataset(2, 5),
  )
  retrain_schedule: str = flag(
    f"Learning rate of each phase: {titles(RETRAIN_SCHEDULES)}.",
    one_of("retraining schedule", RETRAIN_SCHEDULES),
    default="LLR",
  )
  merge: str = flag(
    f"How candidates become one model: {titles(candidate_merges())}; "
    "the base is the pruned model of the phase. "
    f"{' and '.join(GIVEN)} are for --vary=subset, see --subsets and --retained.",
    one_of("merge", candidate_merges),
    default="uniform",
  )
  vary: str = flag(
    "What differs between the copies: seed (batch order, augmentation, dropout); "
    "weight_decay, epochs (of each phase) or learning_rate (the first of "
    f"{starting_anywhere()}), with the same seed; or subset (the share of the training "
    "data, see --subsets, and the seed). With --ranges also several of learning_rate, "
    "weight_decay and seed.",
    _known_variables,
    default="seed",
  )
  values: tuple[float, ...] | None = flag(
    "Values of --vary, one for each copy. Default: the seeds 0 to m - 1. With "
    "--vary=subset, only for the ratios of --subsets=imbalance.",
    parse=lambda words, name, values: numbers(
      words, name, kind=VARIABLES.get(values["vary"], float)
    ),
  )
  criterion: str = flag(
    f"Which weights are removed: {titles(CRITERIA)}.",
    one_of("criterion", CRITERIA),
    default="magnitude",
  )
  scope: str = flag(
    "Which weights compete: global (all of them) or uniform (those of each layer).",
    one_of("scope", SCOPES),
    default="global",
  )
  budget: str = flag(
    "With --criterion=channels, what --goal_sparsity is a share of: weights, channels, "
    "multiply_adds, or latency (the time of an inference, measured on this machine; "
    "0.5 asks for half of it, to within 10 %).",
    one_of("budget", BUDGETS),
    default="weights",
  )
  round_to: int = flag(
    "With --criterion=channels, a group that loses channels keeps a multiple of this "
    "number. 4 or 8 makes cut networks faster.",
    at_least(1),
    default=1,
  )
  shrink: bool = flag(
    "Cuts the network after each pruning: channels that the masks empty are removed "
    "from its arrays, and the copies retrain the smaller network. Needs "
    "--criterion=channels.",
    default=False,
  )
  n_m_group: int = flag(
    "m of --criterion=n_m; n follows from the sparsity.", at_least(2), default=4
  )

  def sparsity_of_phases(self) -> dict[int, float]:
    """After each phase, from 1."""
    if self.phase_sparsities is not None:
      return dict(enumerate(self.phase_sparsities, 1))
    return phase_sparsities(self.goal_sparsity, self.phases)


define_flags(SoupFlags)


def check(config: Any) -> None:
  """Raises ValueError where the flags of the soup do not fit one another.

  Args:
    config: with those of its baselines.
  """
  _check_phases(config)
  _check_values(config)
  check_criterion(config)
  _check_merge(config)


def _check_phases(config):
  """--phase_sparsities, with --phases and --goal_sparsity."""
  given = config.phase_sparsities
  if given is None:
    return
  if (len(given), given[-1]) != (config.phases, config.goal_sparsity):
    raise ValueError(
      f"--phase_sparsities has {quantity(len(given), 'phase')} to {given[-1]:g}: leave "
      f"--phases={config.phases} and --goal_sparsity={config.goal_sparsity:g} out"
    )


def _check_merge(config):
  """--merge, with --ingredients and --stream."""
  if config.merge in GIVEN:
    return  # see subset_flags
  entry = MERGES[config.merge]
  if entry.two and config.ingredients != 2:
    raise ValueError(
      f"--merge={config.merge} takes two copies, and --ingredients is "
      f"{config.ingredients}: give --ingredients=2 or another merge"
    )
  if config.stream and entry.in_memory:
    raise ValueError(
      f"--merge={config.merge} needs images in memory, and they are streamed: give another "
      "merge"
    )


def _check_values(config):
  """--vary and --values."""
  vary, values = config.vary, config.values
  schedule = RETRAIN_SCHEDULES[config.retrain_schedule]
  if config.ranges is not None or "," in vary:
    for name in vary.split(","):
      if name not in ("seed", *SEARCHED):
        raise ValueError(
          f"--vary={vary} has {name}: only {', '.join(SEARCHED)} and seed go with "
          "--ranges, and with one another"
        )
  if vary == "subset":
    _check_ratios(config)
    return
  if "learning_rate" in vary.split(",") and not schedule.initial_lr:
    raise ValueError(
      f"--vary=learning_rate sets the first rate of {starting_anywhere()}: "
      f"{config.retrain_schedule} has its own"
    )
  if config.ranges is not None:  # see search_flags
    return
  if "," in vary:
    raise ValueError(
      f"--vary={vary} needs --ranges, such as learning_rate:0.01:0.3 for each variable but "
      "seed"
    )
  if vary != "seed" and config.ingredients == 1:
    raise ValueError(
      f"--vary={vary} needs copies that differ, and --ingredients is 1: give 2 or more"
    )
  if values is None:
    if vary != "seed":
      examples = [one for one in EXAMPLE.split(",") if one.startswith(f"{vary}:")]
      raise ValueError(
        f"--vary={vary} needs --values, one for each of {config.ingredients} copies"
        + "".join(f", or --ranges, such as {one}" for one in examples)
      )
    return
  if len(values) != config.ingredients:
    raise ValueError(
      f"--values gives {quantity(len(values), 'value')} for "
      f"--ingredients={config.ingredients}: give one for each copy"
    )
  given = ",".join(f"{value:g}" for value in values)
  above = {"epochs": 0, "learning_rate": 0}.get(vary, -1e-9)
  below = 2**31 if vary in ("seed", "epochs") else math.inf
  if any(not above < value < below for value in values):
    raise ValueError(
      f"--values is {given}: {vary} is a number, "
      + ("above 0" if above == 0 else "0 or above")
    )
  if len(set(values)) < len(values):
    raise ValueError(
      f"--values is {given}: copies that are equal add nothing, give each another value"
    )
  if vary in ("epochs", "learning_rate"):
    why = f", whose copies share one schedule: leave it out with --vary={vary}"
    refuse_baselines(config, "one_schedule", why)


def _check_ratios(config):
  """--values of --vary=subset."""
  values = config.values
  if config.subsets != "imbalance":
    if values is not None:
      raise ValueError(
        f"--values are the ratios of --subsets=imbalance: leave them out with "
        f"--subsets={config.subsets}"
      )
    return
  if values is None or len(values) != config.ingredients:
    raise ValueError(
      f"--subsets=imbalance needs --values, a ratio for each of {config.ingredients} copies"
    )
  for ratio in values:
    check_ratio(ratio, "--values: a ratio of imbalance")
