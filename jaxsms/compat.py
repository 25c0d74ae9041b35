"""What is called otherwise in some of the JAX versions that are supported."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def constraint_mesh(mesh: jax.sharding.Mesh) -> AbstractContextManager:
  """A context for the body of a `shard_map` over this mesh.

  From jax 0.8 on it is not needed: before, `with_sharding_constraint` did not take a
  PartitionSpec over the axes that are not manual there.
  """
  return nullcontext() if jax.__version_info__ >= (0, 8) else mesh


def jaxprs_in_params(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
  """The functions inside an operation; `jax.extend.core` has it from jax 0.8 on."""
  for value in params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if isinstance(one, Jaxpr):
        yield one
      elif isinstance(one, ClosedJaxpr):
        yield one.jaxpr
