"""Arrays cut along their axes, and given their full shapes back."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.trees import is_array, is_concrete, path_string


def taken(x, masks):
  """Of an array or its shape, what stays; on the host where that takes no program."""
  if all(mask is None for mask in masks):
    return x
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(left_shape(x.shape, masks), x.dtype)
  if _on_host(x):
    return _placed_like(x, take(np.asarray(x), masks))
  return take(x, masks)


def masked_leaf(x, mask):
  """What is left of a leaf, on the host where that takes no program."""
  if not is_array(x) or isinstance(x, jax.ShapeDtypeStruct) or np.all(mask):
    return x
  if _on_host(x):
    return _placed_like(x, np.where(mask, x, np.zeros((), x.dtype)))
  return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _on_host(x):
  """Whether the host may work on it: of NumPy, or whole on each of its devices."""
  if isinstance(x, np.ndarray):
    return True
  if not (isinstance(x, jax.Array) and is_concrete(x)):
    return False
  return x.is_fully_addressable and x.is_fully_replicated


def _placed_like(x, array):
  """An array of the host on the devices of x; not committed to them where x is not."""
  if isinstance(x, np.ndarray):
    return array
  return jax.device_put(array, x.sharding) if x.committed else jax.device_put(array)


def left_shape(full: Sequence[int], masks: Sequence[np.ndarray | None]) -> tuple[int, ...]:
  """The shape of what is left of an array, each axis by its mask."""
  pairs = zip(full, masks, strict=True)
  return tuple(n if mask is None else int(mask.sum()) for n, mask in pairs)


def check_left_shape(path, x, leaf, masks) -> None:
  """Raises ValueError unless an array has the shape that is left of a leaf."""
  shape = left_shape(leaf.shape, masks)
  if x.shape != shape:
    raise ValueError(
      f"{path_string(path)} has shape {list(x.shape)} and the cut network {list(shape)}: "
      "pass its params, not the full ones"
    )


def expanded(x, masks):
  """In the full shape, zeros where it was cut; on the host where that takes no program."""
  if all(mask is None for mask in masks):
    return x
  if _on_host(x):
    pairs = zip(x.shape, masks, strict=True)
    stays = [np.ones(n, bool) if mask is None else mask for n, mask in pairs]
    full = np.zeros([len(mask) for mask in stays], x.dtype)
    full[np.ix_(*stays)] = np.asarray(x)
    return _placed_like(x, full)
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
