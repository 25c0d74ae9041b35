"""Baselines: ramp, feedback, re-pruning, averages over time; each worked out anew."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import finish, run_phases
from engine import train as train_to_the_end
from hypothesis import given
from hypothesis import strategies as st
from test_training import (
  BATCH,
  Tiny,
  assert_close,
  ingredients,
  make_data,
  make_programs,
)

from jaxsms import apply_masks, magnitude_masks, make_mesh, prunable, training
from jaxsms.baselines import imp_reprune, swamp
from jaxsms.dynamic import (
  GradualPruning,
  cubic_sparsity,
  gradual_masks,
  prune_during_training,
)
from jaxsms.one_shot import one_shot_soups
from jaxsms.sms import phase_sparsities
from jaxsms.training import Engine, Model, Splits
from jaxsms.training.step import Recipe, train_step

DATA = make_data(23)  # 5 steps an epoch
SPLITS = Splits(DATA, make_data(7, 1), make_data(9, 2))
KEY = jax.random.key(3)


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  pass


@pytest.fixture(scope="module")
def programs():
  return make_programs()


@pytest.fixture(scope="module")
def dense():
  return Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))


def pruned_by_sorting(params, sparsity):
  """Global magnitude pruning in NumPy."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  flags = [prunable(path, x) for path, x in leaves]
  sizes = np.concatenate(
    [np.abs(x).ravel() for (_, x), f in zip(leaves, flags, strict=True) if f]
  )
  threshold = np.sort(sizes)[round(sparsity * len(sizes))]
  new = [
    np.where((np.abs(x) >= threshold) | (not f), x, 0)
    for (_, x), f in zip(leaves, flags, strict=True)
  ]
  return jax.tree.unflatten(structure, new)


