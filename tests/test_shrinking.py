import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsms import (
  Weighted,
  channel_groups,
  channel_masks,
  greedy_soup,
  make_mesh,
  masked,
  retraining,
  sparse_model_soup,
  taylor_scores,
)
from jaxsms.trees import path_string

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((24, 5, 5, 2)).astype(np.float32)
LABELS = RNG.integers(0, 3, 24)
KEY = jax.random.key(3)
INGREDIENTS = {"seed": jnp.arange(2), "lr": jnp.array([0.1, 0.05])}


def draw(*shape):
  return RNG.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))


PARAMS = {
  "params": {
    "conv": {"kernel": draw(3, 3, 2, 8), "bias": draw(8)},
    "norm": {"scale": 1 + draw(8) / 3, "bias": draw(8)},
    "dense": {"kernel": draw(9 * 8, 12), "bias": draw(12)},
    "out": {"kernel": draw(12, 3), "bias": draw(3)},
  },
  "batch_stats": {"mean": draw(8), "var": 1 + np.abs(draw(8))},
}


def network(params, images, train=False):
  """Logits; in training the batch statistics as well."""
  layers, statistics = params["params"], params["batch_stats"]
  x = jax.lax.conv_general_dilated(
    images, layers["conv"]["kernel"], (1, 1), "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip
  x = x + layers["conv"]["bias"]
  if train:
    statistics = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
  x = (x - statistics["mean"]) * jax.lax.rsqrt(statistics["var"] + 1e-5)
  x = jax.nn.relu(x * layers["norm"]["scale"] + layers["norm"]["bias"])
  x = x.reshape(len(x), -1) @ layers["dense"]["kernel"] + layers["dense"]["bias"]
  x = jnp.tanh(x) @ layers["out"]["kernel"] + layers["out"]["bias"]
  return (x, statistics) if train else x


def loss(layers, statistics, images):
  logits, new = network({"params": layers, "batch_stats": statistics}, images, train=True)
  return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), new


def full_loss(params):
  return loss(params["params"], params["batch_stats"], IMAGES)[0]


def train(key, params, masks, ingredient, cut=lambda fn: fn):
  """Three steps with momentum, on the full network or the cut one."""
  key = jax.random.fold_in(key, ingredient["seed"])
  optimizer = masked(optax.sgd(ingredient["lr"], momentum=0.9))

  def whole(params, images):
    return loss(params["params"], params["batch_stats"], images)

  def of_layers(layers, statistics, images):
    return cut(whole)({"params": layers, "batch_stats": statistics}, images)

  def step(carry, key):
    layers, statistics, state = carry
    images = IMAGES + 0.1 * jax.random.normal(key, IMAGES.shape)
    (value, new), gradient = jax.value_and_grad(of_layers, has_aux=True)(
      layers, statistics, images
    )
    updates, state = optimizer.update(gradient, state, layers, masks=masks["params"])
    statistics = jax.tree.map(lambda old, x: 0.9 * old + 0.1 * x, statistics, new)
    return (optax.apply_updates(layers, updates), statistics, state), value

  layers = params["params"]
  start = layers, params["batch_stats"], optimizer.init(layers)
  (layers, statistics, _), losses = jax.lax.scan(step, start, jax.random.split(key, 3))
  return {"params": layers, "batch_stats": statistics}, losses


def run(shrink=True, **options):
  options = {"goal_sparsity": 0.7, "phases": 2, "ingredients": INGREDIENTS, **options}
  if shrink:
    return sparse_model_soup(KEY, PARAMS, train, shrink=(network, IMAGES[:1]), **options)
  return sparse_model_soup(KEY, PARAMS, train, **options)


def groups():
  return channel_groups(network, PARAMS, IMAGES[:1])


def same_history(a, b):
  for one, other in zip(a, b, strict=True):
    assert one.keys() == other.keys()
    for name in ("sparsity", "pruned_fraction", "norm_drop", "relative_norm_drop"):
      assert one[name] == pytest.approx(other[name], rel=1e-4)
    np.testing.assert_allclose(one["weights"], other["weights"])
    np.testing.assert_allclose(one["retrain"], other["retrain"], rtol=1e-4)


@pytest.fixture(scope="module")
def shrunk():
  seen = []
  return run(on_phase=seen.append), seen


def test_the_same_soup_as_with_masks(shrunk, assert_trees_equal):
  soup, seen = shrunk
  masks_of_phases = []
  plain = run(
    shrink=False,
    prune=functools.partial(channel_masks, groups=groups()),
    on_phase=masks_of_phases.append,
  )
  same_history(soup.history, plain.history)
  assert_trees_equal(soup.expand(soup.params), plain.params, rtol=1e-4, atol=1e-5)
  for small, full in zip(seen, masks_of_phases, strict=True):
    expanded = small.expand(small.masks)
    for a, b in zip(jax.tree.leaves(expanded), jax.tree.leaves(full.masks), strict=True):
      np.testing.assert_array_equal(np.asarray(a, bool), b)


