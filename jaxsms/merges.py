"""Merges beside the mean: learned and Fisher weights, task vectors, spheres.

Each takes m models, leaves [m, ...], and gives one, so that it fits `merge=` of
`sparse_model_soup` once its other arguments are bound (`functools.partial`). An entry that is
0 in all models is 0 in the result: a shared mask stays exactly as it is. Models with values
that are not finite are left out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsms.selection import keep_largest, magnitude_key
from jaxsms.sms import finite_models
from jaxsms.soups import uniform_soup
from jaxsms.trees import (
  PyTree,
  is_concrete,
  is_floating,
  is_parameter,
  number_of_models,
  path_names,
)

Loss = Callable[..., jax.Array]
SquaredGradients = PyTree | Callable[[PyTree], PyTree]


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
    A tree with leaves [...]: of all averages on the way, the uniform one at its start among
    them, that of the smallest loss.

  Raises:
    ValueError: leaves disagree on m, or an option is unknown or out of range.
    FloatingPointError: no model is finite.

  References:
    Wortsman et al., 2022, https://arxiv.org/abs/2203.05482 (appendix I, learned soups)

  Example:
    >>> models = {"w": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
    >>> soup = learned_soup(models, lambda p: jnp.sum((p["w"] - jnp.array([0.2, 0.8])) ** 2))
    >>> print(soup["w"].round(1))
    [0.2 0.8]
  """
  weights = learned_weights(
    stacked, loss, data, by=by, steps=steps, learning_rate=learning_rate
  )
  return average_by_leaf(stacked, weights)


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

  Args:
    stacked: see `learned_soup`, like all others.
    loss: the same.
    data: the same.
    by: the same.
    steps: the same.
    learning_rate: the same.

  Returns:
    A tree as `stacked`, with leaves float [m] that sum to 1.

  Raises:
    ValueError: see `learned_soup`.
    FloatingPointError: the same.
  """
  number_of_models(stacked)
  if by not in ("model", "layer"):
    raise ValueError(f"by is {by!r}: weights are learned by 'model' or by 'layer'")
  if steps < 1 or not 0 < learning_rate < np.inf:
    raise ValueError(
      f"steps is {steps} and learning_rate {learning_rate}: give at least 1 step, and a "
      "learning rate above 0"
    )
  _check_some_finite(stacked)
  return _learn(stacked, tuple(data), learning_rate, loss, by, steps)


@functools.partial(jax.jit, static_argnames=("loss", "by", "steps"))
def _learn(stacked, data, learning_rate, loss, by, steps):
  finite = finite_models(stacked)
  clean = _without_others(stacked, finite)
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
  owners = [
    path_names(path)[:-1] for path, _ in jax.tree_util.tree_leaves_with_path(stacked)
  ]
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
  """
  number_of_models(stacked)
  if jax.tree.structure(stacked) != jax.tree.structure(weights):
    raise ValueError(
      "stacked and weights have different tree structures: give a weight [m] for each leaf"
    )
  return _average(stacked, weights)


def _averaged(stacked, weights):
  def one(leaf, weight):
    if not is_floating(leaf):
      return leaf[0]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    weight = weight.astype(wide).reshape([-1] + [1] * (leaf.ndim - 1))
    values = jnp.where(weight == 0, 0, leaf.astype(wide))
    return jnp.sum(weight * values, axis=0).astype(leaf.dtype)

  return jax.tree.map(one, stacked, weights)


_average = jax.jit(_averaged)


