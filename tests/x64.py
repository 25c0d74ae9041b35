"""Arrays of 64 bits in any of the JAX versions that are supported."""

import jax


def enable_x64():
  """A context in which float64 and int64 stay what they are."""
  if hasattr(jax, "enable_x64"):  # from jax 0.8 on
    return jax.enable_x64(True)
  from jax.experimental import enable_x64  # later versions lack this one

  return enable_x64()
