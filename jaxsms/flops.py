"""What one inference costs: multiply-adds of each layer, dense and sparse."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxsms.checks import check_outside_jit
from jaxsms.pruning import prunable_flags
from jaxsms.trace import weight_uses
from jaxsms.trees import Prunable, PyTree, path_string


def multiply_adds(
  apply: Callable[[PyTree, Any], Any],
  params: PyTree,
  images: Any,
  prunable: Prunable | None = None,
) -> dict[str, int]:
  """Counts the multiply-adds of each dense layer and convolution, without computing them.

  It takes a network of any framework: `apply` is traced, and each product that has a weight
  as one of its operands belongs to that weight's layer. Products of activations, such as
  queries with keys, do not count, nor do biases and normalizations. Positions in a
  convolution's padding count, so a layer costs its number of outputs times the weights of
  one output. A scan counts as often as it runs. For a `lax.cond` the last branch counts.

  Args:
    apply: the network in inference, called with `params` and `images`.
    params: tree of parameters; shapes are enough (`jax.eval_shape`). May hold other
      leaves, such as batch statistics.
    images: float [1, height, width, channels], or its `jax.ShapeDtypeStruct`; all images of
      a larger batch count.
    prunable: which leaves are weights; None means `jaxsms.prunable`.

  Returns:
    The count of each weight, by its path, such as "Dense_0/kernel".

  Raises:
    ValueError: nothing is prunable, or a weight is used in no product that is found.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788 (theoretical speed-up)

  Example:
    >>> params = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((3, 2))}}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> jaxsms.multiply_adds(apply, params, jnp.ones((1, 4)))
    {'a/kernel': 12, 'b/kernel': 6}
  """
  weights = _weights(params, prunable)
  uses = weight_uses(apply, params, images)
  counts = {name: uses[name].multiply_adds if name in uses else 0 for name in weights}
  unused = [name for name, count in counts.items() if not count]
  if unused:
    raise ValueError(
      f"no product with {unused[0]} was found: if this weight takes no part in an "
      "inference, pass a prunable(path, leaf) that leaves it out"
    )
  return counts


def sparse_multiply_adds(
  dense: Mapping[str, int], params: PyTree, prunable: Prunable | None = None
) -> dict[str, int]:
  """Counts the multiply-adds that are left where zero weights cost nothing.

  Args:
    dense: what `multiply_adds` gave for this network.
    params: tree of parameters of one model, with zeros.
    prunable: which leaves are weights, as in `multiply_adds`.

  Returns:
    For each weight its dense count times the share of its entries that are not zero.

  Raises:
    ValueError: `dense` counts other weights than `params` has.

  Example:
    >>> params = {"a": {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]])}}
    >>> jaxsms.sparse_multiply_adds({"a/kernel": 400}, params)
    {'a/kernel': 100}
  """
  weights = _weights(params, prunable)
  if weights.keys() != dense.keys():
    other = sorted(weights.keys() ^ dense.keys())[0]
    raise ValueError(
      f"dense counts and params do not have the same weights, as {other} shows: count "
      "the multiply-adds of these params"
    )
  # Exact: each entry is used equally often.
  return {
    name: dense[name] * int(np.count_nonzero(leaf)) // leaf.size
    for name, leaf in jax.device_get(weights).items()
  }


def theoretical_speedup(
  dense: Mapping[str, int], params: PyTree, prunable: Prunable | None = None
) -> float:
  """Dense multiply-adds over those with weights that are not zero.

  Args:
    dense: what `multiply_adds` gave for this network.
    params: tree of parameters of one model, with zeros.
    prunable: which leaves are weights, as in `multiply_adds`.

  Returns:
    At least 1; infinite where all weights are zero.

  Raises:
    ValueError: `dense` counts other weights than `params` has.

  Example:
    >>> params = {"a": {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]])}}
    >>> jaxsms.theoretical_speedup({"a/kernel": 400}, params)
    4.0
  """
  sparse = sum(sparse_multiply_adds(dense, params, prunable).values())
  return sum(dense.values()) / sparse if sparse else math.inf


def layer_sparsities(params: PyTree, prunable: Prunable | None = None) -> dict[str, float]:
  """The share of exact zeros in each weight.

  Args:
    params: tree of parameters of one model.
    prunable: which leaves are weights; None means `jaxsms.prunable`.

  Returns:
    Shares in [0, 1], by the path of the weight.

  Raises:
    ValueError: nothing is prunable, or values are traced.

  Example:
    >>> params = {"a": {"kernel": jnp.array([[1.0, 0.0]])},
    ...           "b": {"kernel": jnp.ones((1, 2))}}
    >>> jaxsms.layer_sparsities(params)
    {'a/kernel': 0.5, 'b/kernel': 0.0}
  """
  check_outside_jit(
    "layer_sparsities", params, "call it outside of jit, or sparsity inside"
  )
  weights = jax.device_get(_weights(params, prunable))
  return {name: float(np.mean(leaf == 0)) for name, leaf in weights.items()}


def _weights(params: PyTree, prunable: Prunable | None) -> dict[str, Any]:
  """The prunable leaves by their paths."""
  leaves = jax.tree.leaves_with_path(params)
  flags = prunable_flags(params, prunable)
  return {path_string(p): x for (p, x), flag in zip(leaves, flags, strict=True) if flag}
