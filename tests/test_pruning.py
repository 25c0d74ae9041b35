import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from x64 import enable_x64

from jaxsms import (
  apply_masks,
  magnitude_masks,
  masks_from_keys,
  phase_sparsity,
  prune_phase,
  random_masks,
  sparsity,
  stack,
  uniform_soup,
  unstack,
)
from jaxsms.counts import digits
from jaxsms.selection import magnitude_key, select

# Two prunable leaves of 24 and 15 entries; shapes stay the same so that programs do.
CONV, DENSE = (2, 2, 3, 2), (5, 3)
SIZES = (24, 15)
SPARSITIES = st.floats(0, 1, exclude_max=True)
SCOPES = st.sampled_from(["global", "uniform"])
DTYPES = (np.float16, jnp.bfloat16, np.float32)


def tree(values, dtype=np.float32):
  """A tree with all kinds of leaves; `values` [39] fill those that are prunable."""
  values = np.asarray(values, np.float32).astype(dtype)
  return {
    "conv": {"kernel": values[:24].reshape(CONV), "bias": np.zeros(2, dtype)},
    "dense": {"kernel": jnp.asarray(values[24:].reshape(DENSE)), "bias": np.ones((1, 3))},
    "key": jax.random.key(0),
    "steps": np.int32(7),
  }


def flat(masks):
  """The masks of the prunable entries as one array [39]; all others must be True."""
  for path in (("conv", "bias"), ("dense", "bias"), ("key",), ("steps",)):
    mask = functools.reduce(lambda t, k: t[k], path, masks)
    assert mask.dtype == bool and bool(np.all(mask))
  kernels = masks["conv"]["kernel"], masks["dense"]["kernel"]
  assert [k.dtype for k in kernels] == [bool, bool]
  return np.concatenate([np.asarray(k).ravel() for k in kernels])


def reference(values, sparsity, scope, old=None):
  """The definition: a stable sort, and the first round(sparsity * n) go."""
  old = np.ones(39, bool) if old is None else old
  masks = []
  groups = [slice(0, 39)] if scope == "global" else [slice(0, 24), slice(24, 39)]
  for group in groups:
    kept = old[group]
    goal = max(round(sparsity * kept.size), np.sum(~kept))
    order = np.argsort(np.where(kept, np.abs(values[group]), -1), kind="stable")
    mask = np.ones(kept.size, bool)
    mask[order[:goal]] = False
    masks.append(mask)
  return np.concatenate(masks)


ordinary = st.floats(-100, 100, width=32, allow_subnormal=False)
tied = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5])
tiny = st.floats(-(2.0**-120), 2.0**-120, width=32, allow_subnormal=False)
WEIGHTS = st.one_of(
  *(arrays(np.float32, 39, elements=e) for e in (ordinary, tied, tiny)),
  ordinary.map(lambda x: np.full(39, x, np.float32)),
)


