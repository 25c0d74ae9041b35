"""Rules for operations that move positions: reshape, pad, slice, concatenate and others."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from jaxsms.channels.labels import FINITE, LONGEST, Axis, Fixed
from jaxsms.channels.values import Value, Walk, common_number


def merged(walk: Walk, axes: Sequence[Axis | Fixed], sizes: Sequence[int]) -> Axis | Fixed:
  """The axis that several make when they are flattened into one."""
  axes = [walk.labels.normal(axis) for axis in axes]
  if len(axes) == 1 or all(isinstance(axis, Fixed) for axis in axes):
    return axes[0]
  total = math.prod(sizes)
  if not isinstance(total, int | np.integer) or total > LONGEST:
    text = f"an axis of more than {LONGEST:,} positions is not followed"
    for axis in axes:
      walk.labels.freeze(axis, text)
    return walk.labels.fixed(text)
  labels: list[np.ndarray] = []
  values: list[np.ndarray] = []
  for i, axis in enumerate(axes):
    if isinstance(axis, Axis):
      shape = [len(axis.labels)] + [n if j == i else 1 for j, n in enumerate(sizes)]
      full = (len(axis.labels), *sizes)
      for array, layers in ((axis.labels, labels), (axis.values, values)):
        layers.append(np.broadcast_to(array.reshape(shape), full).reshape(-1, total))
  return Axis(np.concatenate(labels), np.concatenate(values))


def parted(
  walk: Walk, axis: Axis | Fixed, n: int, sizes: Sequence[int]
) -> list[Axis | Fixed]:
  """The axes that one of n positions makes when it is split into several."""
  axis = walk.labels.normal(axis)
  if isinstance(axis, Fixed):
    return [axis] * len(sizes)
  long = [i for i, size in enumerate(sizes) if size != 1]
  if len(long) < len(sizes):
    parts = iter(parted(walk, axis, n, [sizes[i] for i in long]))
    one = walk.labels.fixed("an axis of length 1 is not cut")
    return [next(parts) if i in long else one for i in range(len(sizes))]
  if len(sizes) == 1:
    return [axis]
  labels: list[list[np.ndarray]] = [[] for _ in sizes]
  values: list[list[np.ndarray]] = [[] for _ in sizes]
  for row, value in zip(axis.labels, axis.values, strict=True):
    row = np.where(walk.labels.may_go(row), row, 0) if len(axis.labels) > 1 else row
    grid, value = row.reshape(sizes), value.reshape(sizes)
    depends = [
      i for i in range(len(sizes)) if (grid != np.take(grid, [0], axis=i)).any()
    ] or [0]
    rest = [tuple(k for k in range(len(sizes)) if k != i) for i in range(len(sizes))]
    if len(depends) > 1:  # position (a, b) goes with its a or with its b
      new = {i: cast(Axis, walk.labels.fresh(sizes[i], FINITE)) for i in depends}
      each = [
        np.broadcast_to(
          new[i].labels.reshape([n if k == i else 1 for k, n in enumerate(sizes)]), sizes
        ).ravel()
        for i in depends
      ]
      sets = np.stack(each)
      walk.labels.tie(
        Axis(row[None], value.reshape(1, -1)), Axis(sets, np.zeros(sets.shape, np.uint8))
      )
      rows = {i: new[i].labels[0] for i in depends}
    else:
      i = depends[0]
      rows = {i: grid[tuple(slice(None) if k == i else 0 for k in range(len(sizes)))]}
    for i, own in rows.items():
      labels[i].append(own)
      values[i].append(value.max(axis=rest[i]))
  text = walk.labels.why(axis)
  return [
    Axis(np.stack(rows), np.stack(vals)) if rows else walk.labels.fixed(text)
    for rows, vals in zip(labels, values, strict=True)
  ]


def reshape(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Axes that keep their size, are flattened or split, in runs of equal products."""
  (value,) = ins
  old, new = (v.aval.shape for v in (equation.invars[0], equation.outvars[0]))
  one = walk.labels.fixed("an axis of length 1 is not cut")
  axes: list[Axis | Fixed] = [one] * len(new)
  if math.prod(old) == 0:
    return [walk.stays(new, "it is empty")]
  for i, n in enumerate(old):
    if n == 1:
      walk.freeze(value, i, "a reshape of a single position")
  sources = [i for i, n in enumerate(old) if n != 1]
  targets = [i for i, n in enumerate(new) if n != 1]
  while sources:
    ins_, outs = [sources.pop(0)], [targets.pop(0)]
    a, b = old[ins_[0]], new[outs[0]]
    while a != b:
      if a < b:
        ins_.append(sources.pop(0))
        a *= old[ins_[-1]]
      else:
        outs.append(targets.pop(0))
        b *= new[outs[-1]]
    axis = merged(walk, [value.axes[i] for i in ins_], [old[i] for i in ins_])
    for i, part in zip(outs, parted(walk, axis, a, [new[i] for i in outs]), strict=True):
      axes[i] = part
  return [Value(tuple(axes), value.known, value.summed)]