def fisher_soup(
  stacked: PyTree,
  squared_gradients: SquaredGradients,
  weights: jax.Array | None = None,
  *,
  prior: float = 0.0,
  examples: int = 1,
) -> PyTree:
  """Averages each entry with weights from its squared gradients.

  The weight of a model's entry is `weights * (examples * squared gradient + prior)`. With a
  `prior` of 0 these are Fisher weights; with a prior precision and the number of training
  examples they are inverse variances of the models' Laplace approximations. Entries whose
  weights are 0 in all models are averaged uniformly.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    squared_gradients: the diagonals of the models' Fisher matrices: a tree with leaves
      [m, ...], or a function of one model that gives its own, see `diagonal_fisher`.
    weights: float [m], 0 or above; None means equal ones.
    prior: precision of the prior, 0 or above.
    examples: how many the models were trained on.

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
  if not 0 <= prior < np.inf or not 0 < examples < np.inf:
    raise ValueError(
      f"prior is {prior} and examples {examples}: give a precision of 0 or above, and how "
      "many examples the models were trained on"
    )
  weights = jnp.ones([m]) if weights is None else jnp.asarray(weights)
  if weights.shape != (m,):
    raise ValueError(
      f"weights has shape {list(weights.shape)} for {m} models: give one weight each"
    )
  finite = _check_some_finite(stacked)
  clean = _without_others(stacked, finite)
  if callable(squared_gradients):
    squared_gradients = jax.lax.map(squared_gradients, clean)
  leaves, others = map(jax.tree.leaves, (stacked, squared_gradients))
  if [np.shape(x) for x in leaves] != [np.shape(x) for x in others]:
    raise ValueError(
      "stacked and squared_gradients have different leaves: give one squared gradient for "
      "each entry of each model"
    )
  return _fisher(clean, squared_gradients, jnp.where(finite, weights, 0), prior, examples)


@jax.jit
def _fisher(stacked, squares, weights, prior, examples):
  def one(path, leaf, square):
    if not is_floating(leaf):
      return leaf[0]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    weight = weights.astype(wide).reshape([-1] + [1] * (leaf.ndim - 1))
    precision = weight
    if is_parameter(path, leaf):
      precision = weight * (examples * square.astype(wide) + prior)
    return precision_average(jnp, leaf.astype(wide), precision, weight).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, stacked, squares)


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
  """
  n = len(inputs)
  if not n:
    raise ValueError("there are no inputs: give some examples, such as training images")
  leaves, structure = jax.tree.flatten(params)
  chosen = [is_floating(leaf) for leaf in leaves]

  def log_probability(trained, one, key):
    filled = iter(trained)
    full = [next(filled) if flag else x for x, flag in zip(leaves, chosen, strict=True)]
    scores = logits(jax.tree.unflatten(structure, full), one[None])[0]
    label = jax.lax.stop_gradient(jax.random.categorical(key, scores))
    return jax.nn.log_softmax(scores.astype(jnp.float32))[label]

  trained = [x for x, flag in zip(leaves, chosen, strict=True) if flag]

  def squared(now):
    gradient = jax.grad(log_probability)(trained, *now)
    return [x.astype(jnp.float32) ** 2 for x in gradient]

  pairs = inputs, jax.random.split(key, n)
  size = min(batch_size, n)
  whole = n - n % size
  totals = [jnp.zeros(x.shape, jnp.float32) for x in trained]

  def add(totals, batch):
    return [a + jnp.sum(b, axis=0) for a, b in zip(totals, jax.vmap(squared)(batch))]

  batches = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), pairs)
  totals, _ = jax.lax.scan(lambda t, batch: (add(t, batch), None), totals, batches)
  if whole < n:
    totals = add(totals, jax.tree.map(lambda x: x[whole:], pairs))
  means = iter(totals)
  return jax.tree.unflatten(
    structure,
    [
      next(means) / n if flag else jnp.zeros(np.shape(x), jnp.float32)
      for x, flag in zip(leaves, chosen, strict=True)
    ],
  )


def task_arithmetic(
  stacked: PyTree, base: PyTree, weights: jax.Array | None = None, *, scale: float = 1.0
) -> PyTree:
  """Adds the models' mean difference from a base model to it.

  Args:
    stacked: tree whose leaves have shape [m, ...].
    base: the model that they were all trained from, leaves [...].
    weights: float [m], summing to 1; None means 1/m each.
    scale: of the difference; 1 gives the weighted mean, m the sum of all differences.

  Returns:
    A tree with leaves [...]; those that are no parameters are averaged plainly.

  Raises:
    ValueError: trees or shapes disagree, or `scale` is not finite.
    FloatingPointError: no model is finite.

  References:
    Ilharco et al., 2023, https://arxiv.org/abs/2212.04089

  Example:
    >>> models = {"w": jnp.array([[1.0, 0.0], [3.0, 0.0]])}
    >>> print(task_arithmetic(models, {"w": jnp.array([1.0, 5.0])}, scale=0.5)["w"])
    [1.5 0. ]
  """
  _check_base(stacked, base, scale)
  finite = _check_some_finite(stacked)
  clean = _without_others(stacked, finite)
  weights = jnp.ones(len(finite)) if weights is None else jnp.asarray(weights)
  kept = jnp.where(finite, weights, 0)
  return _moved(clean, base, uniform_soup(clean, kept / kept.sum()), scale)


