"""What masks empty along the axes of a network's arrays, and what of it stays."""

import jax
import numpy as np
from absl import logging

from jaxsms.channels.groups import Trace
from jaxsms.channels.labels import Axis
from jaxsms.channels.places import any_along
from jaxsms.trees import PyTree, is_array, path_string

Positions = list[list[np.ndarray | None]]  # of each leaf, for each axis bool [n], or None


def emptied(params: PyTree, masks: PyTree) -> Positions:
  """For each leaf and axis, bool [n]: at which positions the masks leave nothing."""
  zeros: Positions = []
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
  for leaf, mask in pairs:
    if not is_array(leaf):
      continue
    mask = np.asarray(mask)
    rank = len(leaf.shape)
    if mask.shape != leaf.shape or mask.all():
      zeros.append([None] * rank)
      continue
    zeros.append([~any_along(mask, axis) for axis in range(rank)])
  return zeros


def left_alone(trace: Trace, zeros: Positions, kept: Positions) -> dict[str, str]:
  """Where emptied positions stay, since a cut would change other values, and why.

  Args:
    trace: of the network.
    zeros: as `emptied` gives.
    kept: which positions stay; None where all do.

  Returns:
    The reason by place, written "Dense_0/kernel, axis 1".
  """
  labels, found = trace.walk.labels, {}
  rows = zip(trace.paths, trace.axes, zeros, kept, strict=True)
  for path, axes, empty, stay in rows:
    for i, (axis, zero, mask) in enumerate(zip(axes, empty, stay, strict=True)):
      if zero is None or len(zero) == 1:
        continue
      where, normal = zero if mask is None else zero & mask, labels.normal(axis)
      if isinstance(normal, Axis):
        own = Axis(normal.labels[:, where], normal.values[:, where])
        held = where.any() and not labels.may_go(own.labels).any(0).all()
        reason = labels.why(own) if held else None
      else:
        reason = labels.why(normal) if where.any() else None
      if reason is not None:
        found[f"{path_string(path)}, axis {i}"] = reason
  return found


def warn_of_whole_channels(
  trace: Trace, masks: PyTree, zeros: Positions, kept: Positions, reasons: dict[str, str]
) -> None:
  """Logs a warning where masks empty whole channels of a layer and none of them is cut.

  Masks of single weights empty a position here and there. They give no warning: only arrays
  whose masks leave a block are checked.
  """
  rows = zip(trace.paths, jax.tree.leaves(masks), zeros, kept, strict=True)
  for path, mask, empty, stay in rows:
    for i, zero in enumerate(empty):
      place = f"{path_string(path)}, axis {i}"
      if place not in reasons or zero is None or not _is_block(np.asarray(mask), empty):
        continue
      mine = stay[i]
      if mine is None or mine[zero].all():
        logging.warning(
          "masks empty %d of the %d positions of %s, and none of them can be cut: %s",
          zero.sum(), len(zero), place, reasons[place],
        )  # fmt: skip
        return


def _is_block(mask, empty):
  """Whether a mask keeps all where the positions of each axis that it leaves meet."""
  if sum(n > 1 for n in mask.shape) < 2 or not mask.any():
    return False
  return int(np.prod([(~zero).sum() for zero in empty])) == int(mask.sum())
