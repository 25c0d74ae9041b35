"""Flags of averages along the training of each copy."""

import dataclasses
from typing import Any

from ..methods.registry import having
from .fields import at_least, define_flags, ensure, flag, one_of

AVERAGES = ("none", "ema", "swa")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageFlags:
  """What a copy is at the end of a phase."""

  average: str = flag(
    "What each copy is at the end of a phase: none (its last step), ema (an exponential "
    "average over its steps) or swa (their plain mean). Batch statistics are estimated "
    "anew. Baselines that are called _ema have ema in any case.",
    one_of("average", AVERAGES),
    default="none",
  )
  ema_decay: float = flag(
    "Decay of ema from one step that enters to the next, in (0, 1).",
    ensure(lambda value: 0 < value < 1, "it must be in (0, 1), such as 0.99"),
    default=0.99,
  )
  average_from: float | None = flag(
    "Share of a phase's steps that the average leaves out, in [0, 1). Default: 0 for ema, "
    "0.5 for swa.",
    ensure(lambda value: 0 <= value < 1, "it is a share of a phase's steps, in [0, 1)"),
  )
  average_every: int = flag(
    "Steps from one that enters the average to the next; the last one always does.",
    at_least(1),
    default=1,
  )


define_flags(AverageFlags)


def check(config: Any) -> None:
  """Raises ValueError where there is nothing to be averaged.

  Args:
    config: with the flags of the soup and its baselines.
  """
  if config.retrain_epochs:
    return
  if config.average != "none":
    raise ValueError(
      f"--average={config.average} with --retrain_epochs=0: there are no steps to average"
    )
  for name in config.baselines:
    if name in having("averaged"):
      raise ValueError(
        f"--baselines has {name} with --retrain_epochs=0: there are no steps to average"
      )
