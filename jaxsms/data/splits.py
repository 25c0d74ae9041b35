"""Which training examples are held out for validation."""

import operator
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from jaxsms.names import quantity


def train_validation_split(
  n: int, fraction: float = 0.1, seed: int = 42
) -> tuple[np.ndarray, np.ndarray]:
  """Holds out a fixed random share of the training set.

  Args:
    n: number of training examples.
    fraction: share held out, between 0 and 1; round(fraction * n) examples.
    seed: decides which; the same seed gives the same split.

  Returns:
    (training, validation) indices, int64, each sorted; together 0 to n - 1.

  Raises:
    ValueError: `n` is no positive integer, `fraction` is not between 0 and 1, `seed` is
      negative, or one side would be empty.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788 (10 % held out, seed 42)

  Example:
    >>> training, validation = jaxsms.data.train_validation_split(10, fraction=0.2)
    >>> sorted([*training, *validation]) == list(range(10)), len(validation)
    (True, 2)
  """
  n, seed = integer("n", n, 1), integer("seed", seed, 0)
  if not 0 < fraction < 1:
    raise ValueError(f"fraction is {fraction}: give a share between 0 and 1, both excluded")
  held_out = round(fraction * n)
  if not 0 < held_out < n:
    side = "validation" if held_out == 0 else "training"
    raise ValueError(
      f"fraction {fraction} of {quantity(n, 'example')} leaves none for {side}: give "
      "more examples or another fraction"
    )
  order = np.random.default_rng(seed).permutation(n)
  return np.sort(order[held_out:]), np.sort(order[:held_out])


def integer(what: str, value: SupportsIndex, least: int) -> int:
  """An integer of at least `least`, or a ValueError that names it."""
  try:
    number = operator.index(value)
  except TypeError:
    raise ValueError(f"{what} is {value!r}: give an integer") from None
  if number < least:
    raise ValueError(f"{what} is {number}: give an integer of at least {least}")
  return number


def integers(what: str, values: npt.ArrayLike, below: int) -> np.ndarray:
  """Integers [n] from 0 to `below` - 1, at least one, or a ValueError that names them."""
  values = np.asarray(values)
  allowed = f"give integers from 0 to {below - 1}, at least one"
  if values.ndim != 1 or not values.size or not np.issubdtype(values.dtype, np.integer):
    raise ValueError(f"{what} is {values.dtype} of shape {values.shape}: {allowed}")
  if values.min() < 0 or values.max() >= below:
    raise ValueError(f"{what} runs from {values.min()} to {values.max()}: {allowed}")
  return values
