"""Runs a walked function on the positions that stay."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Literal

from jaxsms import convolution
from jaxsms.channels import smaller
from jaxsms.channels.arrays import left_shape, take
from jaxsms.channels.calls import CALLS, own_operation, split_operands, stacked_operation
from jaxsms.channels.labels import Axis, Fixed
from jaxsms.channels.operations import run_alone
from jaxsms.channels.values import Record, Value, Walk
from jaxsms.compat import jaxprs_in_params
from jaxsms.nn.lowerings import vary_alike, varying


class Cut:
  """Which labels go, and what that leaves of an axis.

  Attributes:
    gone: bool for each label.
    convolution: what runs plain convolutions, with the signature of
      `jax.lax.conv_general_dilated`; None leaves them as they are.
  """

  def __init__(
    self, walk: Walk, gone: np.ndarray, convolution: Callable[..., jax.Array] | None = None
  ):
    self._labels, self.gone, self.convolution = walk.labels, gone, convolution
    self._kept: dict[int, tuple[Axis, np.ndarray | None]] = {}

  def kept(self, axis: Axis | Fixed) -> np.ndarray | None:
    """bool [n], which positions stay; None where all do."""
    if isinstance(axis, Fixed):
      return None
    if id(axis) not in self._kept:
      normal = self._labels.normal(axis)
      mask = None
      if isinstance(normal, Axis):
        gone = self.gone[normal.labels].any(0)
        mask = ~gone if gone.any() else None
      self._kept[id(axis)] = axis, mask
    return self._kept[id(axis)][1]

  def masks(self, value: Value) -> list[np.ndarray | None]:
    """For each axis of a value, which positions stay."""
    return [self.kept(axis) for axis in value.axes]

  def touches(self, value: Value) -> bool:
    """Whether a value has positions that go."""
    return any(self.kept(axis) is not None for axis in value.axes)

  def shape(self, value: Value, full: Sequence[int]) -> tuple[int, ...]:
    """The shape that is left."""
    return left_shape(full, self.masks(value))


def evaluate(cut: Cut, record: Record, args: Sequence[Any]) -> list[Any]:
  """The outputs of a walked function, from the positions of its inputs that stay."""
  jaxpr, known = record.jaxpr, record.values
  env = dict(zip(jaxpr.invars, args, strict=True))
  for variable, const in zip(jaxpr.constvars, record.consts, strict=True):
    env[variable] = take(const, cut.masks(known[variable]))

  def read(variable):
    return variable.val if isinstance(variable, Literal) else env[variable]

  for index, equation in enumerate(jaxpr.eqns):
    ins = [read(v) for v in equation.invars]
    values = [None if isinstance(v, Literal) else known[v] for v in equation.invars]
    out_values = [known[v] for v in equation.outvars]
    # Inside shard_map a trace from outside has no place for what varies over the mesh.
    alike = vary_alike(*ins) if len(ins) > 1 else ins
    varies = any(map(_varies, alike))
    ins = alike if varies else ins
    other = varies or (cut.convolution and _has_convolution(equation))
    if other or any(v is not None and cut.touches(v) for v in values + out_values):
      step = smaller.Step(cut, equation, values, out_values, record.inner.get(index, ()))
      with layer_scope(equation):
        outs = _RULES.get(equation.primitive.name, smaller.same)(step, ins)
    else:
      outs = run_alone(jaxpr, equation, ins)
    env |= zip(equation.outvars, outs, strict=True)
  return [read(v) for v in jaxpr.outvars]


def layer_scope(equation: Any) -> AbstractContextManager:
  """What is evaluated inside carries the layer's name, as the operation does."""
  name = str(equation.source_info.name_stack)
  return jax.named_scope(name) if name else nullcontext()


def _varies(x):
  return not isinstance(x, np.generic | float | int) and varying(x)


def _has_convolution(equation):
  """Whether there is a plain convolution in an operation that this room can run."""
  if equation.primitive.name == "conv_general_dilated":
    return True
  if equation.primitive.name not in _RULES or own_operation(equation):
    return False
  return any(
    _has_convolution(inner)
    for jaxpr in jaxprs_in_params(equation.params)
    for inner in jaxpr.eqns
  )


def _call(step, ins):
  own = own_operation(step.equation)
  if own:
    how, index = own
    return [convolution.OPERATIONS[index](how, *ins[-2:])]  # constants come first
  own = stacked_operation(step.equation)
  if own:
    how, index = own
    return [_stacked(functools.partial(convolution.OPERATIONS[index], how), *ins[-2:])]
  if len(step.inner) > 1:
    primal, derivative = step.inner
    return derivative.function(functools.partial(evaluate, step.cut), primal)(*ins)
  return evaluate(step.cut, step.inner[0], ins)


def _stacked(operation, a, b):
  """[m, ...] of operands each of which has m copies or, shared, one."""
  if len(a) == len(b) == 1:
    return operation(a[0], b[0])[None]
  axes = tuple(0 if len(x) > 1 else None for x in (a, b))
  a, b = (x if axis == 0 else x[0] for x, axis in zip((a, b), axes, strict=True))
  return jax.vmap(operation, axes)(a, b)


def _remat(step, ins):
  run = functools.partial(evaluate, step.cut, step.inner[0])
  options = {"prevent_cse": step.params["prevent_cse"], "policy": step.params["policy"]}
  return jax.checkpoint(lambda *args: run(args), **options)(*ins)


def _cond(step, ins):
  branches = [
    lambda *args, record=record: evaluate(step.cut, record, args) for record in step.inner
  ]
  platforms = step.params.get("branches_platforms")
  if platforms is None:
    return lax.switch(ins[0], branches, *ins[1:])
  ways = {
    name: branch
    for names, branch in zip(platforms, branches, strict=True)
    for name in names or ("default",)
  }
  return lax.platform_dependent(*ins[1:], **ways)


def _scan(step, ins):
  p = step.params
  consts, carry, xs = split_operands(ins, p["num_consts"], p["num_carry"])

  def body(carry, xs):
    outs = evaluate(step.cut, step.inner[0], [*consts, *carry, *xs])
    return outs[: len(carry)], outs[len(carry) :]

  carry, ys = lax.scan(body, carry, xs, p["length"], p["reverse"], p["unroll"])
  return [*carry, *ys]


def _while(step, ins):
  p, (test, body) = step.params, step.inner
  of_test, of_body, carry = split_operands(ins, p["cond_nconsts"], p["body_nconsts"])
  return lax.while_loop(
    lambda carry: evaluate(step.cut, test, [*of_test, *carry])[0],
    lambda carry: evaluate(step.cut, body, [*of_body, *carry]),
    carry,
  )


_RULES: dict[str, Callable] = {
  **smaller.RULES,
  **dict.fromkeys(CALLS, _call),
  "remat2": _remat,
  "cond": _cond,
  "scan": _scan,
  "while": _while,
}
