"""Flags of averages along the training of each copy."""

import dataclasses
from typing import Any

from ..methods.registry import having
from .baseline_flags import refuse_baselines
from .fields import at_least, define_flags, ensure, flag, one_of

AVERAGES = ("none", "ema", "swa")
EMA_DECAY = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageFlags:
  """What a copy is at the end of a phase."""

  average: str = flag(
    "What each copy is at the end of a phase: none (its last step), ema (an "
    "exponential moving average over its steps) or swa (the plain mean of its steps). "
    "Batch statistics are estimated anew. Baselines with _ema in their name always use "
    "ema.",
    one_of("average", AVERAGES),
    default="none",
  )
  ema_decay: float = flag(
    "Decay of ema from one step that it includes to the next, in (0, 1).",
    ensure(lambda value: 0 < value < 1, "it must be in (0, 1), such as 0.99"),
    default=EMA_DECAY,
  )
  average_from: float | None = flag(
    "Share of a phase's steps, from its start, that the average leaves out, in [0, 1). "
    "Default: 0 for ema, 0.5 for swa.",
    ensure(lambda value: 0 <= value < 1, "it is a share of a phase's steps, in [0, 1)"),
  )
  average_every: int = flag(
    "The average includes every n-th step, and always the last one.",
    at_least(1),
    default=1,
  )


define_flags(AverageFlags)


def check(config: Any) -> None:
  """Raises ValueError where there is nothing to be averaged, or no average.

  Args:
    config: with the flags of the soup and its baselines.
  """
  _check_needed(config)
  if config.retrain_epochs:
    return
  if config.average != "none":
    raise ValueError(
      f"--average={config.average} with --retrain_epochs=0: there are no steps to average"
    )
  why = " with --retrain_epochs=0: there are no steps to average"
  refuse_baselines(config, "averaged", why)


def _check_needed(config):
  """That there is an average where one of its other flags is given."""
  if any(name in having("averaged") for name in config.baselines):
    return
  ema, none = config.average == "ema", config.average == "none"
  of_ema = f"--average=ema, or one of {', '.join(having('averaged'))} among --baselines"
  for name, unused, of in (
    ("ema_decay", config.ema_decay != EMA_DECAY and not ema, of_ema),
    (
      "average_from",
      config.average_from is not None and none,
      f"--average=swa or {of_ema}",
    ),
    ("average_every", config.average_every != 1 and none, f"--average=swa or {of_ema}"),
  ):
    if unused:
      value = getattr(config, name)
      raise ValueError(f"--{name}={value:g} is of an average: give {of}, or leave it out")
