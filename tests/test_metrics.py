import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

import jaxsms
from jaxsms import (
  accuracy,
  balanced_accuracy,
  calibration_error,
  class_accuracies,
  cross_entropy,
  worst_class_accuracy,
)

N, CLASSES = 60, 5
METRICS = (
  accuracy,
  cross_entropy,
  class_accuracies,
  balanced_accuracy,
  worst_class_accuracy,
  calibration_error,
)


def predictions(seed, missing=()):
  """Logits that are right more often than not, and labels without some classes."""
  rng = np.random.default_rng(seed)
  present = [c for c in range(CLASSES) if c not in missing]
  labels = rng.choice(present, N).astype(np.int32)
  logits = rng.standard_normal((N, CLASSES)) * rng.uniform(0.1, 5)
  logits[np.arange(N), labels] += rng.uniform(0, 2)
  return logits.astype(np.float32), labels


def calibration_by_hand(confidence, hits, bins):
  """ECE and MCE by looping over the bins (k / bins, (k + 1) / bins]."""
  gaps, shares = [], []
  for k in range(bins):
    inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
    if inside.any():
      gaps.append(abs(confidence[inside].mean() - hits[inside].mean()))
      shares.append(inside.mean())
  return np.dot(gaps, shares), max(gaps)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(), (0,), (4,), (1, 2), (0, 3, 4)]))
def test_accuracies_equal_scikit_learn(seed, missing):
  logits, labels = predictions(seed, missing)
  predicted = logits.argmax(1)
  present = sorted(set(labels.tolist()))
  recall = sklearn.metrics.recall_score(
    labels, predicted, labels=present, average=None, zero_division=0
  )
  assert float(accuracy(logits, labels)) == pytest.approx(
    sklearn.metrics.accuracy_score(labels, predicted), abs=1e-6
  )
  assert float(balanced_accuracy(logits, labels)) == pytest.approx(recall.mean(), abs=1e-6)
  assert float(worst_class_accuracy(logits, labels)) == pytest.approx(
    recall.min(), abs=1e-6
  )
  by_class = np.full(CLASSES, np.nan)
  by_class[present] = recall
  np.testing.assert_allclose(class_accuracies(logits, labels), by_class, atol=1e-6)
  loss = sklearn.metrics.log_loss(
    labels, scipy.special.softmax(logits.astype(float), axis=1), labels=range(CLASSES)
  )
  assert float(cross_entropy(logits, labels)) == pytest.approx(loss, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bins", [1, 2, 15])
@given(seed=st.integers(0, 2**32 - 1))
def test_calibration_errors_equal_a_loop_over_bins(bins, seed):
  logits, labels = predictions(seed)
  probabilities = scipy.special.softmax(logits, axis=1)
  hits = (logits.argmax(1) == labels).astype(float)
  ece, mce = calibration_by_hand(probabilities.max(1), hits, bins)
  assert float(calibration_error(logits, labels, bins)) == pytest.approx(ece, abs=1e-5)
  assert float(calibration_error(logits, labels, bins, "max")) == pytest.approx(
    mce, abs=1e-5
  )


def test_one_bin_compares_mean_confidence_with_accuracy():
  logits, labels = predictions(0)
  confidence = scipy.special.softmax(logits, axis=1).max(1).mean()
  gap = abs(confidence - float(accuracy(logits, labels)))
  for norm in ("l1", "max"):
    assert float(calibration_error(logits, labels, 1, norm)) == pytest.approx(gap, abs=1e-5)


def test_confidence_exactly_at_an_edge_belongs_to_the_bin_below():
  # Confidence 1/2, wrong, and 3/5, right: in two bins they are apart, (0, 1/2] first.
  logits = np.array([[0.0, 0.0], [math.log(0.6), math.log(0.4)]], np.float32)
  labels = np.array([1, 0])
  assert float(calibration_error(logits, labels, 2, "max")) == pytest.approx(0.5)
  assert float(calibration_error(logits, labels, 2)) == pytest.approx((0.5 + 0.4) / 2)


@pytest.mark.parametrize("ways", [3, 5, 15])
def test_confidence_exactly_at_an_edge_of_fifteen_bins(ways):
  # An even split over 3, 5 or 15 classes is right on an edge; another example, right
  # where the first is wrong, shares the bin if its confidence lies just below, not above.
  edge = 1 / ways
  for other, expected in (
    (edge - 0.01, abs(edge - 0.005 - 0.5)),
    (edge + 0.01, 1 - (edge + 0.01)),
  ):
    even = [0.0] * ways + [-np.inf] * (30 - ways)
    uneven = [math.log(other)] + [math.log((1 - other) / 29)] * 29
    logits, labels = np.array([even, uneven], np.float32), np.array([29, 0])
    measured = calibration_error(logits, labels, 15, "max")
    assert float(measured) == pytest.approx(expected, abs=1e-5)


def test_certain_predictions():
  logits = np.array([[1000.0, 0], [1000, 0], [0, 1000], [0, 1000]], np.float32)
  labels = np.array([0, 0, 1, 0])
  for norm in ("l1", "max"):
    assert float(calibration_error(logits, labels, norm=norm)) == pytest.approx(0.25)
  assert float(calibration_error(logits[:2], labels[:2])) == 0
  assert np.isfinite(cross_entropy(logits, labels))


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_under_jit_and_vmap_and_in_half_precision(metric):
  pairs = [predictions(seed) for seed in range(3)]
  logits, labels = (np.stack(x) for x in zip(*pairs, strict=True))
  together = jax.jit(jax.vmap(metric))(logits, labels)
  one_by_one = [metric(*pair) for pair in pairs]
  np.testing.assert_allclose(together, one_by_one, rtol=1e-5, atol=1e-6)
  assert one_by_one[0].dtype == np.float32
  for dtype in (jnp.bfloat16, jnp.float16):
    half = jnp.asarray(logits[0], dtype)
    value = metric(half, labels[0])
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, metric(half.astype("f"), labels[0]), rtol=1e-6)


