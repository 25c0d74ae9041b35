"""The loss on the plane through three models."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.meshes import fetch
from jaxsms.trees import PyTree, is_concrete, is_floating, number_of_models, widened

FLAT = 1e-6  # of the length of a side: what float32 leaves of three models on one line


class Plane(NamedTuple):
  """The plane through three models a, b and c, with an orthonormal basis.

  The origin is a, the first axis points to b, and the second one is the direction to c made
  orthogonal to it (Gram-Schmidt). Only floating leaves span it, prunable or not.

  Attributes:
    models: a, b and c, leaves [3, ...].
    coordinates: float [3, 2], where they are: (0, 0), (d, 0) and (p, h).
  """

  models: PyTree
  coordinates: jax.Array | np.ndarray


def plane_through(models: PyTree) -> Plane:
  """The plane through three models.

  Args:
    models: parameters alone, leaves [3, ...], as `jaxsms.stack` gives them.

  Returns:
    The plane; its unit is the L2 distance of the parameters.

  Raises:
    ValueError: there are not three models, none of their leaves is floating, or they lie on
      one line (as far as values can be looked at: not inside a jit).

  References:
    Garipov et al., 2018, https://arxiv.org/abs/1802.10026 (appendix A.1)
    Izmailov et al., 2018, https://arxiv.org/abs/1803.05407

  Example:
    >>> models = {"kernel": jnp.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])}
    >>> jaxsms.plane_through(models).coordinates.tolist()
    [[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]]
  """
  m = number_of_models(models)
  if m != 3:
    raise ValueError(f"got {m} models: a plane goes through three")
  if not _floating(models):
    raise ValueError("no leaf is floating: there is no plane through such models")
  plane = Plane(models, _coordinates(models))
  if is_concrete(plane.coordinates):
    (_, (along, _), (aside, height)) = fetch(plane.coordinates)
    if not height > FLAT * max(along, np.hypot(aside, height)) or not along > 0:
      raise ValueError(
        "the three models lie on one line: a plane needs three that do not, see "
        "loss_along_line"
      )
  return plane


def plane_coordinates(plane: Plane, params: PyTree) -> tuple[jax.Array, jax.Array]:
  """Projects a model on a plane.

  Args:
    plane: see `plane_through`.
    params: of one model, leaves [...].

  Returns:
    Its projection on the plane, float [2], and its distance from it, float [].

  Example:
    >>> models = {"kernel": jnp.array([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [1.0, 3.0, 0.0]])}
    >>> other = {"kernel": jnp.array([2.0, 1.0, 5.0])}
    >>> point, distance = jaxsms.plane_coordinates(jaxsms.plane_through(models), other)
    >>> point.tolist(), float(distance)
    ([2.0, 1.0], 5.0)
  """
  return _project(plane, params)


def model_on_plane(plane: Plane, point: jax.Array) -> PyTree:
  """The model at a point of a plane: an affine combination of its three.

  Args:
    plane: see `plane_through`.
    point: float [2].

  Returns:
    A tree with leaves [...], of the same dtypes; leaves that are not floating come from the
    first model. Where all three share a mask, so does it.

  Example:
    >>> models = {"kernel": jnp.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])}
    >>> plane = jaxsms.plane_through(models)
    >>> jaxsms.model_on_plane(plane, jnp.array([4.0, 0.0]))["kernel"].tolist()
    [4.0, 0.0]
  """
  return affine_combination(plane.models, plane_weights(plane, point))


def plane_grid(
  points: jax.Array | np.ndarray, size: int = 11, margin: float = 0.2
) -> tuple[jax.Array, jax.Array]:
  """Evenly spaced coordinates around some points of a plane.

  Args:
    points: float [k, 2].
    size: how many along each axis, at least 2.
    margin: on each side, relative to the larger extent of the points; 0 or above.

  Returns:
    float [size] along each of the two axes.

  Raises:
    ValueError: `size` or `margin` is out of range.

  Example:
    >>> points = jnp.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])
    >>> x, y = jaxsms.plane_grid(points, size=3, margin=0.25)
    >>> x.tolist(), y.tolist()
    ([-1.0, 2.0, 5.0], [-1.0, 1.5, 4.0])
  """
  if size < 2:
    raise ValueError(f"size is {size}: a grid needs at least 2 points along each axis")
  if margin < 0:
    raise ValueError(f"margin is {margin}: it must be 0 or above")
  points = jnp.asarray(points)
  low, high = points.min(0), points.max(0)
  around = margin * jnp.max(high - low)
  x, y = jnp.linspace(low - around, high + around, size, axis=1)
  return x, y


def loss_on_plane(
  models: PyTree, loss: Callable[[PyTree], jax.Array], size: int = 11, margin: float = 0.2
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The loss on a grid in the plane through three models.

  Args:
    models: parameters, leaves [3, ...].
    loss: jittable function of one model's parameters, giving a scalar.
    size: how many points along each axis, at least 2.
    margin: around the three, see `plane_grid`.

  Returns:
    Coordinates x and y, float [size] each, and losses [size (y), size (x)]. The models are
    at `plane_through(models).coordinates`.

  Raises:
    ValueError: see `plane_through` and `plane_grid`.

  References:
    Garipov et al., 2018, https://arxiv.org/abs/1802.10026
    Izmailov et al., 2018, https://arxiv.org/abs/1803.05407

  Example:
    >>> models = {"kernel": jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])}
    >>> loss = lambda params: jnp.sum(params["kernel"] ** 2)
    >>> x, y, losses = jaxsms.loss_on_plane(models, loss, size=3, margin=0.0)
    >>> losses.tolist()  # x and y are 0, 2, 4
    [[0.0, 4.0, 16.0], [4.0, 8.0, 20.0], [16.0, 20.0, 32.0]]
  """
  plane = plane_through(models)
  x, y = plane_grid(plane.coordinates, size, margin)
  losses = jax.lax.map(lambda at: loss(model_on_plane(plane, at)), grid_points(x, y))
  return x, y, losses.reshape(size, size)


