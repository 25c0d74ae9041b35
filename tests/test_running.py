"""What the listener of a run writes down of its chunks."""

import types

import numpy as np
import pytest

from experiments.run import running
from experiments.run.run_costs import RunCosts
from jaxsms.training import Chunk


def lines_of(steps, steps_per_epoch, length):
  """Lines of a training of so many steps, whose loss is the number of each step."""
  lines = []
  checkpointer = types.SimpleNamespace(
    epoch={"loss": [], "accuracy": [], "taken": []},
    config=types.SimpleNamespace(ingredients=1, phases=1),
    seed_state=types.SimpleNamespace(seed=0),
    count=lambda copies, taken: None,
    append_metrics=lines.append,
    costs=RunCosts(),
  )
  progress = types.SimpleNamespace(chunk=lambda title, epochs, chunk: None)
  listener = running.Listener(progress, checkpointer, steps_per_epoch)
  step = 0
  while step < steps:
    in_epoch = steps_per_epoch - step % steps_per_epoch
    taken = min(length, in_epoch, steps - step)
    epoch = step // steps_per_epoch + 1
    losses = np.arange(step, step + taken)
    step += taken
    mean = np.array([losses.mean()])
    listener.take(
      "sms", Chunk(1, step, steps, taken, epoch, mean, 0 * mean, np.ones(1), phase=1)
    )
  assert checkpointer.costs.record(1)["phases"][0]["steps"] == steps
  assert checkpointer.epoch == {"loss": [], "accuracy": [], "taken": []}
  return [(line["epoch"], line["step"], float(line["loss"][0])) for line in lines]


@pytest.mark.parametrize(
  ("steps", "length", "expected"),
  [
    (12, 4, [(1, 4, 1.5), (2, 8, 5.5), (3, 12, 9.5)]),
    (12, 2, [(1, 4, 1.5), (2, 8, 5.5), (3, 12, 9.5)]),
    (10, 3, [(1, 4, 1.5), (2, 8, 5.5), (3, 10, 8.5)]),  # ends within an epoch
    (3, 2, [(1, 3, 1.0)]),
  ],
)
def test_each_epoch_has_its_line_also_where_training_ends_within_one(
  steps, length, expected
):
  assert lines_of(steps, 4, length) == expected
