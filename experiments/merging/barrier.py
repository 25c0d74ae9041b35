"""Whether models share a basin: the loss between them, said before they are merged."""

from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from rich.console import Console

from jaxsms.disk.tensors import InMemory
from jaxsms.geometry import interpolate, loss_barrier
from jaxsms.training.failures import MARGIN
from jaxsms.training.merging import on_validation

from ..run.task import Task
from ..run.terminal import print_line
from .with_data import as_model

POSITIONS = np.linspace(0, 1, 5)
FLAGS = flags.FLAGS


def say_barrier(console: Console, models: Sequence[InMemory], task: Task) -> None:
  """Prints the largest barrier between the first model and each other one.

  Args:
    console: to print on.
    models: variables of the network.
    task: the network on its data.
  """
  key = jax.random.key(FLAGS.seed)
  trees = [as_model(model.arrays) for model in models]

  def evaluate(model):
    return on_validation(task.engine, key, model)

  ends = [evaluate(tree) for tree in trees]
  found = []
  for tree, end, model in list(zip(trees, ends, models, strict=True))[1:]:
    between = [evaluate(interpolate(trees[0], tree, t)) for t in POSITIONS[1:-1]]
    line = [ends[0], *between, end]
    losses = np.array([point["validation_loss"] for point in line])
    accuracies = [point["validation_accuracy"] for point in line]
    lost = min(accuracies[0], accuracies[-1]) - min(accuracies)
    found.append((float(loss_barrier(losses)), lost, model.path))
  barrier, lost, path = max(found)
  text = (
    f"Largest barrier of the validation loss, from {models[0].path} to {path}: "
    f"{barrier:.4g}."
  )
  if lost > MARGIN:
    text += (
      f" Between them the validation accuracy falls by {100 * lost:.2f} points: they do "
      "not share a basin, and their average will not be good."
    )
  print_line(console, text)
