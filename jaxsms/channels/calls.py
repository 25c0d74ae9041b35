"""Rules for operations that hold functions: jit, custom derivatives, loops, branches."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from jaxsms.channels.derivatives import walk_derivative
from jaxsms.channels.labels import Axis
from jaxsms.channels.operations import inner_function, opened
from jaxsms.channels.products import own_convolution, stacked_convolution
from jaxsms.channels.shapes import joined
from jaxsms.channels.values import Record, Value, Walk, common_number

# Operations that stand for the one function that they hold.
WITH_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")
CALLS = ("jit", "closed_call", "remat2", "custom_vmap_call", "composite", *WITH_DERIVATIVES)


def used(jaxpr: Any) -> list[bool]:
  """Which inputs of a function an operation or an output has."""
  found = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
  for equation in jaxpr.eqns:
    operands = equation.invars
    if equation.primitive.name == "jit":
      flags = used(opened(equation.params["jaxpr"])[0])
      operands = [v for v, flag in zip(operands, flags, strict=True) if flag]
    found |= {v for v in operands if not isinstance(v, Literal)}
  return [v in found for v in jaxpr.invars]


def own_operation(equation: Any) -> tuple[tuple, int] | None:
  """How an operation of `jaxsms.convolution` runs and its index, if this is one."""
  if not equation.primitive.name.startswith("custom_vjp_call"):
    return None
  jaxpr, _ = inner_function(equation)
  if len(jaxpr.eqns) != 1 or jaxpr.eqns[0].primitive.name != "custom_vmap_call":
    return None
  return getattr(jaxpr.eqns[0].params["rule"], "convolution", None)


def stacked_operation(equation: Any) -> tuple[tuple, int] | None:
  """The same of one that runs for several copies at once."""
  if equation.primitive.name != "custom_vmap_call":
    return None
  return getattr(equation.params["rule"], "stacked_convolution", None)


def call(walk: Walk, equation: Any, ins: list[Value]) -> Any:
  """What the function inside does."""
  own = own_operation(equation)
  if own:
    return own_convolution(walk, own[1], ins[-2:])
  stacked = stacked_operation(equation)
  if stacked:
    return stacked_convolution(walk, stacked[1], ins[-2:])
  record = walk.run(*inner_function(equation), ins)
  if not walk.derivatives or equation.primitive.name not in WITH_DERIVATIVES:
    return record.outs, (record,)
  # Those inside the derivative are followed as plain functions: some hold themselves.
  walk.derivatives = False
  derivative = walk_derivative(walk, equation, ins, record.outs)
  walk.derivatives = True
  return record.outs, (record, derivative)


def cond(walk: Walk, equation: Any, ins: list[Value]) -> Any:
  """All branches tie and freeze; a result is the worst of theirs."""
  records = [walk.run(*opened(b), ins[1:]) for b in equation.params["branches"]]
  outs = [_one_of(walk, values) for values in zip(*(r.outs for r in records), strict=True)]
  return outs, tuple(records)


def _one_of(walk, values):
  each = zip(*(v.axes for v in values), strict=True)
  layer = next((v.layer for v in values if v.layer), "")
  axes = tuple(joined(walk, a) for a in each)
  return Value(axes, common_number(values), layer=layer)


def _fixed_point(walk: Walk, carry: Sequence[Value], step: Callable) -> list[Value]:
  """Values that hold before every round of a loop: ties and values that only get worse."""
  carry = [v._replace(summed=None) for v in carry]
  while True:
    after = step(carry)
    merged = [_one_of(walk, pair) for pair in zip(carry, after, strict=True)]
    unchanged = all(_same(walk, old, new) for old, new in zip(carry, merged, strict=True))
    carry = merged
    if unchanged:
      return carry


def _same(walk, old, new):
  if old.known != new.known:
    return False
  for a, b in zip(old.axes, new.axes, strict=True):
    if isinstance(b, Axis) and not np.array_equal(
      walk.labels.values(a, b.labels), b.values
    ):
      return False
  return True


def split_operands(operands: list, first: int, second: int) -> tuple[list, list, list]:
  """Splits the operands of a loop into the `first`, the next `second` and the others."""
  end = first + second
  return operands[:first], operands[first:end], operands[end:]


def scan(walk: Walk, equation: Any, ins: list[Value]) -> Any:
  """Layers that share a body: what goes in one goes in all."""
  p = equation.params
  consts, carry, xs = split_operands(ins, p["num_consts"], p["num_carry"])
  for value in xs:
    walk.freeze(value, 0, "a scan runs along it")
  xs = [Value(tuple(v.axes[1:]), v.known, layer=v.layer) for v in xs]
  record: list[Record] = []

  def step(carry):
    record[:] = [walk.run(*opened(p["jaxpr"]), [*consts, *carry, *xs])]
    return record[0].outs[: p["num_carry"]]

  carry = _fixed_point(walk, carry, step)
  runs = walk.labels.fixed("a scan runs along it")
  ys = [v._replace(axes=(runs, *v.axes)) for v in record[0].outs[p["num_carry"] :]]
  return [*carry, *ys], (record[0],)


def while_(walk: Walk, equation: Any, ins: list[Value]) -> Any:
  """A loop whose values are tied from round to round."""
  p = equation.params
  of_cond, of_body, carry = split_operands(ins, p["cond_nconsts"], p["body_nconsts"])
  records: list[Record] = []

  def step(carry):
    test = walk.run(*opened(p["cond_jaxpr"]), [*of_cond, *carry])
    records[:] = [test, walk.run(*opened(p["body_jaxpr"]), [*of_body, *carry])]
    return records[1].outs

  return _fixed_point(walk, carry, step), tuple(records)


RULES = {**dict.fromkeys(CALLS, call), "cond": cond, "scan": scan, "while": while_}