def broadcast_in_dim(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """New axes, and those that had length 1, have labels of their own."""
  value, mapped = ins[0], equation.params["broadcast_dimensions"]
  old, new = (v.aval.shape for v in (equation.invars[0], equation.outvars[0]))
  axes: list[Axis | Fixed | None] = [None] * len(new)
  for i, j in enumerate(mapped):
    if old[i] == new[j]:
      axes[j] = value.axes[i]
    else:
      walk.freeze(value, i, "a broadcast of a single position")
  every = [
    walk.fresh(n, value.known) if axis is None else axis
    for axis, n in zip(axes, new, strict=True)
  ]
  return [Value(tuple(every), value.known, value.summed)]


def tile(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Positions that are repeated go together."""
  value, shape = ins[0], equation.invars[0].aval.shape
  axes = []
  for axis, n, times in zip(value.axes, shape, equation.params["reps"], strict=True):
    axis = walk.labels.normal(axis)
    if times != 1 and n == 1:
      axis = walk.fresh(times, value.known)
    elif not isinstance(times, int | np.integer):
      walk.labels.freeze(axis, "it is repeated any number of times")
      axis = walk.labels.fixed("an axis of any length is not cut")
    elif isinstance(axis, Axis):
      axis = Axis(*(np.tile(x, (1, int(times))) for x in axis))
    axes.append(axis)
  return [Value(tuple(axes), value.known)]


def iota(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Any position may go."""
  return [Value(tuple(walk.fresh(n) for n in equation.outvars[0].aval.shape))]


def random_bits(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Other numbers for a smaller shape, of the same distribution."""
  keys = ins[0].axes
  shape = equation.outvars[0].aval.shape[len(keys) :]
  return [Value((*keys, *(walk.fresh(n) for n in shape)))]


def transpose(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Axes in another order."""
  axes = tuple(ins[0].axes[i] for i in equation.params["permutation"])
  return [Value(axes, ins[0].known, ins[0].summed)]


def squeeze(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """An axis of length 1 that is dropped must have its position."""
  gone = equation.params["dimensions"]
  for i in gone:
    walk.freeze(ins[0], i, "one position alone is taken")
  axes = tuple(a for i, a in enumerate(ins[0].axes) if i not in gone)
  return [Value(axes, ins[0].known, ins[0].summed)]


def rev(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Positions in the other direction."""
  axes = list(map(walk.labels.normal, ins[0].axes))
  for i in equation.params["dimensions"]:
    axes[i] = taken(axes[i], slice(None, None, -1))
  return [Value(tuple(axes), ins[0].known)]


def taken(axis: Axis | Fixed, positions: Any) -> Axis | Fixed:
  """Some positions of an axis."""
  if isinstance(axis, Fixed):
    return axis
  return Axis(axis.labels[:, positions], axis.values[:, positions])


def slice_(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Every stride-th position between two limits."""
  p = equation.params
  strides = p["strides"] or (1,) * len(ins[0].axes)
  limits = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
  axes = [taken(a, slice(*limit)) for a, limit in zip(ins[0].axes, limits, strict=True)]
  return [Value(tuple(axes), ins[0].known)]


def split(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Pieces along one axis."""
  outs, start = [], 0
  for size in equation.params["sizes"]:
    axes, along = list(ins[0].axes), equation.params["axis"]
    axes[along] = taken(axes[along], slice(start, start + size))
    outs.append(Value(tuple(axes), ins[0].known))
    start += size
  return outs


def concatenate(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Labels one after the other along one axis, tied along all others."""
  along = equation.params["dimension"]
  shapes = [v.aval.shape for v in equation.invars]
  axes = [
    joined(walk, [v.axes[i] for v in ins])
    if i != along
    else concatenated(walk, [v.axes[i] for v in ins], [s[i] for s in shapes])
    for i in range(len(shapes[0]))
  ]
  return [Value(tuple(axes), common_number(ins))]


def stack(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """A new axis of as many positions as there are operands."""
  axes = [joined(walk, axes) for axes in zip(*(v.axes for v in ins), strict=True)]
  axes.insert(equation.params["axis"], walk.fresh(len(ins)))
  return [Value(tuple(axes), common_number(ins))]


def unstack(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Each position of an axis is a result of its own."""
  axis = equation.params["axis"]
  walk.freeze(ins[0], axis, "one position alone is taken")
  axes = tuple(a for i, a in enumerate(ins[0].axes) if i != axis)
  return [Value(axes, ins[0].known) for _ in equation.outvars]


def joined(walk: Walk, axes: Sequence[Axis | Fixed]) -> Axis | Fixed:
  """One axis of several values: labels tied, of the values the worst."""
  for axis in axes[1:]:
    walk.labels.tie(axes[0], axis)
  first = walk.labels.normal(axes[0])
  if isinstance(first, Fixed):
    return first
  values = [walk.labels.values(axis, first.labels) for axis in axes]
  return Axis(first.labels, np.maximum.reduce(values))


def concatenated(
  walk: Walk, axes: Sequence[Axis | Fixed], sizes: Sequence[int]
) -> Axis | Fixed:
  """Axes one after the other."""
  labels = walk.labels
  axes = [labels.normal(axis) for axis in axes]
  if all(isinstance(axis, Fixed) for axis in axes):
    return axes[0]
  layers = max(len(axis.labels) for axis in axes if isinstance(axis, Axis))
  parts = []
  for axis, n in zip(axes, sizes, strict=True):
    if isinstance(axis, Fixed):  # labels that stay, so that the reason is known
      axis = Axis(np.zeros((0, n), int), np.zeros((0, n), np.uint8))
    pad = ((0, layers - len(axis.labels)), (0, 0))
    parts.append((np.pad(axis.labels, pad), np.pad(axis.values, pad)))
  return Axis(*(np.concatenate(x, 1) for x in zip(*parts, strict=True)))


def pad(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """New positions along an axis that may be cut have labels of their own."""
  value, fill = ins
  axes = list(map(walk.labels.normal, value.axes))
  for i, (low, high, inside) in enumerate(equation.params["padding_config"]):
    if isinstance(axes[i], Fixed) or (low, high, inside) == (0, 0, 0):
      continue
    if inside:
      walk.freeze(value, i, "positions are put between its own")
      axes[i] = walk.labels.normal(axes[i])
      continue
    n = equation.invars[0].aval.shape[i]
    axis = taken(axes[i], slice(max(-low, 0), n - max(-high, 0)))
    assert isinstance(axis, Axis)
    ends = [_padding(walk, max(k, 0), fill.known) for k in (low, high)]
    parts = [ends[0], axis, ends[1]]
    sizes = [max(low, 0), axis.labels.shape[1], max(high, 0)]
    axes[i] = concatenated(walk, parts, sizes)
  known = value.known if value.known == fill.known else None
  return [Value(tuple(axes), known)]


def _padding(walk, n, known):
  # One position alone may go too: the axis that it joins is longer.
  return taken(walk.fresh(n + 1, known), slice(1, None)) if n else Fixed(1)


RULES = {
  "reshape": reshape,
  "broadcast_in_dim": broadcast_in_dim,
  "tile": tile,
  "iota": iota,
  "empty": iota,
  "random_bits": random_bits,
  "transpose": transpose,
  "squeeze": squeeze,
  "rev": rev,
  "slice": slice_,
  "split": split,
  "concatenate": concatenate,
  "stack": stack,
  "unstack": unstack,
  "pad": pad,
}
