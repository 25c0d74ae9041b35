"""How much each channel matters: norms, scales of normalization, change of the loss."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.channels.places import channel_leaves
from jaxsms.devices.meshes import fetch
from jaxsms.names import check_name
from jaxsms.trees import Path, PyTree, is_parameter, path_names, split_leaves

Scores = list[np.ndarray]
Score = Callable[[PyTree, Sequence], Scores]

_SCALES = ("scale", "gamma", "weight")


def l2_scores(params: PyTree, groups: Sequence) -> Scores:
  """The L2 norm of all entries of a channel, relative to its group.

  Each norm is divided by the root mean square of the norms of its group, so that channels
  of wide and narrow layers can be compared. Channels of norm 0 do not count in that mean,
  and batch statistics do not count in a norm.

  Args:
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives.

  Returns:
    For each group float64 [size].

  References:
    Li et al., 2017, https://arxiv.org/abs/1608.08710 (norms of filters)
    Fang et al., 2023, https://arxiv.org/abs/2301.12900 (over all places of a channel)

  Example:
    >>> params = {"a": {"kernel": jnp.array([[3.0, 1.0]])},
    ...           "b": {"kernel": jnp.array([[4.0], [7.0]])}}
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 1)))
    >>> scores = jaxsms.l2_scores(params, groups)[0]
    >>> print((scores**2).round(3))  # 9 + 16 and 1 + 49, over their mean
    [0.667 1.333]
  """
  squares = _sums_over_places(params, groups, _squares)
  scores = []
  for square in squares:
    alive = np.count_nonzero(square)
    mean = square.sum() / alive if alive else 1.0
    scores.append(np.sqrt(square / mean))
  return scores


def batch_norm_scores(params: PyTree, groups: Sequence) -> Scores:
  """The magnitude of a channel's scale in a normalization; the mean where it has several.

  Args:
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives.

  Returns:
    For each group float64 [size]; infinite for groups that no normalization scales, so
    that they keep their channels.

  Raises:
    ValueError: no group has a scale.

  References:
    Liu et al., 2017, https://arxiv.org/abs/1708.06519

  Example:
    >>> params = {"kernel": jnp.ones((1, 2)), "scale": jnp.array([0.5, -2.0]),
    ...           "out": jnp.ones((2, 1))}
    >>> apply = lambda p, x: (jnp.tanh(x @ p["kernel"]) * p["scale"]) @ p["out"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 1)))
    >>> jaxsms.batch_norm_scores(params, groups)[0].tolist()
    [0.5, 2.0]
  """
  sums = _sums_over_places(params, groups, _magnitudes, _is_scale)
  counts = _sums_over_places(params, groups, _ones, _is_scale)
  if groups and not any(count.any() for count in counts):
    raise ValueError(
      "score is 'batch_norm', but no channel has a scale of a normalization: use score='l2'"
    )
  return [
    np.where(n > 0, total / np.maximum(n, 1), np.inf)
    for total, n in zip(sums, counts, strict=True)
  ]


def taylor_scores(
  loss: Callable[..., jax.Array], params: PyTree, groups: Sequence, *batch: Any
) -> Scores:
  """How much the loss changes, to first order, when a channel is removed.

  That is |sum of weight * gradient| over all entries of the channel, without batch
  statistics. Pass it to `channel_masks` as
  `score=lambda params, groups: taylor_scores(loss, params, groups, *batch)`.

  Args:
    loss: `loss(params, *batch)` gives a scalar, the mean over the batch.
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives.
    *batch: handed to `loss`.

  Returns:
    For each group float64 [size].

  Raises:
    ValueError: `loss` gives no scalar.

  References:
    Molchanov et al., 2019, https://arxiv.org/abs/1906.10771

  Example:
    >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [5.0]])}
    >>> apply = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 1)))
    >>> loss = lambda p, x: apply(p, x).sum()  # 1 * 3 + 2 * 5, each with two factors
    >>> jaxsms.taylor_scores(loss, params, groups, jnp.ones((1, 1)))[0].tolist()
    [6.0, 20.0]
  """
  trained, filled = split_leaves(params, is_parameter)

  def loss_of(chosen, batch):
    value = loss(filled(chosen), *batch)
    if jnp.shape(value) != ():
      raise ValueError(
        f"loss gave {list(jnp.shape(value))}, not a scalar: take its mean over the batch"
      )
    return value

  chosen = list(map(jnp.asarray, trained))
  products = jax.jit(
    lambda x, batch: jax.tree.map(lambda w, g: (w * g).real, x, jax.grad(loss_of)(x, batch))
  )(chosen, batch)
  sums = _sums_over_places(filled(products), groups, _unchanged)
  return [np.abs(x) for x in sums]


def random_scores(key: jax.Array, params: PyTree, groups: Sequence) -> Scores:
  """Random scores, uniform in [0, 1).

  Args:
    key: a typed key, `jax.random.key(...)`.
    params: not used.
    groups: as `jaxsms.channel_groups` gives.

  Returns:
    For each group float [size].

  Example:
    >>> params = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}
    >>> apply = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 1)))
    >>> [scores.shape for scores in jaxsms.random_scores(jax.random.key(0), params, groups)]
    [(3,)]
  """
  return [
    np.asarray(jax.random.uniform(jax.random.fold_in(key, i), (group.size,)))
    for i, group in enumerate(groups)
  ]


# What `score=` may be called. Taylor scores need a loss and a batch: see `taylor_scores`.
SCORES: dict[str, Callable[..., Scores]] = {
  "l2": l2_scores,
  "batch_norm": batch_norm_scores,
  "random": random_scores,
}


def channel_scores(
  score: str | Score, params: PyTree, groups: Sequence, key: jax.Array | None = None
) -> Scores:
  """The scores of a criterion, by its name or as a function.

  Args:
    score: a name of `SCORES`, or `score(params, groups)` giving float [size] per group.
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives.
    key: for random scores.

  Returns:
    For each group float64 [size].

  Raises:
    ValueError: an unknown name, no key for random scores, or scores that do not fit.
  """
  if callable(score):
    given = list(score(params, groups))
  else:
    check_name("score", score, SCORES)
    if score == "random" and key is None:
      raise ValueError("score is 'random' without a key: pass key=jax.random.key(0)")
    first = (key,) if score == "random" else ()
    given = SCORES[score](*first, params, groups)
  if [np.shape(x) for x in given] != [(group.size,) for group in groups]:
    raise ValueError(
      f"score gave shapes {[np.shape(x) for x in given][:4]} for groups of "
      f"{[group.size for group in groups][:4]} channels: give one float [size] for each"
    )
  scores = [np.asarray(fetch(x), np.float64) for x in given]
  for group, x in zip(groups, scores, strict=True):
    if np.isnan(x).any():
      raise ValueError(f"score gave NaN for channels of {group.places[0][0]}")
  return scores


def _sums_over_places(
  params: PyTree,
  groups: Sequence,
  value: Callable,
  counts: Callable[[Path, Any], bool] = is_parameter,
) -> Scores:
  """For each channel the sum of a value over its entries in the leaves that count.

  Args:
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives.
    value: `value(leaf, axes)` gives an array, and which of its axes those are.
    counts: `counts(path, leaf)`.
  """
  sums = [np.zeros(group.size) for group in groups]
  for place in channel_leaves(params, groups):
    if not counts(place.path, place.leaf):
      continue
    # First the axes that have no channels: what is left is small.
    leaf, axes = value(np.asarray(fetch(place.leaf)), sorted(place.axes))
    for i, axis in enumerate(sorted(place.axes)):
      along = leaf.sum(tuple(a for a in range(leaf.ndim) if a != axes[i]), dtype=np.float64)
      for number, indices in place.axes[axis]:
        sums[number] += along[indices].sum(1)
  return sums


def _squares(leaf: np.ndarray, axes: list[int]):
  """Squares summed over the axes that have no channels, without overflow."""
  size = np.abs(leaf)
  size = size.astype(np.float64 if size.dtype == np.float64 else np.float32, copy=False)
  largest = size.max(initial=0)
  size = np.divide(size, largest or 1)
  others = tuple(a for a in range(leaf.ndim) if a not in axes)
  sums = np.square(size, out=size).sum(others, dtype=np.float64)
  return sums * float(largest) ** 2, list(range(len(axes)))


def _magnitudes(leaf: np.ndarray, axes: list[int]):
  return np.abs(leaf).astype(np.float64), axes


def _ones(leaf: np.ndarray, axes: list[int]):
  return np.ones(leaf.shape), axes


def _unchanged(leaf: np.ndarray, axes: list[int]):
  return leaf.astype(np.float32), axes


def _is_scale(path: Path, leaf: Any) -> bool:
  """Whether a leaf scales the channels of a normalization: one number for each."""
  return (
    is_parameter(path, leaf)
    and sum(n > 1 for n in leaf.shape) <= 1
    and (path_names(path) or [""])[-1] in _SCALES
  )
