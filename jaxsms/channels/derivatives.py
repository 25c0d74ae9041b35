"""Custom derivatives (custom_jvp, custom_vjp), walked like any function."""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsms.channels.labels import FINITE, Axis
from jaxsms.channels.operations import inner_function, run_alone
from jaxsms.channels.values import Record, Value, Walk
from jaxsms.trees import is_floating, shape_of


class Derivative(NamedTuple):
  """The derivative of an operation, as walked functions.

  Attributes:
    records: of the jvp; or of the forward pass and of the backward pass.
    floating: which operands have a derivative.
    floating_outs: which results have one.
  """

  records: tuple[Record, ...]
  floating: list[bool]
  floating_outs: list[bool]

  def function(self, run: Callable, primal: Record) -> Callable:
    """The operation as a function with this derivative."""
    if len(self.records) == 1:
      return self._with_jvp(run, primal)
    return self._with_vjp(run, primal)

  def _with_jvp(self, run, primal):
    function = jax.custom_jvp(lambda *ins: run(primal, ins))

    def jvp(ins, tangents):
      outs = run(self.records[0], [*ins, *compress(tangents, self.floating)])
      n = len(self.floating_outs)
      return outs[:n], _filled(outs[n:], outs[:n], self.floating_outs)

    function.defjvp(jvp)
    return function

  def _with_vjp(self, run, primal):
    function = jax.custom_vjp(lambda *ins: run(primal, ins))
    n = len(self.floating_outs)

    def forward(*ins):
      outs = run(self.records[0], ins)
      return outs[:n], (outs[n:], ins)

    def backward(kept, cotangents):
      residuals, ins = kept
      some = compress(cotangents, self.floating_outs)
      grads = run(self.records[1], [*residuals, *some])
      return tuple(_filled(grads, ins, self.floating))

    function.defvjp(forward, backward)
    return function


def walk_derivative(
  walk: Walk, equation: Any, ins: Sequence[Value], outs: Sequence[Value]
) -> Derivative:
  """Walks the derivative that a custom_jvp or custom_vjp has."""
  avals = [shape_of(v.aval) for v in equation.invars]
  out_avals = [shape_of(v.aval) for v in equation.outvars]
  floating, floating_outs = [list(map(is_floating, some)) for some in (avals, out_avals)]
  jaxpr, _ = inner_function(equation)

  def function(*operands):  # with its own derivative
    return run_alone(jaxpr, equation, operands)

  if equation.primitive.name == "custom_jvp_call":
    records = _walk_jvp(walk, function, avals, floating, floating_outs, ins, outs)
  else:
    records = _walk_vjp(walk, function, avals, floating, floating_outs, ins, outs)
  return Derivative(records, floating, floating_outs)


def _walk_jvp(walk, function, avals, floating, floating_outs, ins, outs):
  def jvp(primals, some):
    tangents = _filled(some, primals, floating)
    out, out_tangents = jax.jvp(function, primals, tangents)
    return out, list(compress(out_tangents, floating_outs))

  closed = jax.make_jaxpr(jvp)(avals, list(compress(avals, floating)))
  # What is 0 whatever the parameters are has no tangent either.
  tangents = [
    v._replace(known=0.0 if v.known == 0 else None) for v in compress(ins, floating)
  ]
  record = walk.run(closed.jaxpr, closed.consts, [*ins, *tangents])
  _tie(walk, record.outs, [*outs, *compress(outs, floating_outs)])
  return (record,)


def _walk_vjp(walk, function, avals, floating, floating_outs, ins, outs):
  def forward(*primals):
    def of_floating(*some):
      rest = iter(some)
      return function(
        *(next(rest) if f else x for x, f in zip(primals, floating, strict=True))
      )

    return jax.vjp(of_floating, *compress(primals, floating))

  closed, (out_shapes, residuals) = jax.make_jaxpr(forward, return_shape=True)(*avals)
  first = walk.run(closed.jaxpr, closed.consts, ins)
  _tie(walk, first.outs[: len(outs)], outs)
  leaves, structure = jax.tree.flatten(residuals)

  def backward(leaves, some):
    pull_back = jax.tree.unflatten(structure, leaves)
    return pull_back(_filled(some, out_shapes, floating_outs))

  of_outs = list(compress(out_shapes, floating_outs))
  closed = jax.make_jaxpr(backward)(leaves, of_outs)
  cotangents = [_unknown(v) for v in compress(outs, floating_outs)]
  args = [*first.outs[len(outs) :], *cotangents]
  second = walk.run(closed.jaxpr, closed.consts, args)
  _tie(walk, second.outs, list(compress(ins, floating)))
  return first, second


def _filled(some, like, flags):
  """A tangent for each value: the given ones where its flag is set, else none."""
  rest = iter(some)
  return [
    next(rest) if flag else _no_tangent(x) for x, flag in zip(like, flags, strict=True)
  ]


def _tie(walk, values, others):
  for a, b in zip(values, others, strict=True):
    for one, other in zip(a.axes, b.axes, strict=True):
      walk.labels.tie(one, other)


def _unknown(value):
  """A value of the same labels, of which nothing else is known."""
  axes = tuple(
    Axis(a.labels, np.full_like(a.values, FINITE)) if isinstance(a, Axis) else a
    for a in value.axes
  )
  return Value(axes, layer=value.layer)


def _no_tangent(x):
  return np.zeros(np.shape(x), jax.dtypes.float0)
