import functools
import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsms import (
  apply_masks,
  batch_norm_scores,
  channel_groups,
  channel_masks,
  compact,
  l2_scores,
  masks_of_channels,
  multiply_adds,
  prunable,
  prune_phase,
  random_masks,
  sensitivity,
  taylor_scores,
)
from jaxsms.channels.latency import (
  masks_for_latency,
  network_latency,
  rounds_by_turns,
  seconds_of,
  seconds_ratio,
)
from jaxsms.channels.places import kept_channels
from jaxsms.trees import path_string

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Group(NamedTuple):
  size: int
  places: tuple
  indices: tuple


class Groups(tuple):
  """Groups that know what their leaves cost."""

  multiply_adds = None
  outputs = None


def group(size, *places):
  """Of (path, axis) or (path, axis, positions); positions are those from 0 by default."""
  positions = [p[2] if len(p) > 2 else np.arange(size) for p in places]
  return Group(size, tuple(p[:2] for p in places), tuple(positions))


def network(seed=0):
  """A convolution with batch norm, flattened into a dense layer, and fused attention.

  Its leaves have channels on several axes, at several positions, of two groups on one axis,
  and none; one group has two channels only.
  """
  rng = np.random.default_rng(seed)
  shapes = {
    "conv": {"kernel": (2, 2, 2, 6), "bias": (6,)},
    "norm": {"scale": (6,), "bias": (6,)},
    "dense": {"kernel": (12, 10), "bias": (10,)},
    "qkv": {"kernel": (10, 18)},
    "out": {"kernel": (6, 3), "bias": (3,)},
  }
  draw = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  layers = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
  statistics = {"norm": {"mean": draw(6), "var": np.ones(6, np.float32)}}
  return {"params": layers, "batch_stats": statistics}


# Of the fused projection the columns are [3 of q, k, v; 2 heads; 3 columns].
QKV = np.arange(18).reshape(3, 2, 3)
GROUPS = Groups(
  [
    group(
      6,
      ("params/conv/kernel", 3),
      ("params/conv/bias", 0),
      ("params/norm/scale", 0),
      ("params/norm/bias", 0),
      ("batch_stats/norm/mean", 0),
      ("batch_stats/norm/var", 0),
      ("params/dense/kernel", 0, np.arange(12).reshape(2, 6).T),
    ),
    group(
      10, ("params/dense/kernel", 1), ("params/dense/bias", 0), ("params/qkv/kernel", 0)
    ),
    group(
      2,
      ("params/qkv/kernel", 1, np.moveaxis(QKV, 1, 0).reshape(2, 9)),
      ("params/out/kernel", 0, np.arange(6).reshape(2, 3)),
    ),
    group(3, ("params/qkv/kernel", 1, np.moveaxis(QKV[:2], 2, 0).reshape(3, 4))),
  ]
)
GROUPS.multiply_adds = {
  "params/conv/kernel": 48 * 9,
  "params/dense/kernel": 120,
  "params/qkv/kernel": 180 * 4,
  "params/out/kernel": 18 * 4,
}
SIZES = [g.size for g in GROUPS]
KERNELS = ("conv", "dense", "qkv", "out")


