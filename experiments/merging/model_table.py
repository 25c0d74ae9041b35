"""What `experiments.soup` prints: each model and the soup, and how far apart they are."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxsms.disk.merging import MergeStatistics

from .model_checks import angles, dense_note

ACCURACIES = {"validation_accuracy": "Validation", "test_accuracy": "Test"}


def show(
  console: Console,
  paths: Sequence[str],
  weights: np.ndarray,
  found: MergeStatistics,
  scores: Sequence[dict[str, float]] | None,
) -> None:
  """Prints a table, and the distances between the models.

  Args:
    console: to print on.
    paths: of the models.
    weights: of each in the average.
    found: what merging them found.
    scores: metrics of each model and of the soup, last; None where there are no data.
  """
  table = Table(caption="Accuracies in percent." if scores else None)
  table.add_column("Model", overflow="fold")
  for title in ("Weight", "Sparsity", "Distance to the soup"):
    table.add_column(title, justify="right")
  for title in ACCURACIES.values() if scores else ():
    table.add_column(title, justify="right")
  names = [*paths, "Soup"]
  shares = [*(f"{w:.3f}" for w in weights), ""]
  sparsities = [*found.sparsities, found.of_result / max(found.weights, 1)]
  finite = np.isfinite(found.to_result)
  distances = np.where(finite, [f"{x:.4g}" for x in found.to_result], "not finite")
  for i, row in enumerate(zip(names, shares, sparsities, [*distances, ""], strict=True)):
    name, share, sparsity, distance = row
    cells = [name, share, f"{sparsity:.2%}", distance]
    if scores:
      cells += [f"{100 * scores[i][metric]:.2f}" for metric in ACCURACIES]
    table.add_row(*cells)
  console.print(table)
  for line in filter(None, [distance_note(found), dense_note(paths, found)]):
    console.print(line, highlight=False, soft_wrap=True)


def distance_note(found: MergeStatistics) -> str | None:
  """What is said of the distances between models; None where no two are finite."""
  apart = found.distances[np.triu_indices(len(found.norms), 1)]
  finite = np.isfinite(apart)
  if not finite.any():
    return None
  apart, degrees = apart[finite], angles(found)[finite]
  return (
    f"L2 distance between two models: {apart.min():.4g} to {apart.max():.4g}, angle "
    f"{degrees.min():.3g} to {degrees.max():.3g} degrees."
  )
