"""The arguments of a call: those that a trace depends on, and those that may change."""

from collections.abc import Callable
from typing import Any

import jax

from jaxsms.trees import is_array, split_leaves


class Inputs:
  """Arguments of a call: arrays and floats move, all else is part of the function."""

  def __init__(self, args, kwargs):
    self.arrays, self._filled = split_leaves((args, kwargs), lambda path, x: _is_dynamic(x))
    flat, structure = jax.tree.flatten((args, kwargs))
    self.key = structure, tuple(_kind(x) if _is_dynamic(x) else (type(x), x) for x in flat)

  def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of params and of what moves alone."""

    def with_arrays(params, *arrays):
      args, kwargs = self._filled(arrays)
      return function(params, *args, **kwargs)

    return with_arrays


def _is_dynamic(x):
  return is_array(x) or isinstance(x, float)


def _kind(x):
  return (float,) if isinstance(x, float) else (x.shape, str(x.dtype))
