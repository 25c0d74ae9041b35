"""Times what a checkpoint of a run costs its training: rounds with and without a save.

python -m experiments.bench_saving
python -m experiments.bench_saving --model=resnet18 --ingredients=5
"""

import math
import os
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from experiments import bench_jax, bench_settings, hardware
from experiments.bench_statistics import Spread, calls_for, cores, scaled, seconds, spread
from experiments.environment import environment
from experiments.work import Work, packed
from jaxsms import models
from jaxsms.names import check_name
from jaxsms.series import Series
from jaxsms.training import Model

ROUND_SECONDS = 5.0  # at least; and longer than a save
LONGER = 1.5  # a round, than the save within it


class Settings(NamedTuple):
  """The flags of this file."""

  model: str
  ingredients: int
  batch_size: int | None
  rounds: int
  folder: str | None
  save_minutes: float


class Cost(NamedTuple):
  """What one save costs, over the rounds.

  Attributes:
    megabytes: of its arrays.
    chunks: of training in a round.
    training: seconds of a round without a save.
    blocked: seconds in which nothing else runs, copying to the host above all.
    held_up: seconds by which a round with a save takes longer.
    cpu: CPU seconds by which it takes more, the save's thread among them.
  """

  megabytes: float
  chunks: int
  training: Spread
  blocked: Spread
  held_up: Spread
  cpu: Spread


def define_flags(to: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; called by the binary alone, as other binaries have some of them."""
  names = ", ".join(models.MODELS)
  flags.DEFINE_string("model", "mlp", f"Network: {names}.", flag_values=to)
  flags.DEFINE_integer("ingredients", 5, "Copies that are trained at once.", flag_values=to)
  flags.DEFINE_integer(
    "batch_size",
    None,
    "Examples of one copy in a step; a save costs the same whatever it is. Default: 20 for "
    "the mlp, else 128.",
    flag_values=to,
  )
  flags.DEFINE_integer(
    "rounds", 5, "Pairs of rounds, with and without a save.", flag_values=to
  )
  flags.DEFINE_string(
    "folder", None, "Where to save. Default: where temporary files are.", flag_values=to
  )
  flags.DEFINE_float(
    "save_minutes", 5.0, "Between two saves: the main job's default.", flag_values=to
  )


def main(argv: list[str]) -> None:
  """Times what the flags say; bad input ends it with one sentence and exit status 2."""
  logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise ValueError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
    chosen = read_settings(flags.FLAGS)
    devices = hardware.read_hardware(chosen.model, chosen.ingredients)
    hardware.start(devices, chosen.model, chosen.ingredients)
    training = make_training(chosen, devices)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(text(chosen, measure(training, chosen.rounds, chosen.folder)))


def read_settings(given: flags.FlagValues) -> Settings:
  """The parsed flags.

  Raises:
    ValueError: a flag is out of range or names something unknown.
  """
  chosen = Settings(*(given[name].value for name in Settings._fields))
  check_name("model", chosen.model, models.MODELS)
  for name in ("ingredients", "rounds", "batch_size"):
    value = getattr(chosen, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name} is {value}: it must be at least 1")
  if not 0 < chosen.save_minutes < math.inf:
    raise ValueError(f"--save_minutes is {chosen.save_minutes}: give a number above 0")
  if chosen.folder is not None and not os.access(chosen.folder, os.W_OK):
    raise ValueError(f"--folder {chosen.folder} cannot be written: choose another one")
  return chosen


def make_training(chosen: Settings, devices: hardware.Hardware) -> bench_jax.Training:
  """m copies in training on images of the shape that such a network usually gets."""
  like: dict[str, Any] = bench_settings.DATASETS[
    "digits" if chosen.model == "mlp" else "cifar10"
  ]
  options = hardware.network_options(devices, chosen.model)
  if chosen.model == "mlp":
    options |= {"hidden": (256, 256), "dropout": 0.0}
  m, batch_size = chosen.ingredients, chosen.batch_size or like["batch_size"]
  task = bench_jax.make_task(
    models.create(chosen.model, bench_jax.NUM_CLASSES, **options),
    like["image"],
    examples=max(batch_size, min(like["examples"], 5000)),
    batch_size=batch_size,
    augmentation=like["augmentation"],
    at_once=lambda parameters: hardware.copies_at_once(
      devices, chosen.model, m * parameters
    ),
    mesh_of=hardware.mesh_of(devices, chosen.model, batch_size),
    micro_batches=devices.micro_batches,
  )
  return bench_jax.Training(task, m, chunk_steps=1 if chosen.model != "mlp" else 50)


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
      work = Work(0, dense=model, model=model, masks=masks, state=training.state)
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
    chunks,
    spread([alone[1] for alone, _ in pairs]),
    spread([saved[0] for _, saved in pairs]),
    spread([saved[1] - alone[1] for alone, saved in pairs]),
    spread([saved[2] - alone[2] for alone, saved in pairs]),
  )


def text(chosen: Settings, cost: Cost) -> str:
  """What is printed.

  Args:
    chosen: the flags.
    cost: of one save.
  """
  versions, n, interval = environment(), cores(), 60 * chosen.save_minutes
  share = scaled(cost.held_up, 100 / interval)
  work = scaled(cost.cpu, 100 / (interval * n))
  return "\n".join(
    [
      f"{chosen.model}, m = {chosen.ingredients}, {cost.megabytes:.3g} MB; jax "
      f"{versions['jax']} on {versions['devices']} x {versions['device']}, {n} cores; "
      f"medians of {chosen.rounds} pairs of rounds, in brackets the least and the greatest",
      f"a round without a save: {_shown(cost.training)} s",
      f"a save blocks training for {_shown(cost.blocked)} s",
      f"a round with a save takes longer by {_shown(cost.held_up)} s",
      f"a save takes {_shown(cost.cpu)} CPU seconds",
      f"saved every {interval:g} s: {_shown(share)} % of the time, "
      f"{_shown(work)} % of the cores",
    ]
  )


def _shown(quantity: Spread) -> str:
  return f"{quantity.median:.3g} [{quantity.min:.3g}, {quantity.max:.3g}]"


if __name__ == "__main__":
  define_flags()
  flags.adopt_module_key_flags(hardware)
  app.run(main)
