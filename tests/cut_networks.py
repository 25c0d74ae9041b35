"""Shared by tests of cut networks: masks of channels, and what a network computes."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.trees import is_array, is_floating, path_string


def masks_of(params, groups, kept):
  """Masks that remove the channels of each group where `kept` is False, worked by place."""
  flat, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [path_string(path) for path, _ in flat]
  masks = {
    n: np.ones(getattr(x, "shape", ()), bool) for n, (_, x) in zip(names, flat, strict=True)
  }
  for group, stay in zip(groups, kept, strict=True):
    for (name, axis), indices in zip(group.places, group.indices, strict=True):
      gone = np.asarray(indices)[~stay].ravel()
      np.moveaxis(masks[name], axis, 0)[gone] = False
  return jax.tree.unflatten(structure, [masks[name] for name in names])


def random_kept(groups, seed=0):
  """For each group which channels stay: half of them, and one at least."""
  rng = np.random.default_rng(seed)
  kept = [rng.random(group.size) < 0.5 for group in groups]
  for stay in kept:
    stay[rng.integers(len(stay))] = True
  return kept


def apply_masks(params, masks):
  """Removed entries 0, leaves that are no floating arrays as they are."""
  return jax.tree.map(
    lambda x, mask: jnp.where(mask, x, 0) if is_floating(x) else x, params, masks
  )


def outputs_and_gradients(apply, params, inputs):
  """All that a network gives, and the gradient of the mean square of its first output."""
  flat, structure = jax.tree.flatten(params)
  moving = [i for i, x in enumerate(flat) if is_floating(x)]

  def loss(some):
    every = list(flat)
    for i, x in zip(moving, some, strict=True):
      every[i] = x
    outs = apply(jax.tree.unflatten(structure, every), *inputs)
    return jnp.mean(jax.tree.leaves(outs)[0] ** 2), outs

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  some, outs = gradient([flat[i] for i in moving])
  every = [jnp.zeros_like(x) if is_array(x) else x for x in flat]
  for i, x in zip(moving, some, strict=True):
    every[i] = x
  return outs, jax.tree.unflatten(structure, every)


def assert_close(a, b, tolerance=1e-5, nonzero=True):
  """Arrays that agree to a share of the largest entry in their tree."""
  a, b = ([x for x in jax.tree.leaves(t) if is_floating(x)] for t in (a, b))
  largest = max(float(jnp.abs(x).max()) for x in a)
  assert largest > 0 or not nonzero
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


def number_of_weights(tree):
  return sum(x.size for x in jax.tree.leaves(tree) if is_floating(x))


def stays(params, masks):
  """How many entries of floating leaves the masks keep."""
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
  return sum(int(np.sum(mask)) for x, mask in pairs if is_floating(x))