@given(WEIGHTS, SPARSITIES, SCOPES)
@example(np.zeros(39, np.float32), 0.5, "global")
@example(np.ones(39, np.float32), 0.999999, "global")
@example(np.ones(39, np.float32), 0.999999, "uniform")
@example(np.arange(39, dtype=np.float32), 0.0, "global")
@example(np.full(39, np.finfo(np.float32).max), 0.3, "uniform")
def test_magnitude_masks_are_a_stable_sort(values, share, scope):
  masks = flat(magnitude_masks(tree(values), share, scope))
  np.testing.assert_array_equal(masks, reference(values, share, scope))
  sizes = (39,) if scope == "global" else SIZES
  assert np.sum(~masks) == sum(round(share * n) for n in sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@given(WEIGHTS, SPARSITIES)
def test_half_precision_leaves(dtype, values, share):
  rounded = values.astype(dtype).astype(np.float32)
  masks = flat(magnitude_masks(tree(values, dtype), share))
  np.testing.assert_array_equal(masks, reference(rounded, share, "global"))


def test_leaves_of_different_dtypes_compare_by_value():
  params = {
    "a": {"kernel": jnp.array([[1.0, 3.0]], jnp.bfloat16)},
    "b": {"kernel": jnp.array([[2.0, 4.0]], jnp.float16)},
    "c": {"kernel": np.array([[1.5, 2.5]], np.float32)},
  }
  masks = magnitude_masks(params, 0.5)
  kept = [np.asarray(masks[k]["kernel"]).tolist() for k in "abc"]
  assert kept == [[[False, True]], [[False, True]], [[False, True]]]


def test_float64_leaves():
  with enable_x64():
    values = 1 + 1e-12 * np.arange(12.0)[::-1]  # all equal in float32
    masks = magnitude_masks({"kernel": jnp.asarray(values.reshape(3, 4))}, 0.5)
    np.testing.assert_array_equal(np.ravel(masks["kernel"]), values > np.median(values))
    drawn = random_masks(jax.random.key(0), {"kernel": values.reshape(3, 4)}, 0.25)
    assert np.sum(~np.asarray(drawn["kernel"])) == 3


def test_subnormal_magnitudes_are_ordered():
  values = np.arange(39, dtype=np.uint32)[::-1].copy().view(np.float32)
  masks = magnitude_masks({"kernel": jnp.asarray(values.reshape(3, 13))}, 0.5)
  np.testing.assert_array_equal(np.ravel(masks["kernel"]), np.arange(39) < 19)


@pytest.mark.filterwarnings("error::UserWarning")
def test_numpy_float64_leaves_without_x64():
  values = np.arange(6.0).reshape(2, 3)
  masks = magnitude_masks({"kernel": values}, 0.5)
  pruned = apply_masks({"kernel": values}, masks)
  np.testing.assert_array_equal(pruned["kernel"], [[0, 0, 0], [3, 4, 5]])


@pytest.mark.parametrize("share", [0.1, 0.123456789, 0.5, 0.98, 0.9999])
def test_counts_are_exact_for_many_entries(share):
  # float32 would round some of these shares of 848,944 entries to another count.
  params = {"kernel": jnp.arange(848_944, dtype=jnp.float32).reshape(16, -1) % 1000}
  masks = magnitude_masks(params, share)
  assert int(jnp.sum(~masks["kernel"])) == round(share * 848_944)


@given(WEIGHTS, st.floats(0, 0.999), st.integers(1, 6), SCOPES)
def test_masks_are_nested_over_phases(values, goal, phases, scope):
  params, masks, before = tree(values), None, np.ones(39, bool)
  for phase in range(1, phases + 1):
    share = phase_sparsity(goal, phase, phases)
    masks = magnitude_masks(params, share, scope, masks=masks)
    now = flat(masks)
    assert not np.any(now & ~before)
    sizes = (39,) if scope == "global" else SIZES
    assert np.sum(~now) == sum(round(share * n) for n in sizes)
    params, before = apply_masks(params, masks), now


@given(WEIGHTS, SPARSITIES, SCOPES, arrays(bool, 39))
def test_what_masks_removed_stays_removed(values, share, scope, old):
  # Also where the removed entries are large, and more of them than asked for.
  earlier = jax.tree.map(lambda x: np.ones(np.shape(x), bool), tree(values))
  earlier["conv"]["kernel"] = old[:24].reshape(CONV)
  earlier["dense"]["kernel"] = old[24:].reshape(DENSE)
  masks = flat(magnitude_masks(tree(values), share, scope, masks=earlier))
  assert not np.any(masks & ~old)
  np.testing.assert_array_equal(masks, reference(values, share, scope, old))


@pytest.mark.slow
@given(st.integers(0, 2**31 - 1), SPARSITIES, SCOPES, arrays(bool, 39))
def test_random_masks_count_and_nest(seed, share, scope, old):
  params = tree(np.full(39, np.nan))  # values do not matter
  key = jax.random.key(seed)
  masks = random_masks(key, params, share, scope)
  first = flat(masks)
  sizes = (39,) if scope == "global" else SIZES
  assert np.sum(~first) == sum(round(share * n) for n in sizes)
  np.testing.assert_array_equal(first, flat(random_masks(key, params, share, scope)))
  more = flat(random_masks(key, params, (1 + share) / 2.01, scope, masks=masks))
  assert not np.any(more & ~first)


@pytest.mark.slow
def test_random_masks_are_uniform():
  keys = jax.random.split(jax.random.key(0), 400)
  params = {"a": {"kernel": jnp.ones((4, 5))}, "b": {"kernel": jnp.ones((10, 2))}}
  masks = jax.vmap(lambda key: random_masks(key, params, 0.3))(keys)
  both = np.concatenate([np.reshape(m, (400, -1)) for m in jax.tree.leaves(masks)], 1)
  np.testing.assert_array_equal(np.sum(~both, 1), 12)
  # Each entry's share has a standard deviation of 0.023; the same for pairs of entries.
  assert np.all(np.abs(np.mean(~both, 0) - 0.3) < 0.1)
  assert np.all(np.abs(np.corrcoef(both.T)[np.triu_indices(40, 1)]) < 0.25)
  one = random_masks(keys[7], params, 0.3)
  np.testing.assert_array_equal(masks["b"]["kernel"][7], one["b"]["kernel"])


def test_masks_from_keys_takes_any_criterion():
  def last_first(leaf):
    return jnp.arange(leaf.size, dtype=jnp.uint32)[::-1].reshape(leaf.shape)

  masks = masks_from_keys({"kernel": np.ones((2, 3))}, last_first, 0.5)
  np.testing.assert_array_equal(masks["kernel"], [[True] * 3, [False] * 3])

  def largest(leaf):
    return jnp.full(leaf.shape, 2**32 - 1, jnp.uint32)

  masks = masks_from_keys({"kernel": np.ones((2, 3))}, largest, 0.5)
  np.testing.assert_array_equal(masks["kernel"], [[False] * 3, [True] * 3])


def test_own_prunable():
  params = {"W": np.array([1.0, 2.0]), "kernel": np.ones((2, 2))}

  def mine(path, leaf):
    return path[-1].key == "W"

  for masks in (
    magnitude_masks(params, 0.5, prunable=mine),
    magnitude_masks(params, 0.5, "uniform", mine),
  ):
    np.testing.assert_array_equal(masks["W"], [False, True])
    assert np.all(masks["kernel"])
  assert np.sum(random_masks(jax.random.key(0), params, 0.5, prunable=mine)["W"]) == 1
  assert sparsity({"W": np.array([0.0, 2.0]), "kernel": 0}, mine) == 0.5


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_jit_and_vmap(scope, assert_trees_equal):
  rng = np.random.default_rng(0)
  models = [tree(rng.standard_normal(39)) for _ in range(3)]

  def prune(params):
    return magnitude_masks(params, 0.6, scope)

  one_by_one = [prune(params) for params in models]
  assert_trees_equal(jax.jit(prune)(models[0]), one_by_one[0])
  assert_trees_equal(jax.vmap(prune)(stack(models)), stack(one_by_one))


def test_traced_sparsity():
  params = tree(np.random.default_rng(1).standard_normal(39))
  shares = jnp.array([0.0, 0.25, 0.5, 0.9])
  masks = jax.jit(jax.vmap(lambda s: magnitude_masks(params, s)))(shares)
  for share, mask in zip(shares, unstack(masks), strict=True):
    np.testing.assert_array_equal(flat(mask), flat(magnitude_masks(params, float(share))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_masks(dtype):
  values = np.random.default_rng(2).standard_normal(39)
  values[3] = np.nan  # a removed entry becomes 0 whatever it held
  params = tree(values, dtype)
  masks = magnitude_masks(tree(np.nan_to_num(values), dtype), 0.5)
  pruned = apply_masks(params, masks)
  for leaf, mask, before in zip(
    *map(jax.tree.leaves, (pruned["conv"], masks["conv"], params["conv"])), strict=True
  ):
    assert leaf.dtype == before.dtype
    np.testing.assert_array_equal(leaf, np.where(mask, before, np.zeros_like(before)))
  assert pruned["steps"] == 7
  assert sparsity(pruned) == pytest.approx(20 / 39)


def test_apply_masks_gradient_jit_and_broadcast():
  masks = {"kernel": np.array([[True, False], [False, True]]), "f": np.array(True)}
  params = {"kernel": jnp.full((2, 2), 3.0), "f": jnp.float32(1)}

  def square(p):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(apply_masks(p, masks)))

  gradient = jax.jit(jax.grad(square))(params)
  np.testing.assert_array_equal(gradient["kernel"], [[6, 0], [0, 6]])
  stacked = {"kernel": jnp.ones((3, 2, 2)), "f": jnp.ones(3)}
  np.testing.assert_array_equal(
    apply_masks(stacked, masks)["kernel"], np.broadcast_to(masks["kernel"], (3, 2, 2))
  )


def test_soup_of_models_that_share_a_mask_has_that_mask():
  rng = np.random.default_rng(3)
  masks = magnitude_masks(tree(rng.standard_normal(39)), 0.7)
  models = [apply_masks(tree(rng.standard_normal(39)), masks) for _ in range(4)]
  soup = uniform_soup(stack(models))
  for path in ("conv", "dense"):
    np.testing.assert_array_equal(soup[path]["kernel"] != 0, masks[path]["kernel"])
  assert sparsity(soup) == pytest.approx(27 / 39)


@given(WEIGHTS)
def test_sparsity_counts_exact_zeros(values):
  assert float(sparsity(tree(values))) == pytest.approx(np.mean(values == 0))


def test_sparsity_under_jit_and_vmap():
  models = [{"kernel": jnp.array([[0.0, x], [1, 0]])} for x in (0.0, 2.0)]
  np.testing.assert_allclose(jax.jit(jax.vmap(sparsity))(stack(models)), [0.75, 0.5])


@given(st.floats(0, 0.9999), st.integers(1, 20))
def test_phase_sparsity_removes_the_same_fraction_each_time(goal, phases):
  fraction = 1 - (1 - goal) ** (1 / phases)
  remaining = 1.0
  for phase in range(1, phases + 1):
    remaining *= 1 - fraction
    assert phase_sparsity(goal, phase, phases) == pytest.approx(1 - remaining, abs=1e-9)
  assert phase_sparsity(goal, phases, phases) == goal


def test_functions_as_leaves_are_left_alone():
  params = {"layer": {"kernel": np.array([[1.0, 2.0]])}, "activation": jax.nn.relu}
  masks = magnitude_masks(params, 0.5)
  pruned = apply_masks(params, masks)
  assert pruned["activation"] is jax.nn.relu
  np.testing.assert_array_equal(pruned["layer"]["kernel"], [[0, 2]])
  assert sparsity(pruned) == 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_selection_takes_no_memory_beside_its_masks(masked):
  values = [jnp.ones((16, 1000)), jnp.ones((3, 3, 10, 20))]
  kept = [jnp.ones(x.shape, bool) if masked else None for x in values]
  program = select.lower(values, kept, digits(9000), magnitude_key).compile()
  analysis = program.memory_analysis()
  assert analysis.output_size_in_bytes < 18_000  # a byte an entry
  assert analysis.temp_size_in_bytes < 8_000  # and not four


@pytest.mark.slow
def test_selection_among_100_million_entries(usual_compilation):
  leaves = jax.random.normal(jax.random.key(0), (43, 3, 3, 512, 512))
  params = {str(i): {"kernel": leaf} for i, leaf in enumerate(leaves)}
  jax.block_until_ready(params)
  size, seconds = leaves.size, []
  for share in (0.9, 0.91, 0.5):
    start = time.process_time()
    masks = jax.block_until_ready(magnitude_masks(params, share))
    seconds.append(time.process_time() - start)
    removed = sum(int(jnp.sum(~mask)) for mask in jax.tree.leaves(masks))
    assert removed == round(share * size)
  print(f"{size:,} entries: {seconds[0]:.2f} s with compilation, then {seconds[1:]}")


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_rejects_sparsities(share, rejects):
  params = {"kernel": np.ones((2, 2), np.float32)}
  for prune in (magnitude_masks, functools.partial(random_masks, jax.random.key(0))):
    with rejects(f"sparsity is {share:g}: it is the share of weights to remove, in [0, 1)"):
      prune(params, share)
  with rejects("goal sparsity is"):
    phase_sparsity(share, 1, 1)


def test_a_phase_counts_masks_that_broadcast():
  params = {"kernel": np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)}
  row = np.array([True, False])
  pruned, _, record = prune_phase(params, None, 0.5, lambda *a, **k: {"kernel": row})
  assert record["sparsity"] == sparsity(pruned) == 0.5
  _, _, record = prune_phase(
    pruned, {"kernel": row}, 0.5, lambda *a, **k: {"kernel": row & np.ones((6, 1), bool)}
  )
  assert (record["sparsity"], record["pruned_fraction"]) == (0.5, 0)
  with pytest.raises(ValueError, match="keeps 6 weights that were removed before"):
    prune_phase(params, {"kernel": row}, 0.5, lambda *a, **k: {"kernel": np.array(True)})


def test_rejects(rejects):
  params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
  key = jax.random.key(0)
  for prune in (magnitude_masks, functools.partial(random_masks, key)):
    with rejects("unknown scope 'globl': did you mean global?"):
      prune(params, 0.5, "globl")
    with rejects("none of the 1 leaves of params is prunable"):
      prune({"bias": params["bias"]}, 0.5)
    with rejects("params and masks have different tree structures"):
      prune(params, 0.5, masks={"kernel": np.ones((2, 2), bool)})
    with rejects("params and masks differ in shape at kernel: [2, 2] and [3]"):
      prune(params, 0.5, masks={"kernel": np.ones(3, bool), "bias": np.ones(2, bool)})
  with rejects("NaN or infinite values in kernel"):
    magnitude_masks({"kernel": np.full((2, 2), np.nan)}, 0.5)
  with rejects("none of the 0 leaves"):
    sparsity({})
  with rejects("params and masks have different tree structures"):
    apply_masks(params, {"kernel": np.ones((2, 2), bool)})
  with rejects("phases is 0"):
    phase_sparsity(0.5, 1, 0)
  for phase in (0, 4):
    with rejects(f"phase is {phase}: phases count from 1 to 3"):
      phase_sparsity(0.5, phase, 3)
