"""Masks with a pattern in each layer: N:M groups of inputs, whole output filters."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.checks import check_sparsity
from jaxsms.criteria import over_largest
from jaxsms.mask_trees import mask_leaves
from jaxsms.names import check_name
from jaxsms.pruning import SCOPES, removal_count, with_all_kept
from jaxsms.selection import keep_largest, magnitude_key
from jaxsms.trees import (
  Path,
  Prunable,
  PyTree,
  check_finite,
  is_concrete,
  path_names,
  path_string,
)
from jaxsms.weight_names import is_attention_projection
from jaxsms.weights import Axis, Weights, prunable_flags, warn_of_unpruned_matrices


def n_m_masks(
  params: PyTree,
  sparsity: float,
  m: int = 4,
  axis: Axis | None = None,
  prunable: Prunable | None = None,
  masks: PyTree | None = None,
) -> PyTree:
  """Keeps the n largest magnitudes of every m consecutive inputs: N:M sparsity.

  n is (1 - sparsity) * m, so a sparsity of 0.5 with m = 4 gives 2:4. Among equal
  magnitudes the earlier ones go first.

  Args:
    params: tree of parameters.
    sparsity: 1 - n / m, in [0, 1); not traced.
    m: length of a group.
    axis: of the inputs, along which groups lie: -2 in the Dense [in, out] and
      convolution [height, width, in, out] kernels of Flax and Haiku, which is the
      default; 1 in Equinox's and PyTorch's [out, in, ...]; or a function of key path and
      leaf that gives it. Flax's queries, keys and values, [in, heads, features], need
      one that gives 0 there: the default would group over heads.
    prunable: which leaves to prune; None means `jaxsms.prunable`. A `jaxsms.Weights`
      gives the axis, too.
    masks: earlier masks. What they removed stays removed and counts in its group.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept.

  Raises:
    ValueError: n is not whole, m does not divide the inputs of a layer, no axis where the
      default would group over heads, values that are not finite, nothing prunable, or
      masks of another structure.

  References:
    Mishra et al., 2021, https://arxiv.org/abs/2104.08378
    Zhou et al., 2021, https://arxiv.org/abs/2102.04010

  Example:
    >>> params = {"kernel": jnp.array([[1.0], [-4.0], [2.0], [3.0]])}
    >>> jaxsms.n_m_masks(params, 0.5)["kernel"][:, 0].tolist()  # 2:4
    [False, True, False, True]
  """
  if not is_concrete(sparsity):
    raise ValueError("sparsity is traced: n of N:M is part of the program")
  check_sparsity(sparsity)
  if m < 1 or abs(sparsity * m - round(sparsity * m)) > 1e-6:
    raise ValueError(
      f"sparsity is {sparsity:g} with m = {m}: sparsity * m must be a whole number"
    )
  check_finite(params)
  if axis is None and isinstance(prunable, Weights):
    axis = prunable.inputs
  axis = _default_axis(-2, "0 (its inputs)") if axis is None else axis
  layers = _layers(params, axis, prunable, masks)
  for layer in layers:
    length = np.shape(layer.leaf)[layer.axis]
    if length % m:
      raise ValueError(
        f"{path_string(layer.path)} has {length} inputs on axis {layer.axis}, not a "
        f"multiple of {m}: leave it out with prunable, or choose another m or axis"
      )
  new = {
    x.number: _largest_of_groups(x.leaf, x.mask, round(sparsity * m), m, x.axis)
    for x in layers
  }
  return with_all_kept(params, new)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _largest_of_groups(leaf, mask, removed, m, axis):
  """Bool array without the `removed` smallest of each m entries along the axis."""
  size = jnp.abs(leaf)
  if mask is not None:
    size = jnp.where(mask, size, -1)
  axis %= leaf.ndim
  before, after = leaf.shape[:axis], leaf.shape[axis + 1 :]
  groups = size.reshape(*before, -1, m, *after)
  place = jax.lax.broadcasted_iota(jnp.int32, groups.shape, axis + 1)

  def count_smaller(i, rank):  # among equals the earlier ones count as smaller
    one = jax.lax.dynamic_slice_in_dim(groups, i, 1, axis + 1)
    return rank + ((one < groups) | ((one == groups) & (i < place)))

  # No sorting: comparing each with the m of its group runs in one pass over them.
  start = jnp.zeros(groups.shape, jnp.int32)
  rank = jax.lax.fori_loop(0, m, count_smaller, start, unroll=m <= 16)
  kept = (rank >= removed).reshape(leaf.shape)
  return kept if mask is None else kept & mask


def filter_masks(
  params: PyTree,
  sparsity: float | jax.Array,
  scope: str = "global",
  axis: Axis | None = None,
  prunable: Prunable | None = None,
  masks: PyTree | None = None,
) -> PyTree:
  """Removes whole output filters, those of smallest L2 norm.

  At least one filter of each layer stays, the one of largest norm. A classifier's outputs
  are its classes: leave it out with `prunable`. Biases and normalization of a removed
  filter stay.

  Args:
    params: tree of parameters.
    sparsity: share of the filters to remove, in [0, 1). It is the share of weights where
      filters have the same size, as in one layer.
    scope: "global" compares the filters of all layers, each norm divided by the L2 norm
      of its layer; "uniform" removes round(sparsity * filters) of each layer.
    axis: of the outputs: -1 in the Dense [in, out] and convolution [height, width, in,
      out] kernels of Flax and Haiku, which is the default; 0 in Equinox's and PyTorch's
      [out, in, ...]; or a function of key path and leaf that gives it. Flax's queries,
      keys and values, [in, heads, features], need one: 1 for whole heads, 2 for the same
      feature of all heads.
    prunable: which leaves to prune; None means `jaxsms.prunable`. A `jaxsms.Weights`
      gives the axis, too.
    masks: earlier masks. What they removed stays removed; a filter counts as removed
      where all of it is.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept. Of
    equal norms the earlier filters go first.

  Raises:
    ValueError: sparsity outside [0, 1), unknown scope, no axis where the default would
      group over heads, nothing prunable, values that are not finite, or masks of another
      structure.

  References:
    Li et al., 2017, https://arxiv.org/abs/1608.08710 (norms of filters)
    Molchanov et al., 2017, https://arxiv.org/abs/1611.06440 (normalized by layer)

  Example:
    >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])}
    >>> jaxsms.filter_masks(params, 1 / 3)["kernel"].tolist()
    [[False, True, True], [False, True, True]]
  """
  check_sparsity(sparsity)
  check_name("scope", scope, SCOPES)
  check_finite(params)
  if axis is None and isinstance(prunable, Weights):
    axis = prunable.outputs
  if axis is None:
    axis = _default_axis(-1, "1 (whole heads) or 2 (a feature of all heads)")
  layers = _layers(params, axis, prunable, masks)
  new: dict[int, jax.Array] = {}
  for group in [layers] if scope == "global" else [[layer] for layer in layers]:
    scores = [_filter_scores(x.leaf, x.mask, x.axis) for x in group]
    norms, alive, earlier = map(list, zip(*scores, strict=True))
    filters = sum(x.size for x in norms)
    goal = jnp.minimum(removal_count(sparsity, filters), filters - len(group))
    kept = keep_largest(norms, alive, goal, magnitude_key)
    new |= {x.number: k & m for x, k, m in zip(group, kept, earlier, strict=True)}
  return with_all_kept(params, new)


@functools.partial(jax.jit, static_argnums=2)
def _filter_scores(leaf, mask, axis):
  """Of each filter its share of the layer's norm (infinite for the largest).

  Returns:
    Scores, whether a filter has any weight left (both [filters], with axes of length 1
    for the others), and the earlier mask.
  """
  mask = jnp.ones(leaf.shape, bool) if mask is None else jnp.asarray(mask, bool)
  others = tuple(a for a in range(leaf.ndim) if a != axis % leaf.ndim)
  size = over_largest(jnp.where(mask, jnp.abs(leaf), 0))
  squares = jnp.sum(size**2, others, keepdims=True)
  total = jnp.sum(squares)
  norms = jnp.sqrt(squares / jnp.where(total > 0, total, 1))
  alive = jnp.any(mask, others, keepdims=True)
  # The last of the largest, so that among equals the earlier ones go.
  flat = jnp.where(alive, norms, -1).ravel()
  last = flat.size - 1 - jnp.argmax(flat[::-1])
  largest = (jnp.arange(flat.size) == last).reshape(norms.shape)
  return jnp.where(largest, jnp.inf, norms), alive, mask


class _Layer(NamedTuple):
  number: int
  path: Path
  leaf: Any
  mask: Any
  axis: int


def _layers(
  params: PyTree, axis: Axis, prunable: Prunable | None, masks: PyTree | None
) -> list[_Layer]:
  """The prunable leaves, with their earlier masks (or None) and the axis of each."""
  flags = prunable_flags(params, prunable)
  warn_of_unpruned_matrices(params, prunable)
  leaves = jax.tree.leaves_with_path(params)
  old = [None] * len(leaves) if masks is None else mask_leaves(params, masks)
  layers = []
  for i, (path, leaf) in enumerate(leaves):
    if not flags[i]:
      continue
    along = axis(path, leaf) if callable(axis) else axis
    if not -leaf.ndim <= along < leaf.ndim:
      raise ValueError(f"axis is {along}, but {path_string(path)} has {leaf.ndim} axes")
    layers.append(_Layer(i, path, leaf, old[i], along))
  return layers


def _default_axis(default: int, instead: str) -> Axis:
  """The axis where none is given, refused where it would group over heads.

  Args:
    default: of other layers.
    instead: what to give for queries, keys and values.
  """

  def axis(path, leaf):
    if is_attention_projection(path_names(path), leaf.shape):
      raise ValueError(
        f"{path_string(path)} is {list(leaf.shape)}, [inputs, heads, features] of an "
        f"attention, where the default axis {default} would group over heads: pass "
        f"axis=, a function of key path and leaf that gives {instead} there and {default} "
        "elsewhere"
      )
    return default

  return axis