def ties(
  stacked: PyTree, base: PyTree, *, density: float = 0.2, scale: float = 1.0
) -> PyTree:
  """Adds what the models agree on, of their differences from a base model, to it.

  Of each model's differences the largest are kept (trim); for each entry the sign of their
  sum is chosen (elect sign); those of that sign are averaged (disjoint mean).

  Args:
    stacked: tree whose leaves have shape [m, ...].
    base: the model that they were all trained from, leaves [...].
    density: share of a model's differences that is kept, in (0, 1].
    scale: of what is added.

  Returns:
    A tree with leaves [...]; those that are no parameters are averaged plainly.

  Raises:
    ValueError: trees or shapes disagree, or an argument is out of range.
    FloatingPointError: no model is finite.

  References:
    Yadav et al., 2023, https://arxiv.org/abs/2306.01708

  Example:
    >>> models = {"w": jnp.array([[3.0, 1.0], [-1.0, 1.0]])}
    >>> print(ties(models, {"w": jnp.zeros(2)}, density=1.0)["w"])
    [3. 1.]
  """
  _check_base(stacked, base, scale)
  if not 0 < density <= 1:
    raise ValueError(f"density is {density}: it is the share that is kept, in (0, 1]")
  finite = _check_some_finite(stacked)
  clean = _without_others(stacked, finite)
  return _ties(clean, base, finite, density, scale)


@functools.partial(jax.jit, static_argnames="density")
def _ties(stacked, base, finite, density, scale):
  flat = jax.tree_util.tree_leaves_with_path(stacked)
  numbers = [i for i, (path, leaf) in enumerate(flat) if is_parameter(path, leaf)]
  bases = jax.tree.leaves(base)
  tasks = []
  for i in numbers:
    leaf = flat[i][1]
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    task = leaf.astype(wide) - bases[i].astype(wide)
    chosen = finite.reshape([-1] + [1] * (leaf.ndim - 1))
    tasks.append(jnp.where(chosen & (leaf != 0).any(0), task, 0))
  total = sum(bases[i].size for i in numbers)
  goal = total - round(density * total)

  def trim(one):
    kept = keep_largest(one, [None] * len(one), goal, magnitude_key)
    return [jnp.where(mask, x, 0) for mask, x in zip(kept, one, strict=True)]

  trimmed = jax.vmap(trim)(tasks)
  moved = [agreed(jnp, x) for x in trimmed]
  weights = finite / finite.sum()
  mean = uniform_soup(stacked, weights)
  leaves = jax.tree.leaves(mean)
  for i, move in zip(numbers, moved, strict=True):
    leaf, wide = flat[i][1], move.dtype
    value = bases[i].astype(wide) + scale * move
    leaves[i] = jnp.where((leaf != 0).any(0), value, 0).astype(leaf.dtype)
  return jax.tree.unflatten(jax.tree.structure(stacked), leaves)


def agreed(numpy: Any, differences: Any) -> Any:
  """The mean of those differences [m, ...] that have the sign of their sum, [...]."""
  sign = numpy.sign(numpy.sum(differences, axis=0))
  same = (numpy.sign(differences) == sign) & (sign != 0)
  total = numpy.sum(numpy.where(same, differences, 0), axis=0)
  return total / numpy.maximum(numpy.sum(same, axis=0), 1).astype(total.dtype)


