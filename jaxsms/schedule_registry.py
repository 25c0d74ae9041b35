"""The schedules of learning rates by name: one entry each, with what it computes.

A new schedule is a function and an entry of `PRETRAIN_SCHEDULES` or `RETRAIN_SCHEDULES`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsms.trees import is_concrete


class PretrainSchedule(NamedTuple):
  """A schedule of dense training.

  Attributes:
    make: `make(peak_lr, steps, warmup_steps, **arguments)` giving the learning rate by
      the step after the warmup; `steps` are those after the warmup.
    arguments: those of `pretrain_schedule` that it takes beside these.
  """

  make: Callable[..., optax.Schedule]
  arguments: tuple[str, ...] = ()


def _linear(peak_lr, steps, warmup_steps, end_lr):
  return optax.linear_schedule(peak_lr, end_lr, steps)


def _cosine(peak_lr, steps, warmup_steps, end_lr):
  if is_concrete(peak_lr):
    alpha: Any = end_lr / peak_lr if peak_lr else 0.0
  else:
    alpha = jnp.where(peak_lr == 0, 0.0, end_lr / jnp.where(peak_lr == 0, 1, peak_lr))
  return optax.cosine_decay_schedule(peak_lr, steps, alpha=alpha)


def _decaying(decays: Callable[..., jax.Array]) -> Callable[..., optax.Schedule]:
  """A factor as often as `decays(step after the warmup, step, **arguments)` says."""

  def make(peak_lr, steps, warmup_steps, decay, **arguments):
    # The logarithm in float64: a factor rounded to float32 is off after many steps.
    rate = math.log(decay)

    def schedule(i):
      i = jnp.asarray(i)
      return peak_lr * jnp.exp(rate * decays(i, i + warmup_steps, **arguments))

    return schedule

  return make


PRETRAIN_SCHEDULES: dict[str, PretrainSchedule] = {
  "Linear": PretrainSchedule(_linear, ("end_lr",)),
  "Cosine": PretrainSchedule(_cosine, ("end_lr",)),
  "StepLR": PretrainSchedule(
    _decaying(lambda i, step, step_size: step // step_size), ("decay", "step_size")
  ),
  "MultiStepLR": PretrainSchedule(
    _decaying(
      lambda i, step, milestones: jnp.sum(step[..., None] >= np.asarray(milestones), -1)
    ),
    ("decay", "milestones"),
  ),
  "ExponentialLR": PretrainSchedule(_decaying(lambda i, step: i), ("decay",)),
  "Constant": PretrainSchedule(
    lambda peak_lr, steps, warmup_steps: optax.constant_schedule(peak_lr)
  ),
}


class Retraining(NamedTuple):
  """The retraining in one phase, as its schedule reads it.

  Attributes:
    lrs: float32 [pretraining steps], the learning rates of pretraining.
    largest: of them.
    smallest: of them after their warmup.
    pretrain_warmup_steps: how many of them are warmup.
    steps: of the retraining.
    after_warmup: steps of the retraining after its warmup.
    initial_lr: the first value that is asked for, or None.
    relative_norm_drop: of this pruning step, or None.
    pruned_fraction: what it removed of the weights that remained, or None.
  """

  lrs: jax.Array
  largest: jax.Array
  smallest: jax.Array
  pretrain_warmup_steps: int
  steps: Any
  after_warmup: Any
  initial_lr: Any
  relative_norm_drop: Any
  pruned_fraction: Any


class RetrainSchedule(NamedTuple):
  """A schedule of retraining.

  Attributes:
    title: what it does, for people.
    value: `value(phase, i, t)` giving the learning rate i steps after the warmup of a
      `Retraining`, t the share of its steps after the warmup.
    warmup: whether there is one.
    needs: arguments of `retrain_schedule` without which it cannot be.
    initial_lr: whether its first value may be given.
  """

  title: str
  value: Callable[[Retraining, jax.Array, jax.Array], jax.Array]
  warmup: bool = True
  needs: tuple[str, ...] = ()
  initial_lr: bool = False


def _smallest(phase, i, t):
  return jnp.full_like(t, phase.smallest)


def _last_steps(phase, i, t):
  last = len(phase.lrs) - 1
  return phase.lrs[jnp.clip(last + 1 - phase.steps + i, 0, last)]


def _compressed(phase, i, t):
  lrs, after = phase.lrs, phase.after_warmup
  in_warmup = jnp.arange(len(lrs)) < phase.pretrain_warmup_steps
  whole = jnp.where(in_warmup, phase.largest, lrs)
  index = _scaled(jnp.clip(i, 0, after), len(lrs), after)
  return whole[jnp.minimum(index, len(lrs) - 1)]


def _scaled(
  i: jax.Array, numerator: int, denominator: int | np.ndarray | jax.Array
) -> jax.Array:
  """i * numerator // denominator in int32, also where the product is beyond it.

  A float32 guess is off by one at most; its remainder is small, whatever wrapped around.
  """
  guess = jnp.floor(i * (numerator / denominator)).astype(jnp.int32)
  rest = i * numerator - guess * denominator
  return guess + (rest >= denominator) - (rest < 0)


def _half_cosine(phase, i, t):
  difference = phase.largest - phase.smallest
  return phase.smallest + difference * (1 + jnp.cos(jnp.pi * t)) / 2


def _to_zero(phase, i, t):
  first = phase.largest if phase.initial_lr is None else phase.initial_lr
  return first * (1 - t)


def _adaptive(phase, i, t):
  lowest = jnp.minimum(1.0, phase.steps / len(phase.lrs))
  # Where nothing was pruned the drop is 0: the lowest value then, not 0 / 0.
  pruned = jnp.sqrt(jnp.maximum(phase.pruned_fraction, 1e-30))
  drop = phase.relative_norm_drop / pruned
  return phase.largest * jnp.clip(drop, lowest, 1.0) * (1 - t)


RETRAIN_SCHEDULES: dict[str, RetrainSchedule] = {
  "FT": RetrainSchedule(
    "constant, the smallest of dense training", _smallest, warmup=False
  ),
  "LRW": RetrainSchedule(
    "the last steps of dense training again", _last_steps, warmup=False
  ),
  "SLR": RetrainSchedule("the whole schedule of dense training, compressed", _compressed),
  "CLR": RetrainSchedule(
    "cosine from the largest to the smallest of dense training", _half_cosine
  ),
  "LLR": RetrainSchedule("linear from the largest to 0", _to_zero, initial_lr=True),
  "ALLR": RetrainSchedule(
    "LLR, lower where pruning changed little",
    _adaptive,
    needs=("relative_norm_drop", "pruned_fraction"),
  ),
}


def starting_anywhere() -> str:
  """Names of the retraining schedules whose first value may be given, for messages."""
  return " or ".join(name for name, one in RETRAIN_SCHEDULES.items() if one.initial_lr)
