"""What benchmarks of training share: their flags, and a network on usual images."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
from absl import flags, logging

from jaxsms import models

from ..config import device_flags
from ..config.fields import read_fields
from ..run.flag_files import check_no_arguments, refusals
from ..setup import hardware
from . import bench_jax
from .bench_settings import DATASETS

Config, Made = TypeVar("Config"), TypeVar("Made")


def read_training_flags(kind: type[Config], given: flags.FlagValues) -> Config:
  """The parsed flags of a benchmark that trains copies.

  Args:
    kind: the dataclass of its flags, those of the devices and `ingredients` among them.
    given: what absl parsed.

  Raises:
    ValueError: a flag is out of range or names something unknown.
  """
  config: Any = read_fields(kind, given)
  device_flags.check(config, config.ingredients)
  return config


def prepared(
  kind: type[Config], argv: list[str], make: Callable[[Any], Made]
) -> tuple[Config, Made]:
  """Configuration and work of a benchmark; bad input ends it with exit status 2.

  Args:
    kind: the dataclass of its flags.
    argv: what absl leaves, the program's name first.
    make: makes the work once the devices are started.
  """
  logging.set_verbosity(logging.WARNING)
  with refusals():
    check_no_arguments(argv)
    config: Any = read_training_flags(kind, flags.FLAGS)
    hardware.start(config, config.ingredients)
    return config, make(config)


def usual_network(config: Any) -> tuple[nn.Module, dict[str, Any]]:
  """The network of --model, and the entry of `DATASETS` that it usually gets."""
  return make_network(config), DATASETS["digits" if config.model == "mlp" else "cifar10"]


def make_network(config: Any, hidden: tuple[int, ...] = (256, 256)) -> nn.Module:
  """The network of --model; an MLP has such hidden layers and no dropout."""
  options = hardware.network_options(config)
  if config.model == "mlp":
    options |= {"hidden": hidden, "dropout": 0.0}
  return models.create(config.model, bench_jax.NUM_CLASSES, **options)


def make_task(
  config: Any, module: nn.Module, image: tuple[int, int, int], copies: int, **data: Any
) -> bench_jax.Task:
  """The work of a network on the devices that the flags describe.

  Args:
    config: `batch_size`, and the flags of the devices.
    module: the network.
    image: [height, width, channels].
    copies: the most that train at once.
    **data: `examples` and `augmentation`, see `bench_jax.make_task`.
  """
  return bench_jax.make_task(
    module,
    image,
    batch_size=config.batch_size,
    at_once=lambda parameters: hardware.copies_at_once(config, copies * parameters),
    mesh_of=hardware.mesh_of(config),
    micro_batches=config.micro_batches,
    **data,
  )
