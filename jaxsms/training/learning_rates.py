"""The learning rates of all steps as an array: the program knows no schedule."""

import jax.numpy as jnp
import numpy as np

from jaxsms.schedules import retrain_schedule


def retrain_learning_rates(
  name: str,
  pretrain_lrs: np.ndarray,
  steps: np.ndarray,
  *,
  initial_lr: np.ndarray | None = None,
  **options,
) -> np.ndarray:
  """The learning rate of every step of every copy.

  Args:
    name: retraining schedule, see `jaxsms.retrain_schedule`.
    pretrain_lrs: float [pretraining steps].
    steps: int [m], steps of each copy.
    initial_lr: float [m] for LLR, or None.
    **options: further arguments of `jaxsms.retrain_schedule`, the same for all copies.

  Returns:
    float32 [m, max(steps)]; entries beyond a copy's own steps are not used.

  Example:
    >>> pretrain_lrs, steps = np.array([0.5, 0.25]), np.array([2, 4])  # of two copies
    >>> jaxsms.training.retrain_learning_rates("LLR", pretrain_lrs, steps).tolist()
    [[0.5, 0.25, 0.0, 0.0], [0.5, 0.375, 0.25, 0.125]]
  """
  lrs = jnp.asarray(pretrain_lrs, jnp.float32)
  at = jnp.arange(int(np.max(steps)))
  rows = [
    retrain_schedule(
      name, lrs, int(n), initial_lr=None if initial_lr is None else initial_lr[i], **options
    )(at)
    for i, n in enumerate(steps)
  ]
  return np.asarray(jnp.stack(rows))
