"""Single operations of a traced function: run alone, and the function that a call holds."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal


def run_alone(jaxpr: Any, equation: Any, ins: Sequence[Any]) -> list[Any]:
  """What one operation of a function gives for its operands; traceable."""
  pairs = zip(equation.invars, ins, strict=True)
  given = {v: x for v, x in pairs if not isinstance(v, Literal)}
  alone = jaxpr.replace(
    eqns=[equation], invars=list(given), outvars=list(equation.outvars), constvars=[]
  )
  return jax.core.eval_jaxpr(alone, (), *given.values())


def inner_function(equation: Any) -> tuple[Any, Sequence[Any]]:
  """The jaxpr that a call stands for, and its constants."""
  for name in ("call_jaxpr", "jaxpr", "call"):
    if name in equation.params:
      return opened(equation.params[name])
  raise KeyError(equation.primitive.name)


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """A closed or open jaxpr as a jaxpr and its constants."""
  return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())
