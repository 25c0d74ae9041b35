"""Rules for operations that work position by position."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsms.channels.labels import BROKEN, FINITE, ZERO, Axis
from jaxsms.channels.values import Value, Walk, reason, unknown

# f(0) = 0.
_KEEP_ZERO = (
  "neg", "sign", "floor", "ceil", "round", "sin", "tan", "asin", "atan", "sinh",
  "tanh", "asinh", "atanh", "expm1", "log1p", "sqrt", "cbrt", "abs", "erf", "erf_inv",
  "square", "real", "imag", "conj", "convert_element_type", "reduce_precision", "copy",
  "stop_gradient", "optimization_barrier", "sharding_constraint", "device_put", "pvary",
  "reshard", "population_count", "bessel_i1e", "name", "layout_constraint", "to_edtype",
  "from_edtype",
)  # fmt: skip
# f(0) is some number.
_MOVE_ZERO = (
  "exp", "exp2", "cos", "cosh", "acos", "acosh", "logistic", "erfc", "not",
  "is_finite", "bessel_i0e", "clz",
)  # fmt: skip
# f(0) is infinite.
_BREAK_ZERO = (
  "log", "rsqrt", "digamma", "lgamma",
)  # fmt: skip
# f(0, ..., 0) = 0.
_ALL_ZERO = (
  "add", "sub", "add_any", "max", "min", "or", "xor", "atan2", "shift_left",
  "shift_right_logical", "shift_right_arithmetic",
)  # fmt: skip
_NUMBERS = (
  "eq", "ne", "lt", "le", "gt", "ge", "eq_to", "le_to", "lt_to", "nextafter", "complex",
  "igamma", "igammac", "igamma_grad_a", "regularized_incomplete_beta", "zeta", "polygamma",
  "mulhi",
)  # fmt: skip


def elementwise(combine: Callable[..., Any]) -> Callable:
  """A rule for an operation that works position by position.

  Args:
    combine: (equation, operands, a function that gives the values of each operand along an
      axis) -> values of the result along that axis.
  """

  def rule(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
    shape = equation.outvars[0].aval.shape
    shapes = [v.aval.shape for v in equation.invars]
    axes = []
    for i, n in enumerate(shape):
      there = [k for k, s in enumerate(shapes) if len(s) == len(shape) and s[i] == n]
      for k, value in enumerate(ins):
        if value.axes and k not in there:
          walk.freeze(value, i, f"{equation.primitive.name} of a single position")
      axes.append(_tied(walk, equation, ins, there, i, combine))
    mean_of_sum(walk, equation, ins)
    name = equation.primitive.name
    summed = ins[0].summed if name in ("convert_element_type", "copy") else None
    return [Value(tuple(axes), _folded(name, ins), summed)]

  return rule


def _tied(walk, equation, ins, there, i, combine):
  labels = walk.labels
  first = ins[there[0]].axes[i]
  for k in there[1:]:
    labels.tie(first, ins[k].axes[i])
  axis = labels.normal(first)
  if not isinstance(axis, Axis):
    return axis
  each = [
    labels.values(v.axes[i], axis.labels)
    if k in there
    else np.uint8(ZERO if v.known == 0 else FINITE)
    for k, v in enumerate(ins)
  ]
  values = np.broadcast_to(combine(equation, ins, each), axis.labels.shape)
  return Axis(axis.labels, values.astype(np.uint8))


def _folded(name: str, ins: Sequence[Value]) -> float | None:
  known = [v.known for v in ins]
  if None in known:
    return None
  if name in _FOLD:
    with np.errstate(all="ignore"):
      return float(_FOLD[name](*known))
  return None


_FOLD: dict[str, Callable[..., Any]] = {
  "convert_element_type": float, "copy": float, "stop_gradient": float, "neg": np.negative,
  "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
  "max": np.maximum, "min": np.minimum, "sqrt": np.sqrt,
  "square": np.square,
}  # fmt: skip


def mean_of_sum(walk: Walk, equation: Any, ins: Sequence[Value]) -> None:
  """A sum divided by the number of its terms is a mean: other terms, another mean.

  It would stay what it is, as removed terms are 0; but the function as its author would
  write it for the smaller size divides by fewer.
  """
  if equation.primitive.name not in ("mul", "div"):
    return
  for value, other in (ins, ins[::-1]):
    if value.summed and other.known:
      axes, n = value.summed
      if any(np.isclose(other.known, x, rtol=1e-4) for x in (n, n - 1, 1 / n)):
        for axis in axes:
          walk.labels.freeze(axis, reason("a mean over it", value))


def _worst(values):
  return np.maximum.reduce(np.broadcast_arrays(*values))


def _keep(equation, ins, values):
  return values[0]


def _move(equation, ins, values):
  return np.maximum(values[0], FINITE)


def _mark_broken(equation, ins, values):
  return np.where(values[0] == ZERO, BROKEN, values[0])


def _all_zero(equation, ins, values):
  out, name = _worst(values), equation.primitive.name
  known = [v.known for v in ins]
  for i, c in enumerate(known):
    keeps = (name == "max" and c is not None and c <= 0) or (
      name == "min" and c is not None and c >= 0
    )
    if keeps:
      out = np.where(values[1 - i] == ZERO, ZERO, out)
  return out


def _mul(equation, ins, values):
  some = np.minimum.reduce(np.broadcast_arrays(*values)) == ZERO
  worst = _worst(values)
  return np.where(some & (worst < BROKEN), ZERO, np.maximum(worst, FINITE))


def _div(equation, ins, values):
  a, b = np.broadcast_arrays(*values)
  return np.where((b == FINITE) & (a < BROKEN), a, BROKEN)


def _pow(equation, ins, values):
  a, b = np.broadcast_arrays(*values)
  if ins[1].known is not None and ins[1].known > 0:
    return a
  return np.where(a == ZERO, BROKEN, np.maximum(_worst([a, b]), FINITE))


def _integer_pow(equation, ins, values):
  y = equation.params["y"]
  if y > 0:
    return values[0]
  return np.where(values[0] == ZERO, BROKEN if y else FINITE, values[0])


def _number(equation, ins, values):
  return np.maximum(_worst(values), FINITE)


def _select(equation, ins, values):
  return _worst(values[1:])


def _clamp(equation, ins, values):
  low, high = ins[0].known, ins[2].known
  inside = low is not None and high is not None and low <= 0 <= high
  return values[1] if inside else np.maximum(values[1], FINITE)


def bitcast(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Other numbers from the same bits, if their count does not change."""
  if equation.invars[0].aval.shape != equation.outvars[0].aval.shape:
    return unknown(walk, equation, ins)
  return elementwise(_keep)(walk, equation, ins)


RULES = {
  "bitcast_convert_type": bitcast,
  **{name: elementwise(_keep) for name in _KEEP_ZERO},
  **{name: elementwise(_move) for name in _MOVE_ZERO},
  **{name: elementwise(_mark_broken) for name in _BREAK_ZERO},
  **{name: elementwise(_all_zero) for name in _ALL_ZERO},
  **{name: elementwise(_number) for name in _NUMBERS},
  "mul": elementwise(_mul),
  "and": elementwise(_mul),
  "div": elementwise(_div),
  "rem": elementwise(_div),
  "pow": elementwise(_pow),
  "integer_pow": elementwise(_integer_pow),
  "select_n": elementwise(_select),
  "clamp": elementwise(_clamp),
}


def several(rule: Callable) -> Callable:
  """A rule for an operation that treats each of its operands alike."""

  def each(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
    outs = []
    for value, invar, outvar in zip(ins, equation.invars, equation.outvars, strict=True):
      outs += rule(walk, equation.replace(invars=[invar], outvars=[outvar]), [value])
    return outs

  return each


for _name in ("optimization_barrier", "device_put"):
  RULES[_name] = several(RULES["copy"])
