"""Passes over models on disk: block by block, in order, read by several threads."""

import collections
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsms.disk.tensors import Spec, Tensors

BLOCK = 2**17  # entries: those of a few models fit into a processor's cache


class Block(NamedTuple):
  """A part of an array.

  Attributes:
    name: of the array.
    start: its first entry, in row-major order.
    stop: the one after its last.
  """

  name: str
  start: int
  stop: int


# Gives, of the entries of all models in a block, those of the result; in float32 or 64.
Combine = Callable[[Block, list[np.ndarray]], np.ndarray]


class _Scratch(threading.local):
  """Arrays of this thread, used again and again: fresh memory takes longer than sums."""

  def __init__(self):
    self._arrays: dict[tuple[Any, np.dtype], np.ndarray] = {}

  def __call__(self, what: Any, count: int, dtype: np.dtype) -> np.ndarray:
    """An array [count] for one purpose, with whatever it held."""
    key = what, np.dtype(dtype)
    if key not in self._arrays or self._arrays[key].size < count:
      self._arrays[key] = np.empty([max(count, BLOCK)], dtype)
    return self._arrays[key][:count]


scratch = _Scratch()


def blocks_of(specs: dict[str, Spec], names: Iterable[str]) -> Iterator[Block]:
  """The arrays in parts; an empty array is one empty part."""
  for name in names:
    size = specs[name].size
    for start in range(0, max(size, 1), BLOCK):
      yield Block(name, start, min(start + BLOCK, size))


def in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
  """What a function gives for each item, in their order, from several threads.

  Only a few results wait at a time, so that memory does not grow.
  """
  threads = min(4, os.cpu_count() or 1)
  waiting: collections.deque = collections.deque()
  with ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def as_float(values: np.ndarray, what: Any = None) -> np.ndarray:
  """Floating values in float32, those of float64 as they are.

  Args:
    values: [n].
    what: of this thread's arrays, that to use; None takes a new one.
  """
  if values.dtype in (np.float32, np.float64):
    return values
  if what is None:
    wide = np.empty(values.shape, np.float32)
  else:
    wide = scratch((what, "wide"), values.size, np.dtype(np.float32))
  if values.dtype == jnp.bfloat16:  # its bits are the first of a float32
    np.left_shift(values.view(np.uint16), 16, out=wide.view(np.uint32), dtype=np.uint32)
  else:
    wide[...] = values
  return wide


def read_float(model: Tensors, block: Block, what: Any) -> np.ndarray:
  """A block of floating values as `as_float` gives them, in this thread's array."""
  into = scratch((what, "read"), block.stop - block.start, model.specs[block.name].dtype)
  return as_float(model.read(*block, into=into), what)


def read_finite(model: Tensors, block: Block, what: Any) -> np.ndarray:
  """The same, looked at.

  Raises:
    ValueError: some are not finite.
  """
  values = read_float(model, block, what)
  check_finite(model, block, values)
  return values


def check_finite(model: Tensors, block: Block, values: np.ndarray) -> None:
  """Raises ValueError where values of a model are not finite."""
  if not np.isfinite(values).all():
    raise ValueError(
      f"{model.path} has NaN or infinite values in {block.name}: leave it out, or train it "
      "to finite values"
    )


def weighted(weights: Sequence[float] | np.ndarray) -> Combine:
  """The weighted sum of the models, one weight each; one of weight 0 is left out."""
  taken = [(i, np.float64(w)) for i, w in enumerate(weights) if w]

  def combine(block, values):
    dtype = np.result_type(*(values[i] for i, _ in taken))
    (first, weight), *others = taken
    total = np.empty(values[first].shape, dtype)
    np.multiply(values[first], weight.astype(dtype), out=total, dtype=dtype)
    term = scratch("term", total.size, dtype)
    for i, weight in others:
      total += np.multiply(values[i], weight.astype(dtype), out=term, dtype=dtype)
    return total

  return combine
