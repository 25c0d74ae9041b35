"""Merges of stacked models: against NumPy, SciPy and formulas by hand, and their masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import jaxsms
from jaxsms import Weighted, sparse_model_soup
from jaxsms.merges import (
  MERGES,
  Means,
  average_by_leaf,
  bind,
  diagonal_fisher,
  fisher_soup,
  learned_soup,
  learned_weights,
  slerp,
  task_arithmetic,
  ties,
)

M = 3


def models(seed=0, m=M):
  """m models of two layers that share a mask, and the base they come from."""
  rng = np.random.default_rng(seed)
  base, stacked = {}, {}
  for name, shape in (("a", (4, 5)), ("b", (5, 2))):
    mask = rng.random(shape) > 0.4
    kernel = rng.standard_normal(shape).astype(np.float32)
    moved = kernel + 0.3 * rng.standard_normal((m, *shape)).astype(np.float32)
    bias = rng.standard_normal((m, shape[1])).astype(np.float32)
    base[name] = {"kernel": kernel, "bias": bias[0] + np.float32(0.1)}
    stacked[name] = {"kernel": moved * mask, "bias": bias}
  return stacked, base


def distance(params):
  """A loss whose minimum is known."""
  leaves = jax.tree.leaves(params)
  return sum(jnp.sum((x - 0.1) ** 2) for x in leaves)


def means(stacked, base):
  """What every merge of two or more such models may need."""
  return Means(
    weights=np.full(len(jax.tree.leaves(stacked)[0]), 1 / len(jax.tree.leaves(stacked)[0])),
    base=base,
    evaluate=lambda params: -float(distance(params)),
    loss=distance,
    squared_gradients=lambda params: jax.tree.map(jnp.square, params),
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGES)
def test_every_merge_keeps_the_mask_and_leaves_out_what_is_not_finite(name):
  m = 2 if MERGES[name].two else M
  stacked, base = models(m=m)
  merge = bind(name, means(stacked, base))

  def retrain(key, params, masks, ingredient):
    stacked_now = jax.tree.map(jnp.asarray, stacked)
    return jax.tree.map(
      lambda x, kept: jnp.where(kept, x[ingredient["seed"]], 0), stacked_now, masks
    )

  start = jax.tree.map(lambda x: jnp.asarray(x[0]), stacked)
  result = sparse_model_soup(
    jax.random.key(0), start, retrain,
    ingredients={"seed": jnp.arange(m)}, goal_sparsity=0.6, phases=1, merge=merge,
  )  # fmt: skip
  for layer in ("a", "b"):
    kept = np.asarray(result.masks[layer]["kernel"])
    assert np.all(np.asarray(result.params[layer]["kernel"])[~kept] == 0)
    assert np.all(np.isfinite(result.params[layer]["kernel"]))
  if name in ("uniform", "weighted", "greedy"):
    return  # merge_phase leaves models out for those
  broken = jax.tree.map(np.copy, stacked)
  broken["a"]["kernel"][0, 0, 0] = np.nan
  merged = merge(broken)
  rest = jax.tree.map(lambda x: x[1:], stacked)
  alone = bind(name, means(rest, base))(rest)
  if isinstance(merged, Weighted):
    assert merged.weights[0] == 0
    merged, alone = merged.params, alone.params
  for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(alone), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  with pytest.raises(FloatingPointError):
    merge(jax.tree.map(lambda x: x * np.nan, stacked))


def test_learned_weights_are_those_of_scipy():
  stacked, _ = models()
  flat = np.stack([
    np.concatenate([np.ravel(x[i]) for x in jax.tree.leaves(stacked)]) for i in range(M)
  ])  # fmt: skip

  def loss(logits):
    weights = np.exp(logits) / np.exp(logits).sum()
    return np.sum((weights @ flat - 0.1) ** 2)

  best = scipy.optimize.minimize(loss, np.zeros(M)).fun
  soup = learned_soup(stacked, distance, steps=300)
  assert float(distance(soup)) == pytest.approx(best, rel=1e-3)
  weights = learned_weights(stacked, distance, steps=300)
  for weight in jax.tree.leaves(weights):
    np.testing.assert_allclose(weight, jax.tree.leaves(weights)[0])
    assert weight.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_weights_by_layer_are_as_good_as_each_layers_own():
  stacked, _ = models()
  soup = learned_soup(stacked, distance, by="layer", steps=300)
  for layer in ("a", "b"):
    alone = learned_soup({layer: stacked[layer]}, distance, steps=300)
    assert float(distance({layer: soup[layer]})) == pytest.approx(
      float(distance(alone)), rel=1e-3
    )
  weights = learned_weights(stacked, distance, by="layer", steps=300)
  np.testing.assert_array_equal(weights["a"]["kernel"], weights["a"]["bias"])
  assert not np.allclose(weights["a"]["kernel"], weights["b"]["kernel"], atol=0.02)


@given(st.integers(0, 1000), st.floats(1e-3, 3.0))
def test_learning_never_does_worse_than_the_mean(seed, learning_rate):
  stacked, _ = models(seed)
  uniform = jax.tree.map(lambda x: x.mean(0), stacked)
  soup = learned_soup(stacked, distance, steps=5, learning_rate=learning_rate)
  assert float(distance(soup)) <= float(distance(uniform)) * (1 + 1e-5)


def test_fisher_weights_by_hand_and_their_limits():
  stacked, _ = models()
  rng = np.random.default_rng(1)
  squares = jax.tree.map(lambda x: rng.random(x.shape).astype(np.float32) ** 4, stacked)
  weights = np.array([0.5, 0.25, 0.25])
  soup = fisher_soup(stacked, squares, weights, prior=0.01)
  for path in (("a", "kernel"), ("b", "bias")):
    values, square = stacked[path[0]][path[1]], squares[path[0]][path[1]]
    shaped = weights.reshape([-1] + [1] * (values.ndim - 1))
    expected = np.average(values.astype(float), axis=0, weights=shaped * (square + 0.01))
    np.testing.assert_allclose(soup[path[0]][path[1]], expected, rtol=1e-4, atol=1e-6)
  uniform = jax.tree.map(lambda x: x.mean(0), stacked)
  for same in (0.0, 1e-30, 1.0):  # no information, hardly any, and all the same
    equal = jax.tree.map(lambda x, s=same: np.full_like(x, s), stacked)
    found = fisher_soup(stacked, equal)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(uniform), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_diagonal_fisher_of_logistic_regression_is_the_formula():
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal((4000, 3)).astype(np.float32)
  params = {"kernel": rng.standard_normal((3, 2)).astype(np.float32), "n": np.int32(3)}
  found = diagonal_fisher(
    jax.random.key(0), lambda p, x: x @ p["kernel"], params, inputs, batch_size=300
  )
  logits = inputs @ params["kernel"]
  p = np.exp(logits[:, 0]) / np.exp(logits).sum(1)
  # Of both classes alike: p (1 - p) x^2.
  expected = np.mean((p * (1 - p))[:, None] * inputs**2, axis=0)
  np.testing.assert_allclose(found["kernel"], np.stack([expected] * 2, 1), rtol=0.1)
  assert found["n"] == 0


def test_task_arithmetic_by_hand():
  stacked, base = models()
  kernel, origin = stacked["a"]["kernel"], base["a"]["kernel"]
  weights = np.array([0.2, 0.3, 0.5])
  soup = task_arithmetic(stacked, base, weights, scale=0.7)["a"]["kernel"]
  expected = origin + 0.7 * (np.average(kernel, axis=0, weights=weights) - origin)
  expected[(kernel == 0).all(0)] = 0
  np.testing.assert_allclose(soup, expected, rtol=1e-5, atol=1e-6)
  mean = task_arithmetic(stacked, base)
  np.testing.assert_allclose(mean["a"]["kernel"], kernel.mean(0), rtol=1e-5, atol=1e-6)


def ties_by_hand(stacked, base, density, scale):
  """Yadav et al.'s three steps, in loops, on flat vectors."""
  task = (stacked - base).astype(float)
  task[:, (stacked == 0).all(0)] = 0
  n = task.shape[1]
  for row in task:
    row[np.argsort(np.abs(row), kind="stable")[: n - round(density * n)]] = 0
  result = np.zeros(n)
  for j in range(n):
    sign = np.sign(task[:, j].sum())
    chosen = [x for x in task[:, j] if np.sign(x) == sign and sign != 0]
    result[j] = base[j] + scale * (np.mean(chosen) if chosen else 0)
  result[(stacked == 0).all(0)] = 0
  return result


