"""Averages whose weights are learned on held-out data."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsms.merges.finite import check_some_finite, without_others
from jaxsms.phases import Weighted, finite_models
from jaxsms.soups import weighted_mean
from jaxsms.trees import PyTree, is_floating, number_of_models, path_names

Loss = Callable[..., jax.Array]


def learned_soup(
  stacked: PyTree,
  loss: Loss,
  data: Sequence[Any] = (),
  *,
  by: str = "model",
  steps: int = 50,
  learning_rate: float = 0.1,
) -> PyTree:
  """Averages with weights that are learned on held-out data.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    loss: `loss(params, *data)` of one model, float []; differentiable.
    data: arrays, such as validation images and labels.
    by: "model" learns one weight for each model, "layer" one for each model and layer (the
      leaves that lie side by side).
    steps: of Adam, at least 1.
    learning_rate: of Adam, on the logits of the weights.

  Returns:
    A tree with leaves [...]: the average with the smallest loss of all that were tried. The
    first one is the uniform average.

  Raises:
    ValueError: leaves disagree on m, or an option is unknown or out of range.
    FloatingPointError: no model is finite.

  References:
    Wortsman et al., 2022, https://arxiv.org/abs/2203.05482 (appendix I, learned soups)

  Example:
    >>> models = {"w": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
    >>> loss = lambda p: jnp.sum((p["w"] - jnp.array([0.2, 0.8])) ** 2)
    >>> soup = learned_soup(models, loss)
    >>> print(soup["w"].round(1))
    [0.2 0.8]
  """
  weights = learned_weights(
    stacked, loss, data, by=by, steps=steps, learning_rate=learning_rate
  )
  return average_by_leaf(stacked, weights)


def weighted_by_learning(stacked: PyTree, loss: Loss, **options: Any) -> Weighted:
  """`learned_soup`, and how much each model is in it: the mean over leaves.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    loss: `loss(params, *data)` of one model, float []; differentiable.
    **options: further arguments of `learned_soup`.

  Returns:
    The soup and its weights, float [m].

  Raises:
    ValueError, FloatingPointError: see `learned_soup`.
  """
  weights = learned_weights(stacked, loss, **options)
  mean = jnp.mean(jnp.stack(jax.tree.leaves(weights)), axis=0)
  return Weighted(average_by_leaf(stacked, weights), mean)


def learned_weights(
  stacked: PyTree,
  loss: Loss,
  data: Sequence[Any] = (),
  *,
  by: str = "model",
  steps: int = 50,
  learning_rate: float = 0.1,
) -> PyTree:
  """The weights of `learned_soup`.

  All arguments are those of `learned_soup`.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    loss: `loss(params, *data)` of one model, float []; differentiable.
    data: arrays, such as validation images and labels.
    by: "model" or "layer": what has a weight of its own.
    steps: of Adam, at least 1.
    learning_rate: of Adam, on the logits of the weights.

  Returns:
    A tree as `stacked`, with leaves float [m] that sum to 1.

  Raises:
    ValueError, FloatingPointError: see `learned_soup`.

  Example:
    >>> models = {"w": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
    >>> loss = lambda p: jnp.sum((p["w"] - jnp.array([0.2, 0.8])) ** 2)
    >>> print(jaxsms.merges.learned_weights(models, loss)["w"].round(1))
    [0.8 0.2]
  """
  number_of_models(stacked)
  if by not in ("model", "layer"):
    raise ValueError(f"by is {by!r}: weights are learned by 'model' or by 'layer'")
  if steps < 1 or not 0 < learning_rate < np.inf:
    raise ValueError(
      f"steps is {steps} and learning_rate {learning_rate}: give at least 1 step, and a "
      "learning rate above 0"
    )
  check_some_finite(stacked)
  return _learn(stacked, tuple(data), learning_rate, loss, by, steps)


@functools.partial(jax.jit, static_argnames=("loss", "by", "steps"))
def _learn(stacked, data, learning_rate, loss, by, steps):
  finite = finite_models(stacked)
  clean = without_others(stacked, finite)
  groups = _layers(stacked) if by == "layer" else [0] * len(jax.tree.leaves(stacked))
  structure = jax.tree.structure(stacked)

  def weights_of(logits):
    rows = jax.nn.softmax(jnp.where(finite, logits, -jnp.inf), axis=-1)
    return jax.tree.unflatten(structure, [rows[group] for group in groups])

  def loss_of(logits):
    return loss(_averaged(clean, weights_of(logits)), *data)

  optimizer = optax.adam(learning_rate)

  def step(carry, _):
    logits, state, best, smallest = carry
    value, gradient = jax.value_and_grad(loss_of)(logits)
    better = value < smallest
    best, smallest = jnp.where(better, logits, best), jnp.where(better, value, smallest)
    updates, state = optimizer.update(gradient, state, logits)
    return (optax.apply_updates(logits, updates), state, best, smallest), None

  logits = jnp.zeros([max(groups) + 1, len(finite)])
  start = logits, optimizer.init(logits), logits, jnp.inf
  # One step more: the last average is to be tried as well.
  (_, _, best, _), _ = jax.lax.scan(step, start, length=steps + 1)
  return weights_of(best)


def _layers(stacked):
  """A number for each leaf, the same for those that lie side by side."""
  owners = [path_names(path)[:-1] for path, _ in jax.tree.leaves_with_path(stacked)]
  numbers: dict[tuple[str, ...], int] = {}
  return [numbers.setdefault(tuple(owner), len(numbers)) for owner in owners]


def average_by_leaf(stacked: PyTree, weights: PyTree) -> PyTree:
  """Averages models with weights of their own for each leaf.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    weights: a tree of the same structure, with leaves float [m]. A weight of 0 leaves a
      model out, also where it holds NaN.

  Returns:
    A tree with leaves [...] of the same dtypes; those that are not floating come from the
    first model.

  Raises:
    ValueError: leaves disagree on m, or the trees in their structure.

  Example:
    >>> models = {"a": jnp.array([[0.0], [4.0]]), "b": jnp.array([[0.0], [4.0]])}
    >>> weights = {"a": jnp.array([0.5, 0.5]), "b": jnp.array([0.25, 0.75])}
    >>> soup = jaxsms.merges.average_by_leaf(models, weights)
    >>> soup["a"].tolist(), soup["b"].tolist()
    ([2.0], [3.0])
  """
  number_of_models(stacked)
  structure: Any = jax.tree.structure(stacked)
  if structure != jax.tree.structure(weights):
    raise ValueError(
      "stacked and weights have different tree structures: give a weight [m] for each leaf"
    )
  return _average(stacked, weights)


def _averaged(stacked, weights):
  def one(leaf, weight):
    return weighted_mean(leaf, weight) if is_floating(leaf) else leaf[0]

  return jax.tree.map(one, stacked, weights)


_average = jax.jit(_averaged)
