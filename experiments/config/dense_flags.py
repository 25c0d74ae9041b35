"""Flags of dense training, and the schedule that they describe."""

import dataclasses

import optax

from jaxsms.schedule_registry import PRETRAIN_SCHEDULES
from jaxsms.schedules import pretrain_schedule

from .fields import (
  above_zero,
  at_least,
  by_dataset,
  define_flags,
  ensure,
  flag,
  from_zero,
  one_of,
  whole_numbers,
)

# The flags that give the arguments of `pretrain_schedule` in epochs.
DECAY_FLAGS = {"decay": "decay", "step_epochs": "step_size", "milestones": "milestones"}
WITH_END = " and ".join(n for n, s in PRETRAIN_SCHEDULES.items() if "end_lr" in s.arguments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseFlags:
  """Dense training; batch size, momentum and weight decay are those of all training."""

  epochs: int = flag(
    "Epochs of dense training. Default: 30.", at_least(1), fill=lambda values: 30
  )
  batch_size: int = flag(
    "Examples in a batch of one copy. Default: 20 for digits, else 128.",
    at_least(1),
    fill=by_dataset(20, 128),
  )
  learning_rate: float = flag(
    "Largest learning rate of dense training.", above_zero, default=0.1
  )
  momentum: float = flag(
    "Momentum of SGD, in [0, 1).",
    ensure(lambda value: 0 <= value < 1, "it must be in [0, 1)"),
    default=0.9,
  )
  weight_decay: float = flag(
    "L2 coefficient, on all parameters. If it is above 0, the momentum is Nesterov's. "
    "Default: 1e-4 for digits, else 5e-4.",
    from_zero,
    fill=by_dataset(1e-4, 5e-4),
  )
  pretrain_schedule: str = flag(
    "Learning rate schedule of dense training, whose peak is --learning_rate: "
    f"{', '.join(PRETRAIN_SCHEDULES)}.",
    one_of("pretraining schedule", PRETRAIN_SCHEDULES),
    default="Linear",
  )
  warmup_epochs: float = flag(
    "Linear warmup of dense training, in epochs.", from_zero, default=0.0
  )
  end_lr: float = flag(
    f"Learning rate at the end of dense training, for {WITH_END}.", default=0.0
  )
  decay: float | None = flag(
    "Factor of the learning rate, in (0, 1]: at each decay of StepLR and MultiStepLR, "
    "in every step of ExponentialLR.",
    ensure(lambda value: 0 < value <= 1, "the factor must be in (0, 1]"),
  )
  step_epochs: int | None = flag(
    "Epochs from one decay of StepLR to the next.", at_least(1)
  )
  milestones: tuple[int, ...] | None = flag(
    "Epochs at which MultiStepLR decays, such as 60,80. The warmup counts as epochs.",
    parse=whole_numbers("60,80"),
  )


define_flags(DenseFlags)


def check(config: DenseFlags) -> None:
  """Raises ValueError where the flags of the learning rate do not fit one another."""
  name, epochs = config.pretrain_schedule, config.epochs
  if config.warmup_epochs >= epochs:
    raise ValueError(
      f"--warmup_epochs is {config.warmup_epochs:g} of --epochs {epochs}: the warmup must "
      "be shorter than the training"
    )
  needed = PRETRAIN_SCHEDULES[name].arguments
  if config.end_lr and "end_lr" not in needed:
    raise ValueError(f"--end_lr is for {WITH_END}: {name} has no given end")
  if not 0 <= config.end_lr <= config.learning_rate:
    raise ValueError(
      f"--end_lr is {config.end_lr}: it must be from 0 to --learning_rate, "
      f"{config.learning_rate}"
    )
  for this, argument in DECAY_FLAGS.items():
    if (argument in needed) != (getattr(config, this) is not None):
      verb = "needs" if argument in needed else "takes no"
      raise ValueError(f"--pretrain_schedule={name} {verb} --{this}")
  if config.milestones is not None:
    inside = [0, *config.milestones, epochs]
    if not config.milestones or sorted(set(inside)) != inside:
      raise ValueError(
        f"--milestones is {','.join(map(str, config.milestones))} of --epochs {epochs}: "
        "give epochs inside the training, increasing"
      )


def dense_schedule(config: DenseFlags, steps_per_epoch: int) -> tuple[optax.Schedule, int]:
  """The learning rate of dense training, and how many of its steps are warmup."""
  warmup_steps = int(config.warmup_epochs * steps_per_epoch)
  milestones = config.milestones and [n * steps_per_epoch for n in config.milestones]
  schedule = pretrain_schedule(
    config.pretrain_schedule,
    config.learning_rate,
    config.epochs * steps_per_epoch,
    warmup_steps,
    config.end_lr,
    decay=config.decay,
    step_size=config.step_epochs and config.step_epochs * steps_per_epoch,
    milestones=milestones,
  )
  return schedule, warmup_steps
