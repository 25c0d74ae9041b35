"""The order in which a copy takes the examples of its own share."""

import jax
import jax.numpy as jnp


def share_batches(
  key: jax.Array,
  examples: jax.Array,
  size: jax.Array,
  step: jax.Array,
  steps: int,
  batch_size: int,
) -> jax.Array:
  """The examples of some steps of one copy that trains on a share of the data.

  The copy passes over its share again and again. In a pass each example comes at most once,
  in an order of its own; what is left of a share after whole batches is dropped from that
  pass. The order does not depend on how many entries `examples` is filled up to, so shares
  of unequal sizes fit into one program.

  Args:
    key: of the copy's orders.
    examples: int [most], indices of the share; only the first `size` count.
    size: int [], examples of the share, at least `batch_size`.
    step: int [], the first step.
    steps: how many.
    batch_size: examples in a step.

  Returns:
    Indices, int [steps, batch_size].

  >>> batches = share_batches(jax.random.key(0), jnp.array([5, 7, 9, 0]), 3, 0, 2, 3)
  >>> jnp.sort(batches, axis=1).tolist()
  [[5, 7, 9], [5, 7, 9]]
  """
  steps_per_pass = jnp.maximum(size // batch_size, 1)
  at = step + jnp.arange(steps)
  passes = at // steps_per_pass
  first = (at % steps_per_pass) * batch_size
  positions = first[:, None] + jnp.arange(batch_size)
  entries = jnp.arange(len(examples))

  def add_pass(number, chosen):
    pass_key = jax.random.fold_in(key, number)
    # A key for each entry: a draw is the same however many entries there are.
    draws = jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(pass_key, i)))(entries)
    order = jnp.argsort(jnp.where(entries < size, draws >> 1, jnp.uint32(2**32 - 1)))
    return jnp.where((passes == number)[:, None], examples[order][positions], chosen)

  start = jnp.zeros_like(positions, shape=(steps, batch_size), dtype=examples.dtype)
  return jax.lax.fori_loop(passes[0], passes[-1] + 1, add_pass, start)
