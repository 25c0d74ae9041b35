"""A schedule of sparsity inside an optimizer, against a loop by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsms import (
  apply_masks,
  assert_sparse,
  filter_masks,
  lamp_masks,
  magnitude_masks,
  masked,
  pruned,
  sparsity,
  stack,
  unstack,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
PARAMS = {
  "first": {
    "kernel": jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32),
    "bias": jnp.asarray(RNG.standard_normal(5), jnp.float32),
  },
  "second": {"kernel": jnp.asarray(RNG.standard_normal((5, 4)), jnp.float32)},
}
N = 50
INPUTS = jnp.asarray(RNG.standard_normal((16, 6)), jnp.float32)
# From step 2 to step 10; 0.5 of the way at step 6, so 0.8 * (1 - 1/8) = 0.7.
CUBIC = optax.polynomial_schedule(0.0, 0.8, 3, transition_steps=8, transition_begin=2)
ADAM = optax.adamw(0.05, weight_decay=0.1)


def loss(params):
  hidden = jnp.tanh(INPUTS @ params["first"]["kernel"] + params["first"]["bias"])
  return jnp.mean((hidden @ params["second"]["kernel"] - 1) ** 2)


def step_of(optimizer):
  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (sparsity(params), optax.tree_utils.tree_get(state, "masks"))

  return step


def run(optimizer, params, steps=14):
  return jax.lax.scan(step_of(optimizer), (params, optimizer.init(params)), None, steps)


def shares(every, steps=14):
  """What is to be removed after each step, worked out on the host."""
  found = []
  for step in range(steps):
    at = step - step % every
    progress = min(max(at - 2, 0) / 8, 1)
    found.append(round(0.8 * (1 - (1 - progress) ** 3) * N) / N)
  return found


@pytest.mark.parametrize("every", [1, 3])
def test_as_a_loop_by_hand(every, assert_trees_equal):
  (params, state), (found, _) = jax.jit(functools.partial(run, pruned(ADAM, CUBIC, every)))(
    PARAMS
  )
  np.testing.assert_allclose(found, shares(every), atol=1e-6)

  optimizer = masked(ADAM)
  by_hand, inner, masks = PARAMS, optimizer.init(PARAMS), None

  @jax.jit
  def step(params, inner, masks):
    grads = jax.grad(loss)(params)
    updates, inner = optimizer.update(grads, inner, params, masks=masks)
    return optax.apply_updates(params, updates), inner

  for number in range(14):
    if number % every == 0:
      masks = magnitude_masks(by_hand, float(CUBIC(number)), masks=masks)
    by_hand, inner = step(by_hand, inner, masks)
  assert_trees_equal(params, by_hand, rtol=1e-5, atol=1e-6)
  assert_trees_equal(state.inner, inner, rtol=1e-5, atol=1e-6)
  assert_trees_equal(state.masks, masks)
  assert int(state.count) == 14


def test_what_is_removed_stays_removed():
  _, (_, masks) = jax.jit(functools.partial(run, pruned(ADAM, CUBIC, 2)))(PARAMS)
  for leaf in jax.tree.leaves(masks):
    leaf = np.asarray(leaf)
    assert not np.any(leaf[1:] & ~leaf[:-1])


@pytest.mark.slow
def test_copies_under_vmap(assert_trees_equal):
  copies = [jax.tree.map(lambda x, i=i: x * (1 + i), PARAMS) for i in range(3)]
  alone = jax.jit(functools.partial(run, pruned(ADAM, CUBIC, 4)))
  together = jax.jit(jax.vmap(functools.partial(run, pruned(ADAM, CUBIC, 4))))
  (params, state), _ = together(stack(copies))
  for copy, p, masks in zip(copies, unstack(params), unstack(state.masks), strict=True):
    (expected, own), _ = alone(copy)
    assert_trees_equal(masks, own.masks)
    assert_trees_equal(p, expected, rtol=1e-4, atol=1e-5)
    assert_sparse(p, masks)


def test_in_a_chain_and_without_jit():
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), pruned(ADAM, lambda step: 0.5))
  params, state = PARAMS, optimizer.init(PARAMS)
  for _ in range(2):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
  assert float(sparsity(params)) == 0.5
  assert_sparse(params, optax.tree_utils.tree_get(state, "masks"))


@pytest.mark.slow
def test_other_criteria_and_other_choices_of_weights():
  whole = functools.partial(filter_masks, scope="uniform")
  only_first = lambda path, leaf: path[0].key == "first" and leaf.ndim == 2  # noqa: E731
  shares = (0.4, (2 * 6 + 2 * 5) / N, 0.4)  # whole filters: two of five and two of four
  choices = ((lamp_masks, None), (whole, None), (magnitude_masks, only_first))
  for (prune, prunable), share in zip(choices, shares, strict=True):
    optimizer = pruned(optax.sgd(0.1), lambda step: 0.4, 2, prune, prunable)
    (params, state), _ = jax.jit(functools.partial(run, optimizer, steps=3))(PARAMS)
    assert_sparse(params, state.masks)
    found = float(sparsity(params, prunable))
    assert found == pytest.approx(share, abs=1e-6)
    if prunable is not None:
      assert np.all(params["second"]["kernel"] != 0)


def test_nnx_optimizer():
  model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, pruned(optax.adamw(0.01), CUBIC, 2), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))) ** 2))(model)
    optimizer.update(model, grads)

  for _ in range(13):
    step(model, optimizer)
  assert int(jnp.sum(model.kernel[...] == 0)) == round(0.8 * 24)


def test_leaves_that_are_no_arrays():
  params = {"kernel": jnp.arange(1.0, 9).reshape(2, 4), "activation": None}
  optimizer = pruned(optax.sgd(0.1), lambda step: 0.25)
  state = optimizer.init(params)
  updates, state = jax.jit(optimizer.update)(params, state, params)
  after = optax.apply_updates(params, updates)
  assert int(jnp.sum(after["kernel"] == 0)) == 2


def test_a_model_that_is_sparse_already_stays_as_sparse():
  start = apply_masks(PARAMS, magnitude_masks(PARAMS, 0.5))
  _, (found, _) = jax.jit(functools.partial(run, pruned(ADAM, lambda step: 0.5), steps=3))(
    start
  )
  np.testing.assert_array_equal(found, 0.5)


def test_rejects(rejects):
  with rejects("schedule is 0.9: give a function of the step"):
    pruned(optax.sgd(0.1), 0.9)
  with rejects("every is 0: new masks come at least 1 step apart"):
    pruned(optax.sgd(0.1), CUBIC, 0)
  with rejects("the schedule's sparsity at step 0 is 1"):
    pruned(optax.sgd(0.1), lambda step: 1.0).init(PARAMS)
  with rejects("masked() got float, not an optax transformation"):
    pruned(0.1, CUBIC)
  optimizer = pruned(optax.sgd(0.1), CUBIC)
  with rejects("pruned() needs params"):
    optimizer.update(PARAMS, optimizer.init(PARAMS))
  with rejects("pruned() makes its own masks"):
    masks = magnitude_masks(PARAMS, 0.5)
    optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, masks=masks)
