"""Passes over models on disk: block by block, in order, read by several threads."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsms.disk.tensors import Spec, Tensors

BLOCK = 2**18  # entries: those of a few models fit into a processor's cache


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


def as_float(values: np.ndarray) -> np.ndarray:
  """Floating values in float32, those of float64 as they are."""
  if values.dtype in (np.float32, np.float64):
    return values
  if values.dtype == jnp.bfloat16:  # its bits are the first of a float32
    wide = values.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
  return values.astype(np.float32)


def read_finite(model: Tensors, block: Block) -> np.ndarray:
  """A block of floating values as `as_float` gives them.

  Raises:
    ValueError: some are not finite.
  """
  values = as_float(model.read(*block))
  if not np.isfinite(values).all():
    raise ValueError(
      f"{model.path} has NaN or infinite values in {block.name}: leave it out, or train it "
      "to finite values"
    )
  return values


def weighted(weights: Sequence[float]) -> Combine:
  """The weighted sum of the models, one weight each; one of weight 0 is left out."""
  taken = [(i, np.float64(w)) for i, w in enumerate(weights) if w]

  def combine(block, values):
    dtype = np.result_type(*(values[i] for i, _ in taken))
    (first, weight), *others = taken
    total = np.multiply(values[first], weight.astype(dtype), dtype=dtype)
    term = np.empty_like(total)
    for i, weight in others:
      total += np.multiply(values[i], weight.astype(dtype), out=term, dtype=dtype)
    return total

  return combine
