"""Distances and angles between models, and the loss on the line between two."""

import functools
from collections.abc import Callable
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.soups import uniform_soup
from jaxsms.trees import PyTree, is_floating, number_of_models, small_leaves_joined, widened


def soup_geometry(stacked: PyTree) -> dict[str, jax.Array]:
  """How far apart m models are.

  Args:
    stacked: parameters alone, leaves [m, ...]; batch statistics would count as directions.
      Only floating leaves count.

  Returns:
    dict of float32 scalars: `max_`, `min_`, `mean_` + `l2_distance` and `angle` (between
    the models seen from the origin, in degrees) over all pairs, and `max_`, `min_` +
    `barycentre_distance` to the uniform soup. With one model all are 0.

  Raises:
    ValueError: leaves disagree on m, or none is floating.

  Example:
    >>> geometry = jaxsms.soup_geometry({"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])})
    >>> float(geometry["max_l2_distance"]), float(geometry["max_barycentre_distance"])
    (5.0, 2.5)
    >>> round(float(geometry["max_angle"]), 3)
    90.0
  """
  m = number_of_models(stacked)
  leaves = [x for x in jax.tree.leaves(stacked) if is_floating(x)]
  if not leaves:
    raise ValueError("no leaf is floating: there is nothing to measure")
  return _geometry(leaves, m)


@functools.partial(jax.jit, static_argnums=1)
def _geometry(leaves: list[jax.Array], m: int) -> dict[str, jax.Array]:
  leaves = small_leaves_joined(list(map(widened, leaves)))
  norms = jax.lax.map(lambda i: _norm([x[i] for x in leaves]), jnp.arange(m))
  # Directions of all-zero models are taken as 0, not NaN.
  inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)

  def distance_and_angle(pair):
    i, j = pair
    u, v = [x[i] * inverse[i] for x in leaves], [x[j] * inverse[j] for x in leaves]
    apart = _norm([a - b for a, b in zip(u, v, strict=True)])
    along = _norm([a + b for a, b in zip(u, v, strict=True)])
    # Kahan's formula: small angles keep their digits, which the arc cosine loses.
    angle = jnp.degrees(2 * jnp.arctan2(apart, along))
    return _norm([x[i] - x[j] for x in leaves]), angle

  pairs = jnp.array(list(combinations(range(m), 2)) or [(0, 0)]).T
  distances, angles = jax.lax.map(distance_and_angle, (pairs[0], pairs[1]))
  centre = uniform_soup(leaves)
  to_centre = jax.lax.map(
    lambda i: _norm([x[i] - c for x, c in zip(leaves, centre, strict=True)]),
    jnp.arange(m),
  )
  measured = {}
  for name, values, statistics in (
    ("l2_distance", distances, ("max", "min", "mean")),
    ("angle", angles, ("max", "min", "mean")),
    ("barycentre_distance", to_centre, ("max", "min")),
  ):
    for statistic in statistics:
      measured[f"{statistic}_{name}"] = getattr(jnp, statistic)(values)
  return measured


def interpolate(a: PyTree, b: PyTree, weight: float | jax.Array) -> PyTree:
  """The model between two: (1 - weight) * a + weight * b.

  Args:
    a: tree of parameters, at weight 0.
    b: a tree of the same structure and shapes, at weight 1.
    weight: position on the line, float [].

  Returns:
    A tree as `a`, with its dtypes; leaves that are not floating come from it.

  Example:
    >>> a, b = {"kernel": jnp.array([0.0, 2.0])}, {"kernel": jnp.array([4.0, 2.0])}
    >>> jaxsms.interpolate(a, b, 0.25)["kernel"].tolist()
    [1.0, 2.0]
  """

  def leaf(x, y):
    return ((1 - weight) * x + weight * y).astype(x.dtype) if is_floating(x) else x

  return jax.tree.map(leaf, a, b)


def loss_along_line(
  a: PyTree, b: PyTree, loss: Callable[[PyTree], jax.Array], points: int = 11
) -> tuple[jax.Array, jax.Array]:
  """The loss at evenly spaced models between two.

  Args:
    a: parameters at position 0.
    b: parameters at position 1.
    loss: jittable function of one model's parameters, giving a scalar.
    points: how many positions, both ends included, at least 2.

  Returns:
    Positions, float32 [points], and losses [points].

  Raises:
    ValueError: fewer than 2 points.

  References:
    Frankle et al., 2020, https://arxiv.org/abs/1912.05671

  Example:
    >>> a, b = {"kernel": jnp.array([-1.0])}, {"kernel": jnp.array([1.0])}
    >>> loss = lambda params: jnp.sum(params["kernel"] ** 2)
    >>> positions, losses = jaxsms.loss_along_line(a, b, loss, points=3)
    >>> positions.tolist(), losses.tolist()
    ([0.0, 0.5, 1.0], [1.0, 0.0, 1.0])
  """
  if points < 2:
    raise ValueError(f"points is {points}: both ends are needed, so at least 2")
  positions = jnp.linspace(0, 1, points)
  return positions, jax.lax.map(lambda t: loss(interpolate(a, b, t)), positions)


def loss_barrier(losses: jax.Array | np.ndarray) -> jax.Array:
  """How far the loss rises above the straight line between its ends.

  Args:
    losses: float [points], as `loss_along_line` gives them.

  Returns:
    float []; 0 where the loss never rises above that line.

  References:
    Frankle et al., 2020, https://arxiv.org/abs/1912.05671

  Example:
    >>> float(jaxsms.loss_barrier(jnp.array([1.0, 4.0, 3.0])))  # the line has 2 there
    2.0
  """
  losses = jnp.asarray(losses)
  straight = jnp.linspace(losses[0], losses[-1], len(losses))
  return jnp.max(losses - straight)


def _norm(leaves: list[jax.Array]) -> jax.Array:
  return jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in leaves))
