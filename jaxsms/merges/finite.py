"""Leaving out models whose values are not finite."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.phases import finite_models
from jaxsms.trees import PyTree, is_concrete, is_floating


def check_some_finite(stacked: PyTree) -> jax.Array:
  """bool [m]; FloatingPointError where it can be seen that no model is finite."""
  finite = finite_models(stacked)
  if is_concrete(finite) and not np.asarray(finite).any():
    raise FloatingPointError(
      f"each of the {len(finite)} models has values that are not finite"
    )
  return finite


@jax.jit
def without_others(stacked: PyTree, finite: jax.Array) -> PyTree:
  """The models with 0 for all of one that is not finite."""

  def one(leaf):
    chosen = finite.reshape([-1] + [1] * (leaf.ndim - 1))
    return jnp.where(chosen, leaf, jnp.zeros((), leaf.dtype)) if is_floating(leaf) else leaf

  return jax.tree.map(one, stacked)
