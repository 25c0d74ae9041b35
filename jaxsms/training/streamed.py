"""Data that stay on the host, read batch by batch while the device works."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.data.evaluation import evaluation_batches
from jaxsms.data.examples import Examples
from jaxsms.data.streaming import Batches, stream
from jaxsms.devices.meshes import fetch
from jaxsms.training.inference import recalibration_batches
from jaxsms.training.programs import Programs
from jaxsms.training.state import Ingredients, seed_ingredients
from jaxsms.trees import PyTree, number_of_models


class StreamedData(NamedTuple):
  """Examples that are read and decoded while the device works.

  Attributes:
    source: random access to them, such as `jaxsms.data.TfdsExamples`.
    indices: int [n], those that are used.
    train_transform: `f(generator, image) -> uint8 [height, width, channels]`, such as
      `jaxsms.data.random_resized_crop`.
    eval_transform: `f(image) -> uint8 [height, width, channels]`, such as
      `jaxsms.data.resize_centre_crop`.
    threads: how many read.
  """

  source: Examples
  indices: np.ndarray
  train_transform: Callable | None = None
  eval_transform: Callable | None = None
  threads: int = 16

  @property
  def size(self) -> int:
    """The number of examples."""
    return len(self.indices)


def training_batches(
  programs: Programs,
  data: StreamedData,
  key: jax.Array,
  ingredients: Ingredients,
  chunk_steps: int,
  first: int,
) -> Iterator[Batches]:
  """Batches of all copies from a step on; see `jaxsms.data.stream`.

  Args:
    programs: of the network.
    data: to train on.
    key: of the phase.
    ingredients: of the copies, each [m].
    chunk_steps: steps in a chunk.
    first: step to begin with.

  Yields:
    The batches of up to that many steps.
  """
  batches = stream(
    data.source,
    key,
    np.asarray(ingredients["seed"]),
    batch_size=programs.batch_size,
    steps=np.asarray(ingredients["steps"]),
    chunk_steps=chunk_steps,
    transform=data.train_transform,
    indices=data.indices,
    mesh=programs.mesh_of(number_of_models(ingredients)),
    threads=data.threads,
  )
  if first:
    batches.set_state({**batches.get_state(), "step": first})
  try:
    yield from batches
  finally:
    batches.close()


def recalibrate(
  programs: Programs, data: StreamedData, key: jax.Array, params: PyTree, like: PyTree
) -> PyTree:
  """Batch statistics of m models over the first batches of a shuffled epoch.

  Args:
    programs: of the network.
    data: to train on.
    key: for the order, augmentation and dropout.
    params: leaves [m, ...].
    like: batch statistics [m, ...], for their shapes.

  Returns:
    New batch statistics, the mean over the batches.
  """
  batches = recalibration_batches(data.size, programs.batch_size)
  one = seed_ingredients(1, steps=batches)
  total = jax.tree.map(jnp.zeros_like, like)
  programs_alone = programs._replace(mesh_of=lambda copies: None)
  for chunk in training_batches(programs_alone, data, key, one, 1, 0):
    total = programs.batch_statistics(
      key, np.int32(chunk.step), fetch(chunk.images)[0, 0], params, total
    )
  return jax.tree.map(lambda x: x / batches, total)


def predict(
  programs: Programs, data: StreamedData, params: PyTree, batch_stats: PyTree
) -> tuple[jax.Array, jax.Array]:
  """Logits [m, n, classes] of m models, and labels [n]."""
  logits, labels = [], []
  for batch in evaluation_batches(
    data.source,
    data.eval_transform,
    batch_size=programs.eval_batch_size,
    indices=data.indices,
    threads=data.threads,
  ):
    valid = int(np.sum(fetch(batch.valid)))
    logits.append(programs.predict(fetch(batch.images), params, batch_stats)[:, :valid])
    labels.append(fetch(batch.labels)[:valid])
  return jnp.concatenate(logits, axis=1), jnp.concatenate(labels)
