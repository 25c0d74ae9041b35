"""Random access to examples that stay on the host, and threads that read them ahead."""

import functools
import zlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from jaxsms.data.crops import as_array
from jaxsms.data.splits import integers


class Examples(Protocol):
  """Random access to images and labels, from several threads at once.

  Where a stream is to be resumed by another process, `repr` has to be the same there.
  """

  def __len__(self) -> int:
    """The number of examples."""

  def __getitem__(self, index: int) -> tuple[Any, int]:
    """A Pillow image or uint8 [height, width, channels], and its class."""


class ReadAhead(Protocol):
  """What has been read, in order."""

  def __next__(self) -> Any:
    """The next one."""

  def close(self) -> None:
    """Ends the threads."""


class ArrayExamples:
  """Images of one size in host memory.

  Example:
    >>> examples = jaxsms.data.ArrayExamples(np.zeros((3, 8, 8, 1), np.uint8), [7, 8, 9])
    >>> image, label = examples[1]
    >>> len(examples), image.shape, int(label)
    (3, (8, 8, 1), 8)
  """

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    """Wraps arrays; nothing is copied.

    Args:
      images: uint8 [n, height, width, channels].
      labels: int [n].

    Raises:
      ValueError: they are not images with a label each.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
      raise ValueError(
        f"images are {images.dtype} of shape {images.shape} and labels of shape "
        f"{labels.shape}: give uint8 [n, height, width, channels] and one label each"
      )
    self._images, self._labels = images, labels

  def __len__(self) -> int:
    """The number of examples."""
    return len(self._labels)

  def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
    """The image and the label at an index."""
    return self._images[index], self._labels[index]

  @functools.cached_property
  def _checksum(self) -> int:
    arrays = (np.ascontiguousarray(a) for a in (self._images, self._labels))
    return functools.reduce(lambda crc, array: zlib.crc32(array.data, crc), arrays, 0)

  def __repr__(self) -> str:
    """A text that is equal for equal arrays, in any process."""
    return f"ArrayExamples({self._images.shape}, {self._checksum:08x})"


def chosen(source: Examples, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
  """The indices to use, checked: int64 [n], all of the source for None."""
  n = len(source)
  if not n:
    raise ValueError(f"{source!r} holds no examples: give some")
  checked = np.arange(n) if indices is None else integers("indices", indices, n)
  return np.ascontiguousarray(checked, np.int64)


def read_example(
  source: Examples,
  index: int,
  transform: Callable[[Any], np.ndarray] | None,
  shape: tuple[int, ...] | None = None,
) -> tuple[np.ndarray, int]:
  """Reads and transforms one example.

  Args:
    source: where it is.
    index: of the example.
    transform: `f(image)`; None takes it as it is.
    shape: that it must have; None for any.

  Returns:
    (image uint8 [height, width, channels], label).

  Raises:
    ValueError: the image has another type or shape.
  """
  image, label = source[index]
  image = as_array(image if transform is None else transform(image))
  if image.dtype != np.uint8 or image.ndim != 3:
    raise ValueError(
      f"image {index} of {source!r} is {image.dtype} of shape {image.shape}: give uint8 "
      "[height, width, channels]"
    )
  if shape is not None and image.shape != shape:
    raise ValueError(
      f"{source!r} has images of shape {image.shape} and of shape {shape}: give a "
      "transform that makes them alike, such as random_resized_crop"
    )
  return image, label


class _Reads:
  """What a function gives for each position, as grain's data sources do."""

  def __init__(self, read: Callable[[int], Any], count: int):
    self._read, self._count = read, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, position: int) -> Any:
    return self._read(position)


def read_ahead(read: Callable[[int], Any], count: int, threads: int) -> ReadAhead:
  """An iterator over what a function reads, in order, that threads read ahead of it.

  Args:
    read: of a position, from 0 on, what is there, or None; from several threads at once.
    count: how many positions there are.
    threads: how many; 0 reads in line.

  Returns:
    grain's iterator.
  """
  g = grain()
  options = g.ReadOptions(num_threads=threads, prefetch_buffer_size=8 * threads)
  reads = g.MapDataset.source(_Reads(read, count))
  return iter(reads.to_iter_dataset(options, allow_nones=True))


def grain() -> ModuleType:
  """The module, or an ImportError that says what to install."""
  try:
    import grain
  except ImportError as error:
    raise ImportError(
      "streaming reads with grain, which is not installed: run `pip install 'jaxsms[data]'`"
    ) from error
  return grain
