"""What is computed otherwise where the compiler divides a program among devices."""

import functools
from collections.abc import Callable

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import AxisType, PartitionSpec

from jaxsms.devices.meshes import DATA_AXIS


def sum_over_batch(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
  """A sum over a batch; where devices share it, each sums its part first.

  Left to the compiler, a loop that sums has all devices wait for each other in every step.

  Args:
    function: of such arrays, giving the sum over their axis n.
    *arrays: [m, n, ...].
  """
  mesh = jax.sharding.get_abstract_mesh()
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  size = dict(mesh.shape).get(DATA_AXIS, 1)
  left_to_compiler = size > 1 and types[DATA_AXIS] == AxisType.Auto
  if not left_to_compiler or arrays[0].shape[1] % size:
    return function(*arrays)
  spec = PartitionSpec(None, DATA_AXIS)
  return jax.shard_map(
    lambda *parts: jax.lax.psum(function(*parts), DATA_AXIS),
    in_specs=(spec,) * len(arrays),
    out_specs=PartitionSpec(),
    axis_names={DATA_AXIS},
    check_vma=False,
  )(*arrays)


def unless_partitioned(whole: Callable, parts: Callable) -> Callable[..., jax.Array]:
  """Either of two functions that compute the same.

  Which one is known when a program is lowered, not when it is traced: the same traced
  function may be called with arrays on one device and with arrays in parts.

  Args:
    whole: of arrays, giving one array; runs where each device has arrays of its own: on
      one device, and in a `jax.shard_map` that is manual over all axes of the mesh.
    parts: the same in another way, for programs whose arrays the compiler may divide.

  Returns:
    A function of the same arrays. It has no batching rule and no derivative: call it
    behind `jax.custom_batching.custom_vmap` and `jax.custom_vjp`.
  """

  def either(*arrays):
    in_whole, in_parts = (jax.make_jaxpr(way)(*arrays) for way in (whole, parts))
    bound = functools.partial(_either.bind, whole=in_whole, parts=in_parts)
    return jax.jit(bound, inline=True)(*arrays)[0]

  return either


_either = Primitive("unless_partitioned")
_either.multiple_results = True
_either.def_abstract_eval(lambda *avals, whole, parts: whole.out_avals)


def _lower(context, *values, whole, parts):
  chosen = parts if _is_partitioned(context.module_context.axis_context) else whole
  return mlir.lower_fun(jaxpr_as_fun(chosen), multiple_results=True)(context, *values)


mlir.register_lowering(_either, _lower)


def _is_partitioned(context) -> bool:
  """Whether a program runs on several devices along an axis that is not manual."""
  mesh = getattr(context, "mesh", None)
  if mesh is None:
    return context.num_devices > 1
  automatic = set(mesh.shape) - set(context.manual_axes)
  return any(mesh.shape[axis] > 1 for axis in automatic)
