"""Flags of the learning rate of dense training, and the schedule that they describe."""

from typing import Any

import optax
from absl import flags

from jaxsms.names import check_name
from jaxsms.schedules import DECAY_ARGUMENTS, PRETRAIN_SCHEDULES, pretrain_schedule

# The flags that give the arguments of `pretrain_schedule` in epochs.
DECAY_FLAGS = {"decay": "decay", "step_epochs": "step_size", "milestones": "milestones"}

flags.DEFINE_string(
  "pretrain_schedule",
  "Linear",
  "Learning rate of dense training, from --learning_rate on: "
  f"{', '.join(PRETRAIN_SCHEDULES)}.",
)
flags.DEFINE_float("warmup_epochs", 0.0, "Linear warmup of dense training, in epochs.")
flags.DEFINE_float(
  "end_lr", 0.0, "Learning rate at which Linear and Cosine dense training ends."
)
flags.DEFINE_float(
  "decay",
  None,
  "What StepLR and MultiStepLR multiply the learning rate by, and ExponentialLR in every "
  "step; in (0, 1].",
)
flags.DEFINE_integer("step_epochs", None, "Epochs from one --decay of StepLR to the next.")
flags.DEFINE_list(
  "milestones", None, "Epochs at which MultiStepLR decays, such as 60,80; warmup included."
)


def check_pretraining(s: Any) -> None:
  """Raises ValueError where the flags of this file do not fit one another.

  Args:
    s: the settings.
  """
  name = s.pretrain_schedule
  check_name("pretraining schedule", name, PRETRAIN_SCHEDULES)
  if s.warmup_epochs >= s.epochs:
    raise ValueError(
      f"--warmup_epochs is {s.warmup_epochs:g} of --epochs {s.epochs}: the warmup must be "
      "shorter than the training"
    )
  if s.end_lr and name not in ("Linear", "Cosine"):
    raise ValueError(f"--end_lr is for Linear and Cosine: {name} has no given end")
  if not 0 <= s.end_lr <= s.learning_rate:
    raise ValueError(
      f"--end_lr is {s.end_lr}: it must be from 0 to --learning_rate, {s.learning_rate}"
    )
  needed = DECAY_ARGUMENTS.get(name, ())
  for flag, argument in DECAY_FLAGS.items():
    if (argument in needed) != (getattr(s, flag) is not None):
      verb = "needs" if argument in needed else "takes no"
      raise ValueError(f"--pretrain_schedule={name} {verb} --{flag}")
  if s.decay is not None and not 0 < s.decay <= 1:
    raise ValueError(f"--decay is {s.decay}: the factor must be in (0, 1]")
  if s.step_epochs is not None and s.step_epochs < 1:
    raise ValueError(f"--step_epochs is {s.step_epochs}: it must be at least 1")
  if s.milestones is not None:
    inside = [0, *s.milestones, s.epochs]
    if not s.milestones or sorted(set(inside)) != inside:
      raise ValueError(
        f"--milestones is {','.join(map(str, s.milestones))} of --epochs {s.epochs}: "
        "give epochs inside the training, increasing"
      )


def dense_schedule(s: Any, steps_per_epoch: int) -> tuple[optax.Schedule, int]:
  """The learning rate of dense training, and how many of its steps are warmup."""
  warmup_steps = int(s.warmup_epochs * steps_per_epoch)
  milestones = s.milestones and [n * steps_per_epoch for n in s.milestones]
  schedule = pretrain_schedule(
    s.pretrain_schedule,
    s.learning_rate,
    s.epochs * steps_per_epoch,
    warmup_steps,
    s.end_lr,
    decay=s.decay,
    step_size=s.step_epochs and s.step_epochs * steps_per_epoch,
    milestones=milestones,
  )
  return schedule, warmup_steps
