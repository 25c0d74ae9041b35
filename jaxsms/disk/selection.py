"""Exact thresholds over arrays that are larger than memory, in two or three passes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxsms.disk.passes import Block, scratch

Function = Callable[[Block, np.ndarray], Any]
# Goes through all blocks and gives what a function finds in each; in several threads.
Values = Callable[[Function], Iterator[tuple[Block, Any]]]


@dataclasses.dataclass
class Threshold:
  """What goes in a group of arrays: keys below `key`, and the first `left` equal to it.

  Attributes:
    key: bits of a magnitude.
    left: how many entries of this key are still to go.
  """

  key: int
  left: int


class Thresholds:
  """What is pruned in each array.

  `below` and `equal` may be called for any block at any time, `ties` for all blocks in the
  order of positions: entries of equal magnitude go by position.
  """

  def __init__(self, by_name: dict[str, Threshold], wide: bool):
    self._by_name = by_name
    self._wide = wide

  def below(self, block: Block, values: np.ndarray) -> np.ndarray:
    """The values [n] with what is certain to go set to 0."""
    threshold = self._by_name.get(block.name)
    if threshold is None or not threshold.key:
      return values
    return np.where(_keys(values, self._wide) < threshold.key, values.dtype.type(0), values)

  def equal(self, block: Block, values: np.ndarray) -> np.ndarray:
    """Which of the values [n] are equal to the threshold, int [k]; none where that is 0."""
    threshold = self._by_name.get(block.name)
    if threshold is None or not threshold.key:
      return np.zeros([0], int)
    return np.flatnonzero(_keys(values, self._wide) == threshold.key)

  def ties(self, block: Block, equal: np.ndarray) -> np.ndarray:
    """Which of those that `equal` gave go as well: the first of them."""
    threshold = self._by_name.get(block.name)
    if threshold is None:
      return equal[:0]
    goes = equal[: threshold.left]
    threshold.left -= len(goes)
    return goes


def smallest(
  values: Values, groups: Sequence[tuple[Sequence[str], int]], wide: bool
) -> Thresholds:
  """What has the smallest magnitudes.

  Magnitudes are compared by their bits, of which each pass finds the next digit: it counts
  how many entries there are of each.

  Args:
    values: goes through all blocks, a pass at each call.
    groups: names of arrays that are compared with one another, and how many of their
      entries are to go.
    wide: whether the magnitudes are compared in float64, not float32.

  Returns:
    The thresholds, for all arrays of the groups.
  """
  digits = (22, 21, 21) if wide else (16, 16)  # that many bits at a time
  group_of = {name: i for i, (names, _) in enumerate(groups) for name in names}
  found = [Threshold(0, goal) for _, goal in groups]
  shift = sum(digits)
  for bits in digits:
    above, shift = shift, shift - bits
    digit_counts = functools.partial(_digit_counts, found, group_of, wide, above, shift)
    counts = [np.zeros(2**bits, np.int64) for _ in groups]
    for block, count in values(digit_counts):
      counts[group_of[block.name]][: len(count)] += count
    for threshold, count in zip(found, counts, strict=True):
      # The largest digit with no more entries below it than are to go.
      before = np.concatenate([[0], np.cumsum(count)])[:-1]
      digit = int(np.searchsorted(before, threshold.left, side="right")) - 1
      threshold.key |= digit << shift
      threshold.left -= int(before[digit])
  by_name = {name: found[i] for name, i in group_of.items()}
  return Thresholds(by_name, wide)


def _digit_counts(found, group_of, wide, above, shift, block, values):
  """How many magnitudes of a block have each digit, of those with the known digits.

  Args:
    found: what is known of the threshold of each group.
    group_of: number of the group of each array.
    wide: see `smallest`.
    above: bits below the known digits.
    shift: bits below the digit that is looked for.
    block: which one.
    values: of it.
  """
  keys = _keys(values, wide)
  if above < 8 * keys.itemsize:
    known = np.right_shift(keys, above, out=scratch("known", keys.size, keys.dtype))
    keys = keys[known == found[group_of[block.name]].key >> above]
  keys >>= shift
  keys &= 2 ** (above - shift) - 1
  return np.bincount(keys.view(f"i{keys.itemsize}"))


def _keys(values, wide):
  """The bits of the magnitudes, in this thread's array: floats are ordered as they are."""
  magnitudes = scratch("keys", values.size, np.dtype(np.float64 if wide else np.float32))
  magnitudes[...] = values
  np.abs(magnitudes, out=magnitudes)
  return magnitudes.view(f"u{magnitudes.itemsize}")
