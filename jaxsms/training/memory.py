"""How many copies fit on a device, for the error where they do not."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from jaxsms.training.programs import Programs
from jaxsms.training.state import Data, TrainState, seed_ingredients
from jaxsms.training.streamed import StreamedData
from jaxsms.trees import PyTree, shape_of


class OutOfMemory(MemoryError):
  """A device has too little memory for the training of several copies.

  Attributes:
    copies: that were to train at once.
    fit: how many of them would have fitted at once; None where the device does not tell.
  """

  def __init__(self, copies: int, fit: int | None = None):
    """Keeps the numbers; the message names the argument `at_once`."""
    super().__init__(copies, fit)
    self.copies, self.fit = copies, fit

  def advice(self, argument: str = "at_once") -> str:
    """What happened and what to do, in one sentence.

    Args:
      argument: name of what limits the copies that train at once.
    """
    if self.fit is None:
      advice = "train fewer of them at once, or split the batch into micro-batches"
    elif self.fit:
      advice = f"about {self.fit} of them fit at once: give {argument}={self.fit}"
    else:
      advice = (
        "not even one of them fits: take a smaller batch, micro-batches, remat, or a mesh "
        "that splits the parameters"
      )
    return f"the device is out of memory with {self.copies} copies: {advice}"

  def __str__(self) -> str:
    return self.advice()


@contextlib.contextmanager
def explain_out_of_memory(
  programs: Programs,
  data: Data | StreamedData,
  masks: PyTree,
  key: jax.Array,
  state: TrainState,
  chunk_steps: int,
) -> Iterator[None]:
  """Turns the runtime's error for lack of device memory into one that tells what fits.

  Args:
    programs: of the network.
    data: the training split.
    masks: as `train_chunks` takes them.
    key: of the phase.
    state: of all m copies; only its shapes are used.
    chunk_steps: the length of a chunk.

  Raises:
    OutOfMemory: the device had too little memory.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    m, fit = len(state.step), None
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and isinstance(data, Data):
      like, masks, key, state = jax.tree.map(shape_of, (data, masks, key, state))
      needed = bytes_of_copies(programs, like, masks, key, state, chunk_steps)
      fit = copies_that_fit(limit, m, *needed)
    raise OutOfMemory(m, fit) from error


def bytes_of_copies(
  programs: Programs,
  data: Data,
  masks: PyTree,
  key: jax.Array,
  state: TrainState,
  chunk_steps: int,
) -> tuple[int, int, int]:
  """What a training program needs on one device, from compiling it for one and two copies.

  Args:
    programs: of the network.
    data: arrays or their shapes, like all that follows.
    masks: shared by the copies, or with leading axis m.
    key: of the phase.
    state: leaves [m, ...].
    chunk_steps: the length of a chunk.

  Returns:
    Bytes that all copies share, of one copy's state, and of one copy at work.
  """
  train = programs.train.on(None, 2)  # vmapped, for one copy too

  def resized(tree, m):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((m, *x.shape[1:]), x.dtype), tree)

  def needed(m):
    compiled = train.lower(
      data,
      resized(masks, m) if programs.own_masks else masks,
      key,
      resized(state, m),
      seed_ingredients(m),
      np.zeros([m, chunk_steps], np.float32),
    ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # CPU, GPU and TPU tell it
    return (
      memory.argument_size_in_bytes
      + memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )

  one, two = needed(1), needed(2)
  of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(resized(state, 1)))
  return 2 * one - two, of_state, max(two - one - of_state, 1)


def copies_that_fit(limit: int, m: int, shared: int, state: int, work: int) -> int:
  """How many of m copies can be at work at once where the states of all m are kept.

  Args:
    limit: bytes of the device.
    m: number of copies.
    shared: bytes that all copies share.
    state: bytes of one copy's state.
    work: further bytes of one copy at work.

  Returns:
    From 0 to m.
  """
  return int(np.clip((limit - shared - m * state) // work, 0, m))
