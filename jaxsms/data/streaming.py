"""Batches for every copy, decoded on the host while the device trains.

For data sets too large for the device. Which example a copy sees in a step, and how it is
cropped, depends only on the phase's key, the copy's seed and the step. It does not depend
on the number of copies, the length of the chunks, the processes, or where it was resumed.
"""

import concurrent.futures
import functools
import itertools
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jaxsms.data.examples import (
  Examples,
  ReadAhead,
  chosen,
  grain,
  read_ahead,
  read_example,
)
from jaxsms.data.placement import place, process_block, spread
from jaxsms.data.splits import integer, integers
from jaxsms.devices.meshes import DATA_AXIS, INGREDIENT_AXIS

ORDER, CROP = 0, 1  # independent streams of one copy's key and seed
Transform = Callable[[np.random.Generator, Any], np.ndarray]


class Batches(NamedTuple):
  """Some steps' batches of all copies, on the device.

  After the `taken` steps, and after a copy's own number of steps, all entries are 0.

  Attributes:
    images: uint8 [m, chunk_steps, batch, height, width, channels].
    labels: int32 [m, chunk_steps, batch].
    step: the first step.
    taken: how many steps there are, up to the end of the epoch at most.
  """

  images: jax.Array
  labels: jax.Array
  step: int
  taken: int


class StreamState(TypedDict):
  """Where a stream is.

  Attributes:
    step: the next one.
    stream: which batches it gives.
  """

  step: int
  stream: str


class Stream:
  """An iterator over `Batches` that goes on from any step; made by `stream`.

  Example:
    >>> source = jaxsms.data.ArrayExamples(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4))
    >>> batches = jaxsms.data.stream(source, jax.random.key(0), seeds=[0], batch_size=2,
    ...                              steps=[3], chunk_steps=1, threads=0)
    >>> [chunk.step for chunk in batches]
    [0, 1, 2]
  """

  def __init__(
    self, plan: "_Plan", chunk_steps: int, sharding: Sharding | None, threads: int
  ):
    """See `stream`."""
    self._plan = plan
    self._chunk_steps = chunk_steps
    self._sharding = sharding
    self._threads = threads
    self._step = 0
    self._reads: ReadAhead | None = None
    self._ahead: concurrent.futures.Future[Batches] | None = None
    self._worker = concurrent.futures.ThreadPoolExecutor(1, "jaxsms-stream")

  def __iter__(self) -> "Stream":
    """Itself."""
    return self

  def __next__(self) -> Batches:
    """The next steps, of one epoch; those after it are under way from then on."""
    if self._step >= self._plan.total:
      self.close()
      raise StopIteration
    try:
      batches = (self._ahead or self._start(self._step)).result()
    except BaseException:
      self.close()
      raise
    self._step += batches.taken
    self._ahead = self._start(self._step) if self._step < self._plan.total else None
    return batches

  def get_state(self) -> StreamState:
    """Where the stream is, for `set_state`: a small dict that JSON can hold."""
    return {"step": self._step, "stream": self._plan.identity()}

  def set_state(self, state: StreamState) -> None:
    """Goes to another step, forwards or backwards.

    Args:
      state: what `get_state` gave, here or in another process; chunks, threads, mesh and
        processes may differ.

    Raises:
      ValueError: it is the state of a stream of other batches, or of none.

    Example:
      >>> source = jaxsms.data.ArrayExamples(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4))
      >>> batches = jaxsms.data.stream(source, jax.random.key(0), seeds=[0], batch_size=2,
      ...                              steps=[3], chunk_steps=1, threads=0)
      >>> state, first, second = batches.get_state(), next(batches), next(batches)
      >>> batches.set_state(state)
      >>> first.step, second.step, next(batches).step
      (0, 1, 0)
    """
    identity = self._plan.identity()
    if not isinstance(state, dict) or set(state) != {"step", "stream"}:
      raise ValueError(f"state is {state!r}: give what get_state gave")
    if state["stream"] != identity:
      raise ValueError(
        f"the state belongs to {state['stream']} and this is {identity}: give the "
        "state of a stream of the same data, key, seeds and batch size"
      )
    step = integer("the state's step", state["step"], 0)
    if step > self._plan.total:
      raise ValueError(
        f"the state's step is {step} of a stream of {self._plan.total} steps: give at "
        "most that"
      )
    if self._ahead is not None:
      concurrent.futures.wait([self._ahead])
    if self._reads is not None:
      self._reads.close()
    self._step, self._ahead, self._reads = step, None, None

  def close(self) -> None:
    """Ends the threads; what has been read ahead is lost."""
    if self._reads is not None:
      self._reads.close()
    self._worker.shutdown(cancel_futures=True)
    self._ahead = None

  def _start(self, step: int) -> concurrent.futures.Future[Batches]:
    if self._reads is None:
      plan = self._plan
      count = (plan.total - step) * len(plan.copies) * len(plan.rows)
      self._reads = read_ahead(_reader(plan, step), count, self._threads)
    try:
      return self._worker.submit(self._read, self._reads, step)
    except RuntimeError:
      raise ValueError("the stream is closed: make another") from None

  def _read(self, reads: ReadAhead, step: int) -> Batches:
    """The batches from a step on; in one thread, and in the order of the steps."""
    plan = self._plan
    taken = min(
      self._chunk_steps, plan.per_epoch - step % plan.per_epoch, plan.total - step
    )
    local = (len(plan.copies), self._chunk_steps, len(plan.rows))
    images = np.zeros((*local, *plan.image_shape), np.uint8)
    labels = np.zeros(local, np.int32)
    ranges = (range(taken), range(local[0]), range(local[2]))
    for at, copy, row in itertools.product(*ranges):
      example = next(reads)
      if example is not None:
        images[copy, at, row], labels[copy, at, row] = example
    shape = (len(plan.seeds), self._chunk_steps, plan.batch_size)
    return Batches(
      place(images, self._sharding, shape),
      place(labels, self._sharding, shape),
      step,
      taken,
    )


