"""The one loop: the engine and a caller's own function through it; what a soup gains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import own_batches, own_images, own_optimizer
from engine import run_phases
from sklearn.datasets import load_digits
from test_training import BATCH, Tiny, ingredients, make_data, make_programs

import jaxsms
from jaxsms import Phase, magnitude_masks, training
from jaxsms.phases import prune_phase
from jaxsms.sms import phase_sparsities, soup_phases
from jaxsms.training import Model, Splits

STEPS, RATE, DECAY = 7, 0.1, 1e-3
KEY = jax.random.key(5)


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  pass


def own_retraining(data):
  """What the engine does with one copy, written out with Flax and optax alone."""
  images = own_images(data.images)
  optimizer = own_optimizer(RATE, DECAY)

  def loss(params, batch_stats, batch):
    logits, updated = Tiny().apply(
      {"params": params, "batch_stats": batch_stats}, images[batch], train=True,
      mutable=["batch_stats"],
    )  # fmt: skip
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), data.labels[batch, None], 1)
    return -picked.mean(), updated["batch_stats"]

  def retrain(key, model, masks, ingredient):
    key = jax.random.fold_in(key, ingredient["seed"])
    (params, batch_stats), masks = model, masks.params
    state = optimizer.init(params)
    for batch in own_batches(key, len(data.labels), BATCH, STEPS):
      grads, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats, batch)
      updates, state = optimizer.update(grads, state, params)
      params = jax.tree.map(lambda p, u, m: (p + u) * m, params, updates, masks)
    return Model(params, batch_stats)

  return retrain


def test_the_engine_and_an_own_function_give_equal_soups():
  data = make_data(23)
  dense = Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))
  seeds = ingredients([0, 1, 2], STEPS, DECAY)
  engine = run_phases(
    make_programs(augmentation="none"), Splits(data, make_data(7, 1), make_data(9, 2)),
    KEY, dense, lambda record: (seeds, np.full((3, STEPS), RATE, np.float32)),
    goal_sparsity=0.75, phases=2,
  )  # fmt: skip
  own = jaxsms.sparse_model_soup(
    KEY, dense, own_retraining(data), ingredients={"seed": jnp.arange(3)},
    goal_sparsity=0.75, phases=2,
  )  # fmt: skip
  for a, b in zip(
    jax.tree.leaves(own.params.params), jax.tree.leaves(engine.model.params), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-5)
  for a, b in zip(
    jax.tree.leaves(own.masks.params), jax.tree.leaves(engine.masks), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(own.history, engine.records, strict=True):
    assert a["sparsity"] == b["sparsity"]
    assert a["relative_norm_drop"] == pytest.approx(b["relative_norm_drop"], rel=1e-4)


def test_the_loop_passes_on_what_it_is_told_and_goes_on_after_a_break():
  """Numbers in the place of models: prune halves, retraining adds, merging sums."""

  def prune(x, masks, sparsity):
    return x / 2, (masks or 0) + sparsity, {"sparsity": sparsity}

  def retrain(key, x, masks, record):
    yield f"training in {record['phase']}"
    return [x + 1, x + 2], {"report": record["sparsity"]}

  def merge(key, candidates, record):
    return sum(candidates), {"weights": [1, 1]}

  loop = functools.partial(
    soup_phases, jax.random.key(0), prune=prune, retrain=retrain, merge=merge
  )
  events = list(loop(4.0, {1: 0.5, 2: 0.75}))
  # 4 -> 2 -> 3 + 4 = 7 -> 3.5 -> 4.5 + 5.5 = 10
  record = {"phase": 1, "sparsity": 0.5, "weights": [1, 1], "report": 0.5}
  first = Phase(7.0, 0.5, [3.0, 4.0], record)
  record = {"phase": 2, "sparsity": 0.75, "weights": [1, 1], "report": 0.75}
  second = Phase(10.0, 1.25, [4.5, 5.5], record)
  assert events == ["training in 1", first, "training in 2", second]
  assert list(loop(7.0, {2: 0.75}, masks=0.5)) == events[2:]


def test_each_phase_has_its_own_key():
  seen = []

  def retrain(key, x, masks, record):
    seen.append(jax.random.key_data(key).tolist())
    return [x], {}
    yield

  merge = lambda key, candidates, record: (candidates[0], {})  # noqa: E731
  prune = lambda x, masks, sparsity: (x, masks, {})  # noqa: E731
  list(soup_phases(KEY, 0, {1: 0.1, 3: 0.2}, prune=prune, retrain=retrain, merge=merge))
  assert seen == [
    jax.random.key_data(jax.random.fold_in(KEY, phase)).tolist() for phase in (1, 3)
  ]


def test_sparsities_by_phase():
  assert phase_sparsities(0.875, 3) == pytest.approx({1: 0.5, 2: 0.75, 3: 0.875})
  assert phase_sparsities(0.875, 3, done=2) == pytest.approx({3: 0.875})
  assert phase_sparsities(0.875, 3, done=3) == {}


def test_pruning_in_the_loop_is_that_of_its_parts():
  params = {"Dense_0": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4)}}
  pruned, _, record = prune_phase(params, None, 0.5, magnitude_masks)
  expected = np.where(np.arange(1, 13) > 6, np.arange(1.0, 13.0), 0).reshape(3, 4)
  np.testing.assert_array_equal(pruned["Dense_0"]["kernel"], expected)
  assert record["sparsity"] == 0.5


@pytest.fixture(scope="module")
def soup_of_digits():
  """Three seeds of an MLP on noisy digits, 80 % of its weights removed in one phase."""
  digits = load_digits()
  x, y = digits.images.reshape(-1, 64) / 8 - 1, digits.target
  order = np.random.default_rng(0).permutation(len(x))
  (train_x, test_x), (train_y, test_y) = (
    (jnp.asarray(v[order[:1200]]), jnp.asarray(v[order[1200:]])) for v in (x, y)
  )

  def logits(params, x):
    return jnp.maximum(x @ params["a"]["kernel"], 0) @ params["b"]["kernel"]

  def accuracy(params):
    return float((logits(params, test_x).argmax(1) == test_y).mean())

  def train(key, params, masks, steps, last_rate):
    rates = optax.linear_schedule(0.1, last_rate, steps)
    optimizer = jaxsms.masked(optax.sgd(rates, 0.9))

    def step(carry, key):
      params, state = carry
      of_batch, of_noise = jax.random.split(key)
      batch = jax.random.randint(of_batch, [20], 0, 1200)
      noisy = train_x[batch] + jax.random.normal(of_noise, (20, 64))

      def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(
          logits(params, noisy), train_y[batch]
        ).mean()

      grads = jax.grad(loss)(params)
      updates, state = optimizer.update(grads, state, params, masks=masks)
      return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

  def retrain(key, params, masks, ingredient):
    return train(jax.random.fold_in(key, ingredient["seed"]), params, masks, 120, 0.05)

  gains, worst, shares = [], [], []
  make = jax.jit(lambda key, params, masks: train(key, params, masks, 1200, 0.0))
  for seed in range(3):
    key = jax.random.key(seed)
    keys = jax.random.split(key)
    params = {
      "a": {"kernel": 0.2 * jax.random.normal(keys[0], (64, 128))},
      "b": {"kernel": 0.1 * jax.random.normal(keys[1], (128, 10))},
    }
    ones = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    dense = make(key, params, ones)
    kept = []
    soup = jaxsms.sparse_model_soup(
      key, dense, retrain, ingredients={"seed": jnp.arange(5)}, goal_sparsity=0.8,
      phases=1, on_phase=kept.append,
    )  # fmt: skip
    candidates = [accuracy(c) for c in jaxsms.unstack(kept[0].candidates)]
    gains.append(accuracy(soup.params) - np.mean(candidates))
    worst.append(accuracy(soup.params) - min(candidates))
    removed = [np.asarray(~mask) for mask in jax.tree.leaves(soup.masks)]
    shares.append(sum(mask.sum() for mask in removed) / sum(m.size for m in removed))
    for model in (soup.params, *jaxsms.unstack(kept[0].candidates)):
      for leaf, mask in zip(jax.tree.leaves(model), removed, strict=True):
        assert not np.asarray(leaf)[mask].any()
  return gains, worst, shares


def test_a_soup_is_better_than_its_candidates(soup_of_digits):
  """Of models that are sparse: where nothing is pruned they are better anyway."""
  gains, worst, shares = soup_of_digits
  np.testing.assert_allclose(shares, 0.8, atol=1e-3)
  assert np.mean(gains) > 0.008
  assert min(worst) > 0
