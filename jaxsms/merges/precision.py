"""Averages with a weight for each entry, its precision: Fisher, inverse variance."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.checks import check_weights
from jaxsms.merges.finite import check_some_finite, without_others
from jaxsms.trees import PyTree, is_floating, is_parameter, number_of_models, split_leaves

SquaredGradients = PyTree | Callable[[PyTree], PyTree]


def fisher_soup(
  stacked: PyTree,
  squared_gradients: SquaredGradients,
  weights: jax.Array | np.ndarray | None = None,
  *,
  prior: float = 0.0,
  data: Sequence[Any] = (),
) -> PyTree:
  """Averages each entry with weights from its squared gradients.

  The weight of a model's entry is `weights * (squared gradient + prior)`. With a `prior` of
  0 these are Fisher weights. With the prior of training they are, up to a factor, the
  inverse variances of the models' Laplace approximations. Entries whose weights are 0 in
  all models are averaged by `weights` alone.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    squared_gradients: the diagonals of the models' Fisher matrices: a tree with leaves
      [m, ...], or a function `f(model, *data)` that gives one model's, see
      `diagonal_fisher`.
    weights: float [m], 0 or above; None means equal ones.
    prior: precision of the prior per training example, 0 or above: the L2 coefficient
      that the models were trained with.
    data: of that function.

  Returns:
    A tree with leaves [...]; those that are no parameters are averaged plainly.

  Raises:
    ValueError: trees or shapes disagree, or an argument is out of range.
    FloatingPointError: no model is finite.

  References:
    Matena and Raffel, 2022, https://arxiv.org/abs/2111.09832
    Daheim et al., 2024, https://arxiv.org/abs/2310.12808 (inverse variances)

  Example:
    >>> models = {"w": jnp.array([[0.0, 0.0], [1.0, 1.0]])}
    >>> print(fisher_soup(models, {"w": jnp.array([[1.0, 3.0], [1.0, 1.0]])})["w"])
    [0.5  0.25]
  """
  m = number_of_models(stacked)
  if not 0 <= prior < np.inf:
    raise ValueError(
      f"prior is {prior}: give 0 or above, such as the L2 coefficient of training"
    )
  check_weights(weights, m)
  weights = jnp.ones([m]) if weights is None else jnp.asarray(weights)
  finite = check_some_finite(stacked)
  clean = without_others(stacked, finite)
  if callable(squared_gradients):
    squared_gradients = _of_each(clean, tuple(data), squared_gradients)
  leaves, others = map(jax.tree.leaves, (stacked, squared_gradients))
  if [np.shape(x) for x in leaves] != [np.shape(x) for x in others]:
    raise ValueError(
      "stacked and squared_gradients have different leaves: give one squared gradient for "
      "each entry of each model"
    )
  return _fisher(clean, squared_gradients, jnp.where(finite, weights, 0), prior)


@functools.partial(jax.jit, static_argnums=2)
def _of_each(stacked, data, squared_gradients):
  return jax.lax.map(lambda model: squared_gradients(model, *data), stacked)


@jax.jit
def _fisher(stacked, squares, weights, prior):
  def one(path, leaf, square):
    if not is_floating(leaf):
      return leaf[0]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    weight = weights.astype(wide).reshape([-1] + [1] * (leaf.ndim - 1))
    precision = weight
    if is_parameter(path, leaf):
      precision = weight * (square.astype(wide) + prior)
    return precision_average(jnp, leaf.astype(wide), precision, weight).astype(leaf.dtype)

  return jax.tree.map_with_path(one, stacked, squares)


def precision_average(numpy: Any, values: Any, precision: Any, weight: Any) -> Any:
  """The average of values [m, ...] by precisions; by `weight` where those are all 0.

  Args:
    numpy: `numpy` or `jax.numpy`.
    values: of m models.
    precision: of their entries.
    weight: of the models, of a shape that broadcasts.

  Returns:
    [...].
  """
  largest = numpy.max(precision, axis=0)
  # Relative to the largest: squares of small gradients have a sum that underflows.
  share = numpy.where(largest > 0, precision / numpy.where(largest > 0, largest, 1), weight)
  return numpy.sum(share * values, axis=0) / numpy.sum(share, axis=0)


def diagonal_fisher(
  key: jax.Array,
  logits: Callable[[PyTree, jax.Array], jax.Array],
  params: PyTree,
  inputs: jax.Array,
  *,
  batch_size: int = 32,
) -> PyTree:
  """The diagonal of a classifier's Fisher matrix: mean squared gradients of one example.

  The labels are drawn from the model's own predictions.

  Args:
    key: typed key, for the labels.
    logits: `logits(params, inputs)` of a batch, float [batch, classes].
    params: of one model.
    inputs: [n, ...].
    batch_size: how many examples' gradients are held at once.

  Returns:
    A tree as `params`, 0 or above; 0 for leaves that are not floating.

  Raises:
    ValueError: there is no input.

  References:
    Kunstner et al., 2019, https://arxiv.org/abs/1905.12558 (labels from the model)

  Example:
    >>> logits = lambda params, x: x @ params["kernel"]  # both classes are equally likely
    >>> params, inputs = {"kernel": jnp.zeros((1, 2))}, jnp.array([[2.0], [2.0]])
    >>> fisher = jaxsms.merges.diagonal_fisher(jax.random.key(0), logits, params, inputs)
    >>> fisher["kernel"].tolist()  # (2 * 0.5)^2
    [[1.0, 1.0]]
  """
  n = len(inputs)
  if not n:
    raise ValueError("there are no inputs: give some examples, such as training images")
  trained, filled = split_leaves(params, lambda path, leaf: is_floating(leaf))

  def log_probability(trained, one, key):
    scores = logits(filled(trained), one[None])[0]
    label = jax.lax.stop_gradient(jax.random.categorical(key, scores))
    return jax.nn.log_softmax(scores.astype(jnp.float32))[label]

  def squared(now):
    gradient = jax.grad(log_probability)(trained, *now)
    return [x.astype(jnp.float32) ** 2 for x in gradient]

  pairs = inputs, jax.random.split(key, n)
  size = min(batch_size, n)
  whole = n - n % size
  totals = [jnp.zeros(x.shape, jnp.float32) for x in trained]

  def add(totals, batch):
    return jax.tree.map(lambda a, b: a + b.sum(0), totals, jax.vmap(squared)(batch))

  batches = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), pairs)
  totals, _ = jax.lax.scan(lambda t, batch: (add(t, batch), None), totals, batches)
  if whole < n:
    totals = add(totals, jax.tree.map(lambda x: x[whole:], pairs))
  full = filled(total / n for total in totals)
  return jax.tree.map(
    lambda x, like: x if is_floating(like) else jnp.zeros(np.shape(x), jnp.float32),
    full,
    params,
  )
