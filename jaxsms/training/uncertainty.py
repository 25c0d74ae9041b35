"""How well the spread between models predicts their errors, and detects corrupted data."""

import jax
import jax.numpy as jnp

from jaxsms.devices.meshes import fetch
from jaxsms.metrics import auroc, disagreement, mutual_information, predictive_entropy
from jaxsms.soups import prediction_ensemble


def spread(logits: jax.Array, labels: jax.Array) -> dict[str, float]:
  """How far the predictions of m models are apart, and how well that predicts errors.

  Args:
    logits: float [m, n, classes], m at least 2.
    labels: int [n].

  Returns:
    `disagreement` over pairs of models; the means of `predictive_entropy` and
    `mutual_information`; and the AUROC of each of the two for telling what the ensemble
    gets wrong, `error_auroc_of_entropy` and `error_auroc_of_information`, NaN where it
    gets all right or all wrong.
  """
  return {name: float(value) for name, value in fetch(_spread(logits, labels)).items()}


def detection(clean: jax.Array, corrupted: jax.Array) -> dict[str, float]:
  """How well the spread of m models separates corrupted from clean data.

  Args:
    clean: float [m, n, classes], logits.
    corrupted: float [m, n, classes], logits of other data.

  Returns:
    `auroc_of_entropy` and `auroc_of_information`.
  """
  return {name: float(x) for name, x in fetch(_detection(clean, corrupted)).items()}


def _scores(logits):
  return {
    "entropy": predictive_entropy(logits),
    "information": mutual_information(logits),
  }


@jax.jit
def _spread(logits, labels):
  scores = _scores(logits)
  wrong = jnp.argmax(prediction_ensemble(logits), -1) != labels
  return {
    "disagreement": disagreement(logits),
    "predictive_entropy": scores["entropy"].mean(),
    "mutual_information": scores["information"].mean(),
    **{f"error_auroc_of_{name}": auroc(score, wrong) for name, score in scores.items()},
  }


@jax.jit
def _detection(clean, corrupted):
  clean, corrupted = _scores(clean), _scores(corrupted)
  found = {}
  for name, score in clean.items():
    both = jnp.concatenate([score, corrupted[name]])
    found[f"auroc_of_{name}"] = auroc(both, jnp.arange(len(both)) >= len(score))
  return found
