"""The search of a run, from what --ranges and --rungs say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxsms.training.search import Search

if TYPE_CHECKING:
  from .seeds import Run


def search_of(run: Run, steps: int) -> Search | None:
  """What --ranges and --rungs ask for, in phases of so many steps; None for nothing.

  Rungs lie at the ends of epochs.
  """
  config = run.config
  if not config.searched:
    return None
  epochs = steps // run.task.steps_per_epoch
  ends = tuple(
    epochs * rung // config.rungs * run.task.steps_per_epoch
    for rung in range(1, config.rungs + 1)
  )
  return Search(config.searched, ends)
