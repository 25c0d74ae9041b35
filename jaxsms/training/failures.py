"""Criteria for copies that collapsed and for averages that failed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import jax
import numpy as np

from jaxsms.geometry import interpolate, loss_barrier
from jaxsms.trees import PyTree

# What a record says of copies that are left out.
COPY_FAULTS = ("diverged", "collapsed", "all_collapsed")
MARGIN = 0.01  # validation accuracy by which a soup may be below its worst candidate
POINTS = 11  # on the line between two candidates
FAR = 0.1  # validation accuracy that a copy loses at least, to count as collapsed


class Faults(TypedDict):
  """The copies of a phase that appear only in their own metrics, by index.

  Attributes:
    diverged: those with values that are not finite.
    collapsed: see `collapsed_copies`.
    all_collapsed: all finite copies collapsed, so they are merged.
  """

  diverged: list[int]
  collapsed: list[int]
  all_collapsed: NotRequired[bool]


class AveragingFailure(TypedDict):
  """The evidence that a soup is worse than all that it was merged from.

  Attributes:
    soup_validation_accuracy: of the soup.
    worst_candidate_validation_accuracy: of the worst candidate.
    copies: the first two candidates that were merged.
    positions: on the line between those two, from 0 to 1.
    losses: on validation data, at those positions.
    barrier: how far they rise above the line between both ends, see `jaxsms.loss_barrier`.
  """

  soup_validation_accuracy: float
  worst_candidate_validation_accuracy: float
  copies: list[int]
  positions: list[float]
  losses: list[float]
  barrier: float


def collapsed_copies(
  accuracies: Sequence[float], labels: np.ndarray, start: float | None = None
) -> list[int]:
  """The copies that collapsed: values are finite, but what they knew is gone.

  A copy collapsed where it ends clearly below the model that it started from, and either
  has less than half of the best copy's accuracy above chance or is near chance itself.
  Where that start is not known, both are asked for: near chance, and far below the best.
  Clearly means by `FAR`, or four standard errors where there are few examples; near chance
  means by half of that. Chance is the share of the most frequent class. Others are compared
  with the best copy, so that several collapsed copies do not hide one another.

  Args:
    accuracies: on validation data, one for each copy; NaN where it diverged.
    labels: int [n], of those data.
    start: the accuracy on them of the model that all copies started from, as it was pruned.

  Returns:
    Their indices, in order; those of all copies where none is better.
  """
  n = len(labels)
  chance = float(np.bincount(labels).max()) / n
  clearly = max(FAR, 4 * 0.5 / n**0.5)
  best = float(np.nanmax(accuracies))

  def collapsed(accuracy):
    near_chance = accuracy <= chance + clearly / 2
    far_below = accuracy < best - clearly and accuracy - chance < (best - chance) / 2
    if start is None:
      return near_chance and far_below
    return accuracy < start - clearly and (far_below or near_chance)

  return [i for i, accuracy in enumerate(accuracies) if collapsed(accuracy)]


def merged_copies(record: Mapping[str, Any]) -> list[int]:
  """The copies of a phase that count: those that neither diverged nor collapsed.

  Args:
    record: of the phase, see `merge_candidates`.

  Returns:
    Their indices; where all others collapsed, of those that did not diverge.
  """
  finite = [i for i in range(len(record["weights"])) if i not in record["diverged"]]
  return [i for i in finite if i not in record["collapsed"]] or finite


def averaging_failure(
  evaluate: Callable[[PyTree], dict[str, float]],
  candidates: PyTree,
  weights: np.ndarray,
  soup: dict[str, float],
  scores: list[dict[str, float]],
) -> AveragingFailure | None:
  """The evidence that averaging failed, where a soup is worse than every candidate.

  Args:
    evaluate: gives `validation_accuracy` and `validation_loss` of one model, its batch
      statistics recalibrated.
    candidates: leaves [m, ...].
    weights: float [m], of the merge.
    soup: its metrics.
    scores: those of the candidates, NaN for those that diverged or are left out otherwise.

  Returns:
    None where the soup's validation accuracy is at most `MARGIN` below that of the worst
    candidate.

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
