"""Which entries of several arrays are the smallest: exact counts, no sorting."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

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


@functools.partial(jax.jit, static_argnames="sort_key")
def keep_largest(
  values: list[jax.Array],
  kept: list[jax.Array | None],
  goal: int | jax.Array,
  sort_key: SortKey = identity_key,
) -> list[jax.Array]:
  """Masks without the entries of smallest key, so that `goal` are removed in all.

  The threshold is found by bisecting on the bits of the key, the last tied entry by
  bisecting on its position: no sorting, no index arrays. Keys are worked out anew in
  every pass, which is quicker than reading them from memory and takes none.

  Args:
    values: arrays of any shapes.
    kept: bool arrays of these shapes, False where an entry is removed already and
      counts; None where nothing is.
    goal: how many entries to remove.
    sort_key: gives unsigned integers of one dtype, elementwise. The program is compiled
      for it: pass a function of a module, no lambda.

  Returns:
    Bool arrays, True where kept. Equal keys go by position.
  """
  kept = [None if m is None else jnp.asarray(m, bool) for m in kept]
  old = [m for m in kept if m is not None]
  # Two counts: a single one XLA turns, on CPU, into a sum that writes all ones first.
  removed = _counts(lambda m, _, __: [~m, m], old, old, [])[0] if old else 0
  count = jnp.maximum(goal - removed, 0)

  def counts_below(thresholds):
    """For each threshold, how many kept entries have a smaller key."""
    return _counts(
      lambda v, m, t: [_and(m, sort_key(v) < x) for x in t], values, kept, thresholds
    )

  dtype = jax.eval_shape(sort_key, values[0]).dtype
  threshold, below = _largest(counts_below, count, dtype, jnp.iinfo(dtype).bits)
  left = count - below

  # Positions count leaf by leaf, in row-major order. Of the tied entries those before
  # `end` go.
  *starts, total = (int(n) for n in np.cumsum([0] + [v.size for v in values]))

  def tied_before(v, m, ends, start):
    tied = _and(m, sort_key(v) == ends[0])
    position = _positions(v.shape, ends[1]) + np.uint32(start)
    return [tied & (position < end) for end in ends[2:]]

  def counts_tied_before(ends):
    rules = [functools.partial(tied_before, start=start) for start in starts]
    return _counts(rules, values, kept, [threshold, np.uint32(1), *ends])

  end = jax.lax.cond(
    left > 0,
    lambda: _largest(counts_tied_before, left, jnp.uint32, total.bit_length())[0],
    lambda: jnp.zeros((), jnp.uint32),
  )
  masks = []
  for v, m, start in zip(values, kept, starts, strict=True):
    key, position = sort_key(v), _positions(v.shape) + np.uint32(start)
    masks.append(_and(m, (key > threshold) | ((key == threshold) & (position >= end))))
  return masks


def _largest(counts_below, limit, dtype, bits) -> tuple[jax.Array, jax.Array]:
  """The largest number of so many bits with no more than `limit` entries below it.

  Two bits per pass: three counts take hardly longer than one, since reading the
  entries is what takes time.

  Returns:
    The number, and how many entries are below it.
  """
  passes = -(-bits // 2)

  def find_two_bits(i, carry):
    found, below = carry
    shift = (2 * (passes - 1 - i)).astype(dtype)
    trials = [found | (jnp.asarray(digit, dtype) << shift) for digit in (1, 2, 3)]
    numbers = jnp.stack(counts_below(trials))
    within = numbers <= limit
    found |= jnp.sum(within, dtype=dtype) << shift
    return found, jnp.maximum(below, jnp.max(numbers, where=within, initial=0))

  start = jnp.zeros((), dtype), jnp.zeros((), jnp.int32)
  return jax.lax.fori_loop(0, passes, find_two_bits, start)


def _counts(rules, values, kept, arguments) -> list[jax.Array]:
  """How many entries of all arrays each condition holds for, in one pass over them.

  Args:
    rules: `rule(values, kept, arguments)` gives a list of bool arrays, the conditions;
      one rule, or one for each array.
    values: arrays.
    kept: bool arrays, or None.
    arguments: scalars.
  """
  rules = [rules] * len(values) if callable(rules) else rules
  totals = 0
  for rule, v, m in zip(rules, values, kept, strict=True):
    # What the conditions share is not to be moved out of a loop into an array.
    conditions = rule(*jax.lax.optimization_barrier((v, m, arguments)))
    ones = [condition.astype(jnp.int32) for condition in conditions]
    zeros = [np.int32(0)] * len(ones)
    axes = tuple(range(v.ndim))
    totals += jnp.stack(jax.lax.reduce(ones, zeros, _add, axes))
  return list(totals)


def _add(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
  return [x + y for x, y in zip(a, b, strict=True)]


def _and(mask: jax.Array | None, condition: jax.Array) -> jax.Array:
  return condition if mask is None else mask & condition


def _positions(shape: tuple[int, ...], one: int | jax.Array = 1) -> jax.Array:
  """Row-major positions, uint32; `one` is 1, and may be a 1 that no compiler sees."""
  position, stride = np.uint32(0), 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    position += along * (np.uint32(stride) * jnp.asarray(one, jnp.uint32))
    stride *= shape[axis]
  return position
