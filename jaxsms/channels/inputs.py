"""Arguments of a call, told apart: what a trace depends on and what moves."""

from collections.abc import Callable
from typing import Any

import jax

from jaxsms.trees import is_array


class Inputs:
  """Arguments of a call: arrays and floats move, all else is part of the function."""

  def __init__(self, args, kwargs):
    self._flat, self._structure = jax.tree.flatten((args, kwargs))
    self._moving = [
      i for i, x in enumerate(self._flat) if is_array(x) or isinstance(x, float)
    ]
    self.arrays = [self._flat[i] for i in self._moving]
    kinds = [
      _kind(x) if i in self._moving else (type(x), x) for i, x in enumerate(self._flat)
    ]
    self.key = self._structure, tuple(kinds)

  def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of params and of what moves alone."""

    def with_arrays(params, *arrays):
      flat = list(self._flat)
      for i, x in zip(self._moving, arrays, strict=True):
        flat[i] = x
      args, kwargs = jax.tree.unflatten(self._structure, flat)
      return function(params, *args, **kwargs)

    return with_arrays


def _kind(x):
  return (float,) if isinstance(x, float) else (x.shape, str(x.dtype))
