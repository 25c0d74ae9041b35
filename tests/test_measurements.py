"""Measurements of models, against NumPy and counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.metrics import roc_auc_score
from test_training import Tiny, make_data, make_programs

from jaxsms import training
from jaxsms.training import Engine, Model, Splits
from jaxsms.training.measurements import (
  describe_weights,
  measure,
  ood_metrics,
  set_record,
)


@pytest.fixture
def params():
  kernel = np.array([[3.0, 0.0, -1.0], [0.5, -4.0, 0.0]], np.float32)
  return {
    "Dense_0": {"kernel": kernel, "bias": np.array([0.0, 1.0, 2.0], np.float32)},
    "Dense_1": {"kernel": np.array([[2.0], [0.0], [0.0], [12.0]], np.float32)},
  }


def test_counts_sparsities_and_costs(params):
  found = describe_weights(params, 0.5, {"Dense_0/kernel": 600, "Dense_1/kernel": 4})
  assert found["sparsity"] == pytest.approx(4 / 10)
  assert found["overall_sparsity"] == pytest.approx(5 / 13)
  assert found["layer_sparsities"] == pytest.approx(
    {"Dense_0/kernel": 1 / 3, "Dense_1/kernel": 0.5}
  )
  assert (found["parameters"], found["nonzero_parameters"]) == (13, 8)
  assert (found["multiply_adds"], found["sparse_multiply_adds"]) == (604, 402)
  assert found["theoretical_speedup"] == pytest.approx(604 / 402)
  assert "multiply_adds" not in describe_weights(params, 0.5)


def test_distances_to_the_origin_and_to_being_pruned(params):
  # Prunable: 3, 0, 1, 0.5, 4, 0, 2, 0, 0, 12. Seven of ten go: zeros, 0.5, 1 and 2.
  found = describe_weights(params, 0.7)
  norm = np.sqrt(9 + 1 + 0.25 + 16 + 4 + 144)
  assert found["distance_to_origin"] == pytest.approx(norm)
  assert found["distance_to_pruned"] == pytest.approx(np.sqrt(0.25 + 1 + 4))
  assert found["relative_distance_to_pruned"] == pytest.approx(np.sqrt(5.25) / norm)
  assert describe_weights(params, 0.4)["distance_to_pruned"] == 0  # sparse enough


def test_ood_is_the_mean_over_corruptions_of_means_over_severities():
  found = ood_metrics(
    {
      "fog": [
        {"ood_accuracy": 0.8, "ood_loss": 1.0},
        {"ood_accuracy": 0.4, "ood_loss": 3.0},
      ],
      "snow": [{"ood_accuracy": 0.2, "ood_loss": 4.0}],
    }
  )
  assert found["ood"]["fog"] == pytest.approx({"accuracy": 0.6, "loss": 2.0})
  assert found["ood"]["snow"] == pytest.approx({"accuracy": 0.2, "loss": 4.0})
  assert found["ood_accuracy"] == pytest.approx(0.4)  # not 1.4 / 3
  assert found["ood_loss"] == pytest.approx(3.0)


def test_mean_and_largest_of_single_metrics():
  scores = [{"a": 1, "by": {"x": 2.0}}, {"a": 4, "by": {"x": 0.0}}]
  found = set_record(scores, {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])})
  assert found["mean_candidate"] == {"a": 2.5, "by": {"x": 1.0}}
  assert found["max_candidate"] == {"a": 4.0, "by": {"x": 2.0}}
  assert found["geometry"]["mean_l2_distance"] == pytest.approx(5)
  assert found["geometry"]["mean_angle"] == pytest.approx(90)


@pytest.mark.slow
def test_every_model_and_the_ensemble_on_every_split():
  programs, data = make_programs(), make_data(11, 1)
  one = training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1))
  models = Model(*jax.tree.map(lambda x: jnp.stack([x, x / 2]), one))
  darker = training.Data(data.images // 2, data.labels)
  splits = Splits(
    make_data(9),
    data,
    make_data(8, 2),
    {"dark": [lambda: data, lambda: darker]},
    ("train",),
  )
  calls = []

  def describe(params):
    calls.append(params["Dense_0"]["kernel"])
    return {"norm": 1.0}

  scores, ensemble, predictions, uncertainty = measure(
    Engine(programs, splits, describe), models
  )
  assert set(predictions) == {"validation", "test", "train"}
  # As if measured as other splits.
  again = measure(Engine(programs, Splits(data, darker, data)), models)
  for found, expected in (
    *zip(scores, again.scores, strict=True), (ensemble, again.ensemble)
  ):  # fmt: skip
    both = expected["test_accuracy"], expected["validation_accuracy"]
    assert found["ood"]["dark"]["accuracy"] == pytest.approx(np.mean(both))
    assert found["ood_accuracy"] == pytest.approx(np.mean(both))
    assert {"train_loss", "test_loss", "validation_loss", "ood_loss"} <= set(found)
  # The ensemble by hand.
  logits = np.asarray(predictions["test"].logits, np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  labels = np.asarray(predictions["test"].labels)
  p = p.mean(0)[np.arange(len(labels)), labels]
  assert ensemble["test_loss"] == pytest.approx(-np.log(p).mean(), rel=1e-5)
  assert "norm" not in ensemble
  assert [s["norm"] for s in scores] == [1.0, 1.0]
  assert (calls[0] == 2 * calls[1]).all()
  # Corrupted data told by the ensemble's entropy: the mean over both severities.
  entropies = []
  for of in (
    predictions["test"],
    again.predictions["validation"],
    again.predictions["test"],
  ):
    p = scipy.special.softmax(np.asarray(of.logits, np.float64), -1).mean(0)
    entropies.append(scipy.special.entr(p).sum(-1))
  clean, *corrupted = entropies
  told = [
    roc_auc_score(np.repeat([0, 1], [len(clean), len(one)]), np.concatenate([clean, one]))
    for one in corrupted
  ]
  found = uncertainty["corrupted"]["dark"]["auroc_of_entropy"]
  assert found == pytest.approx(np.mean(told), abs=1e-5)
  classes = logits.argmax(-1)
  assert uncertainty["test"]["disagreement"] == pytest.approx(
    np.mean(classes[0] != classes[1])
  )
  assert uncertainty["test"]["predictive_entropy"] == pytest.approx(clean.mean(), rel=1e-4)
  p = scipy.special.softmax(logits, -1).mean(0)
  expected = roc_auc_score(p.argmax(-1) != labels, clean)
  assert uncertainty["test"]["error_auroc_of_entropy"] == pytest.approx(expected, abs=1e-5)
  # One model is its own ensemble.
  one_model = Model(*jax.tree.map(lambda x: x[None], one))
  alone = measure(Engine(programs, Splits(data, data, data)), one_model)
  assert alone.ensemble == alone.scores[0]
  assert alone.uncertainty == {}
