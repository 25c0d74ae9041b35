"""Which weights to remove: scores and scopes -> masks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms import counts
from jaxsms.checks import check_phases, check_sparsity
from jaxsms.mask_trees import mask_leaves
from jaxsms.names import check_name
from jaxsms.selection import (
  SortKey,
  identity_key,
  keep_largest,
  magnitude_key,
  magnitude_key_64,
)
from jaxsms.trees import Prunable, PyTree, check_finite, is_array, is_concrete, is_floating
from jaxsms.weights import prunable_flags, warn_of_unpruned_matrices

SCOPES = ("global", "uniform")
# Numbers of leaves, in the order of `jax.tree.leaves`, and how many entries to remove.
Group = tuple[list[int], int | jax.Array]


def magnitude_masks(
  params: PyTree,
  sparsity: float | jax.Array,
  scope: str = "global",
  prunable: Prunable | None = None,
  masks: PyTree | None = None,
) -> PyTree:
  """Removes the weights of smallest magnitude.

  Exactly round(sparsity * n) of n prunable entries are removed. Among equal magnitudes
  the entries at earlier positions (leaf by leaf, each in row-major order) go first.

  Args:
    params: tree of parameters, with leaves of any shape.
    sparsity: share of the prunable entries to remove, in [0, 1). Give a Python float: a
      traced value is float32, and the count is then rounded in float32.
    scope: "global" compares all prunable entries with one another; "uniform" removes
      round(sparsity * n) of each leaf's n entries.
    prunable: which leaves to prune, called with key path and leaf; None means
      `jaxsms.prunable`.
    masks: earlier masks. Entries that they removed stay removed and count towards
      `sparsity`, even if they are more than it asks for.

  Returns:
    Tree of bool arrays with the structure and shapes of `params`: True where an entry
    is kept, all True where a leaf is not prunable, None where a leaf is not an array.
    Matrices that the default `prunable` leaves out are logged, once for each structure.

  Raises:
    ValueError: sparsity outside [0, 1), unknown scope, nothing prunable, values that
      are not finite, or masks of another structure.

  References:
    Han et al., 2015, https://arxiv.org/abs/1506.02626
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, section 2

  Example:
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [2.0, 3.0]]), "bias": jnp.zeros(2)}
    >>> masks = jaxsms.magnitude_masks(params, 0.5)
    >>> masks["kernel"].tolist(), masks["bias"].tolist()
    ([[False, True], [False, True]], [True, True])
  """
  check_finite(params)
  groups = scope_groups(params, sparsity, scope, prunable)
  return masks_of_groups(params, groups, masks, sort_key=magnitude_sort_key(params))


def magnitude_sort_key(params: PyTree) -> SortKey:
  """The order of magnitudes, in float64 where there is a leaf of it."""
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(params) if is_floating(leaf)]
  # NumPy's float64 is float32 to JAX, unless 64 bits are enabled.
  wide = any(jnp.finfo(jax.dtypes.canonicalize_dtype(t)).bits > 32 for t in dtypes)
  return magnitude_key_64 if wide else magnitude_key


def random_masks(
  key: jax.Array,
  params: PyTree,
  sparsity: float | jax.Array,
  scope: str = "global",
  prunable: Prunable | None = None,
  masks: PyTree | None = None,
) -> PyTree:
  """Removes weights at random: like `magnitude_masks`, but with random scores.

  Args:
    key: a typed key, `jax.random.key(...)`.
    params: tree of parameters; only shapes and names matter.
    sparsity: share of the prunable entries to remove, in [0, 1).
    scope: "global" or "uniform", see `magnitude_masks`.
    prunable: which leaves to prune; None means `jaxsms.prunable`.
    masks: earlier masks, whose removed entries stay removed.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept.

  Raises:
    ValueError: as in `magnitude_masks`, except that values need not be finite.

  Example:
    >>> params = {"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(4)}
    >>> masks = jaxsms.random_masks(jax.random.key(0), params, 0.25)
    >>> int(masks["kernel"].sum()), int(masks["bias"].sum())
    (6, 4)
  """
  count = iter(range(len(jax.tree.leaves(params))))

  def random_key(leaf):
    return jax.random.bits(jax.random.fold_in(key, next(count)), leaf.shape)

  return masks_from_keys(params, random_key, sparsity, scope, prunable, masks)


def masks_from_keys(
  params: PyTree,
  sort_key: Callable[[jax.Array], jax.Array],
  sparsity: float | jax.Array,
  scope: str = "global",
  prunable: Prunable | None = None,
  masks: PyTree | None = None,
) -> PyTree:
  """Removes the entries with the smallest sort keys: for a criterion of your own.

  Args:
    params: tree of parameters.
    sort_key: returns an array of unsigned integers with the shape of the prunable leaf
      that it gets. All arrays need the same dtype. Smaller keys are removed earlier.
    sparsity: share of the prunable entries to remove, in [0, 1).
    scope: "global" or "uniform", see `magnitude_masks`.
    prunable: which leaves to prune; None means `jaxsms.prunable`.
    masks: earlier masks, whose removed entries stay removed.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept.

  Raises:
    ValueError: see `magnitude_masks`.

  Example:
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [2.0, 3.0]])}
    >>> first_rows = lambda x: jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    >>> jaxsms.masks_from_keys(params, first_rows, 0.5)["kernel"].tolist()
    [[False, False], [True, True]]
  """
  groups = scope_groups(params, sparsity, scope, prunable)
  return masks_of_groups(params, groups, masks, lambda i, leaf, mask: sort_key(leaf))


def scope_groups(
  params: PyTree, sparsity: float | jax.Array, scope: str, prunable: Prunable | None
) -> list[Group]:
  """The leaves that are compared with one another, and how many entries of them go.

  Raises:
    ValueError: sparsity outside [0, 1), unknown scope, or nothing prunable.
  """
  check_sparsity(sparsity)
  check_name("scope", scope, SCOPES)
  flags = prunable_flags(params, prunable)
  warn_of_unpruned_matrices(params, prunable)
  numbers = [i for i, flag in enumerate(flags) if flag]
  sizes = [np.size(leaf) for leaf in jax.tree.leaves(params)]
  groups = [numbers] if scope == "global" else [[i] for i in numbers]
  return [(g, removal_count(sparsity, sum(sizes[i] for i in g))) for g in groups]


def masks_of_groups(
  params: PyTree,
  groups: Sequence[Group],
  masks: PyTree | None = None,
  values: Callable[[int, Any, Any], jax.Array] | None = None,
  sort_key: SortKey = identity_key,
) -> PyTree:
  """In each group removes the entries with the smallest sort keys.

  Args:
    params: tree of parameters.
    groups: numbers of leaves, and how many of their entries to remove.
    masks: earlier masks; what they removed stays removed and counts.
    values: `values(number, leaf, earlier mask or None)` gives what `sort_key` takes;
      None means the leaf.
    sort_key: see `selection.keep_largest`.

  Returns:
    Tree of bool arrays, all True in leaves of no group.

  Raises:
    ValueError: masks of another structure.
  """
  leaves = jax.tree.leaves(params)
  old = [None] * len(leaves) if masks is None else mask_leaves(params, masks)
  new: dict[int, jax.Array] = {}
  for numbers, goal in groups:
    chosen = [leaves[i] for i in numbers]
    if values is not None:
      chosen = [values(i, leaves[i], old[i]) for i in numbers]
    chosen = [jnp.asarray(x) for x in chosen]
    kept = keep_largest(chosen, [old[i] for i in numbers], goal, sort_key)
    new |= dict(zip(numbers, kept, strict=True))
  return with_all_kept(params, new)


def with_all_kept(params: PyTree, new: dict[int, jax.Array]) -> PyTree:
  """The masks by number of leaf as a tree: None where a leaf is no array, else True."""
  leaves, structure = jax.tree.flatten(params)
  others = [i for i, leaf in enumerate(leaves) if i not in new and is_array(leaf)]
  ones = _all_kept(tuple(np.shape(leaves[i]) for i in others))
  new = new | dict(zip(others, ones, strict=True))
  return jax.tree.unflatten(structure, [new.get(i) for i in range(len(leaves))])


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
  """Sets removed entries to exactly 0.

  Args:
    params: tree of parameters.
    masks: tree of bool arrays for the leaves of `params`, True where kept. Their
      shapes broadcast, so masks [...] serve stacked parameters [m, ...].

  Returns:
    A tree like `params`. Gradients through it are 0 at removed entries.

  Raises:
    ValueError: the masks have other leaves or shapes than `params`, or are not bool.

  Example:
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [2.0, 3.0]])}
    >>> masks = {"kernel": jnp.array([[False, True], [False, True]])}
    >>> jaxsms.apply_masks(params, masks)["kernel"].tolist()
    [[0.0, -4.0], [0.0, 3.0]]
  """
  leaves, structure = jax.tree.flatten(params)
  pairs = list(zip(leaves, mask_leaves(params, masks), strict=True))
  zeroed = iter(_zero_removed([pair for pair in pairs if pair[1] is not None]))
  return jax.tree.unflatten(
    structure, [leaf if mask is None else next(zeroed) for leaf, mask in pairs]
  )


def sparsity(params: PyTree, prunable: Prunable | None = None) -> jax.Array:
  """The share of exact zeros among the prunable entries.

  Args:
    params: tree of parameters.
    prunable: which leaves count; None means `jaxsms.prunable`.

  Returns:
    float32 [], in [0, 1].

  Raises:
    ValueError: nothing is prunable.

  Example:
    >>> params = {"kernel": jnp.array([[0.0, -4.0], [2.0, 3.0]]), "bias": jnp.zeros(2)}
    >>> float(jaxsms.sparsity(params))  # the bias does not count
    0.25
  """
  flags = prunable_flags(params, prunable)
  leaves = [x for x, flag in zip(jax.tree.leaves(params), flags, strict=True) if flag]
  return _count_zeros(leaves) / float(sum(x.size for x in leaves))


def phase_sparsity(goal: float, phase: int, phases: int) -> float:
  """The sparsity after a phase, where each phase removes the same fraction.

  1 - (1 - goal)^(phase / phases): each phase removes 1 - (1 - goal)^(1 / phases) of
  what remained.

  Args:
    goal: sparsity after the last phase, in [0, 1).
    phase: from 1 to `phases`.
    phases: number of phases, at least 1.

  Returns:
    The sparsity, exactly `goal` after the last phase.

  Raises:
    ValueError: an argument is out of range.

  Example:
    >>> [jaxsms.phase_sparsity(0.75, phase, 2) for phase in (1, 2)]
    [0.5, 0.75]
  """
  check_sparsity(goal, "goal sparsity")
  phase, phases = check_phases(phase, "phase"), check_phases(phases)
  if phases < 1:
    raise ValueError(f"phases is {phases}: at least 1 phase is needed")
  if not 1 <= phase <= phases:
    raise ValueError(f"phase is {phase}: phases count from 1 to {phases}")
  return goal if phase == phases else 1 - (1 - goal) ** (phase / phases)


def removal_count(sparsity: float | jax.Array, size: int) -> int | jax.Array:
  """round(sparsity * size), worked out on the host in float64 where it can be."""
  if is_concrete(sparsity):
    return round(float(sparsity) * size)
  return jnp.round(sparsity * float(size)).astype(jnp.uint32)


# One program for all leaves each: outside of jit, every operation on every shape would be
# compiled on its own.


@functools.partial(jax.jit, inline=True)
def _zero_removed(pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
  return [jnp.where(mask, leaf, jnp.zeros((), leaf.dtype)) for leaf, mask in pairs]


@jax.jit
def _count_zeros(leaves: list[jax.Array]) -> jax.Array:
  return counts.as_float(counts.total(counts.count([leaf == 0 for leaf in leaves])))


@functools.partial(jax.jit, static_argnums=0)
def _all_kept(shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
  return [jnp.ones(shape, bool) for shape in shapes]
