"""Every example once, in a fixed order, decoded on the host."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsms.data.examples import Examples, chosen, grain, read_ahead, read_example
from jaxsms.data.placement import place, process_block, spread
from jaxsms.data.splits import integer
from jaxsms.meshes import DATA_AXIS


class EvaluationBatch(NamedTuple):
  """Examples in their fixed order.

  Attributes:
    images: uint8 [batch, height, width, channels].
    labels: int32 [batch].
    valid: bool [batch], False for what fills up the last batch.
  """

  images: jax.Array
  labels: jax.Array
  valid: jax.Array


def evaluation_batches(
  source: Examples,
  transform: Callable[[Any], np.ndarray] | None = None,
  *,
  batch_size: int,
  indices: Sequence[int] | None = None,
  mesh: Mesh | None = None,
  threads: int = 16,
) -> Iterator[EvaluationBatch]:
  """Streams every example once, in order.

  Args:
    source: random access to the examples, such as `TfdsExamples`.
    transform: `f(image) -> uint8 [height, width, channels]`, all of one shape, such as
      `resize_centre_crop`; None takes images as they are.
    batch_size: examples at a time; the last batch is filled up with zeros.
    indices: int [n], the examples to use, in this order; None for all.
    mesh: None for one device, else as `jaxsms.make_mesh` gives: the batch is spread over
      "data", and all copies share it.
    threads: how many read and decode; 0 does it in line.

  Returns:
    An iterator over `EvaluationBatch`.

  Raises:
    ValueError: an argument is out of its range, or the first example is no image.
    ImportError: grain is not installed.
  """
  grain()
  batch_size = integer("batch_size", batch_size, 1)
  threads = integer("threads", threads, 0)
  indices = chosen(source, indices)
  sharding = spread(mesh, (DATA_AXIS,), (batch_size,))
  rows = range(batch_size)[process_block(sharding, (batch_size,))[0]]
  shape = read_example(source, int(indices[0]), transform)[0].shape
  return _batches(source, transform, indices, batch_size, rows, shape, sharding, threads)


def _batches(source, transform, indices, batch_size, rows, shape, sharding, threads):
  starts = range(0, len(indices), batch_size)
  wanted = [start + row for start in starts for row in rows]
  reads = read_ahead(_Reads(source, transform, indices, wanted, shape), threads)
  try:
    for _ in starts:
      images = np.zeros((len(rows), *shape), np.uint8)
      labels, valid = np.zeros(len(rows), np.int32), np.zeros(len(rows), bool)
      for at in range(len(rows)):
        example = next(reads)
        if example is not None:
          (images[at], labels[at]), valid[at] = example, True
      arrays = (place(x, sharding, (batch_size,)) for x in (images, labels, valid))
      yield EvaluationBatch(*arrays)
  finally:
    reads.close()


class _Reads:
  """Examples that one process evaluates; None where a batch is to be filled up."""

  def __init__(self, source, transform, indices, wanted, shape):
    self._source, self._transform, self._shape = source, transform, shape
    self._indices, self._wanted = indices, wanted

  def __len__(self):
    return len(self._wanted)

  def __getitem__(self, position):
    at = self._wanted[position]
    if at >= len(self._indices):
      return None
    return read_example(self._source, int(self._indices[at]), self._transform, self._shape)