def leaves_by_path(tree):
  return {path_string(p): np.array(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def brute_masks(params, kept, old=None):
  """Masks entry by entry: every place of every channel that goes."""
  masks = {name: np.ones(x.shape, bool) for name, x in leaves_by_path(params).items()}
  for g, left in zip(GROUPS, kept, strict=True):
    for (name, axis), indices in zip(g.places, g.indices, strict=True):
      for channel in np.flatnonzero(~np.asarray(left)):
        for position in np.ravel(indices[channel]):
          np.moveaxis(masks[name], axis, 0)[position] = False
  if old is not None:
    masks = {name: mask & leaves_by_path(old)[name] for name, mask in masks.items()}
  return masks


def share_removed(masks, budget, kept=None):
  """What masks, by path, remove of a budget."""
  if budget == "channels":
    return 1 - sum(int(np.sum(k)) for k in kept) / sum(SIZES)
  names = [f"params/{name}/kernel" for name in KERNELS]
  if budget == "weights":
    return 1 - sum(masks[n].sum() for n in names) / sum(masks[n].size for n in names)
  costs = GROUPS.multiply_adds
  return 1 - sum(costs[n] * masks[n].mean() for n in names) / sum(costs.values())


def norms(params, masks=None):
  """Relative norms of all channels, from the entries that a channel alone would remove."""
  leaves = leaves_by_path(params if masks is None else apply_masks(params, masks))
  scores = []
  for i, g in enumerate(GROUPS):
    squares = []
    for channel in range(g.size):
      kept = [np.ones(size, bool) for size in SIZES]
      kept[i][channel] = False
      alone = brute_masks(params, kept)
      squares.append(
        sum(
          np.sum(leaves[n].astype(float) ** 2, where=~mask)
          for n, mask in alone.items()
          if not n.startswith("batch_stats")
        )
      )
    squares = np.array(squares)
    scores.append(np.sqrt(squares / squares[squares > 0].mean()))
  return scores


def brute_force(params, sparsity, scores, *, budget="weights", round_to=1, old=None):
  """Channel by channel, recounting all entries each time; None where it is not enough."""
  kept = [np.ones(size, bool) for size in SIZES]
  if old is not None:
    kept = [np.asarray(k) for k in kept_channels(params, GROUPS, old)]
  while True:
    masks = brute_masks(params, kept, old)
    if share_removed(masks, budget, kept) >= sparsity - 1e-9:
      return masks
    candidates = []
    for i, left in enumerate(kept):
      block = left.sum() % round_to or round_to
      if left.sum() - block >= round_to:
        order = sorted(np.flatnonzero(left), key=lambda c, i=i: (scores[i][c], c))[:block]
        candidates.append((np.mean(scores[i][order]), i, order))
    if not candidates:
      return None
    _, i, order = min(candidates, key=lambda c: c[:2])
    kept[i][order] = False


def assert_masks(masks, expected):
  found = leaves_by_path(masks)
  assert found.keys() == expected.keys()
  for name, mask in found.items():
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected[name], err_msg=name)


def hidden(values, last=None):
  """x @ a @ b: two groups of channels, each with a row and a column."""
  values = np.asarray(values, np.float32)
  return {"a": {"kernel": values[None]}, "b": {"kernel": np.ones((len(values), 1), "f")}}


def groups_of(params):
  size = params["a"]["kernel"].shape[1]
  return [group(size, ("a/kernel", 1), ("b/kernel", 0))]


@given(st.lists(st.lists(st.booleans(), min_size=10, max_size=10), min_size=4, max_size=4))
def test_masks_of_channels_by_hand_and_back(drawn):
  params = network()
  kept = [np.array([*k[: size - 1], True]) for k, size in zip(drawn, SIZES, strict=True)]
  masks = masks_of_channels(params, GROUPS, kept)
  assert jax.tree.structure(masks) == jax.tree.structure(params)
  assert_masks(masks, brute_masks(params, kept))
  again = masks_of_channels(params, GROUPS, kept_channels(params, GROUPS, masks))
  for mask, other in zip(jax.tree.leaves(masks), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(mask, other)


def test_a_removed_channel_leaves_nothing_behind():
  # The layer with the channel masked computes what the layer without it computes, also
  # where its activation is not 0 at 0 and its running variance is 0.
  params = network()["params"] | {"stats": network()["batch_stats"]["norm"]}
  rng = np.random.default_rng(1)
  inputs = rng.standard_normal((5, 4, 4, 2)).astype(np.float32)

  def features(conv, norm, stats, dense):
    x = jax.lax.conv_general_dilated(
      inputs, conv["kernel"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = (x + conv["bias"] - stats["mean"]) * jax.lax.rsqrt(stats["var"] + 1e-5)
    x = jax.nn.sigmoid(x * norm["scale"] + norm["bias"])[:, :, :1]
    return x.reshape(5, -1) @ dense["kernel"] + dense["bias"]

  tree = {"params": network()["params"], "batch_stats": network()["batch_stats"]}
  kept = [np.array([1, 0, 1, 1, 0, 1], bool), *(np.ones(s, bool) for s in SIZES[1:])]
  masked = apply_masks(tree, masks_of_channels(tree, GROUPS, kept))
  layers = masked["params"]
  together = features(
    layers["conv"], layers["norm"], masked["batch_stats"]["norm"], layers["dense"]
  )
  left = kept[0]
  rows = np.tile(left, 2)
  cut = features(
    {"kernel": params["conv"]["kernel"][..., left], "bias": params["conv"]["bias"][left]},
    jax.tree.map(lambda x: x[left], params["norm"]),
    jax.tree.map(lambda x: x[left], params["stats"]),
    {"kernel": params["dense"]["kernel"][rows], "bias": params["dense"]["bias"]},
  )
  np.testing.assert_allclose(together, cut, rtol=1e-5, atol=1e-5)


def test_weakest_go_first_by_hand():
  # Norms over row and column: sqrt(1 + 9), sqrt(1 + 1), sqrt(1 + 16), sqrt(1 + 4).
  params = hidden([3.0, -1.0, 4.0, 2.0])
  for share, left in (
    (0, [1, 1, 1, 1]), (0.1, [1, 0, 1, 1]), (0.25, [1, 0, 1, 1]), (0.26, [1, 0, 1, 0]),
    (0.5, [1, 0, 1, 0]), (0.75, [0, 0, 1, 0]),
  ):  # fmt: skip
    masks = channel_masks(params, share, groups=groups_of(params))
    np.testing.assert_array_equal(masks["a"]["kernel"], [np.array(left, bool)])
    np.testing.assert_array_equal(masks["b"]["kernel"], np.array(left, bool)[:, None])


def test_equal_scores_go_by_position():
  params = hidden([1.0, -1.0, 1.0, 1.0])
  masks = channel_masks(params, 0.5, groups=groups_of(params))
  np.testing.assert_array_equal(masks["a"]["kernel"], [[False, False, True, True]])


def test_l2_scores_equal_brute_force():
  params = network()
  for score, expected in zip(l2_scores(params, GROUPS), norms(params), strict=True):
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    assert np.sqrt(np.mean(score**2)) == pytest.approx(1)
  # No overflow, no underflow.
  for scale in (1e-30, 1e30):
    scaled = jax.tree.map(lambda x, scale=scale: x * np.float32(scale), params)
    for score, expected in zip(l2_scores(scaled, GROUPS), norms(params), strict=True):
      np.testing.assert_allclose(score, expected, rtol=1e-5)


@pytest.mark.parametrize("budget", ["weights", "channels", "multiply_adds"])
@given(
  share=st.floats(0, 0.85),
  seed=st.integers(0, 3),
  round_to=st.sampled_from([1, 1, 2, 4]),
  earlier=st.sampled_from([None, "channels", "weights"]),
)
def test_equals_brute_force(budget, share, seed, round_to, earlier):
  params = network(seed)
  old = None
  if earlier == "channels":
    old = channel_masks(params, 0.3, groups=GROUPS)
  elif earlier == "weights":
    old = random_masks(jax.random.key(seed), params, 0.3)
  expected = brute_force(
    params, share, norms(params, old), budget=budget, round_to=round_to, old=old
  )
  run = functools.partial(
    channel_masks,
    params,
    share,
    groups=GROUPS,
    budget=budget,
    round_to=round_to,
    masks=old,
  )
  if expected is None:
    with pytest.raises(ValueError, match=f"would empty a group|with round_to={round_to}"):
      run()
  else:
    assert_masks(run(), expected)


@given(
  st.floats(0, 0.85),
  st.sampled_from(["weights", "channels", "multiply_adds"]),
  st.sampled_from(["global", "uniform"]),
  st.sampled_from([1, 2]),
  st.integers(0, 9),
)
def test_budget_is_reached_to_within_one_channel(share, budget, scope, round_to, seed):
  params = network(seed)
  options = {"groups": GROUPS, "budget": budget, "scope": scope, "round_to": round_to}
  try:
    masks = channel_masks(params, share, **options)
  except ValueError as error:
    reason = f"with round_to={round_to}" if round_to > 1 else "would empty a group"
    assert reason in str(error) or "would empty a group" in str(error)
    return
  kept = kept_channels(params, GROUPS, masks)
  reached = share_removed(leaves_by_path(masks), budget, kept)
  assert reached >= share - 1e-9
  assert all(k.sum() >= min(round_to, len(k)) for k in kept)
  assert all(k.all() or k.sum() % round_to == 0 for k in kept)
  if round_to == 1 and not all(k.all() for k in kept):
    # With one channel more, that which went last, it is not enough.
    fewer = []
    for i, left in enumerate(kept):
      for channel in np.flatnonzero(~left):
        more = [k.copy() for k in kept]
        more[i][channel] = True
        fewer.append(share_removed(brute_masks(params, more), budget, more))
    assert min(fewer) < share


@given(st.floats(0, 0.6), st.floats(0, 0.6), st.sampled_from(["global", "uniform"]))
def test_masks_are_nested(a, b, scope):
  params = network()
  run = functools.partial(channel_masks, groups=GROUPS, scope=scope)
  low, high = run(params, min(a, b)), run(params, max(a, b))
  after = run(params, max(a, b), masks=low)
  for x, y, z in zip(*map(jax.tree.leaves, (low, high, after)), strict=True):
    assert not np.any(y & ~x) and not np.any(z & ~x)
  # Less than is gone already removes nothing more.
  for x, y in zip(*map(jax.tree.leaves, (high, run(params, a, masks=high))), strict=True):
    np.testing.assert_array_equal(x, y)


def test_uniform_takes_the_same_share_of_each_group():
  params = network()
  masks = channel_masks(params, 0.4, groups=GROUPS, scope="uniform", budget="channels")
  left = [int(k.sum()) for k in kept_channels(params, GROUPS, masks)]
  # 9 of 21: in each group its weakest k channels, where k - 1/2 over its size is smallest.
  assert left == [3, 6, 1, 2]
  masks = channel_masks(params, 0.5, groups=GROUPS[:2], scope="uniform", budget="channels")
  assert [int(k.sum()) for k in kept_channels(params, GROUPS[:2], masks)] == [3, 5]
  # What a group lost before is part of its share.
  kept = [np.arange(6) > 2, np.ones(10, bool)]
  old = masks_of_channels(params, GROUPS[:2], kept)
  masks = channel_masks(
    params, 0.5, groups=GROUPS[:2], scope="uniform", budget="channels", masks=old
  )
  after = kept_channels(params, GROUPS[:2], masks)
  assert after[0].sum() == 3 and not after[0][:3].any() and after[1].sum() == 5


def test_multiples_for_hardware():
  rng = np.random.default_rng(0)
  params = hidden(rng.standard_normal(40))
  for share in (0.01, 0.3, 0.5, 0.75):
    masks = channel_masks(params, share, groups=groups_of(params), round_to=8)
    left = int(np.sum(masks["a"]["kernel"]))
    assert left == 8 * ((40 - int(np.ceil(share * 40))) // 8)
  # What is no multiple becomes one, and what is smaller stays whole.
  params = hidden(rng.standard_normal(20))
  masks = channel_masks(params, 0.01, groups=groups_of(params), round_to=8)
  assert int(np.sum(masks["a"]["kernel"])) == 16
  params = hidden(rng.standard_normal(7))
  masks = channel_masks(params, 0.0, groups=groups_of(params), round_to=8)
  assert np.all(masks["a"]["kernel"])
  with pytest.raises(ValueError, match="cannot be reached with round_to=8"):
    channel_masks(params, 0.1, groups=groups_of(params), round_to=8)


def excluded(name):
  def rule(path, leaf):
    return path_string(path).endswith("kernel") and name not in path_string(path)

  return rule


def test_layers_left_out_keep_their_own_channels():
  params = network()
  masks = channel_masks(params, 0.5, groups=GROUPS, prunable=excluded("dense"))
  kept = kept_channels(params, GROUPS, masks)
  assert kept[1].all()  # its outputs
  assert not kept[0].all()  # its inputs are the channels of another layer
  # Of what counts, half is gone.
  names = [f"params/{name}/kernel" for name in ("conv", "qkv", "out")]
  flat = np.concatenate([leaves_by_path(masks)[n].ravel() for n in names])
  assert np.mean(~flat) >= 0.5
  # Where the groups say which axes are outputs, those are.
  named = Groups(GROUPS)
  named.outputs = {"params/dense/kernel": (0,)}
  masks = channel_masks(params, 0.3, groups=named, prunable=excluded("dense"))
  kept = kept_channels(params, named, masks)
  assert kept[0].all() and not kept[1].all()


def test_scores_by_name_and_of_ones_own():
  params = network()
  own = [-np.arange(size, dtype=float) for size in SIZES]
  masks = channel_masks(
    params, 0.4, groups=GROUPS, score=lambda params, groups: own, budget="channels"
  )
  expected = brute_force(params, 0.4, own, budget="channels")
  assert_masks(masks, expected)
  random = [
    channel_masks(params, 0.5, groups=GROUPS, score="random", key=jax.random.key(i))
    for i in (0, 0, 1)
  ]
  assert_masks(random[0], leaves_by_path(random[1]))
  assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, random[1:]), strict=True))


def test_batch_norm_scales():
  params = network()
  scales = params["params"]["norm"]["scale"]
  scores = batch_norm_scores(params, GROUPS)
  np.testing.assert_allclose(scores[0], np.abs(scales))
  assert all(np.isinf(score).all() for score in scores[1:])
  options = {"groups": GROUPS, "score": "batch_norm"}
  for scope in ("global", "uniform"):
    masks = channel_masks(params, 0.15, scope=scope, **options)
    kept = kept_channels(params, GROUPS, masks)
    assert all(k.all() for k in kept[1:])  # nothing scales them
    gone = ~kept[0]
    assert gone.any()
    assert np.abs(scales[gone]).max() < np.abs(scales[~gone]).min()


def test_taylor_scores_are_the_change_of_the_loss():
  # Of a loss that is linear in each place the first-order change of one place is exact; a
  # channel has two: |w1 g1 + w2 g2| = 2 |x w1 w2|.
  params = hidden([3.0, -1.0, 4.0])
  params["b"]["kernel"] = np.array([[0.5], [2.0], [-0.1]], np.float32)

  def loss(params, x, scale):
    return jnp.mean(x @ params["a"]["kernel"] @ params["b"]["kernel"]) * scale

  x = np.array([[1.0], [2.0]], np.float32)
  (scores,) = taylor_scores(loss, params, groups_of(params), x, 2.0)
  np.testing.assert_allclose(scores, 2 * 2 * 1.5 * np.array([1.5, 2, 0.4]), rtol=1e-5)

  def score(params, groups):
    return taylor_scores(loss, params, groups, x, 2.0)

  masks = channel_masks(params, 0.3, groups=groups_of(params), score=score)
  np.testing.assert_array_equal(masks["a"]["kernel"], [[True, True, False]])
  with pytest.raises(ValueError, match="loss gave"):
    taylor_scores(lambda params, x: x, params, groups_of(params), x)


def test_fits_the_loop():
  params = network()
  prune = functools.partial(channel_masks, groups=GROUPS)
  pruned, masks, record = prune_phase(params, None, 0.4, prune)
  assert record["sparsity"] >= 0.4
  pruned, after, record = prune_phase(pruned, masks, 0.6, prune)
  assert record["sparsity"] >= 0.6
  for x, y in zip(jax.tree.leaves(masks), jax.tree.leaves(after), strict=True):
    assert not np.any(y & ~x)
  np.testing.assert_array_equal(
    pruned["batch_stats"]["norm"]["var"],
    np.where(after["batch_stats"]["norm"]["var"], 1, 0),
  )


def test_half_precision_and_jax_arrays():
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), network())
  rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  masks = channel_masks(params, 0.5, groups=GROUPS)
  assert_masks(masks, leaves_by_path(channel_masks(rounded, 0.5, groups=GROUPS)))