def grid_points(x: jax.Array, y: jax.Array) -> jax.Array:
  """All points of a grid, row by row: float [len(y) * len(x), 2]."""
  return jnp.stack([jnp.tile(x, len(y)), jnp.repeat(y, len(x))], axis=1)


def plane_weights(plane: Plane, points: jax.Array) -> jax.Array:
  """The weights of a plane's models at some points: float [..., 2] -> [..., 3]."""
  _, (along, _), (aside, height) = plane.coordinates
  points = jnp.asarray(points)
  third = points[..., 1] / height
  second = (points[..., 0] - aside * third) / along
  return jnp.stack([1 - second - third, second, third], axis=-1)


def affine_combination(models: PyTree, weights: jax.Array) -> PyTree:
  """The sum of k models, leaves [k, ...], with weights [k] that add up to 1.

  A weight of 1 among zeros gives that model bit by bit. Leaves that are not floating come
  from the first one.
  """

  def leaf(x):
    if not is_floating(x):
      return x[0]
    pairs = zip(weights, widened(x), strict=True)
    terms: Sequence[jax.Array] = [weight * one for weight, one in pairs]
    return sum(terms[1:], terms[0]).astype(x.dtype)

  return jax.tree.map(leaf, models)


def _floating(tree):
  """Its floating leaves, in float32 or wider."""
  return [widened(x) for x in jax.tree.leaves(tree) if is_floating(x)]


def _dot(a, b):
  return sum(jnp.sum(jnp.real(jnp.conj(x) * y)) for x, y in zip(a, b, strict=True))


def _minus(a, b, factor=1.0):
  return [x - factor * y for x, y in zip(a, b, strict=True)]


def _divided(a, divisor):
  inverse = jnp.where(divisor > 0, 1 / jnp.where(divisor > 0, divisor, 1), 0)
  return [x * inverse for x in a]


def _basis(models):
  """Origin, the two axes, and the coordinates of b and c on them."""
  a, b, c = ([x[i] for x in _floating(models)] for i in range(3))
  side, other = _minus(b, a), _minus(c, a)
  along = jnp.sqrt(_dot(side, side))
  first = _divided(side, along)
  aside = _dot(other, first)
  rest = _minus(other, first, aside)
  height = jnp.sqrt(_dot(rest, rest))
  return a, first, _divided(rest, height), along, aside, height


@jax.jit
def _coordinates(models):
  *_, along, aside, height = _basis(models)
  zero = jnp.zeros_like(along)
  return jnp.stack([zero, zero, along, zero, aside, height]).reshape(3, 2)


@jax.jit
def _project(plane, params):
  origin, first, second, *_ = _basis(plane.models)
  way = _minus(_floating(params), origin)
  x, y = _dot(way, first), _dot(way, second)
  rest = _minus(_minus(way, first, x), second, y)
  return jnp.stack([x, y]), jnp.sqrt(_dot(rest, rest))