def removed(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  weights = np.concatenate([np.ravel(x) for path, x in leaves if prunable(path, x)])
  return np.mean(weights == 0)


def test_the_ramp_is_cubic():
  # 0.8 (1 - (1 - t)^3) at t = 0, 1/4, 1/2, 3/4, 1 and after.
  found = [cubic_sparsity(0.8, step, 8) for step in (0, 2, 4, 6, 8, 9)]
  by_hand = [0, 0.8 * (1 - 27 / 64), 0.7, 0.8 * (1 - 1 / 64), 0.8, 0.8]
  np.testing.assert_allclose(found, by_hand, rtol=1e-12)


@given(st.floats(0, 0.999), st.integers(1, 500), st.data())
def test_the_ramp_rises_to_its_goal(goal, ramp_steps, draw):
  step = draw.draw(st.integers(0, 600))
  now, then = (cubic_sparsity(goal, s, ramp_steps) for s in (step, step + 1))
  assert 0 <= now <= then <= goal


def test_ramps_out_of_range(rejects):
  with rejects("in [0, 1)"):
    cubic_sparsity(1.0, 0, 3)
  with rejects("at least one"):
    cubic_sparsity(0.5, 0, 0)
  with rejects("count from 0"):
    cubic_sparsity(0.5, -1, 3)


class TwoWeights(nn.Module):
  """Logits (w . x, 0)."""

  @nn.compact
  def __call__(self, images, train=False):
    w = self.param("kernel", nn.initializers.zeros, (2, 1))
    z = images.reshape(len(images), 2) @ w
    return jnp.concatenate([z, jnp.zeros_like(z)], -1)


def test_feedback_takes_gradients_at_pruned_weights_and_moves_all():
  w, x = np.array([0.5, 0.2]), np.array([1.0, 8.0])
  mask = np.array([1.0, 0.0])
  rate, decay, momentum = 0.1, 0.01, 0.9
  optimizer = training.sgd(rate, decay, momentum=momentum)
  params = {"kernel": jnp.asarray(w, jnp.float32)[:, None]}
  masks = {"kernel": jnp.asarray(mask[:, None] == 1)}
  state = training.TrainState(params, {}, optimizer.init(params), jnp.zeros((), jnp.int32))
  recipe = Recipe(TwoWeights(), feedback=True)
  step = functools.partial(train_step, recipe, optimizer, jax.random.key(0))
  images = jnp.asarray(x, jnp.float32).reshape(1, 1, 2, 1)
  buffer = np.zeros(2)
  for _ in range(3):
    state, metrics = step(state, masks, images, jnp.zeros([1], jnp.int32))
    z = (mask * w) @ x  # the second weight takes no part
    np.testing.assert_allclose(metrics["loss"], np.log1p(np.exp(-z)), rtol=1e-5)
    gradient = -x / (1 + np.exp(z)) + decay * w  # but has a gradient and decays
    buffer = momentum * buffer + gradient
    w = w - rate * buffer
    np.testing.assert_allclose(state.params["kernel"][:, 0], w, rtol=1e-5)
  # It was the smaller one; now it is the larger one, and comes back.
  assert w[1] > w[0] > 0
  new = magnitude_masks(state.params, 0.5, prunable=lambda *_: True)
  assert new["kernel"][:, 0].tolist() == [False, True]


def one_state(kernel):
  kernel = jnp.asarray(kernel, jnp.float32)[None]
  params = {"Dense_0": {"kernel": kernel}}
  return training.TrainState(params, {}, (), jnp.zeros([1], jnp.int32))


def test_removed_weights_stay_so_without_feedback_and_return_with_it():
  first, grown = [[4.0, 3.0, 2.0, 1.0]], [[4.0, 3.0, 2.0, 5.0]]
  gmp, dpf = (gradual_masks(GradualPruning(0.25, 1, 1), feedback=f) for f in (False, True))
  for remask in (gmp, dpf):
    _, masks = remask(1, one_state(first))
    assert masks["Dense_0"]["kernel"].tolist() == [[True, True, True, False]]
  state, masks = gmp(2, one_state(grown))
  assert masks["Dense_0"]["kernel"].tolist() == [[True, True, True, False]]
  assert state.params["Dense_0"]["kernel"][0].tolist() == [[4, 3, 2, 0]]
  state, masks = dpf(2, one_state(grown))
  assert masks["Dense_0"]["kernel"].tolist() == [[True, True, False, True]]
  assert state.params["Dense_0"]["kernel"][0].tolist() == grown
  with pytest.raises(FloatingPointError, match="not finite"):
    gmp(3, one_state([[1.0, 2.0, 3.0, np.nan]]))


def during(programs, dense, seeds, rates, feedback=None, **options):
  asked = []

  def prune(params, sparsity, masks=None):
    asked.append(sparsity)
    return magnitude_masks(params, sparsity, masks=masks)

  events = prune_during_training(
    Engine(programs, SPLITS), KEY, dense, ingredients(seeds, len(rates)),
    np.broadcast_to(np.float32(rates), [len(seeds), len(rates)]),
    GradualPruning(0.75, ramp_steps=10, mask_steps=3, prune=prune),
    feedback_programs=feedback,
  )  # fmt: skip
  model, masks, (record,) = finish(events, **options)
  return model, masks, record, asked


def test_masks_follow_the_ramp_while_training(programs, dense):
  # Epochs of 5 steps in parts of 3 and 2, two of them; then the mask is fixed.
  chunks = []
  model, masks, record, asked = during(
    programs, dense, [0], np.zeros(15), on_event=chunks.append
  )
  by_hand = [0.75 * (1 - (1 - t / 10) ** 3) for t in (0, 3, 5, 8)] + [0.75]
  np.testing.assert_allclose(asked, by_hand)
  assert [c.step for c in chunks[:-1]] == [3, 5, 8, 10, 15]
  # Nothing moved: the masks are those of the weights at the start.
  assert_close(model.params, pruned_by_sorting(dense.params, 0.75), 0)
  assert record["sparsity"] == pytest.approx(removed(model.params))
  assert removed(apply_masks(dense.params, masks)) == removed(model.params)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_soup_branches_where_the_masks_are_fixed(programs, dense, dynamic):
  feedback = make_programs(feedback=True) if dynamic else None
  rates = np.full(15, 0.1)
  alone, masks, record, _ = during(programs, dense, [4], rates, feedback)
  soup, shared, both, _ = during(programs, dense, [4, 1], rates, feedback)
  assert_close(masks, shared, 0)
  assert both["candidates"][0] == pytest.approx(record["soup"], abs=1e-4)
  assert removed(soup.params) == pytest.approx(removed(alone.params))
  assert np.abs(soup.params["Dense_0"]["kernel"]
                - alone.params["Dense_0"]["kernel"]).max() > 1e-4  # fmt: skip


@pytest.mark.slow
def test_masks_made_anew_on_a_mesh(programs, dense):
  mesh = make_mesh(2, devices=jax.devices()[:2])
  rates = np.full(15, 0.1)
  found = [
    during(p, dense, [0, 1, 2], rates, feedback)[0]
    for p, feedback in (
      (programs, make_programs(feedback=True)),
      (make_programs(mesh=mesh), make_programs(mesh=mesh, feedback=True)),
    )
  ]
  assert_close(*found, 1e-4)


@pytest.mark.slow
def test_imp_reprune_is_the_pruned_mean_of_runs_of_imp(programs, dense):
  own = make_programs(own_masks=True)
  seeds, steps, rates = [0, 1], 5, 0.2

  def plan_of(seeds):
    return lambda record: (
      ingredients(seeds, steps), np.full((len(seeds), steps), rates, np.float32)
    )  # fmt: skip

  options = {"goal_sparsity": 0.8, "phases": 2}
  runs = [
    run_phases(programs, SPLITS, KEY, dense, plan_of([seed]), **options) for seed in seeds
  ]
  runs_, _, records = finish(
    imp_reprune(
      Engine(own, SPLITS), KEY, dense, plan_of(seeds), phase_sparsities(0.8, 2), 2
    )
  )
  model = runs_.average
  masks = [np.asarray(jax.tree.leaves(m)[-1]) for _, m, _ in runs]
  assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(m) for _, m, _ in runs),
                                            strict=True)), masks  # fmt: skip
  mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2,
                      *(run[0].params for run in runs))  # fmt: skip
  assert removed(mean) < 0.8
  assert_close(model.params, pruned_by_sorting(mean, 0.8), 1e-4)
  assert removed(model.params) == pytest.approx(records[-1]["sparsity"])
  for record, *imp in zip(records, *(run[2] for run in runs), strict=True):
    for i in range(2):
      assert record["candidates"][i] == pytest.approx(imp[i]["soup"], abs=1e-4)


