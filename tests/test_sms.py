import functools
import itertools
import logging
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soup_of_processes
from x64 import enable_x64

from jaxsms import (
  Phase,
  greedy_soup,
  magnitude_masks,
  make_mesh,
  masked,
  merge_phase,
  phase_sparsity,
  prune_phase,
  random_masks,
  retrain_phase,
  sparse_model_soup,
  sparsity,
  unstack,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

M, GOAL, PHASES = 3, 0.9, 3
PRUNABLE = 6 * 8 + 8 * 3
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((32, 6)).astype(np.float32)
LABELS = RNG.integers(0, 3, 32)
KEY = jax.random.key(5)
PARAMS = {
  "params": {
    "first": {"kernel": RNG.standard_normal((6, 8)).astype("f"), "bias": np.zeros(8, "f")},
    "last": {"kernel": RNG.standard_normal((8, 3)).astype("f"), "bias": np.ones(3, "f")},
  },
  "batch_stats": {"mean": np.zeros(8, "f"), "steps": np.int32(0)},
}
INGREDIENTS = {"seed": jnp.arange(M), "lr": jnp.full(M, 0.1)}


def logits_of(params, inputs):
  layers = params["params"]
  hidden = inputs @ layers["first"]["kernel"] + layers["first"]["bias"]
  hidden = jnp.tanh(hidden - params["batch_stats"]["mean"])
  return hidden @ layers["last"]["kernel"] + layers["last"]["bias"]


def train(key, params, masks, ingredient):
  """Four steps on noisy inputs, with momentum inside the mask and a moving statistic."""
  key = jax.random.fold_in(key, ingredient["seed"])
  optimizer = masked(optax.sgd(ingredient["lr"], momentum=0.9, nesterov=True))
  inner_masks = masks["params"]

  def loss(layers, statistics, key):
    inputs = INPUTS + 0.3 * jax.random.normal(key, INPUTS.shape)
    logits = logits_of({"params": layers, "batch_stats": statistics}, inputs)
    hidden = inputs @ layers["first"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), hidden

  def step(carry, key):
    layers, statistics, state = carry
    (value, hidden), gradient = jax.value_and_grad(loss, has_aux=True)(
      layers, statistics, key
    )
    updates, state = optimizer.update(gradient, state, layers, masks=inner_masks)
    mean = 0.9 * statistics["mean"] + 0.1 * jax.lax.stop_gradient(hidden).mean(0)
    statistics = {"mean": mean, "steps": statistics["steps"] + 1}
    return (optax.apply_updates(layers, updates), statistics, state), value

  start = (params["params"], params["batch_stats"], optimizer.init(params["params"]))
  (layers, statistics, _), losses = jax.lax.scan(step, start, jax.random.split(key, 4))
  return {"params": layers, "batch_stats": statistics}, {"losses": losses}


def shift(key, params, masks, ingredient):
  """Adds to every kept weight: a retraining whose outcome is known."""
  amount = ingredient["amount"]

  def add(x):
    return x + amount if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(add, params)


def kernels(params):
  return np.concatenate(
    [np.ravel(params["params"][layer]["kernel"]) for layer in ("first", "last")]
  )


def run(retrain, ingredients, **options):
  options = {"goal_sparsity": GOAL, "phases": PHASES, **options}
  return sparse_model_soup(KEY, PARAMS, retrain, ingredients=ingredients, **options)


@pytest.fixture(scope="module")
def traced():
  """`train` with a list that grows with each trace of it."""
  traces = []

  def counted(key, params, masks, ingredient):
    traces.append(1)
    return train(key, params, masks, ingredient)

  return counted, traces


@pytest.fixture(scope="module")
def result(traced):
  """A whole run and what `on_phase` saw of it."""
  seen = []
  soup = run(traced[0], INGREDIENTS, on_phase=seen.append)
  return soup, seen


def test_sparsity_of_each_phase_is_exact(result):
  soup, seen = result
  assert [r["phase"] for r in soup.history] == [1, 2, 3]
  for phase, (record, shown) in enumerate(zip(soup.history, seen, strict=True), 1):
    removed = round(phase_sparsity(GOAL, phase, PHASES) * PRUNABLE)
    assert record["sparsity"] == pytest.approx(removed / PRUNABLE)
    assert np.sum(~kernels(shown.masks)) == removed
    np.testing.assert_array_equal(kernels(shown.params)[~kernels(shown.masks)], 0)
    assert float(sparsity(shown.params)) == pytest.approx(removed / PRUNABLE)
    for copy in unstack(shown.candidates):
      np.testing.assert_array_equal(kernels(copy)[~kernels(shown.masks)], 0)
  np.testing.assert_array_equal(kernels(soup.masks), kernels(seen[-1].masks))


def test_masks_are_nested_and_leave_other_leaves_alone(result):
  _, seen = result
  for before, after in itertools.pairwise(seen):
    assert not np.any(kernels(after.masks) & ~kernels(before.masks))
  masks = seen[-1].masks
  assert masks["batch_stats"]["mean"].all() and masks["params"]["first"]["bias"].all()


def test_pruned_fraction_and_norm_drop_equal_numpy(result, assert_trees_equal):
  soup, seen = result
  starts = [PARAMS, *(shown.params for shown in seen[:-1])]
  kept = PRUNABLE
  for start, shown, record in zip(starts, seen, soup.history, strict=True):
    removed = kernels(start)[~kernels(shown.masks)].astype(float)
    weights = [np.ravel(x).astype(float) for x in jax.tree.leaves(start["params"])]
    drop = np.linalg.norm(removed) / np.linalg.norm(np.concatenate(weights))
    assert record["relative_norm_drop"] == pytest.approx(drop, rel=1e-5)
    remaining = int(np.sum(kernels(shown.masks)))
    assert record["pruned_fraction"] == pytest.approx((kept - remaining) / kept)
    kept = remaining


def test_records_and_on_phase(result):
  soup, seen = result
  for record, shown in zip(soup.history, seen, strict=True):
    assert isinstance(shown, Phase) and shown.record is record
    np.testing.assert_allclose(record["weights"], np.full(M, 1 / M), rtol=1e-6)
    assert record["retrain"]["losses"].shape == (M, 4)
    assert isinstance(record["retrain"]["losses"], np.ndarray)
    mean = np.mean(shown.candidates["params"]["last"]["bias"], axis=0)
    np.testing.assert_allclose(shown.params["params"]["last"]["bias"], mean, rtol=1e-5)
    statistics = shown.candidates["batch_stats"]["mean"]
    np.testing.assert_allclose(
      shown.params["batch_stats"]["mean"], np.mean(statistics, 0), rtol=1e-5, atol=1e-7
    )
  assert soup.params["batch_stats"]["steps"] == 4 * PHASES
  np.testing.assert_array_equal(kernels(soup.params), kernels(seen[-1].params))


def test_different_seeds_differ(result):
  copies = unstack(result[1][0].candidates)
  assert np.any(kernels(copies[0]) != kernels(copies[1]))


def test_phases_and_calls_share_one_program(traced, result, assert_trees_equal):
  function, traces = traced
  assert len(traces) == 1
  again = run(function, INGREDIENTS)
  assert len(traces) == 1
  assert_trees_equal(again.params, result[0].params)
  other = sparse_model_soup(
    jax.random.key(6),
    PARAMS,
    function,
    ingredients=INGREDIENTS,
    goal_sparsity=0.5,
    phases=1,
  )
  assert len(traces) == 1
  assert np.any(kernels(other.params) != kernels(again.params))


def test_equal_ingredients_give_equal_copies(traced):
  equal = {"seed": jnp.array([4, 4, 1]), "lr": jnp.full(M, 0.1)}
  seen = []
  run(traced[0], equal, phases=1, on_phase=seen.append)
  copies = [kernels(copy) for copy in unstack(seen[0].candidates)]
  np.testing.assert_array_equal(copies[0], copies[1])
  assert np.any(copies[0] != copies[2])
  assert len(traced[1]) == 1


def test_copies_together_equal_copies_alone(result, assert_trees_equal):
  _, seen = result
  masks, params = None, PARAMS
  for phase, shown in enumerate(seen, 1):
    share = phase_sparsity(GOAL, phase, PHASES)
    pruned, masks, _ = prune_phase(params, masks, share)
    key = jax.random.fold_in(KEY, phase)
    for i, together in enumerate(unstack(shown.candidates)):
      ingredient = jax.tree.map(lambda x, i=i: x[i : i + 1], INGREDIENTS)
      alone, report = retrain_phase(key, pruned, masks, ingredient, train)
      assert_trees_equal(unstack(alone)[0], together, rtol=2e-4, atol=2e-5)
      np.testing.assert_allclose(
        report["losses"][0], shown.record["retrain"]["losses"][i], rtol=1e-4
      )
    params = shown.params


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_a_mesh_changes_nothing_and_compiles_once(shape, result, assert_trees_equal):
  traces = []

  def counted(*args):
    traces.append(1)
    return train(*args)

  meshed = run(counted, INGREDIENTS, mesh=make_mesh(*shape))
  assert len(traces) == 1
  assert_trees_equal(meshed.params, result[0].params, rtol=1e-3, atol=1e-4)
  assert_trees_equal(meshed.masks, result[0].masks)


def test_ingredients_as_a_function_of_the_phase():
  phases = []

  def ingredients(phase):
    phases.append(phase)
    return {"amount": np.full(2, phase, np.float32)}

  soup = run(shift, ingredients)
  assert phases == [1, 2, 3]
  np.testing.assert_allclose(soup.params["params"]["last"]["bias"], 1 + 1 + 2 + 3)
  assert soup.history[0]["retrain"] is None


def test_the_loop_by_hand():
  # 4 weights, half of them removed in two phases; each copy adds 1 or 3: the mean adds 2.
  params = {"kernel": np.array([[1.0, -2.0, 3.0, -40.0]], np.float32)}
  ingredients = {"amount": jnp.array([1.0, 3.0])}
  soup = sparse_model_soup(
    KEY, params, shift, ingredients=ingredients, goal_sparsity=0.5, phases=2
  )
  # Phase 1 removes 1 of 4 (0.29 * 4 = 1.17): the 1. Then -2 + 2 = 0 is the smallest.
  np.testing.assert_allclose(soup.params["kernel"], [[0, 0, 7, -36]])
  first, second = soup.history
  assert (first["sparsity"], second["sparsity"]) == (0.25, 0.5)
  assert first["pruned_fraction"] == 0.25
  assert second["pruned_fraction"] == pytest.approx(1 / 3)
  norm = math.sqrt(1 + 4 + 9 + 1600)
  assert first["relative_norm_drop"] == pytest.approx(1 / norm, rel=1e-5)
  assert second["relative_norm_drop"] == 0


def test_candidates_are_let_go_before_others_are_trained():
  """Of the loop, of `sparse_model_soup` around it, and where the last are kept."""
  alive, seen = [], []

  def ingredients(phase):
    alive.append(sum(ref() is not None for ref in seen))
    return {"amount": jnp.array([0.5, 1.0 + phase])}

  def on_phase(phase):
    seen.extend(map(weakref.ref, jax.tree.leaves(phase.candidates)))

  for keep in (False, True):
    seen.clear()
    alive.clear()
    soup = run(shift, ingredients, on_phase=on_phase, keep_candidates=keep)
    assert len(seen) == PHASES * len(jax.tree.leaves(PARAMS))
    assert alive == [0] * PHASES
    assert (soup.candidates is not None) == keep


def test_greedy_merge():
  target = np.float32(1.5)

  def evaluate(model):
    return -abs(float(model["params"]["last"]["bias"][0]) - target)

  amounts = {"amount": jnp.array([5.0, 1.0, -1.0])}
  soup = run(
    shift, amounts, phases=1, merge=functools.partial(greedy_soup, evaluate=evaluate)
  )
  # Biases 6, 2 and 0: best is 2 (0.5 off), the mean with 0 is 1 (0.5 off, taken), and
  # with 6 as well 8 / 3 (not).
  np.testing.assert_allclose(soup.history[0]["weights"], [0, 0.5, 0.5])
  np.testing.assert_allclose(soup.params["params"]["last"]["bias"], 1, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_copy_is_left_out(bad, caplog):
  amounts = {"amount": jnp.array([1.0, bad, 2.0])}
  with caplog.at_level(logging.WARNING, logger="absl"):
    soup = run(shift, amounts, phases=1)
  assert "copies [1] diverged" in caplog.text
  np.testing.assert_allclose(soup.history[0]["weights"], [0.5, 0, 0.5])
  np.testing.assert_allclose(soup.params["params"]["last"]["bias"], 2.5)


def test_a_diverged_copy_and_a_greedy_merge():
  def evaluate(model):
    return -abs(float(model["params"]["last"]["bias"][0]))

  merge = functools.partial(greedy_soup, evaluate=evaluate)
  amounts = {"amount": jnp.array([jnp.nan, 9.0, -1.0])}
  soup = run(shift, amounts, phases=1, merge=merge)
  np.testing.assert_array_equal(soup.history[0]["weights"], [0, 0, 1])


def test_all_copies_diverging_is_an_error(rejects):
  with rejects("all 3 copies diverged", FloatingPointError):
    run(shift, {"amount": jnp.full(3, jnp.nan)})


def test_moved_weights_are_set_back_with_a_warning(caplog):
  with caplog.at_level(logging.WARNING, logger="absl"):
    soup = run(shift, {"amount": jnp.ones(2)}, phases=1)
  assert "retrain moved removed weights" in caplog.text
  np.testing.assert_array_equal(kernels(soup.params)[~kernels(soup.masks)], 0)
  caplog.clear()
  with caplog.at_level(logging.WARNING, logger="absl"):
    run(train, INGREDIENTS, phases=1)
  assert not caplog.text


def test_starts_from_a_sparse_model():
  pruned, masks, _ = prune_phase(PARAMS, None, 0.5)
  soup = sparse_model_soup(
    KEY,
    pruned,
    shift,
    ingredients={"amount": jnp.zeros(2)},
    goal_sparsity=0.75,
    phases=1,
    masks=masks,
  )
  assert not np.any(kernels(soup.masks) & ~kernels(masks))
  assert soup.history[0]["pruned_fraction"] == 0.5
  # A goal below what is removed already removes nothing more.
  same = prune_phase(pruned, masks, 0.25)
  np.testing.assert_array_equal(kernels(same[1]), kernels(masks))
  assert same[2]["pruned_fraction"] == 0 and same[2]["sparsity"] == 0.5


def test_other_prunings():
  amounts = {"amount": jnp.zeros(2)}
  uniform = functools.partial(magnitude_masks, scope="uniform")
  masks = run(shift, amounts, prune=uniform, phases=1, goal_sparsity=0.5).masks
  assert np.sum(~masks["params"]["first"]["kernel"]) == 24
  assert np.sum(~masks["params"]["last"]["kernel"]) == 12
  random = functools.partial(random_masks, jax.random.key(1))
  soup = run(shift, amounts, prune=random)
  assert np.sum(~kernels(soup.masks)) == round(GOAL * PRUNABLE)


def test_own_prunable():
  params = {"W": np.arange(1.0, 9.0, dtype="f"), "kernel": np.ones((2, 2), "f")}
  soup = sparse_model_soup(
    KEY,
    params,
    shift,
    ingredients={"amount": jnp.zeros(2)},
    goal_sparsity=0.75,
    phases=2,
    prunable=lambda path, leaf: path[-1].key == "W",
  )
  np.testing.assert_array_equal(soup.params["W"], [0, 0, 0, 0, 0, 0, 7, 8])
  np.testing.assert_array_equal(soup.params["kernel"], np.ones((2, 2)))
  assert [r["sparsity"] for r in soup.history] == [0.5, 0.75]


def test_keys_and_integers_in_the_tree():
  params = {**PARAMS, "key": jax.random.key(1), "count": np.int32(3)}
  soup = sparse_model_soup(
    KEY, params, shift, ingredients={"amount": jnp.ones(2)}, goal_sparsity=0.5, phases=2
  )
  assert soup.params["count"] == 3
  assert jnp.all(
    jax.random.key_data(soup.params["key"]) == jax.random.key_data(params["key"])
  )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
  # In float16 the sum of these squares is beyond its largest number.
  params = {"kernel": np.full((100, 100), 8, dtype)}
  soup = sparse_model_soup(
    KEY,
    params,
    shift,
    ingredients={"amount": jnp.ones(2, dtype)},
    goal_sparsity=0.36,
    phases=1,
  )
  assert soup.params["kernel"].dtype == dtype
  assert float(jnp.sum(soup.params["kernel"] == 9)) == 6400
  assert soup.history[0]["relative_norm_drop"] == pytest.approx(0.6, rel=1e-4)


def test_float64():
  with enable_x64():
    params = {"kernel": np.array([[1 + 1e-12, 1.0]])}
    amounts = {"amount": jnp.array([1e-12, 1e-12, 1e-12])}
    soup = sparse_model_soup(
      KEY, params, shift, ingredients=amounts, goal_sparsity=0.5, phases=1
    )
    assert soup.params["kernel"].dtype == np.float64
    np.testing.assert_allclose(soup.params["kernel"], [[1 + 2e-12, 0]], rtol=1e-15)


def test_merge_phase_weights():
  stacked = {"w": jnp.array([[1.0], [3.0], [jnp.nan], [5.0]])}
  soup, weights = merge_phase(stacked)
  np.testing.assert_allclose(soup["w"], [3])
  np.testing.assert_allclose(weights, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)

  def last(candidates):
    return (jax.tree.map(lambda x: x[-1], candidates), [2])

  soup, weights = merge_phase(stacked, last)
  assert soup["w"] == 5 and weights.tolist() == [0, 0, 0, 1]


def test_rejects_before_any_work(rejects):
  started = []

  def refuse(*args):
    return started.append(1)

  def start(params=PARAMS, ingredients=INGREDIENTS, goal=0.5, phases=1):
    sparse_model_soup(
      KEY, params, refuse, ingredients=ingredients, goal_sparsity=goal, phases=phases
    )

  for goal in (-0.1, 1.0, math.nan):
    with rejects(f"goal_sparsity is {goal:g}"):
      start(goal=goal)
  with rejects("phases is 0: at least 1 phase is needed"):
    start(phases=0)
  with rejects("params has NaN or infinite values in params/first/bias"):
    broken = jax.tree.map(np.copy, PARAMS)
    broken["params"]["first"]["bias"][0] = np.nan
    start(broken)
  with rejects("none of the 1 leaves of params is prunable"):
    start({"bias": np.ones(3, "f")})
  for nothing in ({}, {"seed": jnp.zeros(0)}, None):
    with rejects("there are no ingredients"):
      start(ingredients=nothing)
  with rejects("leaves disagree on the number of ingredients"):
    start(ingredients={"a": jnp.ones(2), "b": jnp.ones(3)})
  with rejects("there are no ingredients"):
    start(ingredients={"lr": 0.1})
  assert not started


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda p: None, "retrain must give params of the structure it got"),
    (lambda p: (p, {}, {}), "retrain must give params of the structure it got"),
    (lambda p: ({}, p), "retrain must give params of the structure it got"),
    (lambda p: {"kernel": p["kernel"][:1]}, "float32[2, 2] into float32[1, 2]"),
    (lambda p: {"kernel": p["kernel"].astype(jnp.bfloat16)}, "into bfloat16[2, 2]"),
  ],
)
def test_rejects_what_retrain_gives(change, words, rejects):
  params = {"kernel": np.ones((2, 2), np.float32)}
  with rejects(words):
    retrain_phase(KEY, params, params, {"seed": jnp.arange(2)}, lambda k, p, *_: change(p))


def test_rejects_what_merge_gives(rejects):
  stacked = {"w": jnp.ones((2, 3))}
  for merge in (lambda c: c, lambda c: None, lambda c: (c, [0]), lambda c: c["w"][0]):
    with rejects("merge gave neither one model"):
      merge_phase(stacked, merge)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, at_once", [(None, 1), (None, 2), (2, 1)])
def test_copies_in_groups_equal_all_at_once(mesh, at_once):
  mesh = mesh and make_mesh(mesh)
  together = soup_of_processes.soup(soup_of_processes.dense())
  got = soup_of_processes.soup(soup_of_processes.dense(), mesh, at_once=at_once)
  for name, value in together.items():
    np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)


def test_no_copies_at_once_are_refused(rejects):
  with rejects("at_once is 0: give at least 1"):
    soup_of_processes.soup(soup_of_processes.dense(), at_once=0)
