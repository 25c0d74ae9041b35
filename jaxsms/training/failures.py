"""What tells that an average is no good."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsms.geometry import interpolate, loss_barrier
from jaxsms.trees import PyTree

MARGIN = 0.01  # validation accuracy by which a soup may be below its worst candidate
POINTS = 11  # on the line between two candidates


def averaging_failure(
  evaluate: Callable[[PyTree], dict[str, float]],
  candidates: PyTree,
  weights: np.ndarray,
  soup: dict[str, float],
  scores: list[dict[str, float]],
) -> dict[str, Any] | None:
  """The evidence that averaging failed, where a soup is worse than every candidate.

  Args:
    evaluate: gives `validation_accuracy` and `validation_loss` of one model, its batch
      statistics recalibrated.
    candidates: leaves [m, ...].
    weights: float [m], of the merge.
    soup: its metrics.
    scores: those of the candidates, NaN for those that diverged.

  Returns:
    None where the soup's validation accuracy is at most `MARGIN` below that of the worst
    candidate. Else both accuracies, and of the line between the first two candidates that
    were merged (`copies`) the validation `losses` at `positions` from 0 to 1, and the
    `barrier`, see `jaxsms.loss_barrier`.

  References:
    Frankle et al., 2020, https://arxiv.org/abs/1912.05671
  """
  worst = float(np.nanmin([s["validation_accuracy"] for s in scores]))
  copies = [int(i) for i in np.flatnonzero(weights)[:2]]
  if soup["validation_accuracy"] >= worst - MARGIN or len(copies) < 2:
    return None
  first, second = (jax.tree.map(lambda x, i=i: x[i], candidates) for i in copies)
  positions = np.linspace(0, 1, POINTS)
  losses = [evaluate(interpolate(first, second, t))["validation_loss"] for t in positions]
  return {
    "soup_validation_accuracy": soup["validation_accuracy"],
    "worst_candidate_validation_accuracy": worst,
    "copies": copies,
    "positions": positions.tolist(),
    "losses": losses,
    "barrier": float(loss_barrier(np.asarray(losses))),
  }