def test_sensitivity():
  params = network()
  seen = []

  def evaluate(tree):
    seen.append(leaves_by_path(tree))
    return float(sum(np.count_nonzero(x) for x in seen[-1].values()))

  table = sensitivity(evaluate, params, GROUPS)
  scores = norms(params)
  assert [row.channels for row in table] == SIZES
  assert [row.removed for row in table] == [2, 2, 1, 1]
  assert table[0].name == "params/conv/kernel"
  dense = leaves_by_path(params)
  for i, row in enumerate(table):
    kept = [np.ones(size, bool) for size in SIZES]
    kept[i][np.argsort(scores[i], kind="stable")[: row.removed]] = False
    gone = {n: ~mask for n, mask in brute_masks(params, kept).items()}
    assert row.loss == sum(np.count_nonzero(dense[n][mask]) for n, mask in gone.items())
    np.testing.assert_array_equal(seen[i + 1]["params/dense/kernel"] == 0,
                                  gone["params/dense/kernel"])  # fmt: skip
    kept[i][:] = False
    masks = brute_masks(params, kept)
    names = [f"params/{name}/kernel" for name in KERNELS]
    assert row.weights == sum(np.sum(~masks[n]) for n in names)
    assert row.bytes == 4 * sum(np.sum(~mask) for mask in masks.values())
    products = sum(GROUPS.multiply_adds[n] * np.mean(~masks[n]) for n in names)
    assert row.multiply_adds == round(products)
  assert sensitivity(evaluate, params, list(GROUPS))[0].multiply_adds is None


