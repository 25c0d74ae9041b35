"""Flags of the grid of a comparison: goal sparsities and numbers of copies."""

import dataclasses
from typing import Any

from absl import flags

from jaxsms.checks import check_sparsity

from . import run_config
from .fields import at_least, define_flags, flag, numbers, read_fields


def _numbers(kind, example, single):
  """A `parse` for different numbers; `single` is the flag for one alone."""

  def parse(words, name, values):
    if not any(str(word).strip() for word in words):
      raise ValueError(
        f"--{name} is empty: give numbers, such as {example}, or leave it out for "
        f"--{single} alone"
      )
    found = numbers(words, name, kind=kind, example=example)
    if len(set(found)) < len(found):
      raise ValueError(f"--{name} is {','.join(words)}: give each number once")
    return found

  return parse


def _check_sparsities(name, values):
  for value in values:
    check_sparsity(value, f"--{name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridFlags:
  """What is compared, beside the methods."""

  sparsities: tuple[float, ...] | None = flag(
    "Goal sparsities to compare at. Default: --goal_sparsity alone.",
    _check_sparsities,
    parse=_numbers(float, "0.9,0.95", "goal_sparsity"),
  )
  copies: tuple[int, ...] | None = flag(
    "Numbers of copies to compare. Default: --ingredients alone.",
    lambda name, values: at_least(1)(name, min(values)),
    parse=_numbers(int, "3,5", "ingredients"),
  )


define_flags(GridFlags)


def read_grid() -> tuple[tuple[float, ...], tuple[int, ...], dict[str, Any]]:
  """Goal sparsities and numbers of copies, and as fields of a run the most of each.

  Raises:
    ValueError: one is not a number, out of range, or given twice.
  """
  grid = read_fields(GridFlags, flags.FLAGS)
  given = {"goal_sparsity": grid.sparsities, "ingredients": grid.copies}
  most = {name: max(values) for name, values in given.items() if values is not None}
  single = read_fields(run_config.Config, flags.FLAGS, most)
  goals = grid.sparsities or (single.goal_sparsity,)
  copies = grid.copies or (single.ingredients,)
  return goals, copies, {"goal_sparsity": max(goals), "ingredients": max(copies)}
