"""The independent streams of a seed's key."""

import jax

INIT, PRETRAIN, RETRAIN, PRUNE, SCRATCH, SHARES, CLASSIFIER = range(7)


def stream(key: jax.Array, number: int) -> jax.Array:
  """The key of one stream.

  Args:
    key: of the seed.
    number: of the stream, such as `RETRAIN`.
  """
  return jax.random.fold_in(key, number)