@pytest.mark.slow
@given(st.integers(0, 1000), st.sampled_from((0.05, 0.4, 1.0)), st.sampled_from((0.3, 1.0)))
def test_ties_by_hand(seed, density, scale):
  stacked, base = models(seed)
  soup = ties(stacked, base, density=density, scale=scale)

  def flat(tree, axis=()):
    return np.concatenate([np.reshape(x, (*axis, -1)) for x in jax.tree.leaves(tree)], -1)

  expected = ties_by_hand(flat(stacked, (M,)), flat(base), density, scale)
  np.testing.assert_allclose(flat(soup), expected, rtol=1e-4, atol=1e-5)


def test_slerp_stays_on_the_sphere_and_straight_where_it_cannot():
  rng = np.random.default_rng(0)
  pair = rng.standard_normal((2, 6, 3)).astype(np.float32)
  pair /= np.linalg.norm(pair, axis=(1, 2), keepdims=True)
  angle = np.arccos(np.sum(pair[0] * pair[1]))
  for t in (0.0, 0.25, 0.5, 1.0):
    found = np.asarray(slerp({"kernel": pair}, t)["kernel"])
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    assert np.arccos(np.clip(np.sum(found * pair[0]), -1, 1)) == pytest.approx(
      t * angle, abs=1e-3
    )
  parallel = np.stack([pair[0], 2 * pair[0]])
  np.testing.assert_allclose(slerp({"w": parallel}, 0.5)["w"], 1.5 * pair[0], rtol=1e-5)
  statistics = {"batch_stats": {"mean": pair}}
  np.testing.assert_allclose(
    slerp(statistics)["batch_stats"]["mean"], pair.mean(0), rtol=1e-5, atol=1e-6
  )


