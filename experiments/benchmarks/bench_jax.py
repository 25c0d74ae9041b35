"""What the benchmark measures of jaxsms: the training program of the main job."""

import contextlib
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.data import training_images
from jaxsms.training import (
  Data,
  Programs,
  TrainState,
  init_variables,
  make_programs,
  sgd,
  start,
  train_chunks,
)
from jaxsms.training.cutting import image_multiply_adds
from jaxsms.training.loop import chunk_length
from jaxsms.training.programs import MeshOf
from jaxsms.training.state import seed_ingredients
from jaxsms.trees import PyTree

from ..costs.timing import ROUND_SECONDS, seconds

NUM_CLASSES = 10
MEAN, STD = 0.5, 0.25  # of every channel of the synthetic images
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
CHUNK_STEPS = 50  # as the main job has it
ENDLESS = 2**24  # more steps than any benchmark takes

# Dense TFLOP/s of one device from the makers' data sheets, by words of its name: of float32
# as JAX multiplies it there by default, and of bfloat16.
PEAKS = {
  "H200": (494, 989),
  "H100 PCIe": (378, 756),
  "H100 NVL": (418, 835),
  "H100": (494, 989),
  "A100": (156, 312),
  "L4": (60, 121),
  "T4": (8.1, None),
  "TPU v4": (275, 275),
  "TPU v5 lite": (197, 197),
  "TPU v5e": (197, 197),
  "TPU v5": (459, 459),
  "TPU v5p": (459, 459),
  "TPU v6 lite": (918, 918),
  "TPU v6e": (918, 918),
}


class Task(NamedTuple):
  """The work that is measured, whatever the number of copies.

  Attributes:
    module: the network.
    programs: its compiled work.
    data: synthetic examples, resident on the device.
    params: of one fresh network.
    batch_stats: its batch statistics.
    steps_per_epoch: whole batches in the data.
    multiply_adds: of the inference of one image.
  """

  module: nn.Module
  programs: Programs
  data: Data
  params: PyTree
  batch_stats: PyTree
  steps_per_epoch: int
  multiply_adds: int

  def flops(self, copies: int) -> int:
    """Of one step of so many copies: forward once, backward twice, 2 a multiply-add."""
    return 2 * 3 * self.multiply_adds * self.programs.batch_size * copies


def make_task(
  module: nn.Module,
  image_shape: tuple[int, int, int],
  *,
  examples: int,
  batch_size: int,
  augmentation: str,
  at_once: Callable[[int], int | None] = lambda parameters: None,
  mesh_of: MeshOf | None = None,
  micro_batches: int = 1,
) -> Task:
  """Makes network, synthetic data and programs.

  Args:
    module: the network, for `NUM_CLASSES` classes.
    image_shape: [height, width, channels].
    examples: of the training split.
    batch_size: examples of one copy in a step, at most `examples`.
    augmentation: see `jaxsms.data.training_images`.
    at_once: gives that of `jaxsms.training.make_programs` for a copy's parameters.
    mesh_of: the mesh of a number of copies; None means one device.
    micro_batches: see `jaxsms.training.make_programs`.

  Returns:
    The task.

  Raises:
    ValueError: the images do not suit the network.
  """
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (examples, *image_shape), np.uint8)
  labels = rng.integers(0, NUM_CLASSES, examples, np.int32)
  params, batch_stats = jax.jit(
    functools.partial(init_variables, module, image_shape=image_shape)
  )(jax.random.key(0))
  counts = image_multiply_adds(
    module.apply, {"params": params, "batch_stats": batch_stats}, image_shape
  )
  programs = programs_of(
    module,
    image_shape[-1],
    batch_size=batch_size,
    augmentation=augmentation,
    at_once=at_once(sum(x.size for x in jax.tree.leaves(params))),
    mesh_of=mesh_of,
    micro_batches=micro_batches,
  )
  return Task(
    module,
    programs,
    Data(jnp.asarray(images), jnp.asarray(labels)),
    params,
    batch_stats,
    examples // batch_size,
    sum(counts.values()),
  )


def programs_of(
  module: Any,
  channels: int,
  *,
  batch_size: int,
  augmentation: str,
  at_once: int | None = None,
  mesh_of: MeshOf | None = None,
  micro_batches: int = 1,
) -> Programs:
  """The programs of a network on synthetic images of so many channels; see `make_task`."""
  mean, std = (np.full([channels], value, np.float32) for value in (MEAN, STD))
  return make_programs(
    module,
    functools.partial(sgd, momentum=MOMENTUM, nesterov=True),
    training_images=lambda key, batch: training_images(augmentation, key, batch, mean, std),
    evaluation_images=lambda batch: batch,  # nothing is evaluated
    batch_size=batch_size,
    at_once=at_once,
    mesh=mesh_of,
    micro_batches=micro_batches,
  )


def most_chunk_steps(flops: int, peak: float | None, steps: int | None) -> int:
  """The most steps of a chunk, the same for every number of copies.

  Args:
    flops: of a step of the most copies.
    peak: FLOP/s of the device, if known.
    steps: of a round, if given.

  Returns:
    As many as the main job's, fewer where a round is shorter or a chunk would take long.
  """
  if steps is not None:
    return min(steps, CHUNK_STEPS)
  if peak is None:
    return CHUNK_STEPS
  step_seconds = flops / (0.2 * peak)  # a guess: nothing is compiled yet
  # A chunk permutes the data set once: not fewer than 10 steps share that.
  return max(10, min(CHUNK_STEPS, int(ROUND_SECONDS / step_seconds)))


