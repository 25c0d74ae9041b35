"""What a search draws: first values of the copies, and values near those of others."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

Values = Mapping[str, np.ndarray]
Ranges = Mapping[str, tuple[float, float]]


def check_range(what: str, low: float, high: float) -> None:
  """Raises ValueError where a range has nothing in it, or is not one of numbers above 0."""
  if not 0 < low < high < np.inf:
    raise ValueError(
      f"{what} goes from {low:g} to {high:g}: a range goes from a number above 0 to a "
      "greater one"
    )


def first_values(key: jax.Array, ranges: Ranges, m: int) -> dict[str, np.ndarray]:
  """Draws values for m copies, uniform in their logarithm.

  A range is cut into m equal parts of the logarithm, and each has one value, in an order
  of its own for each variable (a Latin hypercube).

  Args:
    key: typed key.
    ranges: least and greatest value of each variable.
    m: number of copies.

  Returns:
    float32 [m] by variable.

  References:
    McKay et al., 1979, https://doi.org/10.1080/00401706.1979.10489755
  """
  values = {}
  for number, name in enumerate(sorted(ranges)):
    order_key, place_key = jax.random.split(jax.random.fold_in(key, number))
    part = np.asarray(jax.random.permutation(order_key, m), np.float64)
    share = (part + np.asarray(jax.random.uniform(place_key, [m]), np.float64)) / m
    low, high = ranges[name]
    values[name] = np.clip(low * (high / low) ** share, low, high).astype(np.float32)
  return values


def parents_of(kept: Sequence[int], m: int) -> list[int]:
  """The copy that each of m copies has its values from after a rung.

  Those that were kept have their own; of the others the first takes the best, and so on.

  Args:
    kept: indices of the better half, the best first.
    m: number of copies.

  Example:
    >>> parents_of([3, 1], 5)
    [3, 1, 1, 3, 3]
  """
  parents = list(range(m))
  stopped = [i for i in range(m) if i not in kept]
  for number, i in enumerate(stopped):
    parents[i] = kept[number % len(kept)]
  return parents


def near_values(
  key: jax.Array,
  values: Values,
  parents: Sequence[int],
  ranges: Ranges,
  factor: float,
) -> dict[str, np.ndarray]:
  """Values near those of the parents: times a factor or divided by it, by chance.

  Args:
    key: typed key.
    values: float [m] by variable.
    parents: [m]; a copy that is its own parent keeps its values.
    ranges: that values are clipped to.
    factor: above 1.

  Returns:
    float32 [m] by variable.

  References:
    Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846 (population-based training)
  """
  found = {}
  own = np.asarray(parents) == np.arange(len(parents))
  for number, name in enumerate(sorted(ranges)):
    up = jax.random.bernoulli(jax.random.fold_in(key, number), shape=[len(parents)])
    of_parent = np.asarray(values[name], np.float32)[list(parents)]
    near = of_parent * np.where(np.asarray(up), factor, 1 / factor)
    found[name] = np.where(own, of_parent, np.clip(near, *ranges[name])).astype(np.float32)
  return found
