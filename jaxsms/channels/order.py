"""In which order channels go: weakest first, in blocks, with those that may not."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsms.channels.places import channel_leaves, kept_channels
from jaxsms.channels.scores import Score, channel_scores
from jaxsms.names import check_name
from jaxsms.pruning import SCOPES, apply_masks, prunable_flags
from jaxsms.trees import (
  Path,
  Prunable,
  PyTree,
  check_finite,
  is_concrete,
  path_names,
  path_string,
)
from jaxsms.trees import prunable as default_prunable

Kept = list[np.ndarray]


class RemovalOrder(NamedTuple):
  """The channels that may go, in the order in which they do.

  Attributes:
    start: bool [size] for each group: what earlier masks left.
    channels: int [n], the channels that may go, as numbers into those of all groups.
    ends: int [units + 1], from 0: how many are gone after each unit that goes together.
    may_go: for each group, whether it may lose channels.
  """

  start: Kept
  channels: np.ndarray
  ends: np.ndarray
  may_go: list[bool]

  def without(self, units: int) -> Kept:
    """The channels that are left after removing that number of units: bool [size] each."""
    if not self.start:
      return []
    kept = np.concatenate(self.start)
    kept[self.channels[: self.ends[units]]] = False
    return np.split(kept, np.cumsum([len(x) for x in self.start])[:-1])


def removal_order(
  params: PyTree,
  *,
  groups: Sequence,
  score: str | Score = "l2",
  scope: str = "global",
  round_to: int = 1,
  masks: PyTree | None = None,
  prunable: Prunable | None = None,
  key: jax.Array | None = None,
) -> RemovalOrder:
  """The order in which channels go; for the arguments see `channel_masks`.

  Sorted by score and then by position. The strongest of each group, `round_to` of them, are
  not among them, so that no group is ever empty.
  """
  check_name("scope", scope, SCOPES)
  if round_to < 1 or round_to != int(round_to):
    raise ValueError(f"round_to is {round_to}: give a whole number of channels, from 1")
  if not is_concrete(params):
    raise ValueError("params are traced: channels are chosen before the program runs")
  check_finite(params)
  start = [np.ones(group.size, bool) for group in groups]
  if masks is not None:
    start = kept_channels(params, groups, masks)
    params = apply_masks(params, masks)
  scores = channel_scores(score, params, groups, key)
  may_go = [not x for x in _unprunable_groups(params, groups, prunable)]
  channels, values, lengths = [np.zeros(0, int)], [np.zeros(0)], [np.zeros(0, int)]
  first = 0
  for group, alive, own, may in zip(groups, start, scores, may_go, strict=True):
    if may:
      order, starts = _blocks(own, alive, int(round_to))
      if scope == "uniform":  # the middle of the share that goes with each channel
        share = (np.arange(len(order)) + group.size - alive.sum() + 0.5) / group.size
        own = own.copy()
        own[order] = np.where(own[order] < np.inf, share, np.inf)
      length = np.diff([*starts, len(order)])
      channels.append(order + first)
      lengths.append(length)
      if len(order):
        values.append(np.add.reduceat(own[order], starts) / length)
    first += group.size
  means, runs = np.concatenate(values), np.concatenate(lengths)
  rank = np.argsort(np.repeat(means, runs), kind="stable")
  ends = np.cumsum([0, *runs[np.argsort(means, kind="stable")]])
  ends = ends[: 1 + np.sum(means < np.inf)]  # infinite scores stay
  return RemovalOrder(start, np.concatenate(channels)[rank], ends, may_go)


def _blocks(scores, alive, round_to) -> tuple[np.ndarray, np.ndarray]:
  """The channels of a group that may go, weakest first, and where their blocks start.

  The first block is what is more than a multiple of `round_to`; that many stay.
  """
  left = np.flatnonzero(alive)
  order = left[np.argsort(scores[left], kind="stable")][: max(len(left) - round_to, 0)]
  more = len(left) % round_to
  starts = np.arange(more, len(order), round_to)
  return order, np.concatenate([[0], starts]) if more and len(order) else starts


def _unprunable_groups(
  params: PyTree, groups: Sequence, prunable: Prunable | None
) -> list[bool]:
  """For each group, whether its channels are outputs of a layer that is not prunable."""
  flags = prunable_flags(params, prunable)
  outputs = getattr(groups, "outputs", None)
  held = [False] * len(groups)
  for place in channel_leaves(params, groups):
    if flags[place.number]:
      continue
    if outputs is None:
      own = _output_axes(place.path, place.leaf)
    else:
      own = outputs.get(path_string(place.path), ())
    for axis in {a % np.ndim(place.leaf) for a in own} & place.axes.keys():
      for number, _ in place.axes[axis]:
        held[number] = True
  return held


def _output_axes(path: Path, leaf: Any) -> tuple[int, ...]:
  """The axis of a layer's outputs, by its name; of other leaves none."""
  name = (path_names(path) or [""])[-1]
  if np.ndim(leaf) > 1 and (default_prunable(path, leaf) or name.startswith("embedding")):
    return (0,) if "weight" in name else (-1,)
  return ()