def seconds(kept):
  """A made-up network: a share that no cut makes faster, and steps of 4 channels."""
  return 1.0 + sum(np.ceil(k.sum() / 4) * 4 for k in kept) / 10


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6])
def test_latency_to_within_a_tenth(share):
  rng = np.random.default_rng(0)
  params = hidden(rng.standard_normal(100))
  measured = []

  def measure(kept):
    measured.append(kept)
    return seconds(kept)

  masks = channel_masks(
    params, share, groups=groups_of(params), budget="latency", measure=measure
  )
  kept = kept_channels(params, groups_of(params), masks)
  assert seconds(kept) == pytest.approx((1 - share) * 11, rel=0.1)
  assert len(measured) < 12
  # Those of smallest norm are gone.
  same = channel_masks(
    params, 1 - kept[0].mean(), groups=groups_of(params), budget="channels"
  )
  np.testing.assert_array_equal(masks["a"]["kernel"], same["a"]["kernel"])


def test_latency_that_cannot_be_had(rejects):
  params = hidden(np.arange(1.0, 9))
  options = {"groups": groups_of(params), "measure": seconds}
  with rejects("asks for 0.09 s, but it takes 1.4 s"):
    masks_for_latency(params, 0.95, **options)
  with rejects("budget is 'latency' without a clock"):
    channel_masks(params, 0.5, groups=groups_of(params), budget="latency")
  # What is fast enough already stays as it is.
  old = channel_masks(params, 0.75, groups=groups_of(params))
  masks = masks_for_latency(params, 0.1, masks=old, **options)
  np.testing.assert_array_equal(masks["a"]["kernel"], old["a"]["kernel"])