@pytest.mark.slow
def test_one_shot_soups_are_those_of_a_phase_each(programs, dense):
  """All sparsities in one program give what each gives in a loop of its own."""
  rates = {0.4: 0.2, 0.7: 0.1}  # of its own for each sparsity

  def plan(record):
    (rate,) = (rates[s] for s in rates if abs(s - record["sparsity"]) < 0.05)
    return ingredients([0, 1], 5), np.full((2, 5), rate, np.float32)

  alone = [
    run_phases(programs, SPLITS, KEY, dense, plan, goal_sparsity=s, phases=1) for s in rates
  ]
  engine = Engine(make_programs(own_masks=True), SPLITS)
  sparsities = dict(enumerate(rates, 1))
  (nested, each, _), *_ = [finish(one_shot_soups(engine, KEY, dense, plan, sparsities))]
  for i, (model, masks, (record,)) in enumerate(alone):
    assert_close(nested.models[i], model, 1e-5)
    assert_close(each[i], masks, 0)
    found = nested.records[i + 1]
    assert found["weights"] == record["weights"]
    assert found["soup"] == pytest.approx(record["soup"], abs=1e-4)
    assert removed(nested.models[i].params) == pytest.approx(found["sparsity"])
  kept = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)]) for m in each]
  assert not (kept[1] & ~kept[0]).any()
  assert kept[0].sum() > kept[1].sum()


def test_sparsities_of_one_shot_soups_rise(programs, dense, rejects):
  for sparsities in ({}, {1: 0.5, 2: 0.4}):
    with rejects("none lower than the one before"):
      one_shot_soups(Engine(programs, SPLITS), KEY, dense, None, sparsities)


def test_swamp_averages_particles_and_time_and_rewinds(programs, dense):
  spe = len(DATA.labels) // BATCH
  steps, rates = 3 * spe, np.full((2, 3 * spe), 0.1, np.float32)
  chosen = ingredients([0, 1], steps)
  events = swamp(
    Engine(programs, SPLITS), KEY, dense, lambda record: (chosen, rates),
    phase_sparsities(0.6, 1), average_after=spe,
  )  # fmt: skip
  model, _, records = finish(events)

  def round_average(phase, params, masks):
    """Of the last two epochs of both particles."""
    ends = []

    def keep(state, chunk):
      if chunk.step in (2 * spe, 3 * spe):
        ends.append(jax.tree.map(np.array, state.params))

    train_to_the_end(
      programs, DATA, masks, jax.random.fold_in(KEY, phase), (params, dense.batch_stats),
      chosen, rates, on_state=keep,
    )  # fmt: skip
    assert len(ends) == 2
    return jax.tree.map(lambda a, b: (a + b).mean(0) / 2, *ends)

  everything = jax.tree.map(lambda x: jnp.ones(x.shape, bool), dense.params)
  first = round_average(0, dense.params, everything)
  masks = jax.tree.map(
    lambda x, old: jnp.asarray((x != 0) | (old == 0)), pruned_by_sorting(first, 0.6), first
  )
  second = round_average(1, apply_masks(dense.params, masks), masks)
  assert_close(model.params, second, 1e-5)
  assert removed(model.params) == pytest.approx(records[1]["sparsity"], abs=0.01)
  assert [r["phase"] for r in records] == [0, 1]
