"""Every example once, in a fixed order, decoded on the host."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsms.data.examples import Examples, chosen, grain, read_ahead, read_example
from jaxsms.data.placement import place, process_block, spread
from jaxsms.data.splits import integer
from jaxsms.devices.meshes import DATA_AXIS


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
  indices: Sequence[int] | np.ndarray | None = None,
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

  Example:
    >>> images = np.zeros((3, 8, 8, 1), np.uint8)
    >>> source = jaxsms.data.ArrayExamples(images, np.array([7, 8, 9]))
    >>> for batch in jaxsms.data.evaluation_batches(source, batch_size=2, threads=0):
    ...   print(batch.labels.tolist(), batch.valid.tolist())
    [7, 8] [True, True]
    [9, 0] [True, False]
  """
  grain()
  batch_size = integer("batch_size", batch_size, 1)
  threads = integer("threads", threads, 0)
  used = chosen(source, indices)
  sharding = spread(mesh, (DATA_AXIS,), (batch_size,))
  rows = range(batch_size)[process_block(sharding, (batch_size,))[0]]
  starts = range(0, len(used), batch_size)
  wanted = [start + row for start in starts for row in rows]  # those here, in order
  shape = read_example(source, int(used[0]), transform)[0].shape

  def read(position):
    """An example that is evaluated here; None where a batch is to be filled up."""
    at = wanted[position]
    if at >= len(used):
      return None
    return read_example(source, int(used[at]), transform, shape)

  def batches():
    reads = read_ahead(read, len(wanted), threads)
    try:
      for _ in starts:
        images = np.zeros((len(rows), *shape), np.uint8)
        labels, valid = np.zeros(len(rows), np.int32), np.zeros(len(rows), bool)
        for row in range(len(rows)):
          example = next(reads)
          if example is not None:
            (images[row], labels[row]), valid[row] = example, True
        arrays = (place(x, sharding, (batch_size,)) for x in (images, labels, valid))
        yield EvaluationBatch(*arrays)
    finally:
      reads.close()

  return batches()
