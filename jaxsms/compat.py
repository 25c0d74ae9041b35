"""What is called otherwise in some of the JAX versions that are supported."""

from contextlib import AbstractContextManager, nullcontext

import jax


def enable_x64() -> AbstractContextManager[None]:
  """A context in which float64 and int64 stay what they are.

  It is `jax.enable_x64(True)` of jax 0.8 and later.
  """
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(True)
  # Later versions lack this one.
  from jax.experimental import enable_x64  # type: ignore[attr-defined]

  return enable_x64()


def constraint_mesh(mesh: jax.sharding.Mesh) -> AbstractContextManager:
  """A context for the body of a `shard_map` over this mesh.

  From jax 0.8 on it is not needed: before, `with_sharding_constraint` did not take a
  PartitionSpec over the axes that are not manual there.
  """
  return nullcontext() if jax.__version_info__ >= (0, 8) else mesh
