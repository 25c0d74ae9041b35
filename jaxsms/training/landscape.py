"""The validation loss between the candidates of a phase, while they are still there."""

from collections.abc import Callable
from itertools import combinations
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.ingredients import take_ingredients
from jaxsms.devices.meshes import fetch
from jaxsms.geometry import loss_barrier
from jaxsms.landscape import (
  Plane,
  affine_combination,
  grid_points,
  plane_coordinates,
  plane_grid,
  plane_through,
  plane_weights,
)
from jaxsms.training.engine import Engine, Model
from jaxsms.training.programs import Programs
from jaxsms.training.state import Data
from jaxsms.training.streamed import StreamedData
from jaxsms.trees import PyTree, wait_on_cpu

# Losses and accuracies, [points] each, of combinations with weights [points, k].
OnPoints = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
STREAM = 2**32 - 2  # of the phase's key: no seed uses it
IMAGES = 500  # of the validation data
BATCHES = 2  # of training images, for the batch statistics of each point
LINE_POINTS = 11
GRID_SIZES = (11, 9, 7, 5)
SHARE = 0.05  # of the work of training that a landscape may take ...
LEAST = 65_000  # ... but so many images it may see in any case
PASSES = 3  # forward passes that a training step is worth


class LineRecord(TypedDict):
  """The line between two copies.

  Attributes:
    between: their indices.
    positions: from 0 to 1.
    loss: at each position.
    accuracy: at each position.
    barrier: of the losses, see `jaxsms.loss_barrier`.
  """

  between: list[int]
  positions: list[float]
  loss: list[float]
  accuracy: list[float]
  barrier: float


class PlaneRecord(TypedDict):
  """The plane through three copies.

  Attributes:
    through: their indices.
    x: coordinates of the grid.
    y: coordinates of the grid.
    loss: [y][x].
    accuracy: [y][x].
    points: where those copies are, by their index, and `soup`, projected.
    distance_from_plane: of the `soup`.
    unit: of coordinates and distance.
  """

  through: list[int]
  x: list[float]
  y: list[float]
  loss: list[list[float]]
  accuracy: list[list[float]]
  points: dict[str, list[float]]
  distance_from_plane: dict[str, float]
  unit: str


class LandscapeRecord(TypedDict):
  """Loss and accuracy between the candidates of a phase.

  Attributes:
    split: of the data that they are measured on.
    images: how many of them.
    batch_norm_batches: training batches, for the batch statistics of each point.
    lines: between each pair of the candidates.
    plane: through three; None where there are no three that span one.
  """

  split: str
  images: int
  batch_norm_batches: int
  lines: list[LineRecord]
  plane: PlaneRecord | None


def measure_landscape(
  engine: Engine,
  key: jax.Array,
  candidates: Model,
  healthy: list[int],
  soup: PyTree,
  trained_images: int,
) -> LandscapeRecord | None:
  """Loss and accuracy on the lines between candidates and on the plane through three.

  Of the first three that are healthy, on evenly spaced validation images; for each point
  the batch statistics are estimated anew from a few training batches. The points are
  stacked in groups of m models, so that the programs of the copies serve.

  Args:
    engine: of the network and its data.
    key: of the phase.
    candidates: leaves [m, ...].
    healthy: those that did not diverge.
    soup: the parameters of what they were merged into, leaves [...].
    trained_images: how many the copies of this phase saw together in training: where they
      were few, the grid is coarser.

  Returns:
    Lines and plane; None with fewer than two healthy candidates, or with streamed data.

  References:
    Frankle et al., 2020, https://arxiv.org/abs/1912.05671
    Garipov et al., 2018, https://arxiv.org/abs/1802.10026
  """
  programs, splits, chosen = engine.programs, engine.splits, healthy[:3]
  if len(chosen) < 2 or isinstance(splits.train, StreamedData):
    return None
  if isinstance(splits.validation, StreamedData):
    return None
  validation = evenly(splits.validation, IMAGES)
  batches = training_batches(programs, splits.train, candidates.batch_stats)
  models = take_ingredients(candidates.params, chosen)
  m = len(jax.tree.leaves(candidates.params)[0])
  key = jax.random.fold_in(key, STREAM)
  blank = jax.tree.map(jnp.zeros_like, candidates.batch_stats)

  def on_points(weights):
    return losses_and_accuracies(
      programs, validation, batches, key, models, blank, weights, m
    )

  each = validation.size + len(batches) * programs.batch_size
  allowed = max(SHARE * PASSES * trained_images, LEAST)
  return {
    "split": "validation",
    "images": validation.size,
    "batch_norm_batches": len(batches),
    "lines": lines_between(chosen, on_points),
    "plane": plane_of(chosen, models, soup, on_points, grid_size(each, allowed)),
  }