class CompiledOnce:
  """A program that compiles at its first call, timed, and is the same ever after.

  Attributes:
    trace_seconds: from Python to the compiler's input.
    compile_seconds: of the compiler.
    compiled: the program; None before the first call.
    peak_before: the device's peak before the program first ran, where it reports one.
  """

  def __init__(self, program: Any):
    self._program = program
    self.trace_seconds = self.compile_seconds = 0.0
    self.compiled = None
    self.peak_before = None

  def __call__(self, *arguments):
    if self.compiled is None:
      before = time.perf_counter()
      lowered = self._program.lower(*arguments)
      traced = time.perf_counter()
      self.compiled = lowered.compile()
      self.compile_seconds = time.perf_counter() - traced
      self.trace_seconds = traced - before
      self.peak_before = peak_in_use()
    return self.compiled(*arguments)


class Training:
  """m copies in training, chunk after chunk, by the loop of the main job.

  Attributes:
    state: after the last chunk; the next one takes it.
  """

  def __init__(self, task: Task, copies: int, chunk_steps: int):
    """`chunk_steps`: most steps of a chunk; see `chunk_length`."""
    self.task, self.copies = task, copies
    self.train = CompiledOnce(task.programs.train)
    self.mesh = task.programs.mesh_of(copies)
    self.chunk_steps = chunk_length(task.steps_per_epoch, chunk_steps)
    self._chunks: Iterator | None = None
    self.state: TrainState | None = None

  @property
  def steps_per_chunk(self) -> float:
    """Useful steps: an epoch's last chunk may be filled up with some that are not."""
    return self.task.steps_per_epoch / -(-self.task.steps_per_epoch // self.chunk_steps)

  @property
  def devices(self) -> int:
    """How many devices the copies are spread over."""
    return 1 if self.mesh is None else self.mesh.size

  def run(self, chunks: int) -> None:
    """Trains so many chunks and waits for them."""
    if self._chunks is None:
      self._chunks = self._endless()
    for _ in range(chunks):
      self.state, _ = next(self._chunks)
    jax.block_until_ready(self.state)

  def stop(self) -> None:
    """Frees the state; the next run begins anew with the same program."""
    self._chunks = self.state = None

  def _endless(self):
    task, m = self.task, self.copies
    zero = task.programs.optimizer(0.0, 0.0)
    return train_chunks(
      task.programs._replace(train=self.train),
      task.data,
      jax.tree.map(lambda x: jnp.ones(x.shape, bool), task.params),
      jax.random.key(0),
      start(task.params, task.batch_stats, zero, m),
      seed_ingredients(m, WEIGHT_DECAY, ENDLESS),
      np.broadcast_to(np.float32(LEARNING_RATE), [m, ENDLESS]),
      self.chunk_steps,
    )

  def memory(self) -> tuple[int, str]:
    """Peak memory of a device in bytes, and where the number comes from.

    To be called after the first run, in ascending order of copies: a device tells its
    highest peak alone, which says nothing about a program that does not raise it.
    """
    peak = peak_in_use()
    if peak is not None and peak > self.train.peak_before:
      return peak, "measured by the device"
    used = self.train.compiled.memory_analysis()
    total = used.argument_size_in_bytes + used.temp_size_in_bytes
    total += used.output_size_in_bytes - used.alias_size_in_bytes  # the donated state
    return total, "arguments, results and temporaries of the program"


def peak_in_use() -> int | None:
  """The highest memory in use of the first device so far, in bytes; None if unknown."""
  return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@contextlib.contextmanager
def fresh_compilation():
  """Within it nothing is read from a persistent compilation cache."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def peak_flops(precision: str, given: float | None) -> tuple[float | None, str]:
  """The most FLOP/s of one device, and where the number comes from.

  Args:
    precision: "float32" or "bfloat16".
    given: TFLOP/s, or None.

  Returns:
    FLOP/s, or None where it is not known; on CPU those of all cores.
  """
  if given is not None:
    return given * 1e12, "--peak_tflops"
  if jax.default_backend() == "cpu":
    return matmul_flops(), "float32 matrix product, measured"
  kind = jax.devices()[0].device_kind
  return sheet_flops(kind, precision) or (None, f"unknown for {kind}: give --peak_tflops")


def sheet_flops(kind: str, precision: str) -> tuple[float, str] | None:
  """FLOP/s of a kind of device by its data sheet and in what, None where not known.

  References:
    https://www.nvidia.com/en-us/data-center/h200 and the pages beside it
    https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
  """
  for name, (single, half) in PEAKS.items():
    peak = single if precision == "float32" else half
    if peak is not None and re.search(rf"\b{name}\b", kind):
      how = "bfloat16" if precision == "bfloat16" or "TPU" in name else "TF32"
      how = "float32" if name == "T4" else how
      return peak * 1e12, f"data sheet of {name}, {how}"
  return None


def matmul_flops(size: int = 2048, rounds: int = 5) -> float:
  """FLOP/s of a product of two square float32 matrices, median of a few."""
  matrix = jnp.full((size, size), 1 / size, jnp.float32)
  product = jax.jit(jnp.matmul)

  def run():
    jax.block_until_ready(product(matrix, matrix))

  run()
  return 2 * size**3 / statistics.median(seconds(run) for _ in range(rounds))
