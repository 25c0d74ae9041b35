"""Rules for operations that look at all positions of an axis at once."""

import math
from typing import Any

import numpy as np

from jaxsms.channels.elementwise import several
from jaxsms.channels.labels import FINITE, ZERO, Axis
from jaxsms.channels.shapes import joined
from jaxsms.channels.values import Value, Walk, unknown

_KEEP_ZERO = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cummax",
              "cummin", "cumprod", "reduce_window_sum", "reduce_window_max",
              "reduce_window_min"}  # fmt: skip
_WORDS = {
  "reduce_max": "a maximum over it", "reduce_min": "a minimum over it",
  "reduce_prod": "a product over it", "argmax": "an argmax over it",
  "argmin": "an argmin over it", "sort": "it is sorted", "top_k": "a top_k over it",
}  # fmt: skip


def _words(equation):
  name = equation.primitive.name
  return _WORDS.get(name, f"{name} over it")


def _through(walk, equation, axis):
  """An axis that others are reduced beside."""
  axis = walk.labels.normal(axis)
  if isinstance(axis, Axis) and equation.primitive.name not in _KEEP_ZERO:
    return Axis(axis.labels, np.maximum(axis.values, FINITE))
  return axis


def reduce_sum(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """What goes adds nothing where it is 0."""
  (value,), shape = ins, equation.invars[0].aval.shape
  gone = equation.params["axes"]
  for i in gone:
    axis = walk.labels.normal(value.axes[i])
    if isinstance(axis, Axis):
      walk.labels.freeze(
        axis, _after("a sum over it, of numbers that are not 0", value), axis.values != ZERO
      )
  axes = tuple(a for i, a in enumerate(value.axes) if i not in gone)
  terms = tuple(value.axes[i] for i in gone) + (value.summed[0] if value.summed else ())
  n = math.prod(shape[i] for i in gone) * (value.summed[1] if value.summed else 1)
  return [Value(axes, summed=(terms, n) if n not in (0, 1) else None)]


def collective(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Over a named axis that vmap has made one of the arrays' own."""
  if not all(isinstance(i, int) for i in equation.params["axes"]):
    return unknown(walk, equation, ins)
  rule = reduce_sum if equation.primitive.name == "psum" else reduce
  return several(rule)(walk, equation, ins)


def reduce(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Maxima and the like: another set of positions, another result."""
  gone = equation.params.get("axes", equation.params.get("dimensions"))
  values = [v for v in ins if v.axes]
  for value in values:
    for i in gone:
      walk.freeze(value, i, _words(equation))
  axes = [joined(walk, [v.axes[i] for v in values]) for i in range(len(values[0].axes))]
  axes = [_through(walk, equation, a) for i, a in enumerate(axes) if i not in gone]
  return [Value(tuple(axes)) for _ in equation.outvars]


def along(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Sorts and cumulative sums along one axis, side by side along all others."""
  p, rank = equation.params, len(ins[0].axes)
  axis = p.get("axis", p.get("dimension", rank - 1))
  for value in ins:
    walk.freeze(value, axis % rank, _words(equation))
  axes = [joined(walk, [v.axes[i] for v in ins]) for i in range(rank)]
  axes = [_through(walk, equation, a) for a in axes]
  axes[axis % rank] = walk.labels.fixed(_words(equation))
  return [Value(tuple(axes)) for _ in equation.outvars]


def fft(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Over the last axes."""
  (value,) = ins
  axes, last = list(value.axes), len(equation.params["fft_lengths"])
  for i in range(len(axes) - last, len(axes)):
    walk.freeze(value, i, _words(equation))
    axes[i] = walk.labels.fixed(_words(equation))
  return [Value(tuple(axes))]


def window(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Pooling: an axis along which the window is one position wide passes."""
  p, values = equation.params, [v for v in ins if v.axes]
  rank = len(values[0].axes)
  ones, zeros = (1,) * rank, ((0, 0),) * rank
  how = zip(
    p.get("window_dimensions") or ones,
    p.get("window_strides") or ones,
    p.get("padding") or zeros,
    p.get("base_dilation") or ones,
    strict=True,
  )
  axes = []
  for i, (size, stride, low_high, base) in enumerate(how):
    if (size, stride, tuple(low_high), base) == (1, 1, (0, 0), 1):
      axes.append(_through(walk, equation, joined(walk, [v.axes[i] for v in values])))
      continue
    for value in values:
      walk.freeze(value, i, "a window moves along it")
    axes.append(walk.labels.fixed("a window moves along it"))
  return [Value(tuple(axes)) for _ in equation.outvars]


def _after(doing, value):
  return f"{doing}, after {value.layer}" if value.layer else doing


RULES = {
  "reduce_sum": reduce_sum,
  **{
    name: reduce
    for name in ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
                 "reduce_xor", "argmax", "argmin", "reduce")
  },
  **{
    name: along
    for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "top_k")
  },
  **{
    name: window
    for name in ("reduce_window", "reduce_window_sum", "reduce_window_max",
                 "reduce_window_min", "select_and_gather_add")
  },
  "fft": fft,
  **dict.fromkeys(("psum", "pmax", "pmin"), collective),
}  # fmt: skip
