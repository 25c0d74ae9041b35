"""Arrays cut along their axes, and given their full shapes back."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.trees import is_array, is_concrete


def taken(x, masks):
  if all(mask is None for mask in masks):
    return x
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(left_shape(x.shape, masks), x.dtype)
  if isinstance(x, np.ndarray):
    return take(x, masks)
  alone = is_concrete(x) and isinstance(x, jax.Array) and len(x.devices()) == 1
  if not alone:
    return take(x, masks)
  return _beside(x, take(np.asarray(x), masks))  # no program to compile


def _beside(x, array):
  """An array of the host on the device of x; free to move where x is."""
  return jax.device_put(array, x.sharding) if x.committed else jnp.asarray(array)


def masked_leaf(x, mask):
  """What is left of a leaf, on the host where that takes no program."""
  if not is_array(x) or isinstance(x, jax.ShapeDtypeStruct) or np.all(mask):
    return x
  if isinstance(x, np.ndarray):
    return np.where(mask, x, np.zeros((), x.dtype))
  if isinstance(x, jax.Array) and is_concrete(x) and len(x.devices()) == 1:
    return _beside(x, np.where(mask, x, np.zeros((), x.dtype)))
  return jnp.where(mask, x, jnp.zeros((), x.dtype))


def left_shape(full: Sequence[int], masks: Sequence[np.ndarray | None]) -> tuple[int, ...]:
  """The shape of what is left of an array, each axis by its mask."""
  pairs = zip(full, masks, strict=True)
  return tuple(n if mask is None else int(mask.sum()) for n, mask in pairs)


def expanded(x, masks):
  for axis, mask in enumerate(masks):
    if mask is not None:
      zero = jnp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)
      where = np.where(mask, np.cumsum(mask) - 1, x.shape[axis])
      x = jnp.take(jnp.concatenate([x, zero], axis), where, axis=axis)
  return x


def take(array: Any, masks: Sequence[np.ndarray | None]) -> Any:
  """Of an array, what stays along each axis."""
  for axis, mask in enumerate(masks):
    if mask is not None:
      numbers = np if isinstance(array, np.ndarray) else jnp
      array = numbers.take(array, np.flatnonzero(mask), axis=axis)
  return array
