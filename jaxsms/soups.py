"""From m models to one: averages, and averages of predictions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.checks import check_outside_jit, check_weights
from jaxsms.trees import (
  PyTree,
  is_array,
  is_concrete,
  is_floating,
  model_at,
  number_of_models,
  wait_on_cpu,
)


def uniform_soup(stacked: PyTree, weights: jax.Array | np.ndarray | None = None) -> PyTree:
  """Averages m models into one.

  Sums run in float32 (float64 for float64 leaves). A model with weight 0 is left out,
  even if it holds NaN. The gradient with respect to its weight uses its finite values.
  Leaves that are not floating-point (counters, keys, functions) come from the first
  model.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    weights: float [m], summing to 1; None means 1/m each.

  Returns:
    A tree with leaves [...] of the same dtypes. If all m models share a mask, the soup
    has this mask.

  Raises:
    ValueError: leaves disagree on m, or `weights` does not have length m, does not sum
      to 1, or is not finite.

  References:
    Wortsman et al., 2022, https://arxiv.org/abs/2203.05482
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788 (a shared mask keeps the
    average sparse)

  Example:
    >>> models = {"kernel": jnp.array([[1.0, 2.0], [3.0, 6.0]])}  # of two models
    >>> jaxsms.uniform_soup(models)["kernel"].tolist()
    [2.0, 4.0]
    >>> jaxsms.uniform_soup(models, np.array([0.75, 0.25]))["kernel"].tolist()
    [1.5, 3.0]
  """
  m = number_of_models(stacked)
  check_weights(weights, m)
  if weights is None:
    weights = jnp.full([m], 1 / m)
  elif is_concrete(weights) and not abs(float(np.sum(weights)) - 1) < 1e-3:
    raise ValueError(
      f"weights sum to {float(np.sum(weights)):g}: they must be finite and sum to 1"
    )
  leaves, structure = jax.tree.flatten(stacked)
  floating = [leaf for leaf in leaves if is_floating(leaf)]
  means = iter(wait_on_cpu(_weighted_means(floating, jnp.asarray(weights))))

  def mean(leaf):
    if is_floating(leaf):
      return next(means)
    return leaf[0] if is_array(leaf) else leaf

  return jax.tree.unflatten(structure, [mean(leaf) for leaf in leaves])


@jax.jit
def _weighted_means(leaves: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
  return [weighted_mean(leaf, weights) for leaf in leaves]


def weighted_mean(leaf: jax.Array, weights: jax.Array) -> jax.Array:
  """The mean [...] of a leaf [m, ...], with weights [m] that sum to 1."""
  accumulate = jnp.promote_types(leaf.dtype, jnp.float32)
  shape = (-1,) + (1,) * (leaf.ndim - 1)
  weights = weights.astype(accumulate).reshape(shape)
  # 0 times NaN is NaN. Values that are finite stay, for the gradient in their weight.
  left_out = (weights == 0) & ~jnp.isfinite(leaf)
  values = jnp.where(left_out, 0, leaf.astype(accumulate))
  return jnp.sum(weights * values, axis=0).astype(leaf.dtype)


def greedy_soup(
  stacked: PyTree, evaluate: Callable[[PyTree], float]
) -> tuple[PyTree, list[int]]:
  """Averages the models that do not lower the score, tried from best to worst.

  The models are sorted by `evaluate`, best first, earlier ones first among equals. The
  soup starts as the best one. Each next model is taken if the average with it is at
  least as good as the soup so far.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    evaluate: returns the score of one model (leaves [...]), such as its validation
      accuracy. Higher is better. It is not traced, so it may run any code. A model that
      scores NaN is never taken.

  Returns:
    The soup, a tree with leaves [...], and the indices of the models in it, in the order
    in which they were taken. One index means that no average was as good as the best
    model alone.

  Raises:
    ValueError: leaves disagree on m, no model has a score, or values are traced.

  References:
    Wortsman et al., 2022, https://arxiv.org/abs/2203.05482, recipe 1

  Example:
    >>> models = {"kernel": jnp.array([[1.0], [2.0], [9.0]])}  # of three models
    >>> evaluate = lambda params: -abs(params["kernel"][0] - 1.5)  # best at 1.5
    >>> soup, taken = jaxsms.greedy_soup(models, evaluate)
    >>> soup["kernel"].tolist(), taken
    ([1.5], [0, 1])
  """
  check_outside_jit(
    "greedy_soup",
    stacked,
    "call it outside of jit, or uniform_soup(stacked, weights) inside",
  )
  m = number_of_models(stacked)
  scores = np.array([float(evaluate(model_at(stacked, i))) for i in range(m)])
  order = [int(i) for i in np.argsort(-scores, kind="stable") if not np.isnan(scores[i])]
  if not order:
    raise ValueError(f"evaluate gave NaN for all {m} models: there is no best one")
  taken, best = [order[0]], scores[order[0]]
  soup = uniform_soup(stacked, soup_weights(taken, m))
  for index in order[1:]:
    trial = uniform_soup(stacked, soup_weights([*taken, index], m))
    score = float(evaluate(trial))
    if score >= best:
      soup, taken, best = trial, [*taken, index], score
  return soup, taken


def soup_weights(indices: list[int], m: int) -> np.ndarray:
  """float [m]: equal weights at the indices, 0 elsewhere."""
  weights = np.zeros([m])
  weights[list(indices)] = 1 / len(indices)
  return weights


def prediction_ensemble(logits: jax.Array) -> jax.Array:
  """The mean of m models' class probabilities.

  Args:
    logits: float [m, n, classes].

  Returns:
    Log-probabilities, float32 [n, classes]. They can be used in place of logits.

  Raises:
    ValueError: logits do not have three axes.

  Example:
    >>> probabilities = jnp.array([[[0.2, 0.8]], [[0.6, 0.4]]])  # two models, one example
    >>> print(jnp.exp(jaxsms.prediction_ensemble(jnp.log(probabilities))).round(3))
    [[0.4 0.6]]
  """
  if jnp.ndim(logits) != 3:
    raise ValueError(
      f"logits have shape {list(jnp.shape(logits))}: expected [models, n, classes]"
    )
  log_probabilities = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
  return wait_on_cpu(jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(len(logits)))
