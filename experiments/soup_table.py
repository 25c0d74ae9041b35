"""What `experiments.soup` prints: each model and the soup, and how far apart they are."""

from collections.abc import Sequence

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.soup_checks import Arrays, parameters_of, sparsity_of
from experiments.terminal import say
from jaxsms.geometry import soup_geometry

ACCURACIES = {"validation_accuracy": "Validation", "test_accuracy": "Test"}


def show(
  console: Console,
  paths: Sequence[str],
  models: Sequence[Arrays],
  weights: np.ndarray,
  soup: Arrays,
  scores: Sequence[dict[str, float]] | None,
) -> None:
  """Prints a table, and the distances between the models.

  Args:
    console: to print on.
    paths: of the models.
    models: that were averaged.
    weights: of each in the average.
    soup: the result.
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
  for i, (name, share, model) in enumerate(
    zip(names, shares, [*models, soup], strict=True)
  ):
    row = [name, share, f"{sparsity_of(model):.2%}"]
    row.append("" if model is soup else f"{distance(model, soup):.4g}")
    if scores:
      row += [f"{100 * scores[i][metric]:.2f}" for metric in ACCURACIES]
    table.add_row(*row)
  console.print(table)
  of_models = [parameters_of(model) for model in models]
  stacked = {name: np.stack([model[name] for model in of_models]) for name in of_models[0]}
  apart = {name: float(x) for name, x in jax.device_get(soup_geometry(stacked)).items()}
  say(
    console,
    f"L2 distance between two models: {apart['min_l2_distance']:.4g} to "
    f"{apart['max_l2_distance']:.4g}, angle {apart['min_angle']:.3g} to "
    f"{apart['max_angle']:.3g} degrees.",
  )


def distance(model: Arrays, other: Arrays) -> float:
  """The L2 distance between the parameters of two models."""
  pairs = [(x, other[name]) for name, x in parameters_of(model).items()]
  squares = (np.sum((x.astype(np.float64) - y) ** 2) for x, y in pairs)
  return float(np.sqrt(sum(squares)))
