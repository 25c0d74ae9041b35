"""Labels that are more than a class: a teacher's, or with a prior; the loss with them."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxsms.training.state import Teacher


class SoftLabels(NamedTuple):
  """A teacher's predictions for a batch.

  Attributes:
    labels: int [batch], the true ones.
    probabilities: float [batch, classes], the teacher's at its temperature.
    temperature: float [batch], that of all examples.
  """

  labels: jax.Array
  probabilities: jax.Array
  temperature: jax.Array


class PriorLabels(NamedTuple):
  """True labels, and how frequent each class is in what is trained on.

  Attributes:
    labels: int [batch], the true ones.
    log_prior: float [batch, classes], the same for all examples.
  """

  labels: jax.Array
  log_prior: jax.Array


def prior_labels(labels: jax.Array, log_prior: jax.Array) -> PriorLabels:
  """Labels with a prior, which a batch in parts can be cut from.

  Args:
    labels: int [batch].
    log_prior: float [classes].

  Returns:
    One row of the prior for each example.
  """
  return PriorLabels(labels, jnp.broadcast_to(log_prior, (*labels.shape, *log_prior.shape)))


def soft_labels(
  module: nn.Module, teacher: Teacher, images: jax.Array, labels: jax.Array
) -> SoftLabels:
  """The mean prediction of a teacher's models, one after another, at its temperature.

  Args:
    module: network, called with train=False.
    teacher: of one student.
    images: float [batch, height, width, channels].
    labels: int [batch].

  Returns:
    Labels that carry no gradient.

  References:
    Hinton et al., 2015, https://arxiv.org/abs/1503.02531, section 2
  """

  def logits_of(model):
    params, batch_stats = model
    return module.apply({"params": params, "batch_stats": batch_stats}, images, train=False)

  logits = jax.lax.map(logits_of, (teacher.params, teacher.batch_stats))
  probabilities = jax.nn.softmax(logits.astype(jnp.float32) / teacher.temperature)
  weights = teacher.weights[:, None, None]  # 0 for models that may hold NaN
  mean = jnp.where(weights > 0, weights * probabilities, 0).sum(0)
  temperature = jnp.broadcast_to(teacher.temperature, labels.shape)
  return SoftLabels(labels, jax.lax.stop_gradient(mean), temperature)


def mean_loss(logits: jax.Array, labels: jax.Array | SoftLabels | PriorLabels) -> jax.Array:
  """Mean cross-entropy with labels; with soft ones at their temperature, times its square.

  The square keeps the gradients of the size that they have at temperature 1. A prior is
  added to the logits: what the network gives without it suits classes of equal size.

  Args:
    logits: float32 [batch, classes].
    labels: int [batch], or soft, or with a prior.

  Returns:
    float32 [].

  References:
    Menon et al., 2021, https://arxiv.org/abs/2007.07314 (logit adjustment)
  """
  if isinstance(labels, PriorLabels):
    logits, labels = logits + labels.log_prior, labels.labels
  if not isinstance(labels, SoftLabels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  cooled = logits / labels.temperature[:, None]
  losses = optax.softmax_cross_entropy(cooled, labels.probabilities)
  return (labels.temperature**2 * losses).mean()
