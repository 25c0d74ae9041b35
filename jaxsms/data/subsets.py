"""Shares of the training data, one for each copy."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from jaxsms.data.long_tail import check_ratio, class_counts, profile_counts
from jaxsms.names import quantity

DRAWS = 1000  # of Dirichlet shares, until every one has enough examples


class Shares(NamedTuple):
  """What part of the training data each of m copies has.

  Attributes:
    indices: int32 [m, most], of the examples; of share i the first `sizes[i]` count, and
      the rest repeats them.
    sizes: int32 [m], examples of each share.
  """

  indices: np.ndarray
  sizes: np.ndarray

  def of(self, copy: int) -> np.ndarray:
    """The indices of one share.

    Args:
      copy: which, from 0.

    Returns:
      int32 [size].

    >>> Shares(np.array([[4, 2, 4]]), np.array([2])).of(0).tolist()
    [4, 2]
    """
    return self.indices[copy, : self.sizes[copy]]


def random_shares(
  key: jax.Array, labels: npt.ArrayLike, copies: int, fraction: float
) -> Shares:
  """Random shares of one size that overlap as little as they can.

  One random order of all examples is a circle; the shares begin at equal distances on it.
  So every example is in equally many shares, up to one, and shares are disjoint where
  copies * fraction is at most 1.

  Args:
    key: typed key.
    labels: int [n], of the training data.
    copies: m.
    fraction: of the data that a share has, in (0, 1].

  Returns:
    m shares of round(fraction * n) examples, at least one.

  Raises:
    ValueError: `fraction` is out of range, or a share has no example of some class.

  >>> shares = random_shares(jax.random.key(0), [0, 0, 1, 1], 2, 1.0)
  >>> sorted(shares.of(1).tolist())
  [0, 1, 2, 3]
  """
  labels = np.asarray(labels)
  check_fraction(fraction)
  size = max(1, round(fraction * len(labels)))
  order = _generator(key).permutation(len(labels))
  shares = _padded([_arc(order, i, copies, size) for i in range(copies)])
  _check_classes(labels, shares)
  return shares


def balanced_shares(
  key: jax.Array, labels: npt.ArrayLike, copies: int, fraction: float = 1.0
) -> Shares:
  """Shares in which every class has equally many examples.

  Their number is `fraction` times the size of the smallest class. The shares have different
  examples of a larger class, as far as it has enough, see `random_shares`.

  Args:
    key: typed key.
    labels: int [n], of the training data.
    copies: m.
    fraction: of the smallest class that a share has, in (0, 1].

  Returns:
    m shares of one size.

  Raises:
    ValueError: `fraction` is out of range, or a share has no example of some class.

  >>> labels = np.array([0, 0, 0, 0, 1, 1])
  >>> shares = balanced_shares(jax.random.key(0), labels, 2)
  >>> [sorted(labels[shares.of(i)].tolist()) for i in range(2)]
  [[0, 0, 1, 1], [0, 0, 1, 1]]
  """
  return imbalanced_shares(key, labels, [1.0] * copies, fraction)


def imbalanced_shares(
  key: jax.Array, labels: npt.ArrayLike, ratios: Sequence[float], fraction: float = 1.0
) -> Shares:
  """Shares with a ratio of imbalance each: long-tailed subsets of the data.

  The classes of a share follow `profile_counts`, those that have most examples first.
  Ratio 1 gives a small balanced share; a ratio as large as that of the data gives most of
  the data.

  Args:
    key: typed key.
    labels: int [n], of the training data.
    ratios: one for each copy, of its largest class to its smallest, at least 1.
    fraction: of that profile, in (0, 1].

  Returns:
    A share for each ratio.

  Raises:
    ValueError: a ratio or `fraction` is out of range, or a share has no example of some
      class.

  References:
    Aminbeidokhti et al., 2025, https://arxiv.org/abs/2511.10683 (soups of such models)

  >>> labels = np.repeat([0, 1, 2], [4, 2, 1])
  >>> shares = imbalanced_shares(jax.random.key(0), labels, [1, 4])
  >>> [class_counts(labels[shares.of(i)]).tolist() for i in range(2)]
  [[1, 1, 1], [4, 2, 1]]
  """
  labels = np.asarray(labels)
  check_fraction(fraction)
  for ratio in ratios:
    check_ratio(ratio)
  rng, copies = _generator(key), len(ratios)
  available = class_counts(labels)
  order = np.argsort(-available, kind="stable")
  of_class = {c: rng.permutation(np.flatnonzero(labels == c)) for c in order}
  parts = []
  for i, ratio in enumerate(ratios):
    counts = np.floor(fraction * profile_counts(available[order], ratio) + 1e-6)
    parts.append(
      np.concatenate(
        [
          _arc(of_class[c], i, copies, int(count))
          for c, count in zip(order, counts, strict=True)
        ]
      )
    )
  shares = _padded(parts)
  _check_classes(labels, shares)
  return shares


def oversampled_shares(key: jax.Array, labels: npt.ArrayLike, copies: int) -> Shares:
  """Shares of all data in which every class comes as often as the largest one.

  The examples of smaller classes are repeated. Which of them come once more than the
  others is drawn for each share.

  Args:
    key: typed key.
    labels: int [n], of the training data.
    copies: m.

  Returns:
    m shares of one size, the largest class's times the number of classes.

  References:
    Kang et al., 2020, https://arxiv.org/abs/1910.09217 (class-balanced sampling)

  >>> labels = np.array([0, 0, 0, 1])
  >>> shares = oversampled_shares(jax.random.key(0), labels, 2)
  >>> [sorted(shares.of(i).tolist()) for i in range(2)]
  [[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 3, 3]]
  """
  labels, rng = np.asarray(labels), _generator(key)
  of_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
  most = max(map(len, of_class))
  return _padded(
    [
      np.concatenate([np.resize(rng.permutation(one), most) for one in of_class])
      for _ in range(copies)
    ]
  )


def dirichlet_shares(
  key: jax.Array, labels: npt.ArrayLike, copies: int, alpha: float, least: int = 1
) -> Shares:
  """Splits the data into shares with skewed labels, as clients of federated learning have.

  The examples of each class are split by proportions that are drawn for it from a
  Dirichlet distribution. Small `alpha` gives each share few classes; a large one gives all
  shares the distribution of the whole. Every example is in exactly one share. A draw with
  a share of fewer than `least` examples is drawn again.

  Args:
    key: typed key.
    labels: int [n], of the training data.
    copies: m.
    alpha: concentration, above 0.
    least: examples of the smallest share, such as the batch size.

  Returns:
    m shares that make up the data. Some may lack classes.

  Raises:
    ValueError: `alpha` is not above 0, or no draw gave every share enough examples.

  References:
    Hsu et al., 2019, https://arxiv.org/abs/1909.06335
    Li et al., 2021, https://arxiv.org/abs/2102.02079 (drawing again)

  >>> shares = dirichlet_shares(jax.random.key(0), [0, 0, 1, 1, 2, 2], 2, 0.5)
  >>> sorted(np.concatenate([shares.of(0), shares.of(1)]).tolist())
  [0, 1, 2, 3, 4, 5]
  """
  labels = np.asarray(labels)
  if not 0 < alpha < float("inf"):
    raise ValueError(f"alpha is {alpha}: the concentration is a number above 0")
  rng = _generator(key)
  of_class = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
  for _ in range(DRAWS):
    parts: list[list[np.ndarray]] = [[] for _ in range(copies)]
    for examples in of_class:
      ends = np.cumsum(rng.dirichlet(np.full(copies, alpha)))[:-1]
      cuts = np.round(ends * len(examples)).astype(int)
      for part, piece in zip(parts, np.split(examples, cuts), strict=True):
        part.append(piece)
    shares = [np.concatenate(part) for part in parts]
    if min(map(len, shares)) >= max(1, least):
      return _padded(shares)
  raise ValueError(
    f"none of {DRAWS} draws with alpha {alpha:g} gave each of {copies} clients "
    f"{max(1, least)} of the {len(labels)} examples: give a larger alpha, fewer clients or "
    "a smaller batch"
  )


def group_shares(groups: npt.ArrayLike, copies: int) -> Shares:
  """A share for each group of examples, such as those of one client.

  Args:
    groups: int [n], the group of each training example; any numbers.
    copies: m, as many as there are groups.

  Returns:
    Shares in the order of the groups' numbers. Together they are all examples.

  Raises:
    ValueError: there is another number of groups.

  >>> group_shares([7, 3, 7], 2).of(1).tolist()
  [0, 2]
  """
  groups = np.asarray(groups)
  names = np.unique(groups)
  if len(names) != copies:
    raise ValueError(
      f"the training data have {quantity(len(names), 'group')} for "
      f"{quantity(copies, 'copy')}: give a copy for each group, and each group "
      "at least one example"
    )
  return _padded([np.flatnonzero(groups == name) for name in names])


def check_sizes(shares: Shares, batch_size: int) -> None:
  """Raises ValueError where a share has fewer examples than a batch."""
  smallest = int(np.argmin(shares.sizes))
  if shares.sizes[smallest] < batch_size:
    raise ValueError(
      f"the share of copy {smallest} has {quantity(shares.sizes[smallest], 'example')} for "
      f"batches of {batch_size}: give larger shares or a smaller batch"
    )


def check_fraction(fraction: float) -> None:
  """Raises ValueError unless a share of the data is in (0, 1]."""
  if not 0 < fraction <= 1:
    raise ValueError(f"fraction is {fraction}: it is a share of the data, in (0, 1]")


def _generator(key):
  words = np.ravel(jax.random.key_data(key))
  return np.random.default_rng([int(word) for word in words])


def _arc(order, copy, copies, size):
  """`size` entries of a circle, from the copy's place on it."""
  first = copy * len(order) // copies
  return order[(first + np.arange(size)) % len(order)]


def _padded(parts):
  sizes = np.array([len(part) for part in parts], np.int32)
  indices = np.stack([np.pad(part, (0, sizes.max() - len(part)), "wrap") for part in parts])
  return Shares(indices.astype(np.int32), sizes)


def _check_classes(labels, shares):
  """Raises ValueError where a share lacks a class that the data have."""
  classes = np.unique(labels)
  for i in range(len(shares.sizes)):
    absent = np.setdiff1d(classes, labels[shares.of(i)])
    if len(absent):
      raise ValueError(
        f"the share of copy {i}, {quantity(shares.sizes[i], 'example')}, has none of "
        f"class {absent[0]}: give larger shares"
      )
