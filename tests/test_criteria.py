import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxsms import (
  apply_masks,
  erk_masks,
  filter_masks,
  lamp_masks,
  magnitude_masks,
  n_m_masks,
  phase_sparsity,
  stack,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPARSITIES = st.floats(0, 1, exclude_max=True)
# Many equal magnitudes, and zeros; shapes stay the same so that programs do.
WEIGHTS = arrays(np.float32, 48, elements=st.integers(-6, 6).map(float))
MASKS = arrays(bool, 48, elements=st.integers(0, 3).map(bool))
NAMES = ("conv", "dense")


def tree(values):
  """A convolution [2, 1, 4, 4] and a dense layer [4, 4], with what is not pruned."""
  return {
    "conv": {"bias": np.ones(4, values.dtype), "kernel": values[:32].reshape(2, 1, 4, 4)},
    "dense": {"kernel": values[32:].reshape(4, 4)},
  }


def kernels(masks):
  assert bool(np.all(masks["conv"]["bias"]))
  return [np.asarray(masks[name]["kernel"]) for name in NAMES]


def flat(masks):
  return np.concatenate([mask.ravel() for mask in kernels(masks)])


def earlier(mask):
  return tree(mask) | {"conv": {**tree(mask)["conv"], "bias": np.ones(4, bool)}}


ALL = {
  "erk": (erk_masks, 0.5),
  "lamp": (lamp_masks, 0.5),
  "n_m": (n_m_masks, 0.5),
  "filter": (filter_masks, 0.5),
  "filter_uniform": (functools.partial(filter_masks, scope="uniform"), 0.5),
}


@pytest.mark.parametrize("name", ALL)
@given(values=WEIGHTS, old=MASKS)
def test_what_masks_removed_stays_removed(name, values, old):
  prune, share = ALL[name]
  masks = flat(prune(tree(values), share, masks=earlier(old)))
  assert not np.any(masks & ~old)
  # What is removed already has no say, whatever its value.
  other = np.where(old, values, 7.0).astype(np.float32)
  np.testing.assert_array_equal(masks, flat(prune(tree(other), share, masks=earlier(old))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_jit_and_vmap(name, assert_trees_equal):
  prune, share = ALL[name]
  rng = np.random.default_rng(0)
  models = [tree(rng.standard_normal(48).astype(np.float32)) for _ in range(3)]
  one_by_one = stack([prune(model, share) for model in models])
  together = jax.jit(jax.vmap(lambda params: prune(params, share)))(stack(models))
  assert_trees_equal(together, one_by_one)


def ideal_erk(shapes, share):
  """Densities by the loop of Evci et al.: layers above 1 become dense one by one."""
  sizes = np.array([np.prod(s) for s in shapes], float)
  raw = np.array([sum(s) for s in shapes]) / sizes
  dense = np.zeros(len(shapes), bool)
  while not dense.all():
    factor = ((1 - share) * sizes.sum() - sizes[dense].sum()) / (raw * sizes)[~dense].sum()
    over = ~dense & (factor * raw > 1)
    if not over.any():
      break
    dense |= over & (raw == raw[over].max())
  return np.where(dense, 1, factor * raw) * sizes


ERK_SHAPES = [(3, 3, 3, 8), (3, 3, 8, 16), (3, 3, 16, 16), (1, 1, 8, 16), (16, 10)]


def erk_kept(share, masks=None):
  rng = np.random.default_rng(1)
  params = {
    str(i): {"kernel": rng.standard_normal(s).astype(np.float32)}
    for i, s in enumerate(ERK_SHAPES)
  }
  masks = erk_masks(params, share, masks=masks)
  return params, masks, [int(np.sum(mask)) for mask in jax.tree.leaves(masks)]


@given(SPARSITIES)
def test_erk_densities(share):
  params, masks, kept = erk_kept(share)
  sizes = [np.prod(s) for s in ERK_SHAPES]
  assert sum(kept) == sum(sizes) - round(share * sum(sizes))
  np.testing.assert_allclose(kept, ideal_erk(ERK_SHAPES, share), atol=1.5)
  for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
    size = np.abs(leaf)
    assert np.max(size, where=~mask, initial=0) <= np.min(size, where=mask, initial=np.inf)


def test_erk_worked_by_hand():
  # Weights 2 + 3 and 4 + 6 of 6 and 24 entries; 15 to keep: 5 and 10, at scale 1.
  params = {
    "a": {"kernel": np.arange(6.0).reshape(2, 3)},
    "b": {"kernel": -np.arange(24.0).reshape(4, 6)},
  }
  masks = erk_masks(params, 0.5)
  np.testing.assert_array_equal(np.ravel(masks["a"]["kernel"]), np.arange(6) >= 1)
  np.testing.assert_array_equal(np.ravel(masks["b"]["kernel"]), np.arange(24) >= 14)
  # 24 to keep: twice 8 is beyond the first layer's 6, which stays dense.
  masks = erk_masks(params, 0.2)
  assert [int(np.sum(m)) for m in jax.tree.leaves(masks)] == [6, 18]


@pytest.mark.slow
@given(st.floats(0, 0.999), st.integers(1, 8))
def test_erk_counts_are_exact_over_phases(goal, phases):
  masks, size = None, sum(np.prod(s) for s in ERK_SHAPES)
  for phase in range(1, phases + 1):
    share = phase_sparsity(goal, phase, phases)
    _, masks, kept = erk_kept(share, masks)
    assert sum(kept) == size - round(share * size)


def lamp_scores(values, old):
  """The definition, in float64: position k of the sorted squares over the sum from k."""
  scores = []
  for part in (slice(0, 32), slice(32, 48)):
    squares = np.where(old[part], values[part].astype(float), 0) ** 2
    order = np.argsort(squares, kind="stable")
    score = np.zeros(len(squares))
    for k, i in enumerate(order):
      rest = sum(squares[j] for j in order[k:])
      score[i] = squares[i] / rest if rest else 0
    scores.append(score)
  return np.concatenate(scores)


@given(WEIGHTS, SPARSITIES, MASKS)
def test_lamp_scores(values, share, old):
  masks = flat(lamp_masks(tree(values), share, masks=earlier(old)))
  scores = lamp_scores(values, old)
  removed = np.sum(~masks)
  assert removed == max(round(share * 48), np.sum(~old))
  # Scores of different layers may be equal, but for rounding.
  highest = np.max(scores, where=old & ~masks, initial=0)
  assert highest <= np.min(scores, where=masks, initial=np.inf) * (1 + 1e-5)


def test_lamp_worked_by_hand():
  # 1/14, 4/13, 9/9 and, at a thousandth of the scale, 1/2 (the earlier one), 1/1.
  params = {
    "a": {"kernel": np.array([[1.0, -3.0, 2.0]])},
    "b": {"kernel": np.array([[1e-3, -1e-3]])},
  }
  for share, a, b in (
    (0.2, [0, 1, 1], [1, 1]), (0.4, [0, 1, 0], [1, 1]), (0.6, [0, 1, 0], [0, 1]),
  ):  # fmt: skip
    masks = lamp_masks(params, share)
    np.testing.assert_array_equal(masks["a"]["kernel"], [a])
    np.testing.assert_array_equal(masks["b"]["kernel"], [b])
  assert not np.any(lamp_masks(params, 0.4)["a"]["kernel"][0, ::2])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
@pytest.mark.parametrize("scale", [1e-7, 1, 6e4])
def test_lamp_orders_a_layer_by_magnitude(dtype, scale):
  rng = np.random.default_rng(2)
  params = {"kernel": jnp.asarray(scale * rng.uniform(-1, 1, (30, 40)), dtype)}
  for share in (0.1, 0.5, 0.99):
    np.testing.assert_array_equal(
      lamp_masks(params, share)["kernel"], magnitude_masks(params, share)["kernel"]
    )


@given(WEIGHTS, MASKS, st.sampled_from([(1, 4), (2, 4), (1, 2), (3, 4), (4, 4)]))
def test_n_of_m_inputs_are_kept(values, old, n_m):
  n, m = n_m
  masks = kernels(n_m_masks(tree(values), 1 - n / m, m))
  after = kernels(n_m_masks(tree(values), 1 - n / m, m, masks=earlier(old)))
  for name, mask, nested in zip(NAMES, masks, after, strict=True):
    kernel, before = tree(values)[name]["kernel"], earlier(old)[name]["kernel"]
    # Groups as rows: inputs last.
    size, mask, nested, before = (
      np.swapaxes(x, -1, -2).reshape(-1, m) for x in (np.abs(kernel), mask, nested, before)
    )
    expected = np.zeros_like(mask)
    largest = np.argsort(size, axis=1, kind="stable")[:, m - n :]
    np.put_along_axis(expected, largest, True, axis=1)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(nested.sum(1), np.minimum(before.sum(1), n))


@pytest.mark.parametrize(
  ("n", "m", "axis"), [(5, 32, -2), (3, 16, 0), (20, 24, 1), (1, 1, 2)]
)
def test_wide_groups_with_ties_on_any_axis(n, m, axis):
  rng = np.random.default_rng(n)
  kernel = rng.integers(-4, 5, (48, 96, 4)).astype(np.float32)
  if axis == -2:
    kernel = kernel.transpose(2, 1, 0)
  mask = np.asarray(n_m_masks({"kernel": kernel}, 1 - n / m, m, axis)["kernel"])
  groups = np.moveaxis(np.abs(kernel), axis, -1).reshape(-1, m)
  expected = np.zeros_like(groups, bool)
  largest = np.argsort(groups, axis=1, kind="stable")[:, m - n :]
  np.put_along_axis(expected, largest, True, axis=1)
  np.testing.assert_array_equal(np.moveaxis(mask, axis, -1).reshape(-1, m), expected)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_lamp_is_the_same_in_a_program(masked, assert_trees_equal):
  # Outside of one NumPy sorts, inside of one XLA does.
  rng = np.random.default_rng(3)
  sizes = {"a": (64, 40), "b": (3, 3, 8, 16), "c": (100, 1)}
  params = {k: {"kernel": rng.standard_normal(s).round(2)} for k, s in sizes.items()}
  masks = magnitude_masks(params, 0.3) if masked else None
  for share in (0.4, 0.97):
    jitted = jax.jit(lambda p, share=share: lamp_masks(p, share, masks=masks))
    assert_trees_equal(jitted(params), lamp_masks(params, share, masks=masks))


def test_n_m_axes():
  kernel = np.arange(1.0, 17).reshape(4, 4)
  params = {"a": {"weight": kernel}, "b": {"kernel": kernel}}
  rows = np.array([[False, False, True, True]] * 4)
  masks = n_m_masks(params, 0.5, axis=1)
  np.testing.assert_array_equal(masks["b"]["kernel"], rows)
  masks = n_m_masks(params, 0.5, axis=lambda path, _: 1 if path[0].key == "a" else 0)
  np.testing.assert_array_equal(masks["a"]["weight"], rows)
  np.testing.assert_array_equal(masks["b"]["kernel"], rows.T)
  # 2:4, then 1:4: the sparsities of two phases to 75 %.
  first = n_m_masks(params, phase_sparsity(0.75, 1, 2), axis=1)
  second = n_m_masks(params, 0.75, axis=1, masks=first)
  np.testing.assert_array_equal(second["a"]["weight"], [[False] * 3 + [True]] * 4)


@pytest.mark.torch
def test_2_4_pattern_is_torchs():
  import torch
  from torch.ao.pruning import WeightNormSparsifier

  sparsifier = WeightNormSparsifier(
    sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
  )
  network = torch.nn.Sequential(torch.nn.Linear(16, 8))
  params = {"weight": network[0].weight.detach().numpy().copy()}
  sparsifier.prepare(network, [{"tensor_fqn": "0.weight"}])
  sparsifier.step()
  theirs = network[0].parametrizations.weight[0].mask.numpy().astype(bool)
  np.testing.assert_array_equal(n_m_masks(params, 0.5, axis=1)["weight"], theirs)


def filter_reference(values, share, scope):
  """Kept filters [8], by the definition, and their scores."""
  params = tree(values.astype(float))
  norms = [np.sqrt(np.sum(params[name]["kernel"].reshape(-1, 4) ** 2, 0)) for name in NAMES]
  norms = [x / max(np.sqrt(np.sum(x**2)), 1e-30) for x in norms]
  for first, second in (np.sort(x)[:-3:-1] for x in norms):  # in float32 either may win
    assume(first == second or first - second > 1e-5 * first)
  protected = [len(x) - 1 - np.argmax(x[::-1]) for x in norms]
  for x, i in zip(norms, protected, strict=True):
    x[i] = np.inf
  if scope == "uniform":
    goals, groups = [min(round(share * 4), 3)] * 2, norms
  else:
    goals, groups = [min(round(share * 8), 6)], [np.concatenate(norms)]
  return goals, groups


@pytest.mark.parametrize("scope", ["global", "uniform"])
@given(values=WEIGHTS, share=SPARSITIES)
def test_filters(scope, values, share):
  masks = kernels(filter_masks(tree(values), share, scope))
  filters = [mask.reshape(-1, 4) for mask in masks]
  for mask in filters:
    assert np.all(mask == mask[0])  # whole filters
    assert np.any(mask)  # never all of them
  kept = [mask[0] for mask in filters]
  kept = kept if scope == "uniform" else [np.concatenate(kept)]
  for mask, goal, scores in zip(kept, *filter_reference(values, share, scope), strict=True):
    assert np.sum(~mask) == goal
    highest = np.max(scores, where=~mask, initial=0)
    assert highest <= np.min(scores, where=mask, initial=np.inf) * (1 + 1e-5)


@pytest.mark.torch
def test_filters_of_torch_and_other_layouts():
  import torch
  from torch.nn.utils import prune as torch_prune

  layer = torch_prune.ln_structured(torch.nn.Conv2d(3, 8, 3), "weight", 0.5, n=2, dim=0)
  params = {"weight": layer.weight_orig.detach().numpy()}
  masks = filter_masks(params, 0.5, axis=0)
  np.testing.assert_array_equal(masks["weight"], layer.weight_mask.numpy() == 1)


def test_filters_over_phases_and_a_layer_that_is_gone():
  rng = np.random.default_rng(3)
  params, masks = tree(rng.standard_normal(48).astype(np.float32)), None
  for share, expected in ((0.25, 2), (0.5, 4), (0.75, 6), (0.99, 6)):
    masks = filter_masks(params, share, masks=masks)
    params = apply_masks(params, masks)
    kept = [mask.reshape(-1, 4)[0] for mask in kernels(masks)]
    assert np.sum(~np.concatenate(kept)) == expected
  gone = earlier(np.arange(48) >= 32)
  masks = kernels(filter_masks(params, 0.99, masks=gone))
  assert not np.any(masks[0])
  assert np.any(masks[1])


def test_rejects(rejects):
  params = tree(np.ones(48, np.float32))
  for prune, share in ALL.values():
    for bad in (-0.5, 1.0, float("nan")):
      with rejects("it is the share of weights to remove, in [0, 1)"):
        prune(params, bad)
    with rejects("params and masks have different tree structures"):
      prune(params, share, masks={"dense": np.ones((4, 4), bool)})
    with rejects("none of the 1 leaves of params is prunable"):
      prune({"bias": np.ones(3)}, share)
    with rejects("NaN or infinite values in dense/kernel"):
      prune({"dense": {"kernel": np.full((4, 4), np.nan)}}, share)
  with rejects("sparsity is 0.3 with m = 4: sparsity * m must be a whole number"):
    n_m_masks(params, 0.3)
  with rejects("dense/kernel has 6 inputs on axis -2, not a multiple of 4"):
    n_m_masks({"dense": {"kernel": np.ones((6, 4))}}, 0.5)
  for prune in (n_m_masks, filter_masks):
    with rejects("axis is 2, but dense/kernel has 2 axes"):
      prune(params, 0.5, axis=2)
  with rejects("unknown scope 'layer'"):
    filter_masks(params, 0.5, "layer")
  for prune in (n_m_masks, erk_masks):
    with rejects("sparsity is traced"):
      jax.jit(lambda share, prune=prune: prune(params, share))(0.5)
