"""How many epochs a method trains for, by the number of copies that train at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from ..config.run_config import Config


def bimp_epochs(config: Config) -> tuple[int, int]:
  """Epochs of BIMP's dense training and of each of its cycles, within the budget."""
  cycle = int(config.budget_epochs * (1 - config.fixed_after) / config.phases)
  return config.budget_epochs - cycle * config.phases, cycle


def longest(config: Config) -> float:
  """Epochs of the longest copy in a phase."""
  return max(config.values) if config.vary == "epochs" else config.retrain_epochs


def gradual_epochs(config: Config, copies: int) -> dict[int, float]:
  """GMP and DPF: one model up to the end of the ramp, then all copies."""
  head = config.fixed_after * config.budget_epochs
  return by_copies((1, head), (copies, config.budget_epochs - head))


def all_bimp_epochs(config: Config, copies: int) -> dict[int, float]:
  """BIMP: its dense training, then the cycles of all copies."""
  dense, cycle = bimp_epochs(config)
  return by_copies((1, dense), (copies, config.phases * cycle))


def swamp_epochs(config: Config) -> dict[int, float]:
  """SWAMP: one model up to what is rewound to, then the rounds of all copies."""
  rounds = (config.phases + 1) * (config.budget_epochs - config.rewind_epochs)
  return by_copies((1, config.rewind_epochs), (config.ingredients, rounds))


def by_copies(*parts: tuple[int, float]) -> dict[int, float]:
  """Numbers of copies with their epochs, added up where a number comes twice."""
  total: dict[int, float] = {}
  for copies, epochs in parts:
    total[copies] = total.get(copies, 0) + epochs
  return total


def imp_epochs(config: Config) -> dict[int, float]:
  """One copy, as long as each of the soup's."""
  return {1: config.phases * config.retrain_epochs}


def imp_mx_epochs(config: Config) -> dict[int, float]:
  """One copy, as long as all of the soup's together."""
  return {1: config.ingredients * config.phases * config.retrain_epochs}


def copies_epochs(config: Config) -> dict[int, float]:
  """All copies, in each phase."""
  return {config.ingredients: config.phases * longest(config)}
