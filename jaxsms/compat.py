"""What is called otherwise in some of the JAX versions that are supported."""

from contextlib import AbstractContextManager

import jax


def enable_x64() -> AbstractContextManager[None]:
  """A context in which float64 and int64 stay what they are.

  It is `jax.enable_x64(True)` of jax 0.8 and later.
  """
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(True)
  from jax.experimental import enable_x64

  return enable_x64()
