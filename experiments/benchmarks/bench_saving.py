"""Times what a checkpoint of a run costs its training: rounds with and without a save.

python -m experiments.benchmarks.bench_saving
python -m experiments.benchmarks.bench_saving --model=resnet18 --ingredients=5
"""

import dataclasses
import math
import os
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from jaxsms import models
from jaxsms.disk.series import Series
from jaxsms.training import Model

from ..config import device_flags
from ..config.fields import (
  at_least,
  define_flags,
  ensure,
  flag,
  one_of,
)
from ..costs.timing import Spread, calls_for, cores, scaled, seconds, shown, spread
from ..methods.seed_state import SeedState, packed
from ..run.environment import environment
from . import bench_jax
from .usual_networks import make_task, prepared, usual_network

ROUND_SECONDS = 5.0  # at least; and longer than a save
LONGER = 1.5  # a round, than the save within it


def _may_be_written(name, value):
  if not os.access(value, os.W_OK):
    raise ValueError(f"--{name} {value} cannot be written: choose another one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(device_flags.DeviceFlags):
  """The flags of the devices, and those of this file."""

  model: str = flag(
    f"Network: {', '.join(models.MODELS)}.", one_of("model", models.MODELS), default="mlp"
  )
  ingredients: int = flag("Copies that are trained at once.", at_least(1), default=5)
  batch_size: int = flag(
    "Examples of one copy in a step; a save costs the same whatever it is. Default: 20 for "
    "the mlp, else 128.",
    at_least(1),
    fill=lambda values: 20 if values["model"] == "mlp" else 128,
  )
  rounds: int = flag("Pairs of rounds, with and without a save.", at_least(1), default=5)
  folder: str | None = flag(
    "Where to save. Default: where temporary files are.", _may_be_written
  )
  save_minutes: float = flag(
    "Between two saves: the main job's default.",
    ensure(lambda value: 0 < value < math.inf, "give a number above 0"),
    default=5.0,
  )


class Cost(NamedTuple):
  """What one save costs, over the rounds.

  Attributes:
    megabytes: of its arrays.
    training: seconds of a round without a save.
    blocked: seconds in which nothing else runs, copying to the host above all.
    held_up: seconds by which a round with a save takes longer.
    cpu: CPU seconds by which it takes more, the save's thread among them.
  """

  megabytes: float
  training: Spread
  blocked: Spread
  held_up: Spread
  cpu: Spread


def main(argv: list[str]) -> None:
  """Times what the flags say; bad input ends it with one sentence and exit status 2."""
  config, training = prepared(Config, argv, make_training)
  print(text(config, measure(training, config.rounds, config.folder)))


def make_training(config: Config) -> bench_jax.Training:
  """m copies in training on images of the shape that such a network usually gets."""
  module, like = usual_network(config)
  m, examples = config.ingredients, max(config.batch_size, min(like["examples"], 5000))
  task = make_task(
    config, module, like["image"], m, examples=examples, augmentation=like["augmentation"]
  )
  return bench_jax.Training(task, m, chunk_steps=1 if config.model != "mlp" else 50)


def measure(training: bench_jax.Training, rounds: int, folder: str | None) -> Cost:
  """Alternates rounds with and without a save, of the work of a run in its second phase."""
  task = training.task
  model = Model(task.params, task.batch_stats)
  masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), task.params)
  training.run(1)  # compiles
  chunk_seconds = seconds(lambda: training.run(1))
  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    series = Series(workdir, keep=2)

    def save():
      work = SeedState(0, dense=model, model=model, masks=masks, state=training.state)
      arrays, _ = packed(work)
      series.save(arrays, {})
      return arrays

    def to_the_disk():
      save()
      series.wait()

    megabytes = sum(x.nbytes for x in save().values()) / 1e6
    series.wait()
    wanted = max(ROUND_SECONDS, LONGER * seconds(to_the_disk))
    chunks = calls_for(wanted, chunk_seconds)

    def with_save():
      blocked = seconds(save)
      return blocked, blocked + seconds(lambda: training.run(chunks))

    def without_save():
      return 0.0, seconds(lambda: training.run(chunks))

    pairs = []
    for number in range(rounds):
      order = (without_save, with_save) if number % 2 == 0 else (with_save, without_save)
      found = {}
      for one in order:
        before = time.process_time()
        blocked, wall = one()
        series.wait()
        found[one] = blocked, wall, time.process_time() - before
      pairs.append((found[without_save], found[with_save]))
  return Cost(
    megabytes,
    spread([alone[1] for alone, _ in pairs]),
    spread([saved[0] for _, saved in pairs]),
    spread([saved[1] - alone[1] for alone, saved in pairs]),
    spread([saved[2] - alone[2] for alone, saved in pairs]),
  )


def text(config: Config, cost: Cost) -> str:
  """What is printed.

  Args:
    config: the flags.
    cost: of one save.
  """
  versions, n, interval = environment(), cores(), 60 * config.save_minutes
  share = scaled(cost.held_up, 100 / interval)
  work = scaled(cost.cpu, 100 / (interval * n))
  return "\n".join(
    [
      f"{config.model}, m = {config.ingredients}, {cost.megabytes:.3g} MB; jax "
      f"{versions['jax']} on {versions['devices']} x {versions['device']}, {n} cores; "
      f"medians of {config.rounds} pairs of rounds, in brackets the least and the greatest",
      f"a round without a save: {shown(cost.training)} s",
      f"a save blocks training for {shown(cost.blocked)} s",
      f"a round with a save takes longer by {shown(cost.held_up)} s",
      f"a save takes {shown(cost.cpu)} CPU seconds",
      f"saved every {interval:g} s: {shown(share)} % of the time, "
      f"{shown(work)} % of the cores",
    ]
  )


if __name__ == "__main__":
  define_flags(Config)  # by the binary alone: others have some of them
  flags.adopt_module_key_flags(device_flags)
  app.run(main)
