"""Equinox modules as they are, and trees with None or MaskedNode: only arrays count."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsms import (
  apply_masks,
  assert_sparse,
  erk_masks,
  filter_masks,
  greedy_soup,
  interpolate,
  lamp_masks,
  layer_sparsities,
  magnitude_masks,
  masked,
  merge_phase,
  n_m_masks,
  random_masks,
  soup_geometry,
  sparse_model_soup,
  sparsity,
  stack,
  uniform_soup,
  unstack,
)
from jaxsms.mask_trees import mask_leaves
from jaxsms.trees import Arrays

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
INPUTS = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
WEIGHTS = 4 * 8 + 8 * 4


def network(seed=0):
  """Two dense layers, with functions, a rate, a flag, a name and None among its leaves."""
  key = jax.random.key(seed)
  return {
    "mlp": eqx.nn.MLP(4, 4, 8, 1, use_final_bias=False, key=key),
    "dropout": eqx.nn.Dropout(0.5),
    "lambda": eqx.nn.Lambda(jnp.tanh),
    "name": "a network",
    "nothing": None,
    "norm": eqx.nn.LayerNorm(4),
  }


def loss(model, noise):
  hidden = jax.vmap(model["mlp"])(INPUTS + noise)
  return jnp.mean((jax.vmap(model["norm"])(model["lambda"](hidden)) - INPUTS) ** 2)


def arrays(tree):
  return [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]


def assert_rest_equal(tree, model):
  """All that is no array is the very same, in the same places."""
  assert jax.tree.structure(tree) == jax.tree.structure(model)
  for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(model), strict=True):
    assert eqx.is_array(one) == eqx.is_array(other)
    assert eqx.is_array(one) or one is other


@pytest.mark.parametrize(
  "prune",
  [
    magnitude_masks,
    pytest.param(erk_masks, marks=pytest.mark.slow),
    pytest.param(lamp_masks, marks=pytest.mark.slow),
    pytest.param(n_m_masks, marks=pytest.mark.slow),
    pytest.param(functools.partial(filter_masks, scope="uniform"), marks=pytest.mark.slow),
    lambda model, share, masks=None: random_masks(KEY, model, share, masks=masks),
  ],
)
def test_masks_are_none_where_a_leaf_is_no_array(prune):
  model = network()
  masks = prune(model, 0.5)
  assert jax.tree.structure(masks) == jax.tree.structure(eqx.filter(model, eqx.is_array))
  assert masks["lambda"].fn is None and masks["dropout"].p is None
  pruned = apply_masks(model, masks)
  assert_rest_equal(pruned, model)
  assert float(sparsity(pruned)) == 0.5
  again = prune(pruned, 0.75, masks=masks)
  assert sum(int(jnp.sum(~m)) for m in jax.tree.leaves(again)) == 0.75 * WEIGHTS
  assert list(layer_sparsities(pruned)) == ["mlp/layers/0/weight", "mlp/layers/1/weight"]


@pytest.mark.slow
def test_stacks_soups_and_distances():
  models = [network(seed) for seed in range(3)]
  stacked = stack(models)
  assert_rest_equal(stacked, models[0])
  assert all(x.shape[0] == 3 for x in arrays(stacked))
  for model, back in zip(models, unstack(stacked), strict=True):
    for a, b in zip(arrays(model), arrays(back), strict=True):
      np.testing.assert_array_equal(a, b)
  mean = [np.mean(leaves, axis=0) for leaves in zip(*map(arrays, models), strict=True)]
  soup = uniform_soup(stacked)
  assert_rest_equal(soup, models[0])
  for a, b in zip(arrays(soup), mean, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  best, taken = greedy_soup(stacked, lambda model: -float(loss(model, 0.0)))
  assert_rest_equal(best, models[0])
  assert taken[0] == np.argmin([loss(model, 0.0) for model in models])
  filtered = eqx.filter(stacked, eqx.is_array)
  assert soup_geometry(stacked) == soup_geometry(filtered)
  middle = interpolate(models[0], models[1], 0.5)
  assert_rest_equal(middle, models[0])
  bad = [
    models[0],
    jax.tree.map(lambda x: x * jnp.nan if eqx.is_array(x) else x, models[1]),
  ]
  merged, weights = merge_phase(stack([*bad, models[2]]))
  assert_rest_equal(merged, models[0])
  np.testing.assert_array_equal(weights, [0.5, 0, 0.5])


def train(model, masks, optimizer, noise, steps=3):
  state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
  for _ in range(steps):
    gradient = eqx.filter_grad(loss)(model, noise)
    updates, state = optimizer.update(gradient, state, model, masks=masks)
    model = eqx.apply_updates(model, updates)
  return model, state


@pytest.mark.parametrize("given", ["masks", "nothing"])
def test_masked_takes_the_whole_module(given):
  model = network()
  masks = magnitude_masks(model, 0.5)
  optimizer = masked(optax.adamw(0.1), masks if given == "masks" else None)
  init = optimizer.init(model)  # functions have no moments
  assert len(jax.tree.leaves(init[0].mu)) == len(arrays(model))
  after, state = train(model, masks, optimizer, 0.1)
  assert_rest_equal(after, model)
  assert_sparse(after, masks)
  for leaf, mask in zip(arrays(state[0].mu), jax.tree.leaves(masks), strict=True):
    np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(mask)], 0)
  # The same as on the arrays alone.
  params, static = eqx.partition(model, eqx.is_array)
  state = optimizer.init(params)
  for _ in range(3):
    gradient = jax.grad(lambda p: loss(eqx.combine(p, static), 0.1))(params)
    updates, state = optimizer.update(gradient, state, params, masks=masks)
    params = optax.apply_updates(params, updates)
  for a, b in zip(arrays(after), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_loop_takes_the_whole_module():
  model = network()
  optimizer = masked(optax.adam(0.05))

  def retrain(key, params, masks, ingredient):
    noise = 0.1 * jax.random.normal(jax.random.fold_in(key, ingredient["seed"]), ())
    return train(params, masks, optimizer, noise, steps=2)[0], {"noise": noise}

  seen = []
  soup = sparse_model_soup(
    KEY,
    model,
    retrain,
    ingredients={"seed": jnp.arange(2)},
    goal_sparsity=0.75,
    phases=2,
    on_phase=seen.append,
  )
  assert_rest_equal(soup.params, model)
  assert_sparse(soup.params, soup.masks)
  assert float(sparsity(soup.params)) == 0.75
  assert [record["sparsity"] for record in soup.history] == [0.5, 0.75]
  assert_rest_equal(seen[0].candidates, model)
  first, second = (arrays(copy) for copy in unstack(seen[1].candidates))
  means = arrays(soup.params)
  for a, b, mean in zip(first, second, means, strict=True):
    np.testing.assert_allclose(mean, (a + b) / 2, rtol=1e-5, atol=1e-7)
  assert any(np.any(a != b) for a, b in zip(first, second, strict=True))


def test_none_and_masked_nodes_anywhere():
  params = {"a": {"kernel": jnp.array([[1.0, 2.0]])}, "b": {"kernel": jnp.ones((1, 2))}}
  masks = magnitude_masks(params, 0.5)
  for hole in (None, optax.MaskedNode()):
    partial = {"a": params["a"], "b": hole}
    leaf_hole = {"a": params["a"], "b": {"kernel": hole}}
    for tree in (partial, leaf_hole):
      assert len(mask_leaves(tree, masks)) == 1
      pruned = apply_masks(tree, masks)
      assert jax.tree.structure(pruned) == jax.tree.structure(tree)
      np.testing.assert_array_equal(
        pruned["a"]["kernel"], masks["a"]["kernel"] * jnp.array([[1, 2]])
      )
      own = magnitude_masks(tree, 0.5)
      assert jax.tree.structure(own) == jax.tree.structure(tree)
      averaged = uniform_soup(stack([tree, tree]))
      assert jax.tree.structure(averaged) == jax.tree.structure(tree)
  # A mask that is None keeps its leaf.
  kept = apply_masks(params, {"a": {"kernel": None}, "b": masks["b"]})
  np.testing.assert_array_equal(kept["a"]["kernel"], params["a"]["kernel"])


@pytest.mark.parametrize("outer", ["masked", "multi_transform"])
def test_masked_inside_what_takes_leaves_away(outer):
  params = {"a": {"kernel": jnp.array([[1.0, 2.0]])}, "b": {"kernel": jnp.ones((1, 4))}}
  masks = magnitude_masks(params, 0.5)
  inner = masked(optax.sgd(0.1, momentum=0.9), masks)
  if outer == "masked":
    optimizer = optax.masked(inner, {"a": True, "b": False})
  else:
    kinds = {"a": "x", "b": "y"}
    optimizer = optax.multi_transform(
      {"x": inner, "y": masked(optax.adam(1.0), masks)}, kinds
    )
  params = apply_masks(params, masks)
  state = optimizer.init(params)
  for _ in range(2):
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    params = {**params, "a": optax.apply_updates(params["a"], updates["a"])}
  np.testing.assert_array_equal(params["a"]["kernel"] != 0, masks["a"]["kernel"])


def test_a_mask_for_what_is_not_there_is_refused(rejects):
  params = {"a": jnp.ones((2, 2)), "b": None, "f": jax.nn.relu}
  mask = jnp.ones((2, 2), bool)
  for masks in ({"a": mask, "c": mask}, {"b": mask}, {"a": mask, "a/d": mask}, {}):
    with rejects("params and masks have different tree structures"):
      apply_masks(params, masks)
  apply_masks(params, {"a": mask, "b": mask, "f": mask})


def test_arrays_go_through_jit_and_the_rest_stays():
  model = network()
  traces = []

  @jax.jit
  def double(wrapped):
    traces.append(1)
    return Arrays(jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, wrapped.tree))

  for seed in range(2):
    doubled = double(Arrays(network(seed))).tree
    assert_rest_equal(doubled, model)
    for a, b in zip(arrays(doubled), arrays(network(seed)), strict=True):
      np.testing.assert_array_equal(a, 2 * b)
  assert len(traces) == 1
