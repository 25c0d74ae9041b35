"""Trees of parameters: which leaves can be pruned, and m trees as one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.weight_names import is_weight

PyTree = Any
Path = tuple[Any, ...]
Prunable = Callable[[Path, Any], bool]

# Linen keeps batch statistics in a collection of this name, NNX under these leaves.
_STATISTICS = ("batch_stats", "mean", "var")


def path_names(path: Path) -> list[str]:
  """The names along a key path, from the root to the leaf, as strings.

  A Flax NNX variable's own "value" is left out, and Haiku's "mlp/~/linear_0" counts as
  three names.
  """
  if not path:
    return []
  names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
  is_wrapped = len(names) > 1 and getattr(path[-1], "name", None) == "value"
  return names[:-1] if is_wrapped else names


def path_string(path: Path) -> str:
  """A key path as readable text, such as "Dense_0/kernel"."""
  return "/".join(path_names(path)) or "(root)"


def same_structure(a: PyTree, b: PyTree) -> bool:
  """Whether two trees have equal containers and names, whatever their leaves are."""
  one: Any = jax.tree.structure(a)  # the type is not known to mypy
  return one == jax.tree.structure(b)


def is_array(leaf: Any) -> bool:
  """Whether a leaf is an array (of any kind) and not, say, an activation function."""
  return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of an array, of a scalar, or of what has them."""
  return jax.ShapeDtypeStruct(np.shape(array), array.dtype)


def split_leaves(
  tree: PyTree, chosen: Callable[[Path, Any], bool]
) -> tuple[list[Any], Callable[[Iterable[Any]], PyTree]]:
  """Some of a tree's leaves, and a function that puts others in their place.

  Args:
    tree: any tree.
    chosen: of key path and leaf.
  """
  with_paths, structure = jax.tree.flatten_with_path(tree)
  flags = [chosen(path, leaf) for path, leaf in with_paths]
  leaves = [leaf for _, leaf in with_paths]

  def filled(new: Iterable[Any]) -> PyTree:
    rest = iter(new)
    pairs = zip(leaves, flags, strict=True)
    return jax.tree.unflatten(structure, [next(rest) if f else x for x, f in pairs])

  return [x for x, flag in zip(leaves, flags, strict=True) if flag], filled


@jax.tree_util.register_pytree_node_class
class Arrays:
  """A tree for JAX's transformations: its leaves are the arrays, the rest is structure.

  Functions and numbers among the leaves of a tree, as in Equinox's modules, cannot go
  through `jax.jit`; here they are part of the program.

  Args:
    tree: any tree; `.tree` gives it back.
  """

  def __init__(self, tree: PyTree):
    leaves, structure = jax.tree.flatten(tree)
    self._arrays = [leaf for leaf in leaves if is_array(leaf)]
    self._rest = structure, tuple(None if is_array(x) else (x,) for x in leaves)

  @property
  def tree(self) -> PyTree:
    structure, rest = self._rest
    arrays = iter(self._arrays)
    leaves = [next(arrays) if other is None else other[0] for other in rest]
    return jax.tree.unflatten(structure, leaves)

  def tree_flatten(self):
    return self._arrays, self._rest

  @classmethod
  def tree_unflatten(cls, rest, arrays):
    new = object.__new__(cls)
    new._arrays, new._rest = list(arrays), rest
    return new


def is_floating(leaf: Any) -> bool:
  """Whether a leaf is an array of floating (or complex) numbers."""
  return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def widened(array: Any) -> Any:
  """An array in float32, or in its own dtype where that is wider: what sums are made in."""
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def is_parameter(path: Path, leaf: Any) -> bool:
  """Whether a leaf is trained: floating, and no batch statistic."""
  names = path_names(path) or [""]
  statistic = "batch_stats" in names or names[-1] in _STATISTICS
  return is_floating(leaf) and not statistic


def prunable(path: Path, leaf: Any) -> bool:
  """Whether a leaf is a weight of a dense, convolution or attention layer.

  The default choice of everything here that prunes or counts. It goes by the names that
  Flax linen, Flax NNX, Haiku ("kernel", "w") and Equinox ("weight", except in layers
  called norm or embedding) give to their leaves. No bias, whatever its rank, no
  normalization, embedding table, position embedding, class token, batch statistic, key
  or integer is prunable. Leaves whose name does not say what they are, as in a list of
  (W, b) or a dict of one's own, are prunable from rank 2 on.

  Args:
    path: key path of the leaf, as `jax.tree.map_with_path` passes it.
    leaf: the leaf, of one model (not stacked).

  Returns:
    True for a weight.

  >>> layers = [(jnp.ones((4, 3)), jnp.ones(3))]
  >>> jax.tree.map_with_path(prunable, layers)
  [(True, False)]
  """
  return is_parameter(path, leaf) and is_weight(path_names(path), leaf.shape)


