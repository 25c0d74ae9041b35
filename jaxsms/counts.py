"""Counts of entries that are exact beyond 2**31, where JAX has no integers of 64 bits.

Each array is counted in uint32. Their total is kept as two digits, int32 [2], high and low:
the count is high * 2**16 + low.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 16
_BASE = 1 << _BITS


Digits = np.ndarray | jax.Array


def count(conditions: Sequence[jax.Array]) -> jax.Array:
  """How many entries of each array are True: uint32 [arrays], each of fewer than 2**32."""
  return unsigned(jnp.stack([jnp.sum(x, dtype=jnp.int32) for x in conditions]))


def unsigned(wrapped: jax.Array) -> jax.Array:
  """Counts below 2**32 from sums in int32, whose bits are the same."""
  return jax.lax.bitcast_convert_type(wrapped, jnp.uint32)


def on_host(of_arrays: np.ndarray) -> int:
  """The total of the counts of several arrays."""
  return int(np.sum(of_arrays, dtype=np.int64))


def digits(number: int | jax.Array) -> Digits:
  """The two digits of a number that is not negative."""
  if isinstance(number, jax.Array):
    number = unsigned(number) if number.dtype == jnp.int32 else number
    return _carry(number >> _BITS, number & (_BASE - 1))
  return np.array(divmod(int(number), _BASE), np.int32)


def total(of_arrays: jax.Array) -> Digits:
  """The digits of the sum of uint32 [arrays]."""
  high, low = of_arrays >> _BITS, of_arrays & (_BASE - 1)
  return _carry(jnp.sum(high, dtype=jnp.int32), jnp.sum(low, dtype=jnp.int32))


def as_float(number: Digits) -> jax.Array:
  """Digits as float32."""
  return number[0].astype(jnp.float32) * _BASE + number[1].astype(jnp.float32)


def at_most(a: Digits, b: Digits) -> jax.Array:
  """Whether a <= b, both in digits."""
  return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))


def minus(a: Digits, b: Digits) -> Digits:
  """a - b in digits, 0 where that would be negative."""
  return jnp.where(at_most(b, a), _carry(a[0] - b[0], a[1] - b[1]), 0)


def share_out(number: Digits, most: jax.Array) -> jax.Array:
  """Parts of a number, the first as large as they may be.

  Args:
    number: in digits.
    most: uint32 [parts], the largest that each may be.

  Returns:
    uint32 [parts].
  """
  high, low = most >> _BITS, most & (_BASE - 1)
  before = [jnp.cumsum(x, dtype=jnp.int32) - x.astype(jnp.int32) for x in (high, low)]
  rest = minus(number[:, None], _carry(*before))
  whole = at_most(_carry(high, low), rest)
  return jnp.where(
    whole, most, (rest[0].astype(jnp.uint32) << _BITS) | rest[1].astype(jnp.uint32)
  )


def _carry(high, low):
  low = low.astype(jnp.int32)
  return jnp.stack([high.astype(jnp.int32) + (low >> _BITS), low & (_BASE - 1)])
