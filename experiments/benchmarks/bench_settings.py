"""The flags of the benchmark, and what they mean for each kind of images."""

import dataclasses
from typing import Any

from absl import flags

from jaxsms import models

from ..config import device_flags
from ..config.fields import above_zero, at_least, flag, one_of, read_fields
from ..costs.timing import ROUND_SECONDS
from .bench_figures import writable

AUGMENTATIONS = ("none", "crop_flip", "noise")
TORCH_MODELS = ("mlp", "resnet8", "resnet20", "resnet56", "resnet18")
TORCH = ("none", "sequential", "ensemble", "both")

# What stands for a data set: images of its shape and number, and what fits them.
DATASETS: dict[str, dict[str, Any]] = {
  "digits": {
    "image": (8, 8, 1),
    "examples": 1077,
    "model": "mlp",
    "batch_size": 20,
    "augmentation": "noise",
  },
  "cifar10": {
    "image": (32, 32, 3),
    "examples": 50_000,
    "model": "resnet20",
    "batch_size": 128,
    "augmentation": "crop_flip",
  },
}


def _like(name):
  """A `fill` with what fits the data set."""
  return lambda values: DATASETS[values["dataset"]][name]


def _whole_numbers(separator: str, example: str):
  """A `parse` for whole numbers from 1 on, as many as in the example if not by comma."""

  def parse(words, name, values):
    text = ",".join(words)
    parts = [part.strip() for part in text.split(separator)]
    same_length = separator == "," or len(parts) == example.count(separator) + 1
    if not same_length or any(not p.isdecimal() or int(p) < 1 for p in parts):
      raise ValueError(
        f"--{name} is {text!r}: give whole numbers of at least 1, such as {example}"
      )
    return tuple(int(part) for part in parts)

  return parse


def _copies(words, name, values):
  return tuple(sorted(set(_whole_numbers(",", "1,2,4,8")(words, name, values))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(device_flags.DeviceFlags):
  """The flags of the benchmark, with the values for the data set filled in."""

  dataset: str = flag(
    "digits or cifar10: random images of that shape and number, and the defaults of "
    "--model, --batch_size and --augmentation: mlp, 20 and noise, or resnet20, 128 and "
    "crop_flip.",
    one_of("dataset", DATASETS),
    default="digits",
  )
  image: tuple[int, int, int] = flag(
    "Another image shape, as height x width x channels: 64x64x3.",
    fill=_like("image"),
    parse=_whole_numbers("x", "64x64x3"),
  )
  examples: int = flag(
    "Random images. Default: 1,077 (digits) or 50,000 (cifar10).",
    at_least(1),
    fill=_like("examples"),
  )
  model: str = flag(
    f"Network: {', '.join(models.MODELS)}.",
    one_of("model", models.MODELS),
    fill=_like("model"),
  )
  hidden: tuple[int, ...] = flag(
    "Widths of the MLP's hidden layers; it has no dropout here.",
    default="256,256",
    parse=_whole_numbers(",", "256,256"),
  )
  copies: tuple[int, ...] = flag(
    "Numbers m of copies trained at once, each timed.",
    default="1,2,4,8",
    parse=_copies,
  )
  batch_size: int = flag(
    "Examples of one copy in a step.", at_least(1), fill=_like("batch_size")
  )
  augmentation: str = flag(
    f"One of {', '.join(AUGMENTATIONS)}.",
    one_of("augmentation", AUGMENTATIONS),
    fill=_like("augmentation"),
  )
  rounds: int = flag(
    "Times that everything has its turn; medians are over them.", at_least(1), default=5
  )
  steps: int | None = flag(
    f"Steps of a round, filled up to whole chunks. Default: about {ROUND_SECONDS} seconds.",
    at_least(1),
  )
  peak_tflops: float | None = flag(
    "What utilisation is relative to, of one device. Default: the data sheet of known "
    "accelerators; on CPU a measured float32 matrix product.",
    above_zero,
  )
  torch: str | None = flag(
    "The same work in PyTorch: none, sequential (one copy after another), ensemble (all "
    "under vmap) or both. Default: both where PyTorch is installed and can.",
    one_of("comparison with PyTorch", TORCH),
  )
  json: str | None = flag("File for all figures.", writable)
  profile: str | None = flag("Folder for a trace of one chunk of the most copies.")


def read_config(given: flags.FlagValues) -> Config:
  """The parsed flags, checked as far as they can be without a device.

  Raises:
    ValueError: a flag is out of range, names something unknown, or does not fit others.
  """
  config = read_fields(Config, given)
  if config.model != "mlp" and given["hidden"].present:
    raise ValueError(
      f"--hidden belongs to the mlp: leave it out with --model={config.model}"
    )
  if config.batch_size > config.examples:
    raise ValueError(
      f"--batch_size is {config.batch_size} of {config.examples} examples: it must not be "
      "larger"
    )
  device_flags.check(config, max(config.copies))
  return config