def lines_between(chosen: list[int], on_points: OnPoints) -> list[LineRecord]:
  """A record for each pair of the chosen copies."""
  positions = np.arange(LINE_POINTS) / (LINE_POINTS - 1)
  ends = np.eye(len(chosen))
  pairs = list(combinations(range(len(chosen)), 2))
  weights = [np.outer(1 - positions, ends[i]) + np.outer(positions, ends[j])
             for i, j in pairs]  # fmt: skip
  losses, accuracies = on_points(np.concatenate(weights))
  shape = (len(pairs), LINE_POINTS)
  found = zip(pairs, losses.reshape(shape), accuracies.reshape(shape), strict=True)
  return [
    {
      "between": [chosen[i], chosen[j]],
      "positions": positions.tolist(),
      "loss": loss.tolist(),
      "accuracy": accuracy.tolist(),
      "barrier": float(loss_barrier(loss)),
    }
    for (i, j), loss, accuracy in found
  ]


def plane_of(
  chosen: list[int], models: PyTree, soup: PyTree, on_points: OnPoints, size: int
) -> PlaneRecord | None:
  """A record of the plane through three copies; None where there is none."""
  if len(chosen) < 3:
    return None
  try:
    plane = plane_through(models)
  except ValueError:  # copies that are equal, as without any retraining, span no plane
    return None
  of_soup, distance = fetch(plane_coordinates(plane, soup))
  coordinates = np.asarray(fetch(plane.coordinates))
  x, y = plane_grid(np.concatenate([coordinates, of_soup[None]]), size)
  weights = plane_weights(Plane(None, coordinates), grid_points(x, y))
  losses, accuracies = on_points(np.asarray(weights))
  points = {str(i): at.tolist() for i, at in zip(chosen, coordinates, strict=True)}
  return {
    "through": chosen,
    "x": np.asarray(x).tolist(),
    "y": np.asarray(y).tolist(),
    "loss": losses.reshape(size, size).tolist(),
    "accuracy": accuracies.reshape(size, size).tolist(),
    "points": {**points, "soup": of_soup.tolist()},
    "distance_from_plane": {"soup": float(distance)},
    "unit": "L2 distance of the parameters",
  }


def grid_size(images_each: int, allowed: float) -> int:
  """Points per axis of the grid, so that all points see at most `allowed` images."""
  lines = 3 * LINE_POINTS
  fitting = [n for n in GRID_SIZES if (lines + n * n) * images_each <= allowed]
  return fitting[0] if fitting else GRID_SIZES[-1]


def losses_and_accuracies(
  programs: Programs,
  data: Data,
  batches: list[jax.Array],
  key: jax.Array,
  models: PyTree,
  blank: PyTree,
  weights: np.ndarray,
  m: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Losses and accuracies of affine combinations of models.

  Args:
    programs: of the network.
    data: to evaluate on.
    batches: of training images, for batch statistics.
    key: for their augmentation and dropout.
    models: parameters, leaves [k, ...].
    blank: batch statistics of m models, all 0.
    weights: float [points, k].
    m: how many models to evaluate at once.

  Returns:
    Both, float [points] each.
  """
  groups = -(-len(weights) // m)
  last = len(weights) - 1  # repeated, to fill up the last group
  weights = np.asarray(weights, np.float32)[np.minimum(np.arange(groups * m), last)]
  found = []
  for group in weights.reshape(groups, m, -1):
    params = wait_on_cpu(_combined(models, group))
    statistics = blank
    for number, images in enumerate(batches):
      statistics = programs.batch_statistics(
        key, np.int32(number), images, params, statistics
      )
    statistics = jax.tree.map(lambda x: x / len(batches), statistics)
    metrics = programs.evaluate(
      programs.predict(data.images, params, statistics), data.labels
    )
    found.append(fetch((metrics["loss"], metrics["accuracy"])))
  losses, accuracies = zip(*found, strict=True)
  return np.concatenate(losses)[: last + 1], np.concatenate(accuracies)[: last + 1]


@jax.jit
def _combined(models, weights):
  return jax.vmap(affine_combination, in_axes=(None, 0))(models, weights)


def evenly(data: Data, most: int) -> Data:
  """At most `most` examples, spread evenly over the data."""
  if data.size <= most:
    return data
  return take_ingredients(data, np.arange(most) * data.size // most)


def training_batches(
  programs: Programs, train: Data, batch_stats: PyTree
) -> list[jax.Array]:
  """Training images for batch statistics; none where a network has no statistics."""
  if not jax.tree.leaves(batch_stats):
    return []
  size = programs.batch_size
  count = min(BATCHES, train.size // size)
  taken = np.arange(count * size) * train.size // (count * size)
  return [take_ingredients(train.images, at) for at in taken.reshape(count, size)]
