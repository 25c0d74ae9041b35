"""Times a training step of m copies: dense, with channels cut, and built at that size.

python -m experiments.benchmarks.bench_cut --model=resnet18
python -m experiments.benchmarks.bench_cut --model=vgg16 --ingredients=2 --batch_size=32

The same share of every group of channels goes. Rounds of all alternate. A network is built
at the size of the cut one where its `width` gives the same shapes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from jaxsms import channel_masks, models
from jaxsms.training import Model
from jaxsms.training.cutting import (
  CutModule,
  cut_multiply_adds,
  cut_network,
  groups_of,
  parameter_count,
)

from ..config import device_flags
from ..config.fields import at_least, define_flags, ensure, flag, one_of
from ..costs.timing import Contender, Spread, alternate, cores, ratio, shown
from ..run.environment import environment
from ..setup import hardware
from . import bench_jax
from .usual_networks import make_task, prepared, usual_network

DENSE, CUT, BUILT = "dense", "cut", "built at that size"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(device_flags.DeviceFlags):
  """The flags of the devices, and those of this file."""

  model: str = flag(
    f"Network: {', '.join(models.MODELS)}.",
    one_of("model", models.MODELS),
    default="resnet18",
  )
  ingredients: int = flag("Copies that are trained at once.", at_least(1), default=2)
  batch_size: int = flag("Examples of one copy in a step.", at_least(1), default=32)
  share: float = flag(
    "Share of the channels of each group that goes.",
    ensure(lambda value: 0 < value < 1, "give a share between 0 and 1"),
    default=0.5,
  )
  rounds: int = flag("Rounds of each.", at_least(1), default=5)
  steps: int = flag("Training steps in a round.", at_least(1), default=2)


def main(argv: list[str]) -> None:
  """Times what the flags say; bad input ends it with one sentence and exit status 2."""
  config, trainings = prepared(Config, argv, make_trainings)
  print(text(config, trainings, measure(trainings, config.rounds)))


def make_trainings(config: Config) -> dict[str, bench_jax.Training]:
  """m copies of each network, by its name, on images of the shape that it usually gets."""
  module, like = usual_network(config)
  image_shape, m = like["image"], config.ingredients
  data = {
    "examples": config.batch_size * config.steps, "augmentation": like["augmentation"]
  }  # fmt: skip
  dense = make_task(config, module, image_shape, m, **data)
  model = Model(dense.params, dense.batch_stats)
  masks = channel_masks(
    dense.params,
    config.share,
    groups=groups_of(module, model, image_shape),
    scope="uniform",
    budget="channels",
  )
  network = cut_network(module, model, masks, image_shape)
  left, cut = network.shrink(model._asdict()), CutModule(module, network)
  programs = bench_jax.programs_of(
    cut,
    image_shape[-1],
    batch_size=config.batch_size,
    augmentation=like["augmentation"],
    at_once=hardware.copies_at_once(config, m * parameter_count(left["params"])),
    mesh_of=hardware.mesh_of(config),
    micro_batches=config.micro_batches,
  )
  smaller = dense._replace(
    module=cut,
    programs=programs,
    multiply_adds=sum(cut_multiply_adds(network, model, image_shape).values()),
    **left,
  )
  tasks = {DENSE: dense, CUT: smaller}
  built = narrower(module, 1 - config.share)
  if built is not None:
    task = make_task(config, built, image_shape, m, **data)
    if shapes(task.params) == shapes(smaller.params):
      tasks[BUILT] = task
  return {name: bench_jax.Training(task, m, config.steps) for name, task in tasks.items()}


def narrower(module: Any, share: float) -> Any:
  """The network with a share of its width; None where it has none."""
  width = getattr(module, "width", None)
  return None if width is None else module.clone(width=max(round(width * share), 1))


def shapes(params: Any) -> Any:
  """Of all arrays."""
  return jax.tree.map(jnp.shape, params)


def measure(trainings: dict[str, bench_jax.Training], rounds: int) -> dict[str, Spread]:
  """Seconds of a training step of all copies, of each network.

  Args:
    trainings: by name; a round of each is a chunk.
    rounds: at least 1.

  Returns:
    By name.
  """
  contenders = {}
  for name, training in trainings.items():
    training.run(1)  # compiles
    training.run(1)
    steps = training.steps_per_chunk
    contenders[name] = Contender(lambda t=training: t.run(1), steps, {})
  return alternate(contenders, rounds)


def text(
  config: Config, trainings: dict[str, bench_jax.Training], found: dict[str, Spread]
) -> str:
  """What is printed.

  Args:
    config: the flags.
    trainings: that were timed.
    found: seconds of a step of each.
  """
  versions = environment()
  lines = [
    f"{config.model}, m = {config.ingredients}, batch {config.batch_size}, "
    f"{100 * config.share:g} % of the channels cut; jax {versions['jax']} on "
    f"{versions['devices']} x {versions['device']}, {cores()} cores; medians of "
    f"{config.rounds} rounds, in brackets the least and the greatest"
  ]
  for name, training in trainings.items():
    lines.append(
      f"{name}: {shown(found[name], 1000)} ms a step, compiled in "
      f"{training.train.trace_seconds + training.train.compile_seconds:.1f} s, "
      f"{parameter_count(training.task.params):,} parameters, "
      f"{training.task.multiply_adds:,} multiply-adds"
    )
  lines.append(f"a step is {shown(ratio(found[DENSE], found[CUT]))} times as fast")
  if BUILT in found:
    lines.append(
      f"one {BUILT} takes {shown(ratio(found[BUILT], found[CUT]))} of the cut one's time"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
  define_flags(Config)  # by the binary alone: others have some of them
  flags.adopt_module_key_flags(device_flags)
  app.run(main)
