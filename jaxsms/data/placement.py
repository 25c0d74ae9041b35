"""From what each process has read to arrays on the devices of all."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding


def spread(
  mesh: Mesh | None, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> Sharding | None:
  """The sharding of an array whose first axes are spread over those of a mesh.

  Args:
    mesh: None for one device.
    axes: names of the mesh's axes; None, or a name that the mesh does not have, for an axis
      that is whole on each device.
    shape: of the array's first axes.

  Returns:
    The sharding; None for one device.

  Raises:
    ValueError: an axis does not divide over its devices.
  """
  if mesh is None:
    return None
  on_mesh = [axis if axis in mesh.shape else None for axis in axes]
  for axis, n in zip(on_mesh, shape, strict=True):
    if axis is not None and n % mesh.shape[axis]:
      raise ValueError(
        f"an array of shape {shape} does not divide over the {mesh.shape[axis]} devices "
        f"along {axis!r}: give a multiple of them"
      )
  return NamedSharding(mesh, PartitionSpec(*on_mesh))


def process_block(sharding: Sharding | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
  """The part of an array that this process's devices hold.

  Args:
    sharding: of the array; None for one device.
    shape: of the array.

  Returns:
    A slice for each axis.

  Raises:
    ValueError: the devices hold parts that make up no block.
  """
  if sharding is None:
    return (slice(None),) * len(shape)
  parts = {
    tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
    for index in sharding.addressable_devices_indices_map(shape).values()
    if index is not None
  }
  ends = [zip(*axis, strict=True) for axis in zip(*parts, strict=True)]
  block = tuple(slice(min(starts), max(stops)) for starts, stops in ends)
  size = sum(np.prod([stop - start for start, stop in part]) for part in parts)
  if size != np.prod([axis.stop - axis.start for axis in block]):
    raise ValueError(
      "this process's devices hold scattered parts of the mesh: give a mesh in which each "
      "process has a block, as jaxsms.make_mesh does"
    )
  return block


def place(
  local: np.ndarray, sharding: Sharding | None, shape: tuple[int, ...]
) -> jax.Array:
  """Puts what one process has read on its devices, as its part of one array.

  Args:
    local: the process's part.
    sharding: of the whole array; None for one device.
    shape: the first axes of the whole array; the others are those of `local`.

  Returns:
    The whole array.
  """
  if sharding is None:
    return jax.device_put(local)
  shape = (*shape, *local.shape[len(shape) :])
  return jax.make_array_from_process_local_data(sharding, local, shape)
