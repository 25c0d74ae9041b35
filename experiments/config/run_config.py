"""The configuration of a run: every flag with its value for the data set filled in."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import flags

from . import (
  average_flags,
  baseline_flags,
  data_flags,
  dense_flags,
  device_flags,
  keeping_flags,
  measuring_flags,
  search_flags,
  soup_flags,
  subset_flags,
)
from .fields import (
  at_least,
  default_of,
  define_flags,
  flag,
  flag_text,
  from_zero,
  names,
  read_fields,
)

# The subjects of the work itself, in the order in which their flags are checked.
SUBJECTS = (
  data_flags, dense_flags, soup_flags, average_flags, subset_flags, search_flags,
  baseline_flags, measuring_flags,
)  # fmt: skip
# Whoever adopts the flags of this file gets these with them.
for subject in (*SUBJECTS, device_flags):
  flags.adopt_module_key_flags(subject)

# Flags that runs of this format were once without. At their defaults a run does what it
# did before them.
NEWER = (
  "budget", "round_to", "shrink", "imbalance", "phase_sparsities", "subsets",
  "subset_fraction", "subset_alpha", "average", "ema_decay", "average_from",
  "average_every", "distill_epochs", "temperature", "ranges", "rungs", "retained",
  "logit_adjustment",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(
  keeping_flags.KeepingFlags,
  device_flags.DeviceFlags,
  measuring_flags.MeasuringFlags,
  baseline_flags.BaselineFlags,
  average_flags.AverageFlags,
  subset_flags.SubsetFlags,
  search_flags.SearchFlags,
  soup_flags.SoupFlags,
  dense_flags.DenseFlags,
  data_flags.DataFlags,
):
  """The flags of a run: the fields of all subjects, and its seeds."""

  seed: int = flag(
    "The first seed; it determines all randomness of a run.", from_zero, default=0
  )
  seeds: int = flag(
    "How many seeds to run, one after another, from --seed on.", at_least(1), default=1
  )
  chunk_steps: int | None = flag(
    "Largest number of training steps between two updates of the progress bar. "
    "Default: 50 on a CPU or with --stream, else a whole epoch.",
    at_least(1),
  )

  def flags(self) -> dict[str, Any]:
    """All of them by name, but for those of how the run is kept."""
    kept = names(keeping_flags.KeepingFlags)
    return {name: getattr(self, name) for name in names(Config) if name not in kept}

  def flagfile(self) -> str:
    """The same as a file for --flagfile."""
    given = {k: v for k, v in self.flags().items() if v is not None}
    return "".join(f"--{name}={flag_text(value)}\n" for name, value in given.items())


define_flags(Config)


def read_config(given: flags.FlagValues = flags.FLAGS, **instead: Any) -> Config:
  """The parsed flags, checked as far as they can be without data and devices.

  Args:
    given: the flags.
    **instead: values of fields, whatever the flags say.

  Raises:
    ValueError: a flag is out of range, names something unknown, or does not fit others.
  """
  config = read_fields(Config, given, instead)
  check(config)
  device_flags.check(config, config.ingredients)
  keeping_flags.check(config)
  return config


def check(config: Config) -> None:
  """Raises ValueError where flags of the work itself do not fit one another."""
  for subject in SUBJECTS:
    subject.check(config)
  if config.seed + config.seeds > 2**32:
    raise ValueError(f"--seed is {config.seed}: all seeds must be below 2^32")


def newer_flags(known: Mapping[str, Any]) -> dict[str, Any]:
  """Of the flags that are newer than a run, what it had in their place: the defaults.

  Args:
    known: its other flags.
  """
  values = collections.defaultdict(lambda: None, known)
  missing = [name for name in NEWER if name not in known]
  for field in dataclasses.fields(Config):
    if field.name in missing:
      values[field.name] = default_of(field.metadata["flag"], values)
  return {name: values[name] for name in missing}


def config_of(known: Mapping[str, Any]) -> Config:
  """The configuration that a run had, from what `Config.flags` gave, as JSON has it.

  Raises:
    KeyError: a flag is missing that is not newer than the run can be.
  """
  known = {**newer_flags(known), **known}
  kept = dict.fromkeys(names(keeping_flags.KeepingFlags))
  values = {name: known[name] for name in names(Config) if name not in kept}
  return Config(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in (values | kept).items()}
  )