def stack(models: Sequence[PyTree]) -> PyTree:
  """Stacks m trees of one structure into one tree.

  Args:
    models: m trees whose leaves have equal shapes [...] and dtypes.

  Returns:
    A tree with leaves [m, ...]. Leaves that are no arrays (functions, numbers) come from
    the first model.

  Raises:
    ValueError: there is no model, or structures, shapes or dtypes differ.

  Example:
    >>> models = [{"kernel": jnp.ones((2, 3))}, {"kernel": jnp.zeros((2, 3))}]
    >>> jaxsms.stack(models)["kernel"].shape
    (2, 2, 3)
  """
  if isinstance(models, dict) or not (models := list(models)):
    raise ValueError("got no models to stack: pass a list of at least one")
  first = jax.tree.leaves_with_path(models[0])
  columns = []
  for number, model in enumerate(models):
    leaves = jax.tree.leaves(model)
    if not same_structure(model, models[0]):
      raise ValueError(
        f"model {number} has another tree structure than model 0: all models of a "
        "soup must come from the same network"
      )
    for (path, a), b in zip(first, leaves, strict=True):
      if is_array(a) != is_array(b):
        raise ValueError(
          f"leaf {path_string(path)} is {type(b).__name__} in model {number} but "
          f"{type(a).__name__} in model 0: all must be arrays, or none"
        )
      if is_array(a) and (a.shape, a.dtype) != (b.shape, b.dtype):
        raise ValueError(
          f"leaf {path_string(path)} is {b.dtype}{list(b.shape)} in model {number} but "
          f"{a.dtype}{list(a.shape)} in model 0: shapes and dtypes must agree"
        )
    columns.append([leaf for leaf in leaves if is_array(leaf)])
  stacked = iter(_stack_leaves(columns))
  return jax.tree.map(lambda x: next(stacked) if is_array(x) else x, models[0])


@jax.jit  # one program, and not several for each shape
def _stack_leaves(columns: list[list[jax.Array]]) -> list[jax.Array]:
  return [jnp.stack(leaves) for leaves in zip(*columns, strict=True)]


def unstack(stacked: PyTree) -> list[PyTree]:
  """Takes a stacked tree apart; the inverse of `stack`.

  Args:
    stacked: tree whose leaves have shape [m, ...].

  Returns:
    List of m trees with leaves [...]; all have the leaves that are no arrays.

  Raises:
    ValueError: leaves disagree on m, or there is none.

  Example:
    >>> models = jaxsms.unstack({"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
    >>> [model["kernel"].tolist() for model in models]
    [[1.0, 2.0], [3.0, 4.0]]
  """
  m = number_of_models(stacked)
  return [
    jax.tree.map(lambda x, i=i: x[i] if is_array(x) else x, stacked) for i in range(m)
  ]


def model_at(stacked: PyTree, index: int) -> PyTree:
  """One of several models, in one program: leaves [m, ...] -> [...]."""
  return wait_on_cpu(at(Arrays(stacked), jnp.asarray(index)).tree)


@jax.jit
def at(tree: PyTree, index: jax.Array) -> PyTree:
  """Leaves at an index, or at several; one program for the whole tree."""
  return jax.tree.map(lambda x: x[index], tree)


def wait_on_cpu(tree: PyTree) -> PyTree:
  """Waits for arrays that lie on several devices of a CPU.

  There programs wait for their parts on the other devices in threads that they share with
  the programs after them: several at once can deadlock.
  """
  for x in jax.tree.leaves(tree):
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
      devices: set[Any] = x.sharding.device_set
      if len(devices) > 1 and next(iter(devices)).platform == "cpu":
        return jax.block_until_ready(tree)
      break
  return tree


def number_of_models(stacked: PyTree, what: str = "models") -> int:
  """The length m of the leading axis that all leaves of a stacked tree share.

  Raises:
    ValueError: there is no array, an array has no leading axis, leaves disagree on m, or m
      is 0.
  """
  m: int | None = None
  first_path: Path = ()
  for path, leaf in jax.tree.leaves_with_path(stacked):
    if not is_array(leaf):
      continue
    if leaf.ndim == 0:
      raise ValueError(
        f"leaf {path_string(path)} has no leading axis of {what}: expected a tree with "
        "leaves [m, ...], as jaxsms.stack makes"
      )
    if m is None:
      m, first_path = leaf.shape[0], path
    elif leaf.shape[0] != m:
      raise ValueError(
        f"leaves disagree on the number of {what}: {path_string(first_path)} has {m}, "
        f"{path_string(path)} has {leaf.shape[0]}"
      )
  if m is None:
    raise ValueError("the stacked tree has no leaves: there is nothing to average")
  if m == 0:
    raise ValueError("the leading axis has length 0: there must be at least one model")
  return m


_SMALL = 2**16  # entries of one model


def small_leaves_joined(leaves: Sequence[jax.Array]) -> list[jax.Array]:
  """Leaves [m, ...] with those of few entries flattened into one [m, n] for each dtype.

  For sums over all entries of each model: a program with fewer arrays compiles faster.
  """
  joined: list[jax.Array] = []
  small: dict[Any, list[jax.Array]] = {}
  for leaf in leaves:
    if leaf.size > _SMALL * len(leaf):
      joined.append(leaf)
    else:
      small.setdefault(leaf.dtype, []).append(leaf.reshape(len(leaf), -1))
  return joined + [jnp.concatenate(rows, axis=1) for rows in small.values()]


def is_concrete(tree: PyTree) -> bool:
  """Whether no leaf is a tracer, so that values can be read."""
  return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def check_finite(params: PyTree, what: str = "params") -> None:
  """Raises ValueError, naming the leaf, where concrete values are not all finite."""
  leaves = jax.tree.leaves_with_path(params)
  floating = [(path, x) for path, x in leaves if is_floating(x) and is_concrete(x)]
  with jax.ensure_compile_time_eval():  # concrete values stay so inside a jit
    flags = jax.device_get(_all_finite([leaf for _, leaf in floating]))
  for (path, _), finite in zip(floating, flags, strict=True):
    if not finite:
      raise ValueError(
        f"{what} has NaN or infinite values in {path_string(path)}: train the model to "
        "finite values before pruning it"
      )


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
  return [jnp.isfinite(leaf).all() for leaf in leaves]
