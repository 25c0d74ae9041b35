"""Counts beyond 2**31, against Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import jaxsms
from jaxsms import counts
from jaxsms.counts import digits

sizes = st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5)
numbers = st.integers(0, 2**40)


def number(found):
  high, low = (int(x) for x in found)
  assert 0 <= low < 2**16
  return high * 2**16 + low


@given(sizes, numbers, numbers)
def test_arithmetic_equals_that_of_integers(of_arrays, a, b):
  most = np.array(of_arrays, np.uint32)
  assert number(digits(a)) == a
  assert number(counts.total(most)) == counts.on_host(most) == sum(of_arrays)
  assert bool(counts.at_most(digits(a), digits(b))) == (a <= b)
  assert number(counts.minus(digits(a), digits(b))) == max(a - b, 0)
  assert float(counts.as_float(digits(a))) == np.float32(a)
  parts, left = [], a
  for size in of_arrays:
    parts.append(min(size, left))
    left -= parts[-1]
  assert counts.share_out(digits(a), most).tolist() == parts


@given(st.integers(0, 2**32 - 1))
def test_traced_numbers_have_the_same_digits(n):
  assert number(jax.jit(digits)(np.uint32(n))) == n
  assert number(jax.jit(digits)(np.uint32(n).view(np.int32))) == n


def test_shares_and_counts_of_more_entries_than_int32_holds():
  """Of matrices that are never in memory: nothing else is made of them."""
  shape = (2**16, 3 * 2**13)  # 1.6e9 entries, each, 4.8e9 in all

  @jax.jit
  def found(zero, one):
    params = {
      name: {"kernel": jnp.broadcast_to(value, shape)}
      for name, value in {"a": zero, "b": one, "c": zero}.items()
    }
    zeros = [x["kernel"] == 0 for x in params.values()]
    return jaxsms.sparsity(params), counts.count(zeros)

  share, of_arrays = found(0.0, 1.0)
  assert float(share) == np.float32(2 / 3)
  size = shape[0] * shape[1]
  assert of_arrays.tolist() == [size, 0, size]
  assert counts.on_host(np.asarray(of_arrays)) == 2 * size > 2**31
  larger = jax.jit(lambda x: counts.count([jnp.broadcast_to(x, (2**16, 2**15 + 1)) == 0]))
  assert larger(0.0).tolist() == [2**31 + 2**16]