@pytest.mark.slow
def test_half_precision_counters_and_transformations():
  rng = np.random.default_rng(0)
  stacked = {
    "w": jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.bfloat16),
    "steps": jnp.arange(2),
  }
  base = {"w": jnp.ones((3, 4), jnp.bfloat16), "steps": jnp.int32(0)}
  for name in ("ties", "task_arithmetic", "slerp", "learned", "fisher"):
    given_means = means(stacked, base)._replace(
      loss=lambda p: jnp.sum(p["w"].astype(jnp.float32) ** 2)
    )
    merge = bind(name, given_means)
    soup, traced = merge(stacked), jax.jit(merge)(stacked)
    if isinstance(soup, Weighted):
      np.testing.assert_allclose(traced.weights, soup.weights, rtol=1e-2)
      soup, traced = soup.params, traced.params
    assert soup["w"].dtype == jnp.bfloat16 and soup["steps"] == 0
    np.testing.assert_allclose(
      traced["w"].astype(np.float32), soup["w"].astype(np.float32), rtol=1e-2
    )


@pytest.mark.parametrize("by", ["", "_by_layer"])
def test_learned_weights_are_in_the_record(by):
  """Two weights that differ, found again by least squares."""
  stacked = {
    "a": {"kernel": jnp.array([[[1.0, 2.0]], [[3.0, 1.0]]])},
    "b": {"kernel": jnp.array([[[4.0, 1.0]], [[2.0, 3.0]]])},
  }
  wanted = {"a": 0.8, "b": 0.8 if not by else 0.3}

  def loss(params):
    goals = {k: w * stacked[k]["kernel"][0] for k, w in wanted.items()}
    goals = {k: g + (1 - wanted[k]) * stacked[k]["kernel"][1] for k, g in goals.items()}
    return sum(jnp.sum((params[k]["kernel"] - goals[k]) ** 2) for k in goals)

  merge = bind(f"learned{by}", Means(loss=loss))
  result = sparse_model_soup(
    jax.random.key(0), jax.tree.map(lambda x: x[0], stacked),
    lambda key, params, masks, ingredient: jax.tree.map(
      lambda x: x[ingredient["seed"]], stacked
    ),
    ingredients={"seed": jnp.arange(2)}, goal_sparsity=0.0, phases=1, merge=merge,
  )  # fmt: skip
  shares = []
  for layer in ("a", "b"):
    one, two = (np.ravel(x) for x in stacked[layer]["kernel"])
    soup = np.ravel(result.params[layer]["kernel"])
    shares.append(np.dot(soup - two, one - two) / np.dot(one - two, one - two))
  mean = np.mean(shares)
  assert mean == pytest.approx(np.mean(list(wanted.values())), abs=0.05)
  np.testing.assert_allclose(result.history[0]["weights"], [mean, 1 - mean], atol=1e-5)


def test_the_merges_are_a_part_of_the_package():
  assert jaxsms.merges.bind is bind
  assert jaxsms.Weighted is Weighted


def test_rejects(rejects):
  stacked, base = models()
  with rejects("unknown merge 'tie': did you mean ties?"):
    bind("tie", Means())
  for name, words in (
    ("ties", "base"),
    ("learned", "loss"),
    ("fisher", "squared_gradients"),
  ):
    with rejects(f"merge {name} needs {words}"):
      bind(name, Means())
  with rejects("there are 3 models: slerp goes from one model to another"):
    slerp(stacked)
  with rejects("t is 2"):
    slerp(models(m=2)[0], 2)
  with rejects("density is 0"):
    ties(stacked, base, density=0)
  with rejects("scale is inf"):
    ties(stacked, base, scale=np.inf)
  for merge in (ties, task_arithmetic):
    with rejects("stacked and base have different leaves"):
      merge(stacked, {"a": base["a"]})
  with rejects("stacked and squared_gradients have different leaves"):
    fisher_soup(stacked, base)
  with rejects("prior is -1"):
    fisher_soup(stacked, stacked, prior=-1)
  with rejects("weights has shape [2] for 3 models"):
    fisher_soup(stacked, stacked, np.ones(2))
  with rejects("by is 'leaf'"):
    learned_soup(stacked, distance, by="leaf")
  with rejects("give at least 1 step"):
    learned_soup(stacked, distance, steps=0)
  with rejects("different tree structures"):
    average_by_leaf(stacked, np.ones(3))
  with rejects("there are no inputs"):
    diagonal_fisher(jax.random.key(0), lambda p, x: x, stacked, np.zeros((0, 2)))
  for merge in (functools.partial(learned_soup, loss=distance), slerp):
    with rejects("leaves disagree on the number of models"):
      merge({"a": np.ones((3, 2)), "b": np.ones((2, 2))})