def stream(
  source: Examples,
  key: jax.Array,
  seeds: Sequence[int] | np.ndarray,
  *,
  batch_size: int,
  steps: Sequence[int] | np.ndarray,
  chunk_steps: int,
  transform: Transform | None = None,
  indices: Sequence[int] | np.ndarray | None = None,
  mesh: Mesh | None = None,
  copies: slice | None = None,
  batch_part: slice | None = None,
  threads: int = 16,
) -> Stream:
  """Streams training batches to all copies, one chunk ahead of the training.

  Each copy has its own order of the examples in every epoch, and drops those that fill no
  whole batch. An example is decoded once for each copy: m copies cost m times the reading
  and decoding of one.

  Args:
    source: random access to the examples, such as `TfdsExamples`.
    key: of the phase; all copies share it.
    seeds: int [m], from 0 to 2^32 - 1; equal seeds see equal batches.
    batch_size: examples of one copy in a step.
    steps: int [m], how many each copy takes; nothing is read for it afterwards.
    chunk_steps: steps in a chunk; it ends early where the epoch does.
    transform: `f(generator, image) -> uint8 [height, width, channels]`, all of one shape,
      such as `random_resized_crop`; None takes images as they are.
    indices: int [n], the examples to use, as `train_validation_split` gives; None for all.
    mesh: None for one device, else as `jaxsms.make_mesh` gives: copies are spread over
      "ingredient" and the batch over "data".
    copies: those that this process reads; None for those that its devices hold.
    batch_part: the part of each batch that this process reads; None for the part that its
      devices hold.
    threads: how many read and decode; 0 does it in line.

  Returns:
    An iterator over `Batches`, with `get_state`, `set_state` and `close`.

  Raises:
    ValueError: an argument is out of its range, or the first example is no image.
    ImportError: grain is not installed.

  References:
    https://google-grain.readthedocs.io (threads that read ahead)

  Example:
    >>> images = np.zeros((4, 8, 8, 1), np.uint8)
    >>> source = jaxsms.data.ArrayExamples(images, np.array([0, 1, 2, 3]))
    >>> batches = jaxsms.data.stream(source, jax.random.key(0), seeds=[0, 1], batch_size=2,
    ...                              steps=[4, 4], chunk_steps=2, threads=0)
    >>> chunk = next(batches)  # both steps of the first epoch
    >>> chunk.images.shape, sorted(chunk.labels[0].ravel().tolist())
    ((2, 2, 2, 8, 8, 1), [0, 1, 2, 3])
  """
  grain()
  each_seed = integers("seeds", seeds, 2**32)
  each_steps = integers("steps", steps, 2**31)
  m = len(each_seed)
  if len(each_steps) != m:
    raise ValueError(f"steps has {len(each_steps)} entries for {m} seeds: give one each")
  batch_size = integer("batch_size", batch_size, 1)
  chunk_steps = integer("chunk_steps", chunk_steps, 1)
  threads = integer("threads", threads, 0)
  used = chosen(source, indices)
  if batch_size > len(used):
    raise ValueError(
      f"batch_size is {batch_size} for {len(used)} examples: give at most that many"
    )
  shape = (m, 1, batch_size)
  sharding = spread(mesh, (INGREDIENT_AXIS, None, DATA_AXIS), shape)
  held_copies, _, held_rows = process_block(sharding, shape)
  own_copies = range(m)[copies or held_copies]
  own_rows = range(batch_size)[batch_part or held_rows]
  if not own_copies or not own_rows:
    raise ValueError(
      f"this process is to read {len(own_copies)} of {m} copies and {len(own_rows)} of "
      f"{batch_size} examples in a batch: give copies and batch_part that hold some"
    )
  first = functools.partial(transform, np.random.default_rng(0)) if transform else None
  plan = _Plan(
    source=source,
    transform=transform,
    indices=used,
    key=tuple(int(word) for word in np.ravel(jax.random.key_data(key))),
    seeds=tuple(each_seed.tolist()),
    steps=tuple(each_steps.tolist()),
    batch_size=batch_size,
    copies=own_copies,
    rows=own_rows,
    image_shape=read_example(source, int(used[0]), first)[0].shape,
  )
  return Stream(plan, chunk_steps, sharding, threads)


