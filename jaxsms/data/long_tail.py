"""Classes of unequal size: long-tailed training sets, and what is measured on them."""

import numpy as np
import numpy.typing as npt

from jaxsms.data.splits import integer
from jaxsms.names import quantity

HEAD, MIDDLE, TAIL = "head", "middle", "tail"


def profile_counts(available: npt.ArrayLike, ratio: float) -> np.ndarray:
  """How many examples each class keeps in an exponential profile, the largest that fits.

  n_c = floor(n_max * ratio^(-c / (C - 1))) for the classes c = 0 to C - 1 in the order
  given. n_max is the largest for which every class has enough examples, so that the profile
  is exact. Where the last class would then have no example, n_max is `ratio`: the last
  class has one, the others no more than they have.

  Args:
    available: int [classes], examples of each class, in the order of the profile.
    ratio: of the first class to the last, at least 1; 1 gives all classes the same.

  Returns:
    int64 [classes].

  Raises:
    ValueError: `ratio` is below 1, or some class would have no example.

  References:
    Cui et al., 2019, https://arxiv.org/abs/1901.05555 (the exponential profile)

  >>> profile_counts([5000] * 10, 100).tolist()
  [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  >>> profile_counts([9, 2, 1, 1], 8).tolist()
  [8, 2, 1, 1]
  """
  available = np.asarray(available)
  check_ratio(ratio)
  if available.ndim != 1 or not available.size:
    raise ValueError(
      f"available has shape {list(available.shape)}: give one count for each class"
    )
  exponents = np.arange(len(available)) / max(len(available) - 1, 1)
  shrinking = float(ratio) ** -exponents
  largest = max(np.min(available / shrinking), min(float(ratio), float(available[0])))
  counts = np.floor(largest * shrinking + 1e-6).astype(np.int64)
  counts = np.minimum(counts, available)
  if counts.min() < 1:
    raise ValueError(
      f"an imbalance of {ratio:g} leaves no example of class {int(np.argmin(counts))} in "
      "the order of the profile, whose classes have "
      f"{quantity(available.max(), 'example')} at most: give less"
    )
  return counts


def check_ratio(ratio: float, what: str = "imbalance") -> None:
  """Raises ValueError unless a ratio of class sizes is a number of at least 1."""
  if not 1 <= ratio < float("inf"):
    raise ValueError(
      f"{what} is {ratio}: it is examples of the largest class for each of the smallest, "
      "give a number of at least 1"
    )


def class_counts(labels: npt.ArrayLike, classes: int | None = None) -> np.ndarray:
  """Examples of each class.

  Args:
    labels: int [n], from 0.
    classes: how many there are; None means up to the largest label.

  Returns:
    int64 [classes].

  >>> class_counts([0, 2, 2]).tolist()
  [1, 0, 2]
  """
  labels = np.asarray(labels)
  return np.bincount(labels, minlength=classes or 0)


def long_tail(labels: npt.ArrayLike, ratio: float, seed: int = 42) -> np.ndarray:
  """Makes a long-tailed training set: which examples it keeps.

  Class 0 is the largest and the last class the smallest, see `profile_counts`.

  Args:
    labels: int [n], from 0.
    ratio: of the first class to the last, at least 1.
    seed: decides which examples of a class stay.

  Returns:
    Their indices, int64, sorted.

  Raises:
    ValueError: `ratio` is below 1, or some class would have no example.

  References:
    Cao et al., 2019, https://arxiv.org/abs/1906.07413 (long-tailed CIFAR)

  >>> labels = np.repeat([0, 1, 2], 4)
  >>> labels[long_tail(labels, 4)].tolist()
  [0, 0, 0, 0, 1, 1, 2]
  """
  labels = np.asarray(labels)
  rng = np.random.default_rng(integer("seed", seed, 0))
  counts = profile_counts(class_counts(labels), ratio)
  kept = [
    rng.permutation(np.flatnonzero(labels == c))[:count] for c, count in enumerate(counts)
  ]
  return np.sort(np.concatenate(kept))


def head_middle_tail(counts: npt.ArrayLike) -> dict[str, tuple[int, ...]]:
  """The classes with many, with some and with few training examples, a third each.

  Fixed limits, more than 100 and fewer than 20 examples as for ImageNet-LT, leave groups
  empty on smaller sets. Thirds exist for every set.

  Args:
    counts: int [classes], training examples of each class.

  Returns:
    Classes by `head`, `middle` and `tail`, each in order. Head and tail have
    round(classes / 3), at least one; equally large classes go by their number. Groups
    without a class are missing.

  References:
    Liu et al., 2019, https://arxiv.org/abs/1904.05160 (many, medium and few shot)

  >>> head_middle_tail([9, 5, 7, 1])
  {'head': (0,), 'middle': (1, 2), 'tail': (3,)}
  """
  counts = np.asarray(counts)
  order, third = np.argsort(-counts, kind="stable"), max(1, round(len(counts) / 3))
  parts = {
    HEAD: order[:third],
    MIDDLE: order[third : len(order) - third],
    TAIL: order[max(third, len(order) - third) :],
  }
  return {name: tuple(sorted(part.tolist())) for name, part in parts.items() if len(part)}
