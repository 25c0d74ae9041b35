"""The positions of channels in the leaves of a network, and masks of whole channels."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.meshes import fetch
from jaxsms.mask_trees import mask_leaves
from jaxsms.pruning import with_all_kept
from jaxsms.trees import Path, PyTree, is_array, is_concrete, path_string


class ChannelLeaf(NamedTuple):
  """A leaf that has channels.

  Attributes:
    number: of the leaf, in the order of `jax.tree.leaves`.
    path: its key path.
    leaf: the array.
    axes: for each axis that has channels, pairs of the number of a group and the
      positions of its channels, int [size, k].
  """

  number: int
  path: Path
  leaf: Any
  axes: dict[int, list[tuple[int, np.ndarray]]]


def masks_of_channels(params: PyTree, groups: Sequence, kept: Sequence) -> PyTree:
  """Masks that remove whole channels, in every leaf that has them.

  The weights, bias, normalization and batch statistics of a channel are removed, and the
  weights of the next layers that read it. So the masked network computes what a network
  without that channel computes.

  Args:
    params: tree of parameters; shapes are enough.
    groups: as `jaxsms.channel_groups` gives: each has `size`, `places` (path and axis of
      every leaf with these channels) and `indices` (the positions there, int [size] or
      [size, k]).
    kept: for each group bool [size], False where a channel goes.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept.

  Raises:
    ValueError: groups of other params, `kept` does not fit the groups or is not bool, or
      a group would lose all channels.

  Example:
    >>> params = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}
    >>> apply = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 1)))
    >>> masks = jaxsms.masks_of_channels(params, groups, [np.array([True, False, True])])
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([[True, False, True]], [[True], [False], [True]])
  """
  kept = _check_kept(groups, kept)  # on the host from here on
  for group, own in zip(groups, kept, strict=True):
    if group.size and not own.any():
      raise ValueError(
        f"kept leaves none of the {group.size} channels of {group.places[0][0]}: keep at "
        "least one of each group"
      )
  return masks_with(params, groups, kept)


def masks_with(
  params: PyTree, groups: Sequence, kept: Sequence, masks: PyTree | None = None
) -> PyTree:
  """As `masks_of_channels`, without what earlier masks removed as well."""
  kept = _check_kept(groups, kept)
  earlier = masks_on_host(params, masks)
  new = {i: mask for i, mask in enumerate(earlier) if mask is not None}
  for place in channel_leaves(params, groups):
    mask = new.get(place.number)
    mask = np.ones(np.shape(place.leaf), bool) if mask is None else mask.copy()
    for axis, alive in alive_positions(place, kept).items():
      if not alive.all():
        mask &= np.expand_dims(alive, [a for a in range(mask.ndim) if a != axis])
    new[place.number] = mask
  return with_all_kept(params, {i: jnp.asarray(mask) for i, mask in new.items()})


def kept_channels(params: PyTree, groups: Sequence, masks: PyTree) -> list[np.ndarray]:
  """The channels that masks leave: those with an entry that is kept, in any place.

  Args:
    params: tree of parameters; shapes are enough.
    groups: as `jaxsms.channel_groups` gives.
    masks: tree of bool arrays with the structure of `params`.

  Returns:
    For each group bool [size]: `masks_of_channels` takes it.

  Raises:
    ValueError: groups of other params, or masks of another structure.
  """
  kept = [np.zeros(group.size, bool) for group in groups]
  masks = masks_on_host(params, masks)
  for place in channel_leaves(params, groups):
    mask = masks[place.number]
    mask = np.ones(np.shape(place.leaf), bool) if mask is None else mask
    for axis, members in place.axes.items():
      left = any_along(mask, axis)
      for number, indices in members:
        kept[number] |= left[indices].any(1)
  return kept


def masks_on_host(params: PyTree, masks: PyTree | None) -> list[np.ndarray | None]:
  """The mask of each leaf, in its shape; None where it is no array, or has none."""
  leaves = jax.tree.leaves(params)
  if masks is None:
    return [None] * len(leaves)
  if not is_concrete(masks):
    raise ValueError("masks are traced: channels are chosen before the program runs")
  return [
    np.broadcast_to(np.asarray(fetch(mask), bool), leaf.shape)
    if is_array(leaf) and mask is not None
    else None
    for mask, leaf in zip(mask_leaves(params, masks), leaves, strict=True)
  ]


def channel_leaves(params: PyTree, groups: Sequence) -> list[ChannelLeaf]:
  """The leaves that have channels, in the order of `jax.tree.leaves`.

  Raises:
    ValueError: a place that `params` does not have.
  """
  leaves = jax.tree.leaves_with_path(params)
  numbers = {path_string(path): i for i, (path, _) in enumerate(leaves)}
  found: dict[int, dict[int, list[tuple[int, np.ndarray]]]] = {}
  for g, group in enumerate(groups):
    for (name, axis), indices in zip(group.places, group.indices, strict=True):
      shape = np.shape(leaves[numbers[name]][1]) if name in numbers else None
      indices = np.asarray(indices)
      if shape is None or not _fits(shape, axis, indices, group.size):
        raise ValueError(
          f"groups have {group.size} channels on axis {axis} of {name}, but params have "
          f"{'no such leaf' if shape is None else f'{list(shape)} there'}: find the groups "
          "of these params with jaxsms.channel_groups"
        )
      place = found.setdefault(numbers[name], {})
      members = place.setdefault(axis % len(shape), [])
      members.append((g, indices.reshape(group.size, -1)))
  return [ChannelLeaf(i, *leaves[i], axes=found[i]) for i in sorted(found)]


def _fits(shape, axis, indices, size) -> bool:
  in_range = -len(shape) <= axis < len(shape) and indices.shape[:1] == (size,)
  return in_range and (
    not indices.size or 0 <= indices.min() <= indices.max() < shape[axis]
  )


def alive_positions(place: ChannelLeaf, kept: Sequence) -> dict[int, np.ndarray]:
  """For each axis that has channels bool [length]: which positions no channel empties."""
  positions = {}
  for axis, members in place.axes.items():
    alive = positions[axis] = np.ones(np.shape(place.leaf)[axis], bool)
    for number, indices in members:
      alive[indices[~kept[number]]] = False
  return positions


def any_along(mask: np.ndarray, axis: int) -> np.ndarray:
  """Bool [length]: at which positions of an axis anything is kept."""
  return np.asarray(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))


class EntryCount:
  """How many entries of a leaf are left, for any choice of channels.

  What is kept of a leaf is a block: the positions that are left on each axis. So entries
  are a product of counts, also where rows belong to one group and columns to another.
  """

  def __init__(self, place: ChannelLeaf, mask: np.ndarray | None = None):
    """Counts of one leaf, of which an earlier mask may have removed entries."""
    self.place = place
    shape = np.shape(place.leaf)
    others = tuple(a for a in range(len(shape)) if a not in place.axes)
    self.each, self.table, self.earlier = math.prod(shape[a] for a in others), None, {}
    if mask is None or mask.all():
      return
    left = [any_along(mask, axis) for axis in range(mask.ndim)]
    if math.prod(int(x.sum()) for x in left) == int(mask.sum()):
      self.each = math.prod(int(left[a].sum()) for a in others)
      self.earlier = {axis: left[axis] for axis in place.axes}
    else:  # no block: how many are kept at each combination of positions
      self.table = mask.sum(others, dtype=np.float64)

  def __call__(self, kept: Sequence) -> int:
    """The entries that are left where `kept`, bool [size] each, are the channels."""
    positions = sorted(alive_positions(self.place, kept).items())
    if self.table is None:
      return self.each * math.prod(
        int((alive & self.earlier.get(axis, True)).sum()) for axis, alive in positions
      )
    table = self.table
    for _, alive in positions:  # always the first of the axes that are left
      table = np.tensordot(alive.astype(np.float64), table, 1)
    return round(float(table))


def _check_kept(groups: Sequence, kept: Sequence) -> list[np.ndarray]:
  kept = list(kept)
  if not is_concrete(kept):
    raise ValueError("kept is traced: which channels go is known before the program runs")
  sizes, shapes = [(group.size,) for group in groups], [np.shape(k) for k in kept]
  if sizes != shapes:
    raise ValueError(
      f"kept has shapes {shapes[:4]} for groups of {[s for (s,) in sizes[:4]]} channels: "
      "give one bool [size] for each group"
    )
  found = [np.asarray(fetch(k)) for k in kept]
  for group, own in zip(groups, found, strict=True):
    if own.dtype != bool and own.size:
      raise ValueError(
        f"kept has {own.dtype} for the channels of {group.places[0][0]}: give bool [size], "
        "False where a channel goes"
      )
  return [own.astype(bool) for own in found]
