"""Flags of what is measured beside accuracy and loss."""

import dataclasses
import functools
from typing import Any

from jaxsms.data import CORRUPTIONS
from jaxsms.names import check_name

from .fields import define_flags, flag, numbers, one_of

LANDSCAPES = ("last", "all", "none")


def _check_severities(name, value):
  if any(not 1 <= n <= 5 for n in value) or len(set(value)) < len(value):
    raise ValueError(f"--{name} is {','.join(map(str, value))}: give some of 1,2,3,4,5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuringFlags:
  """What is measured."""

  ood: tuple[str, ...] = flag(
    "Corruptions of the test images that every model is measured on: names, all, or "
    "none. Prepared TFDS sets (cifar10_corrupted) are used first, then corruptions "
    "made on the device. For streamed data only prepared sets are used.",
    default=[],
    parse=lambda words, name, values: tuple(
      dict.fromkeys(word for word in words if word and word != "none")
    ),
  )
  ood_severities: tuple[int, ...] = flag(
    "Severities of --ood, 1 to 5.",
    _check_severities,
    default=["1", "2", "3", "4", "5"],
    parse=functools.partial(numbers, kind=int),
  )
  landscape: str = flag(
    "Phases for which results.json gets the validation loss between the copies (on "
    "lines, and on the plane through three): last, all, or none. Not with --stream.",
    one_of("landscape", LANDSCAPES),
    default="last",
  )
  train_metrics: bool = flag("Measures every model on training data too.", default=False)


define_flags(MeasuringFlags)


def check(config: Any) -> None:
  """Raises ValueError for corruptions that no data have; with the data the others show.

  Args:
    config: with the flags of the data.
  """
  if config.ood and not config.ood_severities:
    raise ValueError("--ood_severities is empty: give some of 1,2,3,4,5")
  if len(config.ood) > 1 and "all" in config.ood:
    raise ValueError(f"--ood is {','.join(config.ood)}: give names, or all alone")
  if config.in_memory:
    for name in config.ood:  # TFDS may have others
      check_name("corruption", name, ("all", *CORRUPTIONS))