def test_cross_entropy_gradient():
  logits, labels = predictions(1)
  gradient = jax.grad(cross_entropy)(jnp.asarray(logits), labels)
  expected = scipy.special.softmax(logits, axis=1) - np.eye(CLASSES)[labels]
  np.testing.assert_allclose(gradient, expected / N, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_rejects_shapes(metric, rejects):
  with rejects("logits [3, 2] and labels [4] do not fit together"):
    metric(np.ones((3, 2)), np.zeros(4, int))
  with rejects("expected [n, classes] and [n]"):
    metric(np.ones(3), np.zeros(3, int))
  with rejects("labels are float32: expected integers"):
    metric(np.ones((3, 2)), np.zeros(3, np.float32))
  with rejects("there are no examples"):
    metric(np.ones((0, 2)), np.zeros(0, int))


def test_rejects_other_arguments(rejects):
  logits, labels = predictions(0)
  with rejects("unknown norm 'l2': known are l1, max"):
    calibration_error(logits, labels, norm="l2")
  for bins in (0, -1):
    with rejects(f"bins is {bins}: at least 1 is needed"):
      calibration_error(logits, labels, bins)


def test_agreement(rejects):
  a = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
  b = jnp.array([[0.0, 9.0], [0.0, 1.0], [2.0, 3.0], [1.0, 0.0]])
  assert float(jaxsms.agreement(a, b)) == 0.75
  with rejects("expected [n, classes] for both"):
    jaxsms.agreement(a, b[:2])


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5]))
def test_spread_of_models_equals_scipy(seed, m):
  rng = np.random.default_rng(seed)
  logits = (rng.standard_normal((m, N, CLASSES)) * rng.uniform(0.1, 20)).astype(np.float32)
  p = scipy.special.softmax(logits.astype(np.float64), -1)
  entropy = scipy.special.entr(p.mean(0)).sum(-1)
  np.testing.assert_allclose(jaxsms.predictive_entropy(logits), entropy, atol=1e-4)
  found = jaxsms.mutual_information(logits)
  np.testing.assert_allclose(
    found, entropy - scipy.special.entr(p).sum(-1).mean(0), atol=2e-4
  )
  assert (np.asarray(found) >= 0).all()
  if m > 1:
    classes = logits.argmax(-1)
    pairs = [(i, j) for i in range(m) for j in range(i)]
    by_hand = np.mean([(classes[i] != classes[j]).mean() for i, j in pairs])
    assert float(jaxsms.disagreement(logits)) == pytest.approx(by_hand, abs=1e-6)


def test_a_model_that_is_certain_has_no_entropy():
  logits = np.array([[[200.0, 0.0], [np.inf, 0.0][::-1]]], np.float32)[:, :1]
  assert float(jaxsms.predictive_entropy(logits)[0]) == 0
  assert float(jaxsms.mutual_information(np.repeat(logits, 2, 0))[0]) == 0


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_auroc_equals_scikit_learn(seed, ties):
  rng = np.random.default_rng(seed)
  positives = rng.random(N) < rng.uniform(0.1, 0.9)
  positives[:2] = True, False
  scores = rng.standard_normal(N).astype(np.float32) + positives
  scores = scores.round() if ties else scores
  expected = sklearn.metrics.roc_auc_score(positives, scores)
  assert float(jaxsms.auroc(scores, positives)) == pytest.approx(expected, abs=1e-5)
  assert float(jax.jit(jaxsms.auroc)(scores, positives)) == pytest.approx(
    expected, abs=1e-5
  )


def test_auroc_of_one_kind_is_unknown():
  for positives in (np.ones(3, bool), np.zeros(3, bool)):
    assert np.isnan(jaxsms.auroc(np.arange(3.0), positives))


def test_spread_of_what_is_no_models(rejects):
  with rejects("at least two models"):
    jaxsms.disagreement(np.zeros((1, 4, 3), np.float32))
  with rejects("expected [models, n, classes]"):
    jaxsms.predictive_entropy(np.zeros((4, 3), np.float32))
  with rejects("do not fit together: expected [n] for both"):
    jaxsms.auroc(np.zeros(3), np.zeros(2, bool))
  with rejects("positives are int32: expected bool"):
    jaxsms.auroc(np.zeros(3), np.zeros(3, np.int32))
