"""How good predictions are: accuracy, loss, calibration."""

import jax
import jax.numpy as jnp
import optax

from jaxsms.names import check_name


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The share of examples whose largest logit is at their label.

  Args:
    logits: float [n, classes].
    labels: int [n].

  Returns:
    float32 [].

  Raises:
    ValueError: shapes do not fit together.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    >>> float(jaxsms.accuracy(logits, jnp.array([0, 1, 1, 0])))
    0.75
  """
  check_predictions(logits, labels)
  return jnp.mean(jnp.argmax(logits, -1) == labels)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Mean softmax cross-entropy.

  Args:
    logits: float [n, classes].
    labels: int [n].

  Returns:
    float32 [], in nats.

  Raises:
    ValueError: shapes do not fit together.

  Example:
    >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))
    >>> loss = jaxsms.cross_entropy(logits, jnp.array([0, 0]))
    >>> print(jnp.exp(-loss).round(3))
    0.25
  """
  check_predictions(logits, labels)
  logits = jnp.asarray(logits, jnp.float32)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def class_accuracies(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The accuracy on the examples of each class: its recall.

  Args:
    logits: float [n, classes].
    labels: int [n].

  Returns:
    float32 [classes], NaN for a class without examples.

  Raises:
    ValueError: shapes do not fit together.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    >>> print(jaxsms.class_accuracies(logits, jnp.array([0, 1, 1, 0])))
    [1.  0.5]
  """
  check_predictions(logits, labels)
  classes = logits.shape[-1]
  hits = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
  total = jax.ops.segment_sum(jnp.ones_like(hits), labels, classes)
  return jax.ops.segment_sum(hits, labels, classes) / total


def balanced_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Accuracy averaged over the classes that occur.

  Args:
    logits: float [n, classes].
    labels: int [n].

  Returns:
    float32 [].

  Raises:
    ValueError: shapes do not fit together.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    >>> float(jaxsms.balanced_accuracy(logits, jnp.array([0, 0, 0, 1])))  # (2/3 + 0) / 2
    0.333...
  """
  return jnp.nanmean(class_accuracies(logits, labels))


def worst_class_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The lowest recall of the classes that occur.

  Args:
    logits: float [n, classes].
    labels: int [n].

  Returns:
    float32 [].

  Raises:
    ValueError: shapes do not fit together.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    >>> float(jaxsms.worst_class_accuracy(logits, jnp.array([0, 1, 1, 0])))
    0.5
  """
  return jnp.nanmin(class_accuracies(logits, labels))


def calibration_error(
  logits: jax.Array, labels: jax.Array, bins: int = 15, norm: str = "l1"
) -> jax.Array:
  """How far confidence is from accuracy.

  Examples are put into equal bins (k / bins, (k + 1) / bins] of their top softmax
  probability; in each the mean confidence is compared with the accuracy. Empty bins
  count 0.

  Args:
    logits: float [n, classes].
    labels: int [n].
    bins: number of bins, at least 1.
    norm: "l1" for the expected calibration error (gaps weighted by the share of the
      examples in the bin), "max" for the maximum calibration error (the largest gap).

  Returns:
    float32 [], in [0, 1].

  Raises:
    ValueError: shapes do not fit together, unknown norm, or bins below 1.

  References:
    Guo et al., 2017, https://arxiv.org/abs/1706.04599

  Example:
    >>> logits = jnp.log(jnp.array([[0.75, 0.25]] * 4))
    >>> labels = jnp.array([0, 0, 1, 1])
    >>> print(jaxsms.calibration_error(logits, labels).round(3))  # 0.75 sure, 0.5 right
    0.25
  """
  check_predictions(logits, labels)
  check_name("norm", norm, ("l1", "max"))
  if bins < 1:
    raise ValueError(f"bins is {bins}: at least 1 is needed")
  probabilities = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
  confidence = jnp.max(probabilities, -1)
  hits = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
  edges = jnp.arange(1, bins) / bins
  member = jnp.searchsorted(edges, confidence, side="left")
  gap = jnp.abs(jax.ops.segment_sum(confidence - hits, member, bins))
  count = jax.ops.segment_sum(jnp.ones_like(hits), member, bins)
  if norm == "max":
    return jnp.max(jnp.where(count > 0, gap / jnp.maximum(count, 1), 0))
  return jnp.sum(gap) / len(labels)


def agreement(logits: jax.Array, others: jax.Array) -> jax.Array:
  """The share of examples for which two models predict the same class.

  Args:
    logits: float [n, classes].
    others: float [n, classes], of the other model.

  Returns:
    float32 [].

  Raises:
    ValueError: shapes differ.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    >>> float(jaxsms.agreement(logits, jnp.zeros((4, 2))))  # zeros predict class 0
    0.75
  """
  if jnp.ndim(logits) != 2 or jnp.shape(logits) != jnp.shape(others):
    raise ValueError(
      f"logits have shapes {list(jnp.shape(logits))} and {list(jnp.shape(others))}: "
      "expected [n, classes] for both"
    )
  return jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(others, -1))


def check_predictions(logits: jax.Array, labels: jax.Array) -> None:
  """Raises ValueError unless logits are [n, classes] and labels int [n], n > 0."""
  if jnp.ndim(logits) != 2 or jnp.shape(labels) != jnp.shape(logits)[:1]:
    raise ValueError(
      f"logits {list(jnp.shape(logits))} and labels {list(jnp.shape(labels))} do not fit "
      "together: expected [n, classes] and [n]"
    )
  if not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
    raise ValueError(f"labels are {jnp.asarray(labels).dtype}: expected integers")
  if not len(labels):
    raise ValueError("there are no examples: metrics need at least one")
