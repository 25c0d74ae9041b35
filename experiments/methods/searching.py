"""The search of a run, from what --ranges and --rungs say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxsms.training.search import Search

if TYPE_CHECKING:
  from .seeds import Run


def search_of(run: Run, steps: int) -> Search | None:
  """What --ranges and --rungs ask for, in phases of so many steps; None for nothing.

  Rungs lie at the ends of epochs.
  """
  config = run.config
  if config.ranges is None:
    return None
  epochs = steps // run.task.steps_per_epoch
  ends = tuple(
    epochs * rung // config.rungs * run.task.steps_per_epoch
    for rung in range(1, config.rungs + 1)
  )
  return Search(ranges_of(config.ranges), ends)


def ranges_of(words: Sequence[str]) -> dict[str, tuple[float, float]]:
  """Ranges by variable, from words such as learning_rate:0.01:0.3."""
  parts = [word.split(":") for word in words]
  return {name: (float(low), float(high)) for name, low, high in parts}