def slerp(stacked: PyTree, t: float = 0.5) -> PyTree:
  """Goes from one model to another along a great circle, leaf by leaf.

  Args:
    stacked: tree whose leaves have shape [2, ...].
    t: where, 0 at the first model and 1 at the second.

  Returns:
    A tree with leaves [...]; those that are no parameters are interpolated linearly. Where
    one of the two models is not finite, the other.

  Raises:
    ValueError: there are not two models, or `t` is not in [0, 1].
    FloatingPointError: no model is finite.

  References:
    Shoemake, 1985, https://doi.org/10.1145/325165.325242

  Example:
    >>> print(slerp({"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])})["w"].round(3))
    [0.707 0.707]
  """
  m = number_of_models(stacked)
  if m > 2:
    raise ValueError(
      f"there are {m} models: slerp goes from one model to another, give two"
    )
  if not 0 <= t <= 1:
    raise ValueError(f"t is {t}: it is 0 at the first model and 1 at the second")
  finite = _check_some_finite(stacked)
  if m == 1:
    return jax.tree.map(lambda x: x[0], stacked)
  return _slerp(_without_others(stacked, finite), finite, t)


@jax.jit
def _slerp(stacked, finite, t):
  t = jnp.where(finite.all(), t, finite[1].astype(jnp.float32))

  def one(path, leaf):
    if not is_floating(leaf):
      return leaf[0]
    first, second = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    a, b = 1 - t, t
    if is_parameter(path, leaf):
      products = [
        jnp.vdot(x, y) for x, y in ((first, first), (first, second), (second, second))
      ]
      a, b = arc_weights(jnp, *products, t)
    return (a * first + b * second).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, stacked)


def arc_weights(numpy: Any, first: Any, both: Any, second: Any, t: Any) -> tuple[Any, Any]:
  """The weights of two vectors on the arc between them.

  Args:
    numpy: `numpy` or `jax.numpy`.
    first: the product of the first vector with itself.
    both: of both.
    second: of the second with itself.
    t: where on the arc, from 0 to 1.

  Returns:
    Two weights; those of a straight line where the vectors are parallel, or one is 0.
  """
  length = numpy.sqrt(first * second)
  cosine = numpy.clip(both / numpy.where(length > 0, length, 1), -1, 1)
  angle = numpy.arccos(cosine)
  sine = numpy.sin(angle)
  straight = (length == 0) | (sine < 1e-4)
  safe = numpy.where(straight, 1, sine)
  a = numpy.where(straight, 1 - t, numpy.sin((1 - t) * angle) / safe)
  b = numpy.where(straight, t, numpy.sin(t * angle) / safe)
  return a, b


def _check_base(stacked, base, scale):
  number_of_models(stacked)
  shapes = [np.shape(x)[1:] for x in jax.tree.leaves(stacked)]
  if shapes != [np.shape(x) for x in jax.tree.leaves(base)]:
    raise ValueError(
      "stacked and base have different leaves: give the model that all were trained from"
    )
  if is_concrete(scale) and not np.isfinite(scale):
    raise ValueError(f"scale is {scale}: it must be finite")


@jax.jit
def _moved(stacked, base, mean, scale):
  """base + scale * (mean - base), 0 where all models are."""

  def one(path, leaf, origin, target):
    if not is_parameter(path, leaf):
      return target
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    origin, target = origin.astype(wide), target.astype(wide)
    value = origin + scale * (target - origin)
    return jnp.where((leaf != 0).any(0), value, 0).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, stacked, base, mean)


def _check_some_finite(stacked):
  """bool [m]; FloatingPointError where it can be seen that no model is finite."""
  finite = finite_models(stacked)
  if is_concrete(finite) and not np.asarray(finite).any():
    raise FloatingPointError(f"none of the {len(finite)} models has finite values alone")
  return finite


@jax.jit
def _without_others(stacked, finite):
  """The models with 0 for all of one that is not finite."""

  def one(leaf):
    chosen = finite.reshape([-1] + [1] * (leaf.ndim - 1))
    return jnp.where(chosen, leaf, jnp.zeros((), leaf.dtype)) if is_floating(leaf) else leaf

  return jax.tree.map(one, stacked)
