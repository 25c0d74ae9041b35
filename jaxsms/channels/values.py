"""What is known of a value in a traced function, and the walk along its operations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from jaxsms.channels.labels import FINITE, ZERO, Axis, Fixed, Labels


class Value(NamedTuple):
  """What is known of one value.

  Attributes:
    axes: for each axis its labels, or that it stays.
    known: the number that all entries are, where that is known.
    summed: the axes (and their size) that were summed to get it.
    layer: the leaf nearest to it, for messages.
  """

  axes: tuple[Axis | Fixed, ...]
  known: float | None = None
  summed: tuple[tuple[Axis, ...], int] | None = None
  layer: str = ""


class Record(NamedTuple):
  """A walked function.

  Attributes:
    jaxpr: of the function.
    consts: its constants.
    values: of its variables.
    inner: the walked functions inside an operation, by its index.
    outs: values of its outputs.
  """

  jaxpr: Any
  consts: Sequence[Any]
  values: dict[Any, Value]
  inner: dict[int, tuple["Record", ...]]
  outs: list[Value]


class Walk:
  """Follows labels through a traced function."""

  def __init__(self, rules: dict[str, Callable], derivatives: bool):
    self.labels = Labels()
    self.derivatives = derivatives  # whether those of one's own are followed too
    self._rules = rules

  def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Value]) -> Record:
    """Walks a jaxpr from the values of its inputs."""
    values = dict(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    inner = {}

    def read(variable):
      if isinstance(variable, Literal):
        if shape := np.shape(variable.val):
          return self.stays(shape, "it meets a constant")
        return self.constant(variable.val)
      return values[variable]

    for index, equation in enumerate(jaxpr.eqns):
      ins = [read(v) for v in equation.invars]
      rule = self._rules.get(equation.primitive.name, unknown)
      outs = rule(self, equation, ins)
      if isinstance(outs, tuple):
        outs, inner[index] = outs
      layer = next((v.layer for v in ins if v.layer), "")
      for variable, out in zip(equation.outvars, outs, strict=True):
        values[variable] = out if out.layer else out._replace(layer=layer)
    return Record(jaxpr, consts, values, inner, [read(v) for v in jaxpr.outvars])

  def constant(self, array: Any) -> Value:
    """The value of a constant: any of its positions may go."""
    known = _the_number(array)
    shape = np.shape(array)
    return Value(tuple(self.fresh(n, known) for n in shape), known)

  def fresh(self, n: int, known: float | None = None) -> Axis | Fixed:
    """An axis of its own labels, of a value that is all one number if that is known."""
    return self.labels.fresh(n, ZERO if known == 0 else FINITE)

  def stays(self, shape: Sequence[int], text: str) -> Value:
    """A value all of whose positions stay."""
    return Value((self.labels.fixed(text),) * len(shape))

  def freeze(self, value: Value, axis: int, doing: str) -> None:
    """Positions along an axis of a value stay, for what an operation is doing there."""
    self.labels.freeze(value.axes[axis], reason(doing, value))


def reason(doing: str, value: Value) -> str:
  """Words for why something stays."""
  return f"{doing} after {value.layer}" if value.layer else doing


def common_number(values: Sequence[Value]) -> float | None:
  """The number that all entries of several values are known to be, if there is one."""
  known = {value.known for value in values}
  return known.pop() if len(known) == 1 else None


def unknown(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """The rule for an operation that has none: all that it touches stays."""
  doing = f"{equation.primitive.name} cannot be followed"
  for value in ins:
    for axis in range(len(value.axes)):
      walk.freeze(value, axis, doing)
  layer = next((v for v in ins if v.layer), Value(()))
  return [
    walk.stays(getattr(v.aval, "shape", ()), reason(doing, layer)) for v in equation.outvars
  ]


def _the_number(array: Any) -> float | None:
  """The number that all entries of a constant are, if it is one."""
  try:
    if np.size(array) == 0 or np.size(array) > 2**20:
      return None
    array = np.asarray(array)
    first = array.reshape(-1)[0]
    return float(first) if array.dtype != object and (array == first).all() else None
  except (TypeError, ValueError):  # keys, and numbers that are not real
    return None
