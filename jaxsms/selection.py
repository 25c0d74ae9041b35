"""Which entries of several arrays are the smallest: exact counts, no sorting."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms import counts

SortKey = Callable[[jax.Array], jax.Array]


def magnitude_key(values: jax.Array) -> jax.Array:
  """The bits of the magnitudes: floats from 0 up are ordered as their bits are."""
  return jax.lax.bitcast_convert_type(jnp.abs(values).astype(jnp.float32), jnp.uint32)


def magnitude_key_64(values: jax.Array) -> jax.Array:
  """As `magnitude_key`, for arrays of which some are float64."""
  return jax.lax.bitcast_convert_type(jnp.abs(values).astype(jnp.float64), jnp.uint64)


def identity_key(values: jax.Array) -> jax.Array:
  """For values that are sort keys already."""
  return values


def keep_largest(
  values: list[jax.Array],
  kept: list[jax.Array | None],
  goal: int | jax.Array,
  sort_key: SortKey = identity_key,
) -> list[jax.Array]:
  """Masks without the entries of smallest key, so that `goal` are removed in all.

  The threshold is found by bisecting on the bits of the key, the last tied entry by
  bisecting on its position: no sorting, no index arrays. Keys are computed again in every
  pass: that is faster than reading them from memory, and needs no memory.

  Args:
    values: arrays of any shapes, of fewer than 2**32 entries each.
    kept: bool arrays of these shapes, False where an entry is removed already and
      counts; None where nothing is.
    goal: how many entries to remove.
    sort_key: gives unsigned integers of one dtype, elementwise. The program is compiled
      for it: pass a function of a module, no lambda.

  Returns:
    Bool arrays, True where kept. Equal keys go by position.

  Raises:
    ValueError: an array has too many entries to be counted.
  """
  largest = max(v.size for v in values)
  if largest >= 2**32:
    raise ValueError(
      f"an array has {largest} entries, more than are counted in one: split it into arrays "
      "of fewer than 2**32"
    )
  return select(values, kept, counts.digits(goal), sort_key)


@functools.partial(jax.jit, static_argnames="sort_key")
def select(
  values: list[jax.Array],
  kept: list[jax.Array | None],
  goal: counts.Digits,
  sort_key: SortKey,
) -> list[jax.Array]:
  """`keep_largest`, with the goal in digits, see `jaxsms.counts`."""
  kept = [None if m is None else jnp.asarray(m, bool) for m in kept]
  old = [m for m in kept if m is not None]
  count = goal
  if old:  # two counts: a single one XLA turns, on CPU, into a sum that writes all ones
    removed = _counts(lambda m, _, __: [~m, m], old, old, [])
    count = counts.minus(goal, counts.total(removed[0]))

  def is_within(thresholds):
    """For each threshold, whether no more than `count` kept entries have a smaller key."""
    below = _counts(
      lambda v, m, t: [_and(m, sort_key(v) < x) for x in t], values, kept, thresholds
    )
    return [counts.at_most(counts.total(n), count) for n in below]

  dtype = jax.eval_shape(sort_key, values[0]).dtype
  threshold = _largest(is_within, (), dtype, jnp.iinfo(dtype).bits)

  def below_and_tied(v, m, t):
    key = sort_key(v)
    return [_and(m, key < t[0]), _and(m, key == t[0])]

  # Of the tied entries the first go, array by array, in each by row-major position.
  below, tied = _counts(below_and_tied, values, kept, [threshold])
  left = counts.minus(count, counts.total(below))
  quota = counts.share_out(left, tied)

  def tied_before(v, m, ends, array):
    key_is_tied = _and(m, sort_key(v) == ends[0])
    position = _positions(v.shape, ends[1])
    return [key_is_tied & (position < end[array]) for end in ends[2:]]

  def is_within_quota(ends):
    rules = [functools.partial(tied_before, array=i) for i in range(len(values))]
    found = _counts(rules, values, kept, [threshold, np.uint32(1), *ends])
    return [n <= quota for n in found]

  bits = max(v.size for v in values).bit_length()
  ends = jax.lax.cond(
    counts.at_most(left, counts.digits(0)),
    lambda: jnp.zeros([len(values)], jnp.uint32),
    lambda: _largest(is_within_quota, (len(values),), jnp.uint32, bits),
  )
  masks = []
  for v, m, end in zip(values, kept, ends, strict=True):
    key, position = sort_key(v), _positions(v.shape)
    masks.append(_and(m, (key > threshold) | ((key == threshold) & (position >= end))))
  return masks


def _largest(is_within, shape, dtype, bits) -> jax.Array:
  """The largest numbers of so many bits, up to which `is_within` holds.

  Two bits per pass: three counts take hardly longer than one, since reading the
  entries is what takes time.
  """
  passes = -(-bits // 2)

  def find_two_bits(i, found):
    shift = (2 * (passes - 1 - i)).astype(dtype)
    trials = [found | (jnp.asarray(digit, dtype) << shift) for digit in (1, 2, 3)]
    return found | jnp.sum(jnp.stack(is_within(trials)), 0, dtype=dtype) << shift

  return jax.lax.fori_loop(0, passes, find_two_bits, jnp.zeros(shape, dtype))


def _counts(rules, values, kept, arguments) -> list[jax.Array]:
  """How many entries of each array each condition holds for, in one pass over them.

  Args:
    rules: `rule(values, kept, arguments)` gives a list of bool arrays, the conditions;
      one rule, or one for each array.
    values: arrays.
    kept: bool arrays, or None.
    arguments: arrays of no or one entry for each array.

  Returns:
    For each condition uint32 [arrays].
  """
  rules = [rules] * len(values) if callable(rules) else rules
  found = []
  for rule, v, m in zip(rules, values, kept, strict=True):
    # What the conditions share is not to be moved out of a loop into an array.
    conditions = rule(*jax.lax.optimization_barrier((v, m, arguments)))
    ones = [condition.astype(jnp.int32) for condition in conditions]
    zeros = [np.int32(0)] * len(ones)
    axes = tuple(range(v.ndim))
    found.append(jnp.stack(jax.lax.reduce(ones, zeros, _add, axes)))
  return list(counts.unsigned(jnp.stack(found, axis=1)))


def _add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
  return [x + y for x, y in zip(a, b, strict=True)]


def _and(mask: jax.Array | None, condition: jax.Array) -> jax.Array:
  return condition if mask is None else mask & condition


def _positions(shape: tuple[int, ...], one: int | jax.Array = 1) -> jax.Array | np.uint32:
  """Row-major positions, uint32; `one` is 1, and may be a 1 that no compiler sees."""
  position: jax.Array | np.uint32 = np.uint32(0)
  stride = 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    position += along * (np.uint32(stride) * jnp.asarray(one, jnp.uint32))
    stride *= shape[axis]
  return position
