"""Which devices work on what: meshes over copies and batches, and moving trees there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  Sharding,
)

from jaxsms.trees import PyTree

INGREDIENT_AXIS = "ingredient"
DATA_AXIS = "data"


def make_mesh(ingredient: int | None = None, data: int = 1, devices=None) -> Mesh:
  """A mesh ("ingredient", "data") over the devices.

  Args:
    ingredient: devices along the copies; None means all that are left.
    data: devices that share the batch of one copy.
    devices: which to use; None means all.

  Returns:
    A mesh whose axes the compiler places (AxisType.Auto).

  Raises:
    ValueError: the product is larger than the number of devices.

  Example:
    >>> mesh = jaxsms.make_mesh(1, 1)  # of one device; make_mesh() takes all of them
    >>> dict(mesh.shape)
    {'ingredient': 1, 'data': 1}
  """
  devices = list(jax.devices() if devices is None else devices)
  ingredient = len(devices) // max(data, 1) if ingredient is None else ingredient
  if ingredient < 1 or data < 1 or ingredient * data > len(devices):
    raise ValueError(
      f"a mesh of {ingredient} x {data} devices does not fit the number of devices, "
      f"{len(devices)}: the product of both axes must be from 1 to {len(devices)}"
    )
  # In the order given: meshes of other shapes over the same devices then share arrays.
  grid = np.array(devices[: ingredient * data]).reshape(ingredient, data)
  return Mesh(grid, (INGREDIENT_AXIS, DATA_AXIS), axis_types=(AxisType.Auto,) * 2)


def fit_mesh(
  copies: int, batch_size: int, devices=None, sharing: float = 0.5
) -> Mesh | None:
  """A mesh over all devices for m copies, by a fixed rule.

  A device trains ceil(copies / ingredient) copies, and d devices that share a batch are
  taken to be d**sharing times as fast as one. The mesh with the fastest step wins, among
  equals the one with more devices along the copies.

  Args:
    copies: m, at least 1.
    batch_size: examples of one copy in a step; the data axis divides it.
    devices: which to use; None means all.
    sharing: 1 would mean that sharing a batch costs nothing; 0.85 was measured on a CPU.

  Returns:
    A mesh as `make_mesh` gives, or None where there is one device.

  Example:
    >>> print(jaxsms.fit_mesh(copies=5, batch_size=128, devices=jax.devices()[:1]))
    None
  """
  devices = list(jax.devices() if devices is None else devices)
  n = len(devices)
  if n == 1:
    return None

  def time(ingredient):
    return -(-copies // ingredient) / (n // ingredient) ** sharing

  fitting = [i for i in range(1, n + 1) if n % i == 0 and batch_size % (n // i) == 0]
  ingredient = min(fitting, key=lambda i: (time(i), -i))
  return make_mesh(ingredient, n // ingredient, devices)


def split_batch(tree: PyTree) -> PyTree:
  """Splits leaves [batch, ...] over the data axis of the mesh in use, if it has one."""
  return _constrain(tree, lambda x, size: PartitionSpec(DATA_AXIS))


def whole(tree: PyTree) -> PyTree:
  """Gives every device along the data axis all of each leaf."""
  return _constrain(tree, lambda x, size: PartitionSpec())


def split_params(tree: PyTree) -> PyTree:
  """Splits each leaf over the data axis along its longest axis that divides evenly."""
  return _constrain(tree, lambda x, size: _longest(x.shape, size))


def params_sharding(mesh: Mesh, shape: tuple[int, ...], stacked: bool) -> NamedSharding:
  """Where `split_params` puts a leaf, with leading axis m if `stacked`.

  Where m does not divide evenly, all devices along the copies have a part of each copy.
  """
  own = _longest(shape[1:] if stacked else shape, mesh.shape.get(DATA_AXIS, 1))
  lead: tuple[str | None, ...] = ()
  if stacked:
    lead = (None if shape[0] % mesh.shape[INGREDIENT_AXIS] else INGREDIENT_AXIS,)
  return NamedSharding(mesh, PartitionSpec(*lead, *own))


def _longest(shape, size):
  even = [(n, axis) for axis, n in enumerate(shape) if size > 1 and n and n % size == 0]
  if not even:
    return PartitionSpec()
  axis = max(even)[1]
  return PartitionSpec(*[None] * axis, DATA_AXIS)


def _constrain(tree, spec_of):
  mesh = jax.sharding.get_abstract_mesh()
  size = dict(mesh.shape).get(DATA_AXIS, 1)
  if size == 1:
    return tree

  # JAX 0.7 takes neither a bare spec in a shard_map nor a mesh with manual axes.
  automatic = (AxisType.Auto,) * len(mesh.axis_names)
  mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=automatic)

  def one(x):
    sharding = NamedSharding(mesh, spec_of(x, size))
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree.map(one, tree)


def place_on(mesh: Mesh, tree: PyTree, stacked: bool) -> PyTree:
  """Puts what is not on this mesh there: XLA stumbles over two meshes in one program.

  Args:
    mesh: of the program.
    tree: of arrays, leaves [m, ...] if `stacked`.
    stacked: whether leaves are spread over the axis "ingredient", where m divides evenly.

  Returns:
    The tree. Where an array lies on the same devices it is not copied.
  """

  def one(x):
    on = getattr(getattr(x, "sharding", None), "mesh", None) == mesh
    if on and DATA_AXIS in x.sharding.spec:  # parameters in parts
      return x
    even = stacked and np.shape(x)[0] % mesh.shape[INGREDIENT_AXIS] == 0
    return place(x, NamedSharding(mesh, PartitionSpec(*[INGREDIENT_AXIS][:even])))

  return jax.tree.map(one, tree)


def place(tree: PyTree, sharding: Any) -> PyTree:
  """Puts a tree on the devices; what is there already stays.

  Args:
    tree: of arrays, of the same values in each process.
    sharding: one for all leaves, or a tree of them.

  Returns:
    The tree, as global arrays where there are several processes.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  if isinstance(sharding, Sharding):
    return jax.tree.map(lambda x: _place_globally(x, sharding), tree)
  return jax.tree.map(_place_globally, tree, sharding)


