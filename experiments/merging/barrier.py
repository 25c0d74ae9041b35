"""Whether models share a basin: the loss between them, said before they are merged."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console

from jaxsms.disk.tensors import InMemory
from jaxsms.geometry import interpolate, loss_barrier
from jaxsms.training.failures import MARGIN
from jaxsms.training.merging import on_validation

from ..run.terminal import print_line
from ..setup.task import Task
from .with_data import as_model

POSITIONS = np.linspace(0, 1, 5)
ALL_PAIRS = 5  # the most models of which each pair is measured: three evaluations each


def measured_pairs(m: int) -> list[tuple[int, int]]:
  """Which of m models are compared: all, or where these are many, the first with each."""
  if m > ALL_PAIRS:
    return [(0, i) for i in range(1, m)]
  return list(itertools.combinations(range(m), 2))


def print_barrier(
  console: Console, models: Sequence[InMemory], task: Task, key: jax.Array
) -> None:
  """Prints the largest barrier between two models.

  Args:
    console: to print on.
    models: variables of the network.
    task: the network on its data.
    key: estimates batch statistics.
  """
  trees = [as_model(model.arrays) for model in models]

  def evaluate(model):
    return on_validation(task.engine, key, model)

  ends = [evaluate(tree) for tree in trees]
  pairs = measured_pairs(len(models))
  found = []
  for a, b in pairs:
    between = [evaluate(interpolate(trees[a], trees[b], t)) for t in POSITIONS[1:-1]]
    line = [ends[a], *between, ends[b]]
    losses = np.array([point["validation_loss"] for point in line])
    accuracies = [point["validation_accuracy"] for point in line]
    lost = min(accuracies[0], accuracies[-1]) - min(accuracies)
    found.append((float(loss_barrier(losses)), lost, a, b))
  barrier, lost, a, b = max(found)
  text = (
    f"Largest barrier of the validation loss, from {models[a].path} to {models[b].path}: "
    f"{barrier:.4g}."
  )
  if lost > MARGIN:
    text += (
      f" Between them the validation accuracy falls by {100 * lost:.2f} points: they do "
      "not share a basin, and their average will not be good."
    )
  if len(models) > ALL_PAIRS:
    text += " Only pairs with the first model were measured."
  elif len(pairs) > 1:
    text += f" All {len(pairs)} pairs were measured."
  print_line(console, text)
