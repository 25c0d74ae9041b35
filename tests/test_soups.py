import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads
from x64 import enable_x64

from jaxsms import greedy_soup, prediction_ensemble, stack, uniform_soup

M = 4
NUMBERS = st.floats(-1000, 1000, width=32, allow_subnormal=False)


@given(arrays(np.float32, (M, 3, 2), elements=NUMBERS))
def test_uniform_soup_is_the_mean(values):
  soup = uniform_soup({"a": {"w": jnp.asarray(values)}, "b": [values[:, 0]]})
  mean = values.astype(float).mean(0)
  np.testing.assert_allclose(soup["a"]["w"], mean, rtol=1e-5, atol=1e-3)
  np.testing.assert_allclose(soup["b"][0], mean[0], rtol=1e-5, atol=1e-3)


@given(
  arrays(np.float32, (M, 3, 2), elements=NUMBERS),
  arrays(np.float32, M, elements=st.floats(0.125, 1, width=32)),
)
def test_weighted_soup_is_the_weighted_mean(values, weights):
  weights = weights / weights.sum()
  soup = uniform_soup({"w": values}, weights)
  expected = np.average(values.astype(float), axis=0, weights=weights)
  np.testing.assert_allclose(soup["w"], expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_zero_weight_removes_a_model_whatever_it_holds(bad):
  values = np.arange(M * 3, dtype=np.float32).reshape(M, 3)
  values[1] = bad
  soup = uniform_soup({"w": values}, [0.5, 0, 0.25, 0.25])
  expected = 0.5 * values[0] + 0.25 * values[2] + 0.25 * values[3]
  np.testing.assert_allclose(soup["w"], expected, rtol=1e-6)
  assert not np.any(np.isfinite(uniform_soup({"w": values})["w"]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype):
  # 256 + 1 is 256 in bfloat16, and 2048 + 1 is 2048 in float16.
  values = np.array([256.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
  values = values if dtype == jnp.bfloat16 else values * [8, 1, 1, 1, 1, 1, 1, 1]
  soup = uniform_soup({"w": jnp.asarray(values, dtype)})
  assert soup["w"].dtype == dtype
  assert soup["w"] == jnp.asarray(values.mean(), dtype)


def test_large_half_precision_values_do_not_overflow():
  soup = uniform_soup({"w": np.full((M, 2), 60000, np.float16)})
  np.testing.assert_array_equal(soup["w"], np.full(2, 60000, np.float16))


def test_float64_keeps_its_precision():
  with enable_x64():
    values = np.random.default_rng(0).standard_normal((3, 50))
    soup = uniform_soup({"w": values})["w"]
    assert soup.dtype == np.float64
    np.testing.assert_allclose(soup, values.mean(0), rtol=1e-14, atol=1e-16)
    greedy, _ = greedy_soup({"w": values}, lambda model: 0.0)
    np.testing.assert_allclose(greedy["w"], values.mean(0), rtol=1e-14, atol=1e-16)


def test_other_leaves_come_from_the_first_model():
  keys = jax.random.split(jax.random.key(0), M)
  stacked = {
    "w": np.ones((M, 2), np.float32),
    "steps": np.arange(3, 3 + M),
    "on": np.array([True, False, False, False]),
    "key": keys,
  }
  for soup in (uniform_soup(stacked), uniform_soup(stacked, [0, 0, 0, 1.0])):
    assert soup["steps"] == 3
    assert soup["on"] == np.True_
    np.testing.assert_array_equal(*map(jax.random.key_data, (soup["key"], keys[0])))


def test_uniform_soup_under_transformations():
  values = jnp.asarray(np.random.default_rng(0).standard_normal((M, 3)), jnp.float32)
  weights = jnp.array([0.1, 0.2, 0.3, 0.4])
  soup = jax.jit(uniform_soup)({"w": values}, weights)
  np.testing.assert_allclose(soup["w"], weights @ values, rtol=1e-5)
  both = jax.vmap(uniform_soup)({"w": jnp.stack([values, -values])})
  np.testing.assert_allclose(both["w"][1], -values.mean(0), rtol=1e-5, atol=1e-6)
  # The soup is linear: its gradient by the models is their weight ...
  by_model = jax.grad(lambda w: uniform_soup({"w": w}, weights)["w"].sum())(values)
  np.testing.assert_allclose(by_model, np.tile(weights[:, None], 3), rtol=1e-6)
  # ... and by the weights it is the models, so that learned soups work.
  by_weight = jax.grad(lambda a: uniform_soup({"w": values}, a)["w"].sum())(weights)
  np.testing.assert_allclose(by_weight, values.sum(1), rtol=1e-5, atol=1e-6)


def brute_force_greedy(values, evaluate):
  """The recipe, on plain arrays."""
  scores = [evaluate(v) for v in values]
  order = sorted(range(len(values)), key=lambda i: -scores[i])  # a stable sort
  taken, best = [order[0]], scores[order[0]]
  for i in order[1:]:
    score = evaluate(np.mean([values[j] for j in [*taken, i]], axis=0))
    if score >= best:
      taken, best = [*taken, i], score
  return taken


# Multiples of 1/2 whose means over up to four models stay apart or agree exactly.
HALVES = st.integers(-8, 8).map(lambda i: i / 2)


@given(arrays(np.float32, (M, 2), elements=HALVES))
@example(np.zeros((M, 2), np.float32))
@example(np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32))
def test_greedy_soup_is_the_recipe(values):
  # Higher is better towards the origin; rounded so that equals are equals.
  def evaluate(v):
    return -round(float(np.sum(np.abs(v))), 3)

  soup, taken = greedy_soup({"w": values}, lambda model: evaluate(model["w"]))
  assert taken == brute_force_greedy(values.astype(float), evaluate)
  np.testing.assert_allclose(soup["w"], values[taken].mean(0), rtol=1e-5, atol=1e-6)


def run_greedy(scores):
  """A greedy soup of one-hot models whose averages are looked up by who is in them."""
  calls = []

  def evaluate(model):
    members = tuple(int(i) for i in np.flatnonzero(np.asarray(model["w"])))
    calls.append(members)
    return scores[members]

  soup, taken = greedy_soup({"w": np.eye(3, dtype=np.float32)}, evaluate)
  return soup, taken, calls


def test_greedy_soup_calls_and_order():
  scores = {(0,): 0.5, (1,): 0.9, (2,): 0.7, (1, 2): 0.95, (0, 1, 2): 0.94}
  soup, taken, calls = run_greedy(scores)
  assert taken == [1, 2]
  np.testing.assert_allclose(soup["w"], [0, 0.5, 0.5])
  assert calls == [(0,), (1,), (2,), (1, 2), (0, 1, 2)]


def test_greedy_soup_goes_on_after_a_model_that_does_not_help():
  scores = {(0,): 0.9, (1,): 0.8, (2,): 0.7, (0, 1): 0.85, (0, 2): 0.9}
  soup, taken, calls = run_greedy(scores)
  assert taken == [0, 2], "a soup that is only as good is taken"
  assert calls[3:] == [(0, 1), (0, 2)]
  np.testing.assert_allclose(soup["w"], [0.5, 0, 0.5])


def test_greedy_soup_of_equals_takes_them_in_order():
  members = [(0,), (1,), (2,), (0, 1), (0, 1, 2)]
  assert run_greedy(dict.fromkeys(members, 1.0))[1] == [0, 1, 2]


def test_greedy_soup_that_takes_one():
  scores = {(0,): 0.1, (1,): 0.9, (2,): 0.2, (1, 2): 0.5, (0, 1): 0.3}
  soup, taken, _ = run_greedy(scores)
  assert taken == [1]
  np.testing.assert_array_equal(soup["w"], [0, 1, 0])


def test_greedy_soup_never_takes_nan():
  nan = float("nan")
  scores = {(0,): nan, (1,): 0.5, (2,): 0.4, (1, 2): nan}
  _, taken, calls = run_greedy(scores)
  assert taken == [1]
  assert calls == [(0,), (1,), (2,), (1, 2)], "a model of no score is not tried again"


def test_greedy_soup_of_one_model():
  soup, taken = greedy_soup({"w": np.ones((1, 2), np.float32)}, lambda model: 1.0)
  assert taken == [0]
  np.testing.assert_array_equal(soup["w"], [1, 1])


def test_greedy_soup_evaluates_unstacked_models():
  stacked = stack([{"w": jnp.full((2, 3), float(i)), "n": np.int32(i)} for i in range(2)])

  def evaluate(model):
    assert model["w"].shape == (2, 3)
    assert model["n"].shape == ()
    return jnp.sum(model["w"])

  assert greedy_soup(stacked, evaluate)[1] == [1]


@given(arrays(np.float32, (M, 5, 3), elements=st.floats(-50, 50, width=16)))
def test_prediction_ensemble_is_the_mean_probability(logits):
  ensemble = prediction_ensemble(logits)
  assert ensemble.dtype == np.float32
  expected = scipy.special.softmax(logits.astype(float), axis=-1).mean(0)
  np.testing.assert_allclose(np.exp(ensemble), expected, rtol=1e-4, atol=1e-6)


def test_prediction_ensemble_of_half_precision_and_under_transformations():
  logits = np.random.default_rng(0).standard_normal((2, M, 5, 3)).astype(np.float32)
  expected = scipy.special.softmax(logits, axis=-1).mean(1)
  together = jax.jit(jax.vmap(prediction_ensemble))(logits)
  np.testing.assert_allclose(np.exp(together), expected, rtol=1e-5)
  half = prediction_ensemble(jnp.asarray(logits[0], jnp.bfloat16))
  assert half.dtype == np.float32
  np.testing.assert_allclose(np.exp(half), expected[0], atol=0.01)
  gradient = jax.grad(lambda x: prediction_ensemble(x)[:, 0].sum())(logits[0])
  assert np.all(np.isfinite(gradient))
  # Far apart logits do not underflow to log(0).
  certain = np.array([[[0.0, 500.0]], [[0.0, 500.0]]])
  np.testing.assert_allclose(prediction_ensemble(certain), [[-500, 0]], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
def test_gradient_in_the_weights(weights):
  rng = np.random.default_rng(0)
  stacked = {"a": rng.standard_normal((3, 4)), "b": [rng.standard_normal((3, 2, 2))]}
  with enable_x64():

    def soup(weights, stacked=stacked):
      leaves = jax.tree.leaves(uniform_soup(stacked, weights))
      return jnp.concatenate([jnp.sin(x).ravel() for x in leaves])

    weights = jnp.array(weights)
    check_grads(soup, (weights,), order=1)
    step, h = np.eye(3), 1e-6
    numeric = [(soup(weights + h * e) - soup(weights - h * e)) / (2 * h) for e in step]
    np.testing.assert_allclose(jax.jacrev(soup)(weights).T, numeric, atol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(soup)(weights).T, numeric, atol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_keep_what_is_not_finite_out(bad):
  stacked = np.array([[1.0, 2.0], [bad, 5.0]], np.float32)
  weights = jnp.array([1.0, 0.0])
  of_weights, of_models = jax.grad(
    lambda w, x: jnp.sum(uniform_soup(x, w) * jnp.array([1.0, 10.0])), argnums=(0, 1)
  )(weights, stacked)
  np.testing.assert_array_equal(of_weights, [21, 50])
  np.testing.assert_array_equal(of_models, [[1, 10], [0, 0]])
  # Where it has a weight, it is no secret.
  assert not np.isfinite(uniform_soup(stacked, jnp.array([0.5, 0.5]))[0])


def test_a_learned_soup_leaves_the_one_it_starts_from():
  stacked = jnp.array([[0.0], [1.0]])
  weights = jnp.array([1.0, 0.0])

  def loss(weights):
    return jnp.sum((uniform_soup(stacked, weights) - 0.5) ** 2)

  for _ in range(50):
    step = jax.grad(loss)(weights)
    weights = weights - 0.2 * (step - step.mean())
  np.testing.assert_allclose(weights, [0.5, 0.5], atol=1e-3)


def test_rejects(rejects):
  stacked = {"w": np.ones((3, 2), np.float32)}
  for weights, shape in ((np.ones(2) / 2, [2]), (np.ones((3, 1)) / 3, [3, 1])):
    with rejects(f"weights has shape {shape} for 3 models"):
      uniform_soup(stacked, weights)
  for weights in ([1.0, 1, 1], [0.0, 0, 0], [np.nan, 0.5, 0.5], [np.inf, 0, 0]):
    with rejects("they must be finite and sum to 1"):
      uniform_soup(stacked, weights)
  for soup in (uniform_soup, functools.partial(greedy_soup, evaluate=lambda model: 1)):
    with rejects("leaves disagree on the number of models"):
      soup({"a": np.ones((3, 2)), "b": np.ones((2, 2))})
    with rejects("length 0"):
      soup({"a": np.ones((0, 2))})
  with rejects("evaluate gave NaN for all 3 models"):
    greedy_soup(stacked, lambda model: np.nan)
  with rejects("logits have shape [2, 3]: expected [models, n, classes]"):
    prediction_ensemble(np.ones((2, 3)))