def jagged(kept):
  """As measured on a CPU: odd numbers of channels take longer, from 7 to 59."""
  (count,) = (int(k.sum()) for k in kept)
  return 1.0 + count / 10 + (4.0 if count % 2 and 5 < count < 60 else 0.0)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.65, 0.75])
def test_latency_that_does_not_fall_with_the_channels(share):
  params = hidden(np.random.default_rng(0).standard_normal(100))
  measured = []

  def measure(kept):
    measured.append(kept)
    return jagged(kept)

  masks = masks_for_latency(params, share, groups=groups_of(params), measure=measure)
  left = kept_channels(params, groups_of(params), masks)
  assert jagged(left) == pytest.approx((1 - share) * 11, rel=0.1)
  assert len(measured) <= 31


def test_latency_that_jumps_over_its_goal(caplog):
  """No number of channels is near: the nearest of all, and a word about it."""
  params = hidden(np.random.default_rng(0).standard_normal(20))
  measure = lambda kept: 1.0 if kept[0].sum() > 7 else 0.1  # noqa: E731
  masks = masks_for_latency(params, 0.7, groups=groups_of(params), measure=measure)
  assert measure(kept_channels(params, groups_of(params), masks)) == 0.1
  assert "asks for 0.3 s, and of 20 networks the nearest takes 0.1 s" in caplog.text


