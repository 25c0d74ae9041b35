"""Learning rates of pretraining and of retraining, as optax schedules.

A schedule is a function of the step, scalar or array. Lengths and peaks may be traced, so
that copies with different ones share a program; optax's own schedules branch on them.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsms.names import check_name
from jaxsms.schedule_registry import (
  PRETRAIN_SCHEDULES,
  RETRAIN_SCHEDULES,
  Retraining,
  starting_anywhere,
)
from jaxsms.trees import is_concrete


def pretrain_schedule(
  name: str,
  peak_lr: float,
  steps: int,
  warmup_steps: int = 0,
  end_lr: float = 0.0,
  *,
  decay: float | None = None,
  step_size: int | None = None,
  milestones: Sequence[int] | None = None,
) -> optax.Schedule:
  """The learning rate of dense training.

  After the warmup, with i the step counted from the start of the training:

  - Linear, Cosine: from `peak_lr` to `end_lr`.
  - StepLR: peak_lr * decay^(i // step_size).
  - MultiStepLR: peak_lr * decay^(number of milestones <= i).
  - ExponentialLR: peak_lr * decay^(i - warmup_steps).
  - Constant: `peak_lr`.

  Args:
    name: one of the above.
    peak_lr: the largest learning rate; it may be traced.
    steps: length of the training in steps, warmup included.
    warmup_steps: steps of linear warmup from 0 to `peak_lr`.
    end_lr: learning rate one step after the last, of Linear and Cosine.
    decay: factor in (0, 1], of StepLR, MultiStepLR and ExponentialLR.
    step_size: steps between two decays of StepLR, warmup included.
    milestones: steps, increasing, at which MultiStepLR decays, warmup included.

  Returns:
    A schedule for steps 0 to steps - 1.

  Raises:
    ValueError: unknown name, no steps, a warmup longer than the training, or `decay`,
      `step_size` or `milestones` missing, out of range, or given to another schedule.

  Example:
    >>> schedule = jaxsms.pretrain_schedule("Linear", peak_lr=0.5, steps=6, warmup_steps=2)
    >>> schedule(jnp.arange(6)).tolist()
    [0.0, 0.25, 0.5, 0.375, 0.25, 0.125]
  """
  check_name("pretraining schedule", name, PRETRAIN_SCHEDULES)
  if steps < 1 or not 0 <= warmup_steps < steps:
    raise ValueError(
      f"pretraining of {steps} steps with {warmup_steps} of warmup: at least one step "
      "must be left after the warmup"
    )
  given = {"decay": decay, "step_size": step_size, "milestones": milestones}
  _check_decay(name, given)
  this = PRETRAIN_SCHEDULES[name]
  given["end_lr"] = end_lr
  arguments = {argument: given[argument] for argument in this.arguments}
  main = this.make(peak_lr, steps - warmup_steps, warmup_steps, **arguments)
  if not warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, peak_lr, warmup_steps)
  return optax.join_schedules([warmup, main], [warmup_steps])


def retrain_schedule(
  name: str,
  pretrain_lrs: jax.Array,
  steps: int | jax.Array,
  *,
  warmup_fraction: float = 0.1,
  pretrain_warmup_steps: int = 0,
  relative_norm_drop: float | jax.Array | None = None,
  pruned_fraction: float | jax.Array | None = None,
  initial_lr: float | jax.Array | None = None,
) -> optax.Schedule:
  """The learning rate of the retraining in one phase.

  With N = `steps` and w = int(warmup_fraction * N), all but FT and LRW rise from 0 at step
  0 to their first value at step w along half a cosine; then, with t = (step - w) / (N - w)
  going from 0 at step w to 1 at step N:

  - FT: constant, the smallest pretraining learning rate after its warmup.
  - LRW: the last N pretraining learning rates; before the first one, the first one.
  - SLR: the whole pretraining schedule, its warmup replaced by its largest value,
    resampled to N - w steps.
  - CLR: half a cosine from the largest to the smallest of them after the warmup.
  - LLR: linear from the largest, or from `initial_lr`, to 0.
  - ALLR: linear from clip(d / sqrt(p), min(1, N / pretraining steps), 1) times the largest,
    d the relative norm drop of this pruning step and p the fraction it removed, to 0.

  Args:
    name: one of the above.
    pretrain_lrs: float [pretraining steps], the learning rate of every one of them.
    steps: N, at least 1; may be traced.
    warmup_fraction: share of N that is warmup, in [0, 1).
    pretrain_warmup_steps: how many of `pretrain_lrs` are warmup.
    relative_norm_drop: d, for ALLR.
    pruned_fraction: p, of the weights that remained, for ALLR.
    initial_lr: the first value of LLR after the warmup; may be traced.

  Returns:
    Learning rate as a function of the step, scalar or array of ints; after the last step
    it stays at its end.

  Raises:
    ValueError: unknown name, empty or not finite `pretrain_lrs`, a warmup that leaves
      nothing, steps below 1, ALLR without its arguments, or `initial_lr` for another
      than LLR.

  References:
    Han et al., 2015 (FT), https://arxiv.org/abs/1506.02626
    Renda et al., 2020 (LRW), https://arxiv.org/abs/2003.02389
    Le and Hua, 2021 (SLR, CLR), https://arxiv.org/abs/2105.03193
    Zimmer et al., 2023 (LLR, ALLR), https://arxiv.org/abs/2111.00843

  Example:
    >>> pretrain_lrs = jnp.array([0.5, 0.375, 0.25, 0.125])
    >>> for name in ("FT", "LRW", "LLR"):
    ...   schedule = jaxsms.retrain_schedule(name, pretrain_lrs, 2, warmup_fraction=0.0)
    ...   print(name, schedule(jnp.arange(2)).tolist())
    FT [0.125, 0.125]
    LRW [0.25, 0.125]
    LLR [0.5, 0.25]
  """
  check_name("retraining schedule", name, RETRAIN_SCHEDULES)
  _check_lengths(pretrain_lrs, steps, warmup_fraction, pretrain_warmup_steps)
  this = RETRAIN_SCHEDULES[name]
  given = {"relative_norm_drop": relative_norm_drop, "pruned_fraction": pruned_fraction}
  if any(given[need] is None for need in this.needs):
    raise ValueError(f"{name} needs {' and '.join(this.needs)} of this phase")
  if initial_lr is not None and not this.initial_lr:
    raise ValueError(
      f"initial_lr is the first value of {starting_anywhere()}: {name} has its own"
    )

  lrs = jnp.asarray(pretrain_lrs, jnp.float32)
  warmup = _whole_steps(warmup_fraction, steps) if this.warmup else 0
  phase = Retraining(
    lrs=lrs,
    largest=jnp.max(lrs),
    smallest=jnp.min(lrs[pretrain_warmup_steps:]),
    pretrain_warmup_steps=pretrain_warmup_steps,
    steps=steps,
    after_warmup=steps - warmup,
    initial_lr=initial_lr,
    **given,
  )

  def main(i):
    """The learning rate i steps after the warmup; i may be 0, or past the end."""
    return this.value(phase, i, jnp.clip(i / phase.after_warmup, 0, 1))

  def schedule(step):
    step = jnp.asarray(step)
    value = main(step - warmup)
    rise = (1 - jnp.cos(jnp.pi * step / jnp.maximum(warmup, 1))) / 2
    return jnp.where(step < warmup, rise * main(jnp.zeros_like(step)), value)

  return schedule


def _whole_steps(fraction: float, steps: int | jax.Array) -> np.ndarray | jax.Array:
  """int(fraction * steps), exact where `steps` is concrete."""
  if is_concrete(steps):
    return np.floor(fraction * np.asarray(steps, np.float64)).astype(np.int32)
  return jnp.floor(fraction * steps).astype(jnp.int32)


def _check_decay(name, given) -> None:
  for argument, value in given.items():
    needed = argument in PRETRAIN_SCHEDULES[name].arguments
    if needed != (value is not None):
      verb = "needs" if needed else "takes no"
      raise ValueError(f"the pretraining schedule {name} {verb} {argument}")
  decay, step_size, milestones = given.values()
  if decay is not None and not 0 < decay <= 1:
    raise ValueError(f"decay is {decay}: the factor must be in (0, 1]")
  if step_size is not None and step_size < 1:
    raise ValueError(f"step_size is {step_size}: it must be at least 1 step")
  if milestones is not None:
    before = [0, *milestones]
    if len(before) == 1 or any(a >= b for a, b in itertools.pairwise(before)):
      raise ValueError(
        f"milestones are {list(milestones)}: give at least one, from 1 on and increasing"
      )


def _check_lengths(lrs, steps, warmup_fraction, pretrain_warmup_steps) -> None:
  if np.ndim(lrs) != 1 or not len(lrs):
    raise ValueError(
      f"pretrain_lrs has shape {list(np.shape(lrs))}: expected the learning rate of "
      "every pretraining step, [pretraining steps]"
    )
  if is_concrete(lrs) and not np.isfinite(np.asarray(lrs)).all():
    raise ValueError("pretrain_lrs has NaN or infinite values: learning rates are finite")
  if is_concrete(steps) and np.min(np.asarray(steps)) < 1:
    raise ValueError(f"steps is {steps}: retraining needs at least 1 step")
  if not 0 <= warmup_fraction < 1:
    raise ValueError(f"warmup_fraction is {warmup_fraction}: it must be in [0, 1)")
  if not 0 <= pretrain_warmup_steps < len(lrs):
    raise ValueError(
      f"pretrain_warmup_steps is {pretrain_warmup_steps} of {len(lrs)} pretraining "
      "steps: at least one must be left after the warmup"
    )
