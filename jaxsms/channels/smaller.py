"""Single operations on the positions that stay: each takes its smaller operands."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsms.channels.arrays import left_shape, take


class Step:
  """An operation on values with positions that go."""

  def __init__(self, cut, equation, values, outs, inner):
    self.cut, self.equation, self.inner = cut, equation, inner
    self.values, self.outs = values, outs
    self.params = equation.params

  def in_shape(self):
    return self.equation.invars[0].aval.shape

  def in_masks(self, i):
    return self.cut.masks(self.values[i])

  def out_shape(self, i=0):
    return self.cut.shape(self.outs[i], self.equation.outvars[i].aval.shape)

  def out_masks(self):
    return self.cut.masks(self.outs[0])

  def bind(self, ins, **params):
    out = self.equation.primitive.bind(*ins, **{**self.params, **params})
    return out if self.equation.primitive.multiple_results else [out]


def same(step: Step, ins: Sequence[Any]) -> list[Any]:
  """An operation that carries no sizes."""
  return step.bind(ins)


def _broadcast(step, ins):
  dimensions = step.params["broadcast_dimensions"]
  return [lax.broadcast_in_dim(ins[0], step.out_shape(), dimensions)]


def _reshape(step, ins):
  return [lax.reshape(ins[0], step.out_shape())]


def _tile(step, ins):
  pairs = zip(step.out_shape(), jnp.shape(ins[0]), strict=True)
  return [jnp.tile(ins[0], [out // old for out, old in pairs])]


def _iota(step, ins):
  return [take(x, step.out_masks()) for x in step.bind(ins)]


def _stack(step, ins):
  mask = step.out_masks()[step.params["axis"]]
  if mask is not None:
    ins = [x for x, stays in zip(ins, mask, strict=True) if stays]
  return step.bind(ins)


def _random_bits(step, ins):
  keys = len(step.in_shape())
  return step.bind(ins, shape=step.out_shape()[keys:])


def _pad(step, ins):
  config = []
  for old, new, n, (low, high, inside) in zip(
    step.in_masks(0), step.out_masks(), step.in_shape(), step.params["padding_config"],
    strict=True,
  ):  # fmt: skip

    def left(k, ends, old=old, new=new, n=n):
      """Of k positions at an end, added or (negative) dropped, those that stay."""
      if k >= 0:
        return k if new is None else int(new[ends(k, len(new))].sum())
      return k if old is None else -int(old[ends(-k, n)].sum())

    start = left(low, lambda k, n: slice(0, k))
    end = left(high, lambda k, n: slice(n - k, n))
    config.append((start, end, inside))
  return step.bind(ins, padding_config=tuple(config))


def _slice(step, ins):
  x, p = ins[0], step.params
  strides = p["strides"] or (1,) * len(p["start_indices"])
  for axis, (mask, start, limit, stride) in enumerate(
    zip(step.in_masks(0), p["start_indices"], p["limit_indices"], strides, strict=True)
  ):
    positions = np.arange(start, limit, stride)
    if mask is not None:
      positions = (np.cumsum(mask) - 1)[positions[mask[positions]]]
    steps = np.unique(np.diff(positions))
    if len(positions) and len(steps) <= 1:
      by = int(steps[0]) if len(steps) else 1
      x = lax.slice_in_dim(x, int(positions[0]), int(positions[-1]) + 1, by, axis)
    else:
      x = jnp.take(x, positions, axis=axis)
  return [x]


def _split(step, ins):
  axis = step.params["axis"]
  sizes = tuple(step.out_shape(i)[axis] for i in range(len(step.outs)))
  return step.bind(ins, sizes=sizes)


def _dynamic_slice(step, ins):
  return step.bind(ins, slice_sizes=step.out_shape())


def _gather(step, ins):
  return step.bind(
    ins, slice_sizes=left_shape(step.params["slice_sizes"], step.in_masks(0))
  )


def _convolution(step, ins):
  lhs, rhs, _ = step.params["dimension_numbers"]
  counts = {}
  for name, axis in (("feature_group_count", lhs[1]), ("batch_group_count", lhs[0])):
    groups, mask = step.params[name], step.in_masks(0)[axis]
    if groups > 1 and mask is None:
      mask = step.in_masks(1)[rhs[0]]
      # Where the channels of each group go, the groups stay.
    if groups > 1 and mask is not None:
      counts[name] = int(mask.reshape(groups, -1).any(1).sum())
  if step.cut.convolution is None:
    return step.bind(ins, **counts)
  p = {**step.params, **counts}
  return [step.cut.convolution(*ins, **{name: p[name] for name in _CONVOLUTION})]


_CONVOLUTION = (
  "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers",
  "feature_group_count", "batch_group_count", "precision", "preferred_element_type",
)  # fmt: skip


RULES: dict[str, Callable] = {
  "broadcast_in_dim": _broadcast,
  "reshape": _reshape,
  "tile": _tile,
  "iota": _iota,
  "empty": _iota,
  "stack": _stack,
  "random_bits": _random_bits,
  "pad": _pad,
  "slice": _slice,
  "split": _split,
  "dynamic_slice": _dynamic_slice,
  "gather": _gather,
  "conv_general_dilated": _convolution,
}