class Machine:
  """Calls that take some work, on a machine whose speed wanders; and its clock."""

  def __init__(self, speed):
    self.speed, self.now = speed, 0.0

  def call(self, work):
    def run():
      self.now += work / self.speed(self.now)

    return run

  def clock(self):
    return self.now


@pytest.mark.parametrize(
  "speed",
  [
    lambda t: 1.0,
    lambda t: 1.0 / (1.0 + 2 * t),  # slower and slower
    lambda t: 1.0 + 0.5 * np.sin(7 * t),
    lambda t: 0.3 if 0.15 < t < 0.3 else 1.0,  # another program for a while
  ],
  ids=["steady", "slower", "wave", "busy"],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_ratio_on_a_machine_whose_speed_wanders(speed, share):
  machine = Machine(speed)
  calls = machine.call(0.003 * share), machine.call(0.003)
  assert seconds_ratio(*calls, machine.clock) == pytest.approx(share, rel=0.02)
  assert machine.now > 0.5


def test_more_rounds_where_the_ratio_is_not_steady():
  """Half of the calls of one are disturbed: it takes longer, but not for ever."""
  noise = np.random.default_rng(0)

  def lengths(share):
    machine = Machine(lambda t: 1.0)
    disturbed = lambda: machine.call(0.02 * (1 + share * noise.random()))()  # noqa: E731
    rounds = rounds_by_turns([disturbed, machine.call(0.02)], machine.clock)
    return machine.now, np.median([a / b for a, b in rounds])

  steady, found = lengths(0.02)
  assert steady < 0.7
  assert found == pytest.approx(1.01, abs=0.01)
  longer, found = lengths(0.3)
  assert 0.7 < longer < 3.2
  assert found == pytest.approx(1.15, abs=0.04)
  assert 3 < lengths(9.0)[0] < 4


def test_one_after_the_other_would_not_do():
  """What the ratio is there for: a machine that is half as fast a second later."""
  machine = Machine(lambda t: 1.0 if t < 0.4 else 0.5)
  dense = seconds_of(machine.call(0.003), machine.clock)
  cut = seconds_of(machine.call(0.0015), machine.clock)
  assert cut / dense == pytest.approx(1.0, rel=0.05)
  machine.now = 0.0
  calls = machine.call(0.0015), machine.call(0.003)
  assert seconds_ratio(*calls, machine.clock) == pytest.approx(0.5, rel=0.02)


def test_rounds_by_turns():
  """Calls of 1 and 4 ms: 10 and 3 in a round of 22 ms, one way and then the other."""
  machine, order = Machine(lambda t: 1.0), []

  def noted(name, work):
    run = machine.call(work)
    return lambda: (order.append(name), run())

  rounds = rounds_by_turns([noted("a", 0.001), noted("b", 0.004)], machine.clock)
  np.testing.assert_allclose(rounds, [[0.001, 0.004]] * len(rounds))
  assert len(rounds) == 23  # half a second
  assert "".join(order[:28]) == "ab" + "a" * 10 + "bbb" + "bbb" + "a" * 10
  slow = rounds_by_turns([machine.call(3.0)], machine.clock)
  assert len(slow) == 5


def test_the_clock_of_a_cut_network():
  params = hidden(np.arange(1.0, 9))

  def apply(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

  x = jnp.ones((2, 1))
  groups = channel_groups(apply, params, x)
  ticks = itertools.count(step=3)
  measure = network_latency(apply, params, groups, x, clock=lambda: next(ticks))
  assert measure([np.arange(8) < 3]) == 3.0
  assert measure([np.arange(8) < 8]) == 3.0
  assert next(ticks) > 3 * 2 * (1 + 5 + 2 + 10)  # before and after each call of each round


def test_a_budget_that_round_to_keeps_from_being_reached_says_so(rejects):
  """Of 5 and 4 channels 4 and 4 stay: 1 of 9 goes. One at a time, 7 of 9 can."""
  params = {"a": jnp.ones((3, 5)), "c": jnp.ones((5, 4)), "d": jnp.ones((4, 2))}
  groups = channel_groups(
    lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["c"]) @ p["d"], params, jnp.ones((1, 3))
  )
  run = functools.partial(channel_masks, params, groups=groups, budget="channels")
  with rejects("with round_to=4, as a group that loses channels keeps at least so many"):
    run(0.5, round_to=4)
  with rejects(
    "0.1111 can go, and most of what is left is in a, so give a smaller round_to"
  ):
    run(0.5, round_to=4)
  with rejects("cannot be reached with round_to=8"):
    run(0.5, round_to=8)
  with rejects("would empty a group of channels: at most"):
    run(0.9, round_to=4)
  assert not np.all(run(0.5)["a"])


def test_rejects(rejects):
  params = network()
  run = functools.partial(channel_masks, params, groups=GROUPS)
  for bad in (-0.1, 1.0, float("nan")):
    with rejects("it is the share of weights to remove, in [0, 1)"):
      run(bad)
  with rejects("would empty a group of channels: at most"):
    run(0.99)
  with rejects("most of what is left is in params/"):
    run(0.999, budget="multiply_adds")
  with rejects("no channel may go"):
    channel_masks(params, 0.1, groups=[])
  with rejects("no channel may go"):
    channel_masks(params, 0.1, groups=[], budget="channels")
  assert all(np.all(x) for x in jax.tree.leaves(channel_masks(params, 0, groups=[])))
  with rejects("groups have no multiply_adds"):
    channel_masks(params, 0.5, groups=list(GROUPS), budget="multiply_adds")
  with rejects("unknown budget 'flops'"):
    run(0.5, budget="flops")
  with rejects("unknown score 'l1'"):
    run(0.5, score="l1")
  with rejects("unknown scope 'layer'"):
    run(0.5, scope="layer")
  with rejects("round_to is 0"):
    run(0.5, round_to=0)
  with rejects("score is 'random' without a key"):
    run(0.5, score="random")
  with rejects("score gave shapes"):
    run(0.5, score=lambda params, groups: [np.ones(3)])
  with rejects("score gave NaN for channels of params/conv/kernel"):
    run(0.5, score=lambda params, groups: [np.full(s, np.nan) for s in SIZES])
  with rejects("no channel has a scale of a normalization"):
    channel_masks(params, 0.1, groups=GROUPS[1:], score="batch_norm")
  with rejects("sparsity is traced"):
    jax.jit(run)(0.5)
  with rejects("params are traced"):
    jax.jit(lambda p: channel_masks(p, 0.5, groups=GROUPS))(params)
  with rejects("params and masks have different tree structures"):
    run(0.5, masks={"a": np.ones(3, bool)})
  other = {"params": params["params"]}
  with rejects("batch_stats/norm/mean, but params have no such leaf"):
    channel_masks(other, 0.5, groups=GROUPS)
  small = jax.tree.map(lambda x: x[..., :4], params)
  with rejects("find the groups of these params"):
    channel_masks(small, 0.5, groups=GROUPS)
  with rejects("give one bool [size] for each group"):
    masks_of_channels(params, GROUPS, [np.ones(3, bool)])
  kept = [np.ones(size, bool) for size in SIZES]
  first = GROUPS[0].places[0][0]
  with rejects(f"kept has int64 for the channels of {first}: give bool [size]"):
    masks_of_channels(params, GROUPS, [np.arange(SIZES[0]), *kept[1:]])
  with rejects(f"kept leaves none of the {SIZES[0]} channels of {first}: keep at least"):
    masks_of_channels(params, GROUPS, [~kept[0], *kept[1:]])
  with rejects("share is 1"):
    sensitivity(lambda p: 0.0, params, GROUPS, share=1.0)
  with rejects("evaluate gives nan of the whole model: give a measure that is finite"):
    sensitivity(lambda p: jnp.nan, params, GROUPS)
  values = iter([1.0, 0.5, np.inf])
  second = GROUPS[1].places[0][0]
  with rejects(f"evaluate gives inf of the model without 2 channels of {second}: give"):
    sensitivity(lambda p: next(values), params, GROUPS)


class Small(nn.Module):
  """Convolution, normalization, attention with two heads, a layer after it."""

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(True)(nn.Conv(8, (3, 3))(x))
    x = nn.relu(nn.Conv(12, (1, 1))(nn.relu(x))).reshape(len(x), -1, 12)
    x = nn.MultiHeadDotProductAttention(2, qkv_features=16, name="attention")(x)
    return nn.Dense(3)(nn.relu(x).mean(1))


@pytest.fixture(scope="module")
def small():
  images = jnp.ones((1, 4, 4, 2))
  variables = jax.jit(Small().init)(jax.random.key(0), images)
  return Small().apply, variables, images


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["weights", "multiply_adds"])
def test_the_cut_network_costs_what_was_asked(budget, small):
  apply, variables, images = small
  groups = channel_groups(apply, variables, images)
  masks = channel_masks(variables, 0.6, groups=groups, budget=budget)
  network = compact(apply, variables, masks, images)

  def cost(apply, params):
    if budget == "multiply_adds":
      return sum(multiply_adds(apply, params, images).values())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.size for path, x in leaves if prunable(path, x))

  dense, cut = cost(apply, variables), cost(network.apply, network.params)
  assert 0.3 * dense <= cut <= 0.4 * dense
  expected = apply(apply_masks(variables, masks), images)
  np.testing.assert_allclose(network.apply(network.params, images), expected, atol=1e-5)


def test_layers_left_out_of_a_traced_network(small):
  apply, variables, images = small
  groups = channel_groups(apply, variables, images)

  def rule(path, leaf):
    return prunable(path, leaf) and "query" not in path_string(path)

  masks = channel_masks(variables, 0.3, groups=groups, prunable=rule)
  for g, kept in zip(groups, kept_channels(variables, groups, masks), strict=True):
    axes = [axis for name, axis in g.places if name == "params/attention/query/kernel"]
    # Its heads and its columns; what it takes as inputs goes.
    assert kept.all() == bool({1, 2} & set(axes))
