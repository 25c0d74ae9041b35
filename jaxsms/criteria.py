"""Other ways to share out the sparsity over layers: ERK and LAMP."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.checks import check_sparsity
from jaxsms.mask_trees import mask_leaves
from jaxsms.pruning import magnitude_sort_key, masks_of_groups, removal_count, scope_groups
from jaxsms.selection import keep_largest, magnitude_key
from jaxsms.trees import Prunable, PyTree, check_finite, is_concrete, widened
from jaxsms.weights import prunable_flags, warn_of_unpruned_matrices


def erk_masks(
  params: PyTree,
  sparsity: float,
  prunable: Prunable | None = None,
  masks: PyTree | None = None,
) -> PyTree:
  """Removes the smallest magnitudes of each layer, with Erdős-Rényi-Kernel densities.

  A layer of shape [d1, d2, ...] keeps a share of its weights proportional to
  (d1 + d2 + ...) / (d1 * d2 * ...), at most all of them, so that narrow layers stay
  denser. The counts are these shares times one common factor, rounded by Webster's method.
  Their sum is exact, and no layer's count rises when the sparsity rises.

  Args:
    params: tree of parameters.
    sparsity: share of the prunable entries to remove, in [0, 1); not traced.
    prunable: which leaves to prune; None means `jaxsms.prunable`.
    masks: earlier masks. What they removed stays removed and counts in its layer, also
      where that is more than the layer's share.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept;
    without `masks`, exactly round(sparsity * n) of n prunable entries are removed.

  Raises:
    ValueError: sparsity traced or outside [0, 1), nothing prunable, values that are not
      finite, or masks of another structure.

  References:
    Mocanu et al., 2018, https://arxiv.org/abs/1707.04780 (Erdős-Rényi)
    Evci et al., 2020, https://arxiv.org/abs/1911.11134, section 3 (with kernels)

  Example:
    >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((6, 2))}}
    >>> masks = jaxsms.erk_masks(params, 0.5)  # kept in proportion to 2 + 2 and 6 + 2
    >>> [int(layer["kernel"].sum()) for layer in masks.values()]
    [3, 5]
  """
  if not is_concrete(sparsity):
    raise ValueError("sparsity is traced: ERK shares it out before the program runs")
  check_sparsity(sparsity)
  check_finite(params)
  flags = prunable_flags(params, prunable)
  warn_of_unpruned_matrices(params, prunable)
  leaves = jax.tree.leaves(params)
  numbers = [i for i, flag in enumerate(flags) if flag]
  shapes = [np.shape(leaves[i]) for i in numbers]
  sizes = [int(np.prod(shape)) for shape in shapes]
  kept = sum(sizes) - int(removal_count(sparsity, sum(sizes)))
  counts = _apportion(kept, [sum(shape) for shape in shapes], sizes)
  groups = [([i], n - k) for i, n, k in zip(numbers, sizes, counts, strict=True)]
  return masks_of_groups(params, groups, masks, sort_key=magnitude_sort_key(params))


def _apportion(total: int, weights: list[int], most: list[int]) -> list[int]:
  """Whole numbers of that total, proportional to the weights up to a largest each.

  Webster's method: number k of a layer comes at the scale (k - 1/2) / weight, and the
  `total` that come first are taken; among equals, those of earlier layers.
  """
  factors, largest = np.asarray(weights, np.float64), np.asarray(most)

  def counts(scale):
    return np.minimum(np.floor(scale * factors + 0.5).astype(np.int64), largest)

  low, high = 0.0, float(np.max((largest + 1) / factors))
  for _ in range(100):
    middle = (low + high) / 2
    enough = counts(middle).sum() > total
    low, high = (low, middle) if enough else (middle, high)
  shares = counts(low)
  while shares.sum() < total:  # several come at the same scale
    scales = np.where(shares < largest, (shares + 0.5) / factors, np.inf)
    shares[np.argmin(scales)] += 1
  return shares.tolist()


def lamp_masks(
  params: PyTree,
  sparsity: float | jax.Array,
  prunable: Prunable | None = None,
  masks: PyTree | None = None,
) -> PyTree:
  """Removes the smallest layer-adaptive magnitudes (LAMP scores) of all layers.

  The score of a weight is its square divided by the sum of the squares of all weights
  of its layer that come no earlier, ordered by magnitude and then by position. Within a
  layer the order is that of magnitudes; the largest of each layer has score 1.

  Args:
    params: tree of parameters.
    sparsity: share of the prunable entries to remove, in [0, 1).
    prunable: which leaves to prune; None means `jaxsms.prunable`.
    masks: earlier masks. What they removed stays removed and counts, and has no part in
      the scores.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept;
    exactly round(sparsity * n) of n prunable entries are removed.

  Raises:
    ValueError: sparsity outside [0, 1), nothing prunable, values that are not finite, or
      masks of another structure.

  References:
    Lee et al., 2021, https://arxiv.org/abs/2010.07611

  Example:
    >>> params = {"a": {"kernel": jnp.array([[1.0, 2.0]])},
    ...           "b": {"kernel": jnp.array([[10.0, 20.0]])}}
    >>> masks = jaxsms.lamp_masks(params, 0.5)  # whatever the scale of a layer
    >>> [layer["kernel"].tolist() for layer in masks.values()]
    [[[False, True]], [[False, True]]]
  """
  check_finite(params)
  ((numbers, goal),) = scope_groups(params, sparsity, "global", prunable)
  leaves = jax.tree.leaves(params)
  old = [None] * len(leaves) if masks is None else mask_leaves(params, masks)
  # Within a layer the order is that of magnitudes: scores only say how many of each go.
  scores, kept = [], []
  for i in numbers:
    sizes, removed = _magnitudes(leaves[i], old[i])
    scores.append(_lamp_scores(_sorted(sizes)))
    kept.append(None if old[i] is None else jnp.arange(sizes.size) >= removed)
  counts = _count_removed(keep_largest(scores, kept, goal, magnitude_key))
  groups = [([i], count) for i, count in zip(numbers, counts, strict=True)]
  return masks_of_groups(params, groups, masks, sort_key=magnitude_sort_key(params))


@jax.jit
def _magnitudes(leaf, mask) -> tuple[jax.Array, jax.Array | int]:
  """The magnitudes [n] of a leaf, 0 where it is removed, and how many entries are."""
  size = widened(jnp.abs(leaf))
  if mask is None:
    return size.ravel(), 0
  return jnp.where(mask, size, 0).ravel(), mask.size - jnp.count_nonzero(mask)


def _sorted(values: jax.Array) -> jax.Array | np.ndarray:
  """In ascending order; NumPy sorts some eight times faster than XLA does on a CPU."""
  if is_concrete(values) and jax.default_backend() == "cpu":
    return np.sort(np.asarray(values))
  return jnp.sort(values)


@jax.jit
def _lamp_scores(sizes: jax.Array | np.ndarray) -> jax.Array:
  """Square roots of the LAMP scores: they underflow less, in the same order.

  Args:
    sizes: magnitudes [n] of a layer in ascending order.
  """
  scaled = over_largest(jnp.asarray(sizes))
  rest = jnp.cumsum(scaled[::-1] ** 2)[::-1]
  # Rounding in the sums must not change the order within the layer.
  return jax.lax.cummax(scaled / jnp.sqrt(jnp.where(rest > 0, rest, 1)))


@jax.jit
def _count_removed(masks):
  return [jnp.sum(~mask) for mask in masks]


def over_largest(values: jax.Array) -> jax.Array:
  """float32, scaled so that the largest is 1, where it is not 0."""
  values = widened(values)
  largest = jnp.max(values)
  return (values / jnp.where(largest > 0, largest, 1)).astype(jnp.float32)
