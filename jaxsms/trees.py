"""Trees of parameters: which leaves can be pruned, and m trees as one."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Path = tuple[Any, ...]
Prunable = Callable[[Path, Any], bool]

# The name of the leaf says it in Flax ("kernel") and Haiku ("w", "w_i", "w_h").
_WEIGHT_NAMES = frozenset({"kernel", "w", "w_i", "w_h"})
# Equinox and PyTorch call every weight "weight": its owner's name has to tell.
_OWNED_WEIGHT_NAMES = frozenset(
  {"weight", "weight_ih", "weight_hh", "in_proj_weight", "kernel_weight"}
)
_NORM_WORDS = ("norm", "bn", "ln", "gn")
_EMBEDDING_WORDS = ("embed", "emb", "embedding", "wte", "wpe")
# Linen keeps batch statistics in a collection of this name, NNX under these leaves.
_STATISTICS = ("batch_stats", "mean", "var")


def path_names(path: Path) -> list[str]:
  """The names along a key path, from the root to the leaf, as strings.

  A Flax NNX variable's own "value" is left out, and Haiku's "mlp/~/linear_0" counts as
  three names.
  """
  names = []
  for entry in path:
    for attribute in ("key", "name", "idx"):
      if hasattr(entry, attribute):
        names += str(getattr(entry, attribute)).split("/")
        break
    else:
      names.append(str(entry))
  wrapper = path and getattr(path[-1], "name", None) == "value"
  return names[:-1] if wrapper and len(names) > 1 else names


def path_string(path: Path) -> str:
  """A key path as readable text, such as "Dense_0/kernel"."""
  return "/".join(path_names(path)) or "(root)"


def is_array(leaf: Any) -> bool:
  """Whether a leaf is an array (of any kind) and not, say, an activation function."""
  return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def is_floating(leaf: Any) -> bool:
  """Whether a leaf is an array of floating (or complex) numbers."""
  return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_parameter(path: Path, leaf: Any) -> bool:
  """Whether a leaf is trained: floating, and no batch statistic."""
  names = path_names(path) or [""]
  statistic = "batch_stats" in names or names[-1] in _STATISTICS
  return is_floating(leaf) and not statistic


def _words(name: str) -> list[str]:
  """The words of an identifier: "layerNorm_2" -> ["layer", "norm"]."""
  return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _is_norm(name: str) -> bool:
  return any(w.endswith("norm") or w in _NORM_WORDS for w in _words(name))


def _is_embedding_table(name: str, leaf: Any) -> bool:
  words = _words(name)
  embedding = any(w in _EMBEDDING_WORDS or w.endswith("embedding") for w in words)
  # A patch embedding is a convolution or a dense layer, whatever it is called.
  return embedding and leaf.ndim == 2 and "patch" not in words


def prunable(path: Path, leaf: Any) -> bool:
  """Whether a leaf is a weight of a dense, convolution or attention layer.

  The default choice of everything here that prunes or counts. It goes by the names that
  Flax linen, Flax NNX, Haiku ("kernel", "w") and Equinox ("weight", except in layers
  called norm or embedding) give to their leaves. No bias, whatever its rank, no
  normalization, embedding table, position embedding, class token, batch statistic, key
  or integer is prunable.

  Args:
    path: key path of the leaf, as `jax.tree_util.tree_map_with_path` passes it.
    leaf: the leaf, of one model (not stacked).

  Returns:
    True for a weight.
  """
  if not is_parameter(path, leaf) or leaf.ndim < 2:
    return False
  names = path_names(path)
  name, owner = names[-1] if names else "", names[-2] if len(names) > 1 else ""
  if name in _WEIGHT_NAMES:
    return not _is_norm(owner)
  if name in _OWNED_WEIGHT_NAMES:
    return not _is_norm(owner) and not _is_embedding_table(owner, leaf)
  return False


def stack(models: Sequence[PyTree]) -> PyTree:
  """Stacks m trees of one structure into one tree.

  Args:
    models: m trees whose leaves have equal shapes [...] and dtypes.

  Returns:
    A tree with leaves [m, ...].

  Raises:
    ValueError: there is no model, a leaf is not an array, or structures, shapes or
      dtypes differ.
  """
  if isinstance(models, dict) or not (models := list(models)):
    raise ValueError("got no models to stack: pass a list of at least one")
  first, structure = jax.tree_util.tree_flatten_with_path(models[0])
  columns = []
  for number, model in enumerate(models):
    leaves, other = jax.tree_util.tree_flatten(model)
    if other != structure:
      raise ValueError(
        f"model {number} has another tree structure than model 0: all models of a "
        "soup must come from the same network"
      )
    for (path, a), b in zip(first, leaves, strict=True):
      if not is_array(b):
        raise ValueError(
          f"leaf {path_string(path)} of model {number} is {type(b).__name__}, not an "
          "array: stack the arrays alone (equinox.partition, flax.nnx.split)"
        )
      if is_array(a) and (a.shape, a.dtype) != (b.shape, b.dtype):
        raise ValueError(
          f"leaf {path_string(path)} is {b.dtype}{list(b.shape)} in model {number} but "
          f"{a.dtype}{list(a.shape)} in model 0: shapes and dtypes must agree"
        )
    columns.append(leaves)
  return jax.tree_util.tree_unflatten(structure, _stack_leaves(columns))


@jax.jit  # one program, and not several for each shape
def _stack_leaves(columns: list[list[jax.Array]]) -> list[jax.Array]:
  return [jnp.stack(leaves) for leaves in zip(*columns, strict=True)]


def unstack(stacked: PyTree) -> list[PyTree]:
  """Takes a stacked tree apart; the inverse of `stack`.

  Args:
    stacked: tree whose leaves have shape [m, ...].

  Returns:
    List of m trees with leaves [...].

  Raises:
    ValueError: leaves disagree on m, or there is none.
  """
  m = number_of_models(stacked)
  return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(m)]


def model_at(stacked: PyTree, index: int) -> PyTree:
  """One of several models, in one program: leaves [m, ...] -> [...]."""
  return settled(_at(stacked, jnp.asarray(index)))


@jax.jit
def _at(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


def settled(tree: PyTree) -> PyTree:
  """Waits for arrays that lie on several devices of a CPU.

  There programs wait for their parts on the other devices in threads that they share with
  the programs after them: several at once can wait for ever.
  """
  for x in jax.tree.leaves(tree):
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
      devices = x.sharding.device_set
      if len(devices) > 1 and next(iter(devices)).platform == "cpu":
        return jax.block_until_ready(tree)
      break
  return tree


def number_of_models(stacked: PyTree, what: str = "models") -> int:
  """The length m of the leading axis that all leaves of a stacked tree share.

  Raises:
    ValueError: there is no leaf, a leaf has no leading axis, leaves disagree on m, or m
      is 0.
  """
  m, first_path = None, None
  for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
    if not is_array(leaf) or leaf.ndim == 0:
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


def is_concrete(tree: PyTree) -> bool:
  """Whether no leaf is a tracer, so that values can be looked at."""
  return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def check_finite(params: PyTree, what: str = "params") -> None:
  """Raises ValueError, naming the leaf, where concrete values are not all finite."""
  floating = [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if is_floating(leaf) and is_concrete(leaf)
  ]
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


def match_masks(params: PyTree, masks: PyTree) -> PyTree:
  """Checks masks against the trees they are for, and gives them their structure.

  Args:
    params: a tree of parameters, gradients or updates, or a stack of such.
    masks: tree of bool arrays for the same leaves; the containers may differ (Flax NNX
      hands out the same parameters as State and as plain dicts).

  Returns:
    The masks in the structure of `params`.

  Raises:
    ValueError: other leaves, shapes that are not those of the last axes, or leaves that
      are not bool.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  others = jax.tree_util.tree_leaves_with_path(masks)
  if [path_names(path) for path, _ in leaves] != [path_names(path) for path, _ in others]:
    raise ValueError(
      "params and masks have different tree structures: make the masks from these params"
    )
  for (path, leaf), (_, mask) in zip(leaves, others, strict=True):
    if not is_array(leaf) or isinstance(mask, bool):
      continue
    if not is_array(mask) or mask.dtype != bool:
      raise ValueError(
        f"the mask of {path_string(path)} is {getattr(mask, 'dtype', type(mask))}: masks "
        "are bool arrays, True where kept"
      )
    if mask.shape != leaf.shape[len(leaf.shape) - len(mask.shape) :]:
      raise ValueError(
        f"params and masks differ in shape at {path_string(path)}: {list(leaf.shape)} and "
        f"{list(mask.shape)}"
      )
  return jax.tree.unflatten(structure, [mask for _, mask in others])
