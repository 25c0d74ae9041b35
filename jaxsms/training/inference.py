"""One model: its batch statistics estimated anew, and its logits."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.devices.meshes import split_batch
from jaxsms.training.state import Data
from jaxsms.trees import PyTree

SHARE = 0.2  # of the batches of an epoch


def recalibrate(
  module: nn.Module,
  prepare: Callable[[jax.Array, jax.Array], jax.Array],
  batch_size: int,
  data: Data,
  key: jax.Array,
  params: PyTree,
  batch_stats: PyTree,
) -> PyTree:
  """Estimates one model's batch statistics anew.

  The mean over the first batches of the unshuffled training split, in training mode with
  augmentation and dropout: what a reset running average would be without its momentum.

  Args:
    module: network with a field `norm_momentum`.
    prepare: augments and normalizes, as in training.
    batch_size: examples in a batch.
    data: the training split.
    key: for augmentation and dropout.
    params: of one model.
    batch_stats: gives the structure; returned as it is where it is empty.

  Returns:
    New batch statistics.
  """
  if not jax.tree.leaves(batch_stats):
    return batch_stats
  batches = recalibration_batches(len(data.labels), batch_size)
  images = data.images[: batches * batch_size]
  images = images.reshape(batches, batch_size, *images.shape[1:])

  def body(total, now):
    index, batch = now
    return batch_statistics(module, prepare, key, index, batch, params, total), None

  zeros = jax.tree.map(jnp.zeros_like, batch_stats)
  total, _ = jax.lax.scan(body, zeros, (jnp.arange(batches), images))
  return jax.tree.map(lambda x: x / batches, total)


def recalibration_batches(n: int, batch_size: int) -> int:
  """How many of the batches of n examples statistics are estimated from, at least one."""
  return max(1, int(SHARE * (n // batch_size)))


def batch_statistics(
  module: nn.Module,
  prepare: Callable[[jax.Array, jax.Array], jax.Array],
  key: jax.Array,
  index: jax.Array,
  images: jax.Array,
  params: PyTree,
  total: PyTree,
) -> PyTree:
  """Adds the batch statistics of one batch, in training mode, to those of others.

  Args:
    module: network with a field `norm_momentum`.
    prepare: augments and normalizes, as in training.
    key: for augmentation and dropout.
    index: int [], of the batch.
    images: uint8 [batch, height, width, channels].
    params: of one model.
    total: the sum so far.

  Returns:
    The sum with this batch.
  """
  augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, index))
  _, updated = module.clone(norm_momentum=0.0).apply(
    {"params": params, "batch_stats": jax.tree.map(jnp.zeros_like, total)},
    prepare(augment_key, split_batch(images)),
    train=True,
    rngs={"dropout": dropout_key},
    mutable=["batch_stats"],
  )
  return jax.tree.map(jnp.add, total, updated["batch_stats"])


def predict(
  module: nn.Module,
  prepare: Callable[[jax.Array], jax.Array],
  batch_size: int,
  images: jax.Array,
  params: PyTree,
  batch_stats: PyTree,
) -> jax.Array:
  """One model's logits for every image, whatever the batch size.

  Args:
    module: network, called with train=False.
    prepare: normalizes, `prepare(uint8 images) -> float images`.
    batch_size: images at a time; the last batch is filled up and cut again.
    images: uint8 [n, height, width, channels].
    params: of one model.
    batch_stats: of one model.

  Returns:
    float32 [n, classes].
  """
  n = len(images)
  batch_size = min(batch_size, n)
  batches = -(-n // batch_size)
  fill = [(0, batches * batch_size - n)] + [(0, 0)] * (images.ndim - 1)
  batched = jnp.pad(images, fill).reshape(batches, batch_size, *images.shape[1:])
  logits = jax.lax.map(
    lambda batch: module.apply(
      {"params": params, "batch_stats": batch_stats},
      prepare(split_batch(batch)),
      train=False,
    ),
    batched,
  )
  return logits.reshape(batches * batch_size, -1)[:n].astype(jnp.float32)
