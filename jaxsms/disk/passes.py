"""Passes over models on disk: block by block, in order, read by several threads."""

import collections
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

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


# Gives, of the entries of all models in a block, those of the result, in float32 or 64.
# They may lie in an array of the thread, and in none of the models'.
Combine = Callable[[Block, Sequence[np.ndarray]], np.ndarray]


class _Scratch(threading.local):
  """Arrays of this thread, used again and again: fresh memory takes longer than sums."""

  def __init__(self):
    self._arrays: dict[tuple[Any, np.dtype], np.ndarray] = {}

  def __call__(self, what: Any, count: int, dtype: np.dtype) -> np.ndarray:
    """An array [count] for one purpose, not initialized."""
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


def width(*dtypes: np.dtype) -> np.dtype:
  """What arrays of floating dtypes are worked with: float32, or float64 if one is that."""
  return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def read_float(model: Tensors, block: Block, out: np.ndarray) -> None:
  """Reads a block of floating values into an array of float32 or float64, [n]."""
  dtype = model.specs[block.name].dtype
  into = out if dtype == out.dtype else scratch("read", out.size, dtype)
  values = model.read(*block, into=into)
  if values is not out:
    out[...] = values


def read_stacked(models: Sequence[Tensors], block: Block) -> np.ndarray:
  """A block of all models, and a row for their average, in this thread's array [m + 1, n].

  Returns:
    Its last row holds anything.
  """
  dtype = width(*(model.specs[block.name].dtype for model in models))
  count, rows = block.stop - block.start, len(models) + 1
  stacked = scratch("stacked", rows * count, dtype).reshape(rows, count)
  for model, row in zip(models, stacked, strict=False):
    read_float(model, block, row)
  return stacked


def read_finite(model: Tensors, block: Block, what: Any) -> np.ndarray:
  """A block of floating values in float32 or float64, in this thread's array for `what`.

  Raises:
    ValueError: some are not finite.
  """
  dtype = width(model.specs[block.name].dtype)
  values = scratch((what, "finite"), block.stop - block.start, dtype)
  read_float(model, block, values)
  check_finite(model, block, values)
  return values


def has_finite_norm(values: np.ndarray) -> bool:
  """Whether the sum of the squares is finite: then they all are, and mostly it is."""
  return bool(np.isfinite(np.dot(values, values)))


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
    dtype = width(*(values[i].dtype for i, _ in taken))
    (first, weight), *others = taken
    total = scratch("total", values[first].size, dtype)
    np.multiply(values[first], weight.astype(dtype), out=total, dtype=dtype)
    term = scratch("term", total.size, dtype)
    for i, weight in others:
      total += np.multiply(values[i], weight.astype(dtype), out=term, dtype=dtype)
    return total

  return combine
