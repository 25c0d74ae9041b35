"""Maps the work of one copy over all of them, and over all devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxsms.compat import constraint_mesh
from jaxsms.devices.meshes import INGREDIENT_AXIS
from jaxsms.trees import PyTree, at, number_of_models, wait_on_cpu


def map_ingredients(
  function: Callable[..., PyTree],
  in_axes: Any = 0,
  mesh: Mesh | None = None,
  at_once: int | None = None,
) -> Callable[..., PyTree]:
  """Maps a function of one ingredient over all m, as `jax.vmap` does, on all devices.

  On a mesh each device holds its share of the copies and maps over them with vmap inside
  shard_map; the axis "ingredient" is manual, other axes are left to the compiler. Where m
  does not divide evenly, copies of the last ingredient fill up the devices and are dropped
  from the result: pass arguments that `pad_ingredients` filled up to save that work.

  Args:
    function: pure and jittable, of one ingredient.
    in_axes: 0 for an argument with leading axis m, None for one that all share; one value,
      or a tuple with one for each positional argument.
    mesh: None for one device, else a mesh with an axis "ingredient", as `make_mesh` gives.
    at_once: ingredients of a device that are vmapped together. Groups of this size follow
      one another in the same program. None means all.

  Returns:
    A function of the same positional arguments, whose results have leading axis m.

  Raises:
    ValueError: in_axes does not fit the arguments, they disagree on m, or the mesh has no
      axis "ingredient", or `at_once` is below 1.

  Example:
    >>> one = lambda scale, x: scale * x
    >>> every = jaxsms.map_ingredients(one, in_axes=(0, None))
    >>> every(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 10.0])).tolist()
    [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]
  """
  if at_once is not None and at_once < 1:
    raise ValueError(f"at_once is {at_once}: give at least 1, or None for all")
  if mesh is not None and INGREDIENT_AXIS not in mesh.shape:
    raise ValueError(
      f"the mesh has axes {tuple(mesh.shape)}: it needs one named {INGREDIENT_AXIS!r}, as "
      "jaxsms.make_mesh gives"
    )

  @functools.cache  # one jitted program, so that eager calls do not compile again
  def program(mesh, axes):
    def on_each(*args):
      with constraint_mesh(mesh):
        return _map_in_groups(function, axes, at_once, *args)

    sharded = jax.shard_map(
      on_each,
      mesh=mesh,
      in_specs=tuple(PartitionSpec(*[INGREDIENT_AXIS][: axis == 0]) for axis in axes),
      out_specs=PartitionSpec(INGREDIENT_AXIS),
      axis_names={INGREDIENT_AXIS},
      check_vma=False,
    )
    return jax.jit(sharded)

  def mapped(*args):
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
    if len(axes) != len(args) or any(axis not in (0, None) for axis in axes):
      raise ValueError(
        f"in_axes {in_axes} for {len(args)} arguments: give 0 or None for each of them"
      )
    if 0 not in axes:
      raise ValueError(
        f"in_axes {in_axes} gives no argument a leading axis: at least one must be 0"
      )
    stacked = [a for a, axis in zip(args, axes, strict=True) if axis == 0]
    m = number_of_models(stacked, "ingredients")
    if mesh is None:
      return _map_in_groups(function, axes, at_once, *args)
    padded = iter(pad_ingredients(stacked, mesh.shape[INGREDIENT_AXIS])[0])
    filled = [
      a if axis is None else next(padded) for a, axis in zip(args, axes, strict=True)
    ]
    result = wait_on_cpu(program(mesh, axes)(*filled))
    if m % mesh.shape[INGREDIENT_AXIS] == 0:
      return result
    return first_ingredients(result, m)

  return mapped


def _map_in_groups(function, axes, at_once, *args):
  """vmap, or groups of `at_once` copies one after another."""
  stacked = [a for a, axis in zip(args, axes, strict=True) if axis == 0]
  if at_once is None or at_once >= number_of_models(stacked) > 1:
    return jax.vmap(function, in_axes=axes)(*args)

  def one(own):
    own, pairs = iter(own), zip(args, axes, strict=True)
    return function(*(a if axis is None else next(own) for a, axis in pairs))

  # Without vmap where it would be over one: there a `cond` skips what it need not do.
  return jax.lax.map(one, stacked, batch_size=at_once if at_once > 1 else None)


def pad_ingredients(stacked: PyTree, multiple: int) -> tuple[PyTree, np.ndarray]:
  """Repeats the last ingredient until their number divides evenly.

  Args:
    stacked: tree with leaves [m, ...].
    multiple: the number of devices that share the ingredients, at least 1.

  Returns:
    The tree with leaves [k, ...], k the next multiple, and bool [k]: which are valid. To
    leave the others out of a soup give them weight 0.

  Raises:
    ValueError: leaves disagree on m, or `multiple` is below 1.

  Example:
    >>> padded, valid = jaxsms.pad_ingredients({"seed": np.array([7, 8, 9])}, 2)
    >>> padded["seed"].tolist(), valid.tolist()
    ([7, 8, 9, 9], [True, True, True, False])
  """
  if multiple < 1:
    raise ValueError(f"multiple is {multiple}: at least 1 is needed")
  m = number_of_models(stacked)
  k = -(-m // multiple) * multiple
  source = np.minimum(np.arange(k), m - 1)
  padded = stacked if k == m else take_ingredients(stacked, source)
  return padded, np.arange(k) < m


# One program each for a whole tree: op by op, small transfers between the devices of a CPU
# wait for one another.


def take_ingredients(stacked: PyTree, indices) -> PyTree:
  """The ingredients at the given indices: leaves [m, ...] -> [len(indices), ...]."""
  if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(stacked)):
    return jax.tree.map(lambda x: x[np.asarray(indices)], stacked)
  return wait_on_cpu(at(stacked, jnp.asarray(indices)))


def first_ingredients(stacked: PyTree, count: int) -> PyTree:
  """The first of the ingredients: leaves [m, ...] -> [count, ...]."""
  return wait_on_cpu(_first(stacked, count))


@functools.partial(jax.jit, static_argnums=1)
def _first(tree, count):
  return jax.tree.map(lambda x: x[:count], tree)


def repeat_model(params: PyTree, m: int) -> PyTree:
  """m equal copies: leaves [...] -> [m, ...]."""
  return wait_on_cpu(_repeat(params, m))


@functools.partial(jax.jit, static_argnums=1)
def _repeat(params, m):
  return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (m, *x.shape)), params)
