"""The jitted programs: one copy's work mapped over all copies and devices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from jaxsms.ingredients import map_ingredients
from jaxsms.metrics import (
  accuracy,
  balanced_accuracy,
  calibration_error,
  cross_entropy,
  worst_class_accuracy,
)
from jaxsms.training import step

METRICS = {
  "loss": cross_entropy,
  "accuracy": accuracy,
  "balanced_accuracy": balanced_accuracy,
  "worst_class_accuracy": worst_class_accuracy,
  "expected_calibration_error": calibration_error,
  "maximum_calibration_error": functools.partial(calibration_error, norm="max"),
}


class Programs(NamedTuple):
  """Compiled once per number of copies; everything that differs between phases is traced.

  Attributes:
    train: `train(data, masks, key, state, ingredients, learning_rates [m, chunk])` giving
      the state after a chunk of steps and its metrics [m]. The state is donated.
    recalibrate: `recalibrate(data, key, params, batch_stats)` giving batch statistics.
    predict: `predict(images, params, batch_stats)` giving logits [m, n, classes].
    evaluate: `evaluate(logits [m, n, classes], labels)` giving metrics [m].
    optimizer: gives the optimizer for a learning rate and a weight decay.
    batch_size: examples in a training step.
    own_masks: whether `train` takes masks [m, ...], one for each copy.
    mesh: what the copies are spread over; None for one device.
  """

  train: Callable
  recalibrate: Callable
  predict: Callable
  evaluate: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
  optimizer: step.Optimizer
  batch_size: int
  own_masks: bool
  mesh: jax.sharding.Mesh | None


def make_programs(
  module: nn.Module,
  optimizer: step.Optimizer,
  *,
  training_images: Callable[[jax.Array, jax.Array], jax.Array],
  evaluation_images: Callable[[jax.Array], jax.Array],
  batch_size: int,
  eval_batch_size: int = 500,
  own_masks: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> Programs:
  """Makes the programs of one network on one data set.

  Args:
    module: Flax linen network.
    optimizer: gives the optimizer for a learning rate and a weight decay, both traced.
    training_images: augments and normalizes, `f(key, uint8 images) -> float images`.
    evaluation_images: normalizes, `f(uint8 images) -> float images`.
    batch_size: examples of one copy in a step.
    eval_batch_size: examples of one copy in an evaluation step; results do not depend
      on it.
    own_masks: whether each copy has masks of its own.
    mesh: None for one device, else as `jaxsms.make_mesh` gives.

  Returns:
    The programs.
  """

  def train(data, masks, key, state, ingredient, learning_rates):
    return step.train_chunk(
      module, optimizer, training_images, batch_size,
      data, masks, key, state, ingredient, learning_rates,
    )  # fmt: skip

  def recalibrate(data, key, params, batch_stats):
    return step.recalibrate(
      module, training_images, batch_size, data, key, params, batch_stats
    )

  def predict(images, params, batch_stats):
    return step.predict(
      module, evaluation_images, eval_batch_size, images, params, batch_stats
    )

  def evaluate(logits, labels):
    return {name: metric(logits, labels) for name, metric in METRICS.items()}

  def program(function, in_axes, **options):
    return jax.jit(map_ingredients(function, in_axes, mesh), **options)

  return Programs(
    train=program(train, (None, 0 if own_masks else None, None, 0, 0, 0), donate_argnums=3),
    recalibrate=program(recalibrate, (None, None, 0, 0)),
    predict=program(predict, (None, 0, 0)),
    evaluate=jax.jit(jax.vmap(evaluate, in_axes=(0, None))),
    optimizer=optimizer,
    batch_size=batch_size,
    own_masks=own_masks,
    mesh=mesh,
  )