def _place_globally(x, sharding):
  """An array of this process's own, or of all of them, as one of all of them."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jax.jit(lambda x: x, out_shardings=sharding)(x)
  if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _place_globally(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def release(given: PyTree, placed: PyTree) -> None:
  """Frees what was copied to where it is used, before anything else is done there.

  Args:
    given: a tree that is not used any more.
    placed: the same leaves where they are used. What both share stays.
  """

  def buffers(x):
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}

  for old, new in zip(jax.tree.leaves(given), jax.tree.leaves(placed), strict=True):
    if isinstance(old, jax.Array) and old is not new:
      jax.block_until_ready(new)
      if not buffers(old) & buffers(new):
        old.delete()


def fetch(tree: PyTree) -> PyTree:
  """The values on the host, the same in every process; waits for them."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_fetch_one, tree)


def _fetch_one(x):
  if not _is_elsewhere(x) or x.is_fully_replicated:
    return jax.device_get(x)
  return multihost_utils.process_allgather(x, tiled=True)


def gather(tree: PyTree) -> PyTree:
  """Copies arrays that are also on devices of other processes to this process's devices.

  Every process has to call it, with the same tree. Other arrays are not copied: in a job of
  one process, none is.
  """

  def one(x):
    if not _is_elsewhere(x):
      return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(
        one(jax.random.key_data(x)), impl=jax.random.key_impl(x)
      )
    return jnp.asarray(_fetch_one(x))

  return jax.tree.map(one, tree)


def _is_elsewhere(x):
  return isinstance(x, jax.Array) and not x.is_fully_addressable
