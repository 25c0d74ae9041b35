"""What merges need beside the candidates, from a network and its data."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import optax

from jaxsms.merges import (
  MERGES,
  Means,
  average_by_leaf,
  bind,
  diagonal_fisher,
  learned_weights,
)
from jaxsms.sms import Merge, Weighted
from jaxsms.training.landscape import evenly
from jaxsms.training.measurements import Model, Splits
from jaxsms.training.programs import Programs
from jaxsms.training.streamed import StreamedData
from jaxsms.trees import PyTree

LEARNING_IMAGES = 1000  # of the validation data, for learned weights
FISHER_IMAGES = 500  # of the training data
_GRADIENTS = 8  # of single images that are held at once


def check_data(name: str, splits: Splits) -> None:
  """Raises ValueError where a merge needs images in memory and they are streamed."""
  if MERGES[name].in_memory and isinstance(splits.train, StreamedData):
    raise ValueError(
      f"merge {name} needs images in memory, and these are streamed: give --nostream, or "
      "another merge"
    )


def named_merge(
  name: str,
  programs: Programs,
  splits: Splits,
  key: jax.Array,
  base: Model | None,
  prior: float = 1e-4,
  weights: np.ndarray | None = None,
) -> Merge:
  """A merge of candidates by its name, except "greedy".

  Args:
    name: one of `jaxsms.merges.MERGES`.
    programs: of the network.
    splits: the data: validation images for learned weights, training images for squared
      gradients.
    key: of the phase.
    base: the pruned model that the candidates were trained from, leaves [...].
    prior: the L2 coefficient of training.
    weights: float [m], of the models where entries have weights of their own; None means
      equal ones.

  Returns:
    A function of `Model` leaves [m, ...].

  Raises:
    ValueError: an unknown name, or data that are streamed where images are needed.
  """
  check_data(name, splits)
  means = Means(base=base, prior=prior, weights=weights)
  if name in ("learned", "learned_by_layer"):
    by = "layer" if name == "learned_by_layer" else "model"
    held_out = evenly(splits.validation, LEARNING_IMAGES)
    data = held_out.images, held_out.labels

    def learned(candidates):
      weights = learned_weights(candidates, loss_of(programs), data, by=by)
      return Weighted(average_by_leaf(candidates, weights), mean_weights(weights.params))

    return learned
  if name in ("fisher", "inverse_variance"):
    images = evenly(splits.train, FISHER_IMAGES).images
    means = means._replace(squared_gradients=squares_of(programs), data=(key, images))
  return bind(name, means)


def mean_weights(weights: PyTree) -> np.ndarray:
  """float [m], the mean over leaves of weights [m]."""
  return np.mean(jax.device_get(jax.tree.leaves(weights)), axis=0, dtype=np.float64)


# Cached: what is compiled for a function serves in all phases.


@functools.lru_cache(maxsize=8)
def loss_of(programs: Programs) -> Callable[..., jax.Array]:
  """`loss(model, images, labels)`, batch statistics as they are."""

  def loss(model, images, labels):
    logits = _logits(programs, model, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  return loss


@functools.lru_cache(maxsize=8)
def squares_of(programs: Programs) -> Callable[..., PyTree]:
  """`squares(model, key, images)`, the diagonal of its Fisher matrix."""

  def squares(model, key, images):
    return diagonal_fisher(
      key, functools.partial(_logits, programs), model, images, batch_size=_GRADIENTS
    )

  return squares


def _logits(programs, model, images):
  one = jax.tree.map(lambda x: x[None], model)
  return programs.predict.on(None, 1)(images, *one)[0]
