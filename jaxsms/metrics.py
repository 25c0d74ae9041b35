"""How good predictions are: accuracy, loss, calibration; how sure models are."""

import jax
import jax.numpy as jnp
import optax

from jaxsms.names import check_name
from jaxsms.soups import prediction_ensemble


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


def accuracy_among(
  logits: jax.Array, labels: jax.Array, classes: tuple[int, ...]
) -> jax.Array:
  """The accuracy on the examples of some classes, the others being possible answers.

  Args:
    logits: float [n, classes].
    labels: int [n].
    classes: whose examples count, such as the tail of a long-tailed set.

  Returns:
    float32 [], NaN where they have no example.

  Raises:
    ValueError: shapes do not fit together.

  >>> logits = jnp.eye(3)[jnp.array([0, 1, 1])]
  >>> accuracy_among(logits, jnp.array([0, 1, 2]), (1, 2)).item()
  0.5
  """
  check_predictions(logits, labels)
  chosen = jnp.isin(labels, jnp.array(classes))
  return jnp.sum(chosen & (jnp.argmax(logits, -1) == labels)) / jnp.sum(chosen)


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


def predictive_entropy(logits: jax.Array) -> jax.Array:
  """The entropy of the mean prediction of m models: how unsure they are together.

  Args:
    logits: float [m, n, classes]; m may be 1.

  Returns:
    float32 [n], in nats.

  Raises:
    ValueError: logits do not have three axes.

  Example:
    >>> round(float(predictive_entropy(jnp.zeros([2, 1, 2]))[0]), 3)
    0.693
  """
  return _entropy(prediction_ensemble(logits))


def mutual_information(logits: jax.Array) -> jax.Array:
  """The part of the predictive entropy of m models that comes from their disagreement.

  Args:
    logits: float [m, n, classes].

  Returns:
    float32 [n], in nats, 0 where all models predict the same.

  Raises:
    ValueError: logits do not have three axes.

  Example:
    >>> sure = jnp.array([[[50.0, 0.0]], [[0.0, 50.0]]])  # each of another class
    >>> round(float(mutual_information(sure)[0]), 3)
    0.693

  References:
    Houlsby et al., 2011, https://arxiv.org/abs/1112.5745
    Lakshminarayanan et al., 2017, https://arxiv.org/abs/1612.01474
  """
  together = predictive_entropy(logits)
  alone = _entropy(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
  return jnp.maximum(together - alone.mean(0), 0)


def _entropy(log_probabilities):
  # A probability of 0 has a logarithm of -inf and adds nothing.
  terms = jnp.exp(log_probabilities) * log_probabilities
  return -jnp.where(jnp.isneginf(log_probabilities), 0, terms).sum(-1)


def disagreement(logits: jax.Array) -> jax.Array:
  """The share of examples for which two models predict different classes, over all pairs.

  Args:
    logits: float [m, n, classes], m at least 2.

  Returns:
    float32 [].

  Raises:
    ValueError: there are no two models, or logits do not have three axes.

  Example:
    >>> votes = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    >>> round(float(disagreement(votes)), 3)
    0.667

  References:
    Fort et al., 2019, https://arxiv.org/abs/1912.02757
  """
  if jnp.ndim(logits) != 3 or len(logits) < 2:
    raise ValueError(
      f"logits have shape {list(jnp.shape(logits))}: expected [models, n, classes] of at "
      "least two models"
    )
  m, _, classes = logits.shape
  votes = jax.nn.one_hot(jnp.argmax(logits, -1), classes).sum(0)
  same = (votes * (votes - 1)).sum(-1) / (m * (m - 1))
  return 1 - same.mean()


def auroc(scores: jax.Array, positives: jax.Array) -> jax.Array:
  """How well scores separate positives from the others: the area under the ROC curve.

  The share of pairs of a positive and another in which the positive has the larger score;
  equal ones count half.

  Args:
    scores: float [n], finite.
    positives: bool [n].

  Returns:
    float32 [], 0.5 for random scores; NaN where all or none are positive.

  Raises:
    ValueError: shapes do not fit together, or positives are not bool.

  Example:
    >>> float(auroc(jnp.array([0.9, 0.2, 0.4]), jnp.array([True, False, True])))
    1.0

  References:
    Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747
  """
  if jnp.ndim(scores) != 1 or jnp.shape(scores) != jnp.shape(positives):
    raise ValueError(
      f"scores {list(jnp.shape(scores))} and positives {list(jnp.shape(positives))} do not "
      "fit together: expected [n] for both"
    )
  if jnp.asarray(positives).dtype != bool:
    raise ValueError(f"positives are {jnp.asarray(positives).dtype}: expected bool")
  scores = jnp.asarray(scores, jnp.float32)
  others = jnp.sort(jnp.where(positives, jnp.inf, scores))
  below = jnp.searchsorted(others, scores, side="left")
  up_to = jnp.searchsorted(others, scores, side="right")
  shares = (below + up_to) / 2 / jnp.sum(~positives)
  return jnp.sum(jnp.where(positives, shares, 0)) / jnp.sum(positives)


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
