"""Spherical interpolation of two models."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsms.merges.finite import check_some_finite, without_others
from jaxsms.trees import PyTree, is_floating, is_parameter, number_of_models, widened


def slerp(stacked: PyTree, t: float = 0.5) -> PyTree:
  """Goes from one model to another along a great circle, leaf by leaf.

  Args:
    stacked: tree whose leaves have shape [2, ...].
    t: where, 0 at the first model and 1 at the second.

  Returns:
    A tree with leaves [...]; those that are no parameters are interpolated linearly. Where
    one model is not finite, the result is the other one.

  Raises:
    ValueError: there are not two models, or `t` is not in [0, 1].
    FloatingPointError: no model is finite.

  References:
    Shoemake, 1985, https://doi.org/10.1145/325165.325242

  Example:
    >>> print(slerp({"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])})["w"].round(3))
    [0.707 0.707]
  """
  m = number_of_models(stacked)
  if m > 2:
    raise ValueError(
      f"there are {m} models: slerp goes from one model to another, give two"
    )
  if not 0 <= t <= 1:
    raise ValueError(f"t is {t}: it is 0 at the first model and 1 at the second")
  finite = check_some_finite(stacked)
  if m == 1:
    return jax.tree.map(lambda x: x[0], stacked)
  return _slerp(without_others(stacked, finite), finite, t)


@jax.jit
def _slerp(stacked, finite, t):
  t = jnp.where(finite.all(), t, finite[1].astype(jnp.float32))

  def one(path, leaf):
    if not is_floating(leaf):
      return leaf[0]
    first, second = widened(leaf)
    a, b = 1 - t, t
    if is_parameter(path, leaf):
      products = [
        jnp.vdot(x, y) for x, y in ((first, first), (first, second), (second, second))
      ]
      a, b = arc_weights(jnp, products[0], products[1], products[2], t)
    return (a * first + b * second).astype(leaf.dtype)

  return jax.tree.map_with_path(one, stacked)


def arc_weights(numpy: Any, first: Any, both: Any, second: Any, t: Any) -> tuple[Any, Any]:
  """The weights of two vectors on the arc between them.

  Args:
    numpy: `numpy` or `jax.numpy`.
    first: the product of the first vector with itself.
    both: of both.
    second: of the second with itself.
    t: where on the arc, from 0 to 1.

  Returns:
    Two weights; those of a straight line where the vectors are parallel, or one is 0.
  """
  length = numpy.sqrt(first * second)
  cosine = numpy.clip(both / numpy.where(length > 0, length, 1), -1, 1)
  angle = numpy.arccos(cosine)
  sine = numpy.sin(angle)
  straight = (length == 0) | (sine < 1e-4)
  safe = numpy.where(straight, 1, sine)
  a = numpy.where(straight, 1 - t, numpy.sin((1 - t) * angle) / safe)
  b = numpy.where(straight, t, numpy.sin(t * angle) / safe)
  return a, b