def test_shapes_fall_from_phase_to_phase(shrunk):
  soup, seen = shrunk
  sizes = [sum(x.size for x in jax.tree.leaves(phase.params)) for phase in seen]
  assert sum(x.size for x in jax.tree.leaves(PARAMS)) > sizes[0] > sizes[1]
  assert soup.history[0]["sparsity"] >= 1 - 0.3**0.5 - 1e-9
  assert soup.history[1]["sparsity"] >= 0.7
  for phase in seen:
    width = phase.params["params"]["conv"]["bias"].shape[0]
    assert phase.candidates["params"]["dense"]["kernel"].shape[:2] == (2, 9 * width)
    assert phase.params["batch_stats"]["var"].shape == (width,)
    assert all(np.all(mask) for mask in jax.tree.leaves(phase.masks))
    # Of the cut network, of the expanded one, and of each function that is cut.
    full = network(phase.expand(phase.params), IMAGES)
    np.testing.assert_allclose(
      phase.cut(network)(phase.params, IMAGES), full, rtol=1e-4, atol=1e-5
    )
  assert jax.tree.structure(soup.params) == jax.tree.structure(soup.masks)
  kept = {
    path_string(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(soup.params)
  }
  assert kept["params/out/kernel"][1] == 3


def test_each_phase_compiles_once():
  traces = []

  def counted(key, params, masks, ingredient, cut):
    traces.append(params["params"]["conv"]["bias"].shape)
    return train(key, params, masks, ingredient, cut)

  shrink = network, IMAGES[:1]
  options = {"goal_sparsity": 0.7, "phases": 2, "ingredients": INGREDIENTS}
  sparse_model_soup(KEY, PARAMS, counted, shrink=shrink, **options)
  assert len(traces) == 2


@pytest.mark.slow
def test_prunings_see_the_full_network(assert_trees_equal):
  def prune(params, sparsity, masks=None, groups=None):
    score = lambda params, groups: taylor_scores(full_loss, params, groups)  # noqa: E731
    return channel_masks(
      params, sparsity, groups=groups, masks=masks, score=score, budget="channels"
    )

  soup = run(prune=prune)
  plain = run(shrink=False, prune=functools.partial(prune, groups=groups()))
  assert_trees_equal(soup.expand(soup.params), plain.params, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_greedy_merge_evaluates_the_full_network(assert_trees_equal):
  merge = functools.partial(greedy_soup, evaluate=lambda params: -float(full_loss(params)))
  soup = run(merge=merge)
  plain = run(
    shrink=False, merge=merge, prune=functools.partial(channel_masks, groups=groups())
  )
  same_history(soup.history, plain.history)
  assert_trees_equal(soup.expand(soup.params), plain.params, rtol=1e-4, atol=1e-5)


def test_a_merge_that_says_its_weights():
  def first(candidates):
    return Weighted(jax.tree.map(lambda x: x[0], candidates), np.array([1.0, 0.0]))

  soup = run(merge=first, phases=1, keep_candidates=True)
  assert soup.history[0]["weights"].tolist() == [1, 0]
  for x, many in zip(
    jax.tree.leaves(soup.params), jax.tree.leaves(soup.candidates), strict=True
  ):
    np.testing.assert_array_equal(x, many[0])


def test_programs_of_single_phases_are_not_kept():
  before = retraining._hashed_retrain_program.cache_info().misses
  run(phases=1)
  assert retraining._hashed_retrain_program.cache_info().misses == before


@pytest.mark.slow
def test_on_a_mesh(shrunk, assert_trees_equal):
  soup = run(mesh=make_mesh(2))
  assert_trees_equal(soup.params, shrunk[0].params, rtol=1e-4, atol=1e-5)


def test_starts_from_a_sparse_model():
  masks = channel_masks(PARAMS, 0.4, groups=groups())
  soup = run(masks=masks, goal_sparsity=0.5, phases=1)
  assert soup.history[0]["pruned_fraction"] < 0.3
  expanded = soup.expand(soup.masks)
  for after, before in zip(jax.tree.leaves(expanded), jax.tree.leaves(masks), strict=True):
    assert not np.any(np.asarray(after, bool) & ~np.asarray(before))


def test_rejects(rejects):
  with rejects("shrink is function: give a tuple (apply, *inputs)"):
    sparse_model_soup(
      KEY, PARAMS, train, ingredients=INGREDIENTS, goal_sparsity=0.5, phases=1,
      shrink=network,
    )  # fmt: skip
  with rejects("retrain takes (key, params, masks, ingredient): with shrink it is called"):
    sparse_model_soup(
      KEY, PARAMS, lambda key, params, masks, ingredient: params, ingredients=INGREDIENTS,
      goal_sparsity=0.5, phases=1, shrink=(network, IMAGES[:1]),
    )  # fmt: skip
  calls = []

  def never(*args):
    calls.append(1)

  for shrink in (None, (network, IMAGES[:1])):
    with rejects("would empty a group of channels"):
      sparse_model_soup(
        KEY, PARAMS, never, ingredients=INGREDIENTS, goal_sparsity=0.999, phases=3,
        prune=functools.partial(channel_masks, groups=groups()), shrink=shrink,
      )  # fmt: skip
  assert not calls
