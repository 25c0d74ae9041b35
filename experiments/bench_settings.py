"""The flags of the benchmark, and what they mean for each kind of images."""

import math
import os
from typing import Any, NamedTuple

from absl import flags

from experiments import hardware
from experiments.bench_statistics import ROUND_SECONDS
from jaxsms import models
from jaxsms.names import check_name

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


class Settings(NamedTuple):
  """Every flag with its value for the data set filled in."""

  dataset: str
  image: tuple[int, int, int]
  examples: int
  model: str
  hidden: tuple[int, ...]
  copies: tuple[int, ...]
  batch_size: int
  augmentation: str
  rounds: int
  steps: int | None
  peak_tflops: float | None
  torch: str | None
  json: str | None
  profile: str | None


def define_flags(to: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags; called by the binary alone, as other binaries have some of them."""
  if to is not flags.FLAGS:
    hardware.define_flags(to)

  def text(name, default, help):
    flags.DEFINE_string(name, default, help, flag_values=to)

  def number(name, help, default=None):
    flags.DEFINE_integer(name, default, help, flag_values=to)

  text(
    "dataset",
    "digits",
    "digits or cifar10: random images of that shape and number, and the defaults of "
    "--model, --batch_size and --augmentation: mlp, 20 and noise, or resnet20, 128 and "
    "crop_flip.",
  )
  text("image", None, "Another image shape, as height x width x channels: 64x64x3.")
  number("examples", "Random images. Default: 1,077 (digits) or 50,000 (cifar10).")
  text("model", None, f"Network: {', '.join(models.MODELS)}.")
  text("hidden", "256,256", "Widths of the MLP's hidden layers; it has no dropout here.")
  text("copies", "1,2,4,8", "Numbers m of copies trained at once, each timed.")
  number("batch_size", "Examples of one copy in a step.")
  text("augmentation", None, f"One of {', '.join(AUGMENTATIONS)}.")
  number("rounds", "Times that everything has its turn; medians are over them.", 5)
  number(
    "steps",
    f"Steps of a round, filled up to whole chunks. Default: about {ROUND_SECONDS} seconds.",
  )
  flags.DEFINE_float(
    "peak_tflops",
    None,
    "What utilisation is relative to, of one device. Default: the data sheet of known "
    "accelerators; on CPU a measured float32 matrix product.",
    flag_values=to,
  )
  text(
    "torch",
    None,
    "The same work in PyTorch: none, sequential (one copy after another), ensemble (all "
    "under vmap) or both. Default: both where PyTorch is installed and can.",
  )
  text("json", None, "File for all figures.")
  text("profile", None, "Folder for a trace of one chunk of the most copies.")


def read_settings(given: flags.FlagValues) -> Settings:
  """The parsed flags, checked as far as they can be without a device.

  Raises:
    ValueError: a flag is out of range or names something unknown.
  """
  values = {name: given[name].value for name in Settings._fields}
  check_name("dataset", values["dataset"], DATASETS)
  for name, value in DATASETS[values["dataset"]].items():
    if values[name] is None:
      values[name] = value
  if isinstance(values["image"], str):
    values["image"] = _whole_numbers("image", values["image"], "x", "64x64x3")
  values["copies"] = tuple(
    sorted(set(_whole_numbers("copies", values["copies"], ",", "1,2,4,8")))
  )
  values["hidden"] = _whole_numbers("hidden", values["hidden"], ",", "256,256")
  settings = Settings(**values)
  _check(settings, hidden_given=given["hidden"].present)
  return settings


def _whole_numbers(name: str, text: str, separator: str, example: str) -> tuple[int, ...]:
  parts = [part.strip() for part in text.split(separator)]
  same_length = separator == "," or len(parts) == example.count(separator) + 1
  if not same_length or any(not p.isdecimal() or int(p) < 1 for p in parts):
    raise ValueError(
      f"--{name} is {text!r}: give whole numbers of at least 1, such as {example}"
    )
  return tuple(int(part) for part in parts)


def _check(s: Settings, hidden_given: bool) -> None:
  check_name("model", s.model, models.MODELS)
  check_name("augmentation", s.augmentation, AUGMENTATIONS)
  if s.torch is not None:
    check_name("comparison with PyTorch", s.torch, TORCH)
  if s.model != "mlp" and hidden_given:
    raise ValueError(f"--hidden is of the mlp: leave it out with --model={s.model}")
  for name in ("examples", "batch_size", "rounds", "steps"):
    value = getattr(s, name)
    if value is not None and value < 1:
      raise ValueError(f"--{name} is {value}: it must be at least 1")
  if s.batch_size > s.examples:
    raise ValueError(
      f"--batch_size is {s.batch_size} of {s.examples} examples: it must not be larger"
    )
  if s.peak_tflops is not None and not 0 < s.peak_tflops < math.inf:
    raise ValueError(f"--peak_tflops is {s.peak_tflops}: it must be a number above 0")
  folder = os.path.dirname(s.json or "") or "."
  if s.json and (os.path.isdir(s.json) or not os.access(folder, os.W_OK)):
    raise ValueError(f"--json {s.json} cannot be written: give a file in a folder that can")
