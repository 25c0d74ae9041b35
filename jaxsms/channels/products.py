"""Rules for products that sum over an axis: dense layers, attention, convolutions."""

from typing import Any

import numpy as np

from jaxsms.channels.labels import BROKEN, ZERO, Axis, Fixed
from jaxsms.channels.shapes import merged, parted
from jaxsms.channels.values import Value, Walk


def _layer(ins: list[Value]) -> str:
  return ins[1].layer or ins[0].layer


def contract(walk: Walk, a: Axis | Fixed, b: Axis | Fixed, text: str) -> None:
  """A sum of products over an axis: what goes there must have been 0 on one side."""
  labels = walk.labels
  labels.tie(a, b)
  a = labels.normal(a)
  if isinstance(a, Axis):
    left, right = a.values, labels.values(b, a.labels)
    exact = ((left == ZERO) | (right == ZERO)) & (np.maximum(left, right) < BROKEN)
    labels.freeze(a, text, ~exact)


def both(walk: Walk, a: Axis | Fixed, b: Axis | Fixed) -> Axis | Fixed:
  """An axis of two operands along which their products stand side by side."""
  labels = walk.labels
  labels.tie(a, b)
  a = labels.normal(a)
  if not isinstance(a, Axis):
    return a
  right = labels.values(b, a.labels)
  some = (np.minimum(a.values, right) == ZERO) & (np.maximum(a.values, right) < BROKEN)
  return Axis(a.labels, np.where(some, ZERO, np.maximum(a.values, right)).astype(np.uint8))


def dot_general(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Batch axes, then the free ones of the left, then those of the right."""
  (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
  a, b = (v.axes for v in ins)
  text = f"a product sums over numbers that are not 0 at {_layer(ins)}"
  for i, j in zip(left, right, strict=True):
    contract(walk, a[i], b[j], text)
  axes = [both(walk, a[i], b[j]) for i, j in zip(left_batch, right_batch, strict=True)]
  axes += [x for i, x in enumerate(a) if i not in (*left, *left_batch)]
  axes += [x for j, x in enumerate(b) if j not in (*right, *right_batch)]
  return [Value(tuple(axes), layer=_layer(ins))]


def convolution(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Any convolution: groups of channels or of images are an axis of their own."""
  p, (image, kernel) = equation.params, ins
  lhs, rhs, out = p["dimension_numbers"]
  name = _layer(ins)
  for value, spec in ((image, lhs), (kernel, rhs)):
    for axis in spec[2:]:
      walk.freeze(value, axis, "a convolution's window moves along it")
  text = f"a convolution sums over numbers that are not 0 at {name}"
  groups, batches = p["feature_group_count"], p["batch_group_count"]
  shapes = [v.aval.shape for v in equation.invars]
  n, c = (shapes[0][i] for i in lhs[:2])
  o = shapes[1][rhs[0]]
  n_axis, c_axis = (image.axes[i] for i in lhs[:2])
  o_axis, i_axis = (kernel.axes[i] for i in rhs[:2])
  if groups > 1:
    group, c_axis = parted(walk, c_axis, c, (groups, c // groups))
    side, o_axis = parted(walk, o_axis, o, (groups, o // groups))
    group = both(walk, group, side)
  contract(walk, c_axis, i_axis, text)
  if groups > 1:
    o_axis = merged(walk, (group, o_axis), (groups, o // groups))
  if batches > 1:
    group, n_axis = parted(walk, n_axis, n, (batches, n // batches))
    side, o_axis = parted(walk, o_axis, o, (batches, o // batches))
    group = both(walk, group, side)
    o_axis = merged(walk, (group, o_axis), (batches, o // batches))
  axes = [walk.labels.fixed("a convolution's window moves along it")] * len(out)
  axes[out[0]], axes[out[1]] = n_axis, o_axis
  return [Value(tuple(axes), layer=name)]


def own_convolution(walk: Walk, index: int, ins: list[Value]) -> list[Value]:
  """The operations of `jaxsms.convolution`: forward, image gradient, kernel gradient."""
  name = _layer(ins)
  for value in ins:
    for axis in range(len(value.axes)):
      kernel = index < 2 and value is ins[1]
      if axis in ((0, 1) if kernel else (1, 2)):
        walk.freeze(value, axis, "a convolution's window moves along it")
  text = f"a convolution sums over numbers that are not 0 at {name}"
  a, b = (v.axes for v in ins)
  window = walk.labels.fixed("a convolution's window moves along it")
  if index == 0:  # images [n, h, w, c], kernel [kh, kw, c, o]
    contract(walk, a[3], b[2], text)
    axes: tuple[Axis | Fixed, ...] = (a[0], window, window, b[3])
  elif index == 1:  # outputs [n, h, w, o], kernel [kh, kw, c, o]
    contract(walk, a[3], b[3], text)
    axes = (a[0], window, window, b[2])
  else:  # images [n, h, w, c], outputs [n, h, w, o]
    contract(walk, a[0], b[0], text)
    axes = (window, window, a[3], b[3])
  return [Value(axes, layer=name)]


def stacked_convolution(walk: Walk, index: int, ins: list[Value]) -> list[Value]:
  """The same for m copies at once: a leading axis, of length 1 where they share."""
  copies = walk.labels.fixed("copies of a convolution")
  for value in ins:
    walk.freeze(value, 0, "copies of a convolution")
  ins = [v._replace(axes=v.axes[1:]) for v in ins]
  (out,) = own_convolution(walk, index, ins)
  return [out._replace(axes=(copies, *out.axes))]


RULES = {"dot_general": dot_general, "conv_general_dilated": convolution}