class _Plan(NamedTuple):
  """Which example every copy sees in every step, and which of them are read here.

  Attributes:
    source: random access to the examples.
    transform: of each image, if any.
    indices: int [n], the examples to use.
    key: of the phase, its words.
    seeds: of all m copies.
    steps: how many each of them takes.
    batch_size: examples of one copy in a step.
    copies: those that this process reads.
    rows: the part of each batch that this process reads.
    image_shape: height, width and channels after the transform.
  """

  source: Examples
  transform: Transform | None
  indices: np.ndarray
  key: tuple[int, ...]
  seeds: tuple[int, ...]
  steps: tuple[int, ...]
  batch_size: int
  copies: range
  rows: range
  image_shape: tuple[int, ...]

  @property
  def per_epoch(self) -> int:
    return len(self.indices) // self.batch_size

  @property
  def total(self) -> int:
    # Of all copies: processes go on together, whichever copies they hold.
    return max(self.steps)

  def order(self, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng([*self.key, seed, ORDER, epoch])
    return rng.permutation(self.indices)

  def identity(self) -> str:
    """A text that all streams of these batches share, in any process, on any mesh."""
    # Copies that take no step only fill up the devices.
    seeds = [seed for seed, n in zip(self.seeds, self.steps, strict=True) if n]
    return (
      f"Stream({self.source!r}, {_qualified_name(self.transform)}, "
      f"indices={len(self.indices)}:{zlib.crc32(self.indices.data):08x}, key={self.key}, "
      f"seeds={seeds}, batch_size={self.batch_size})"
    )


def _reader(plan: _Plan, first: int) -> Callable[[int], tuple[np.ndarray, int] | None]:
  """Reads the examples of one process from a step on, in the order of their use."""
  lock = threading.Lock()  # so that no two threads permute the same epoch
  order_of = functools.lru_cache(maxsize=2 * len(plan.copies))(plan.order)

  def read(position):
    position, row = divmod(position, len(plan.rows))
    step, copy = divmod(position, len(plan.copies))
    step, copy, row = step + first, plan.copies[copy], plan.rows[row]
    if step >= plan.steps[copy]:
      return None
    epoch, batch = divmod(step, plan.per_epoch)
    seed = plan.seeds[copy]
    with lock:
      order = order_of(seed, epoch)
    index = int(order[batch * plan.batch_size + row])
    transform = None
    if plan.transform is not None:
      rng = np.random.default_rng([*plan.key, seed, CROP, epoch, index])
      transform = functools.partial(plan.transform, rng)
    return read_example(plan.source, index, transform, plan.image_shape)

  return read


def _qualified_name(function: Callable | None) -> str:
  """A name for a transform that is the same in every process."""
  if isinstance(function, functools.partial):
    options = [*map(repr, function.args)]
    options += [f"{name}={value!r}" for name, value in sorted(function.keywords.items())]
    return f"{_qualified_name(function.func)}({', '.join(options)})"
  return getattr(function, "__qualname__", type(function).__qualname__)
