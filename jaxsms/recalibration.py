"""Batch statistics estimated anew, of any framework's network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.trees import (
  PyTree,
  is_concrete,
  is_floating,
  number_of_models,
  path_string,
  split_leaves,
  widened,
)


def recalibrate(
  update: Callable[[PyTree, PyTree], PyTree], batch_stats: PyTree, batches: PyTree
) -> PyTree:
  """Estimates a model's batch statistics anew: the exact mean over some batches.

  Batch statistics of averaged weights are not the average of batch statistics. Networks
  keep a running average, old * momentum + new * (1 - momentum). The momentum of each
  leaf is found from the first batch and taken out, so that `update` is the network's
  forward pass as it is in training. Works inside `jax.jit`, and under `jax.vmap` for
  several models.

  Args:
    update: `update(batch_stats, batch) -> batch_stats`, one forward pass of the model in
      training mode. For linen, it gives what `apply(..., mutable=["batch_stats"])` gives
      besides the output; for NNX, the state of type `nnx.BatchStat` after a call.
    batch_stats: tree of the model's statistics.
    batches: tree of arrays with leading axis k, such as images [k, batch, ...] or keys [k]
      for augmentation and dropout; `update` gets one entry of it at a time.

  Returns:
    A tree as `batch_stats`. Leaves that are not floating, such as counters, and those that
    `update` does not change stay as they are.

  Raises:
    ValueError: `batches` has no leading axis that its leaves share, or `update` gives
      another tree, or values that are no running average of what it got.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, section 3

  >>> def update(stats, batch):
  ...   return {"mean": 0.9 * stats["mean"] + 0.1 * batch.mean()}
  >>> batches = jnp.array([[1.0, 3.0], [5.0, 7.0]])
  >>> print(f'{jaxsms.recalibrate(update, {"mean": jnp.zeros(())}, batches)["mean"]:.4f}')
  4.0000
  """
  k = number_of_models(batches, "batches")
  batches = jax.tree.map(jnp.asarray, batches)
  old, tree_of = split_leaves(batch_stats, lambda path, leaf: is_floating(leaf))

  def step(values, batch):
    new = update(tree_of(values), batch)
    _check_fits(batch_stats, new)
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(batch_stats), strict=True)
    return [widened(leaf) for leaf, like in pairs if is_floating(like)]

  zeros = [jnp.zeros_like(leaf) for leaf in old]
  momentum = _momentum(step, zeros, jax.tree.map(lambda x: x[0], batches))
  _check_momentum(batch_stats, momentum)

  def add(total, batch):
    return [t + x for t, x in zip(total, step(zeros, batch), strict=True)], None

  total, _ = jax.lax.scan(add, [widened(leaf) for leaf in zeros], batches)

  def mean(old, total, shares):
    kept = _rounded(shares)
    frozen = kept >= 1
    new = total / (k * jnp.where(frozen, 1, 1 - kept))
    return jnp.where(frozen, old, new.astype(old.dtype))

  return tree_of(map(mean, old, total, momentum))


def _momentum(step, zeros: list[jax.Array], batch: PyTree) -> list[jax.Array]:
  """What share of its old value each entry keeps, by leaf.

  It is the difference between what two old values become, over their own difference. The
  second one is as large as the batch's own, or rounding would hide it.
  """
  without = step(zeros, batch)
  scales = [jnp.maximum(1, jnp.max(jnp.abs(x), initial=0)) for x in without]
  others = [jnp.full_like(x, s) for x, s in zip(zeros, scales, strict=True)]
  return [
    (b - a) / widened(other)
    for a, b, other in zip(without, step(others, batch), others, strict=True)
  ]


def _rounded(shares: jax.Array) -> jax.Array:
  """The momentum of a leaf: it has few digits, and what differs is rounding's."""
  return jnp.round(jnp.mean(shares), 6) if shares.size else jnp.ones(())


def _check_momentum(batch_stats: PyTree, momentum: list[jax.Array]) -> None:
  """Raises ValueError where concrete values are no running average's."""
  paths = [
    path for path, leaf in jax.tree.leaves_with_path(batch_stats) if is_floating(leaf)
  ]
  for path, shares in zip(paths, momentum, strict=True):
    if not is_concrete(shares) or not shares.size:
      continue
    values = np.asarray(shares, float)
    if not (values.max() - values.min() < 1e-2 and -1e-2 < values.mean() < 1.01):
      raise ValueError(
        f"update gives no running average of batch_stats at {path_string(path)}: let it "
        "return old * momentum + new * (1 - momentum), of one forward pass in training "
        "mode"
      )


def _check_fits(batch_stats: PyTree, new: PyTree) -> None:
  """Raises ValueError unless `update` gave a tree as it got."""
  structure: Any = jax.tree.structure(batch_stats)
  same = jax.tree.structure(new) == structure
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(batch_stats), strict=False)
  if not same or any(np.shape(a) != np.shape(b) for a, b in pairs):
    raise ValueError(
      "update must give batch statistics as it got them: it got "
      f"{jax.tree.map(np.shape, batch_stats)} and gave {jax.tree.map(np.shape, new)}"
    )
