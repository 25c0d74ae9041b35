import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies
from x64 import enable_x64

from jaxsms import (
  apply_masks,
  assert_sparse,
  magnitude_masks,
  masked,
  sparsity,
  stack,
  unstack,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.standard_normal((16, 6)), jnp.float32)
TARGETS = jnp.asarray(RNG.standard_normal((16, 3)), jnp.float32)
# No other tensor of any optimizer state has one of the kernels' shapes by chance.
PARAMS = {
  "first": {
    "kernel": jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32),
    "bias": jnp.asarray(RNG.standard_normal(5), jnp.float32),
  },
  "second": {"kernel": jnp.asarray(RNG.standard_normal((5, 3)), jnp.float32)},
}
MASKS = magnitude_masks(PARAMS, 0.6)


def loss(params):
  hidden = jnp.tanh(INPUTS @ params["first"]["kernel"] + params["first"]["bias"])
  return jnp.mean((hidden @ params["second"]["kernel"] - TARGETS) ** 2)


def sgd(**options):
  return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, **options))


DECAY_MASK = jax.tree.map(lambda x: x.ndim > 1, PARAMS)
KINDS = {"first": "a", "second": "b"}
OPTIMIZERS = {
  "momentum": sgd(momentum=0.9),
  "nesterov": sgd(momentum=0.9, nesterov=True),
  "adamw": optax.adamw(0.05, weight_decay=0.3),
  "lion": optax.lion(0.01, weight_decay=0.3),
  "muon": optax.contrib.muon(0.05, weight_decay=0.1),
  "sm3": optax.sm3(0.1),
  "lbfgs": optax.lbfgs(memory_size=3),
  "adafactor": optax.adafactor(0.05, weight_decay_rate=0.1),
  "multi_transform": optax.multi_transform(
    {"a": optax.adamw(0.05, weight_decay=0.2), "b": sgd(momentum=0.9)}, KINDS
  ),
  "nested_masked": optax.chain(
    optax.masked(optax.masked(optax.trace(0.9), DECAY_MASK), DECAY_MASK),
    optax.masked(optax.add_decayed_weights(0.1), DECAY_MASK),
    optax.scale(-0.05),
  ),
  "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.trace(0.9), optax.scale(-0.05)),
  "accumulated": optax.MultiSteps(optax.adamw(0.05), 2).gradient_transformation(),
  "schedule_free": optax.contrib.schedule_free_sgd(0.05),
}


def train(optimizer, params, masks, with_update=False, steps=5):
  """Parameters and state after some steps; `masks` go with each update if so asked."""
  state = optimizer.init(params)

  def step(carry, _):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params)
    extra = {"masks": masks} if with_update else {}
    updates, state = optimizer.update(
      gradient, state, params, value=value, grad=gradient, value_fn=loss, **extra
    )
    return (optax.apply_updates(params, updates), state), None

  (params, state), _ = jax.lax.scan(step, (params, state), None, steps)
  return params, state


def removed_entries(tree, masks):
  """What the leaves of a kernel's shape hold where that kernel is removed."""
  by_shape = {m.shape: np.asarray(m) for m in jax.tree.leaves(masks) if m.ndim == 2}
  leaves = [x for x in jax.tree.leaves(tree) if jnp.shape(x) in by_shape]
  return [np.asarray(x)[~by_shape[x.shape]] for x in leaves]


WITH_CONSTRUCTION = ("momentum", "nesterov", "adamw", "lion", "multi_transform")
QUICK = ("momentum", "adamw", "muon", "multi_transform", "nested_masked", "schedule_free")


@pytest.mark.parametrize(
  ("name", "with_update"),
  [
    pytest.param(name, True, marks=() if name in QUICK else pytest.mark.slow)
    for name in OPTIMIZERS
  ]
  + [
    pytest.param(name, False, marks=() if name == "momentum" else pytest.mark.slow)
    for name in WITH_CONSTRUCTION
  ],
)
def test_removed_entries_stay_exactly_zero(name, with_update):
  optimizer = masked(OPTIMIZERS[name], None if with_update else MASKS)
  run = jax.jit(lambda p, m: train(optimizer, p, m, with_update))
  params, state = run(PARAMS, MASKS)
  for mask, leaf in zip(jax.tree.leaves(MASKS), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(mask)], 0)
    assert np.all(np.isfinite(leaf))
  kept = params["first"]["kernel"][MASKS["first"]["kernel"]]
  before = PARAMS["first"]["kernel"][MASKS["first"]["kernel"]]
  assert np.any(kept != before), "training moved nothing"
  states = removed_entries(state, MASKS)
  expected = {"momentum": 2, "nesterov": 2, "adamw": 4, "lion": 2, "multi_transform": 3}
  assert len(states) >= expected.get(name, 0)
  for entries in states:
    np.testing.assert_array_equal(entries, 0)


@pytest.fixture(scope="module", params=["momentum", "nesterov", "adamw", "lion"])
def train_n_steps(request):
  """Compiled once for each optimizer: parameters and state after n steps, n traced."""
  optimizer = masked(OPTIMIZERS[request.param])

  @jax.jit
  def run(params, masks, n):
    def step(_, carry):
      params, state = carry
      gradient = jax.grad(loss)(params)
      updates, state = optimizer.update(gradient, state, params, masks=masks)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, n, step, (params, optimizer.init(params)))

  return run


@hypothesis.given(
  seed=strategies.integers(0, 2**31),
  share=strategies.floats(0, 1),
  n=strategies.integers(1, 40),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_removed_entries_stay_zero_after_any_number_of_steps(train_n_steps, seed, share, n):
  rng = np.random.default_rng(seed)
  masks = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape) >= share), PARAMS)
  params, state = train_n_steps(PARAMS, masks, n)
  for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(mask)], 0)
  states = removed_entries(state, masks)
  assert len(states) >= 2
  for entries in states:
    np.testing.assert_array_equal(entries, 0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_kept_entries_train_as_the_sparse_model_would(nesterov):
  # SGD with L2 decay and momentum by hand, in float64, on the masked model alone.
  rate, decay, momentum = 0.05, 0.1, 0.9
  optimizer = masked(sgd(momentum=momentum, nesterov=nesterov), MASKS)
  params, state = jax.jit(lambda p: train(optimizer, p, MASKS, steps=4))(PARAMS)
  kernel_mask = np.asarray(MASKS["first"]["kernel"])
  v = np.where(MASKS["second"]["kernel"], PARAMS["second"]["kernel"], 0).astype(float)
  u = np.where(kernel_mask, PARAMS["first"]["kernel"], 0).astype(float)
  b = np.asarray(PARAMS["first"]["bias"], float)
  x, y = np.asarray(INPUTS, float), np.asarray(TARGETS, float)
  weights = [u, b, v]
  kept = [kernel_mask, np.ones(5), np.asarray(MASKS["second"]["kernel"])]
  buffers = [np.zeros_like(w) for w in weights]
  for step in range(4):
    # The first gradient is that of the model as given, before it is masked.
    u0, b0, v0 = weights
    if step == 0:
      u0, v0 = (np.asarray(PARAMS[k]["kernel"], float) for k in ("first", "second"))
    hidden = np.tanh(x @ u0 + b0)
    error = 2 * (hidden @ v0 - y) / y.size
    inner = (error @ v0.T) * (1 - hidden**2)
    gradients = [x.T @ inner, inner.sum(0), hidden.T @ error]
    for i, gradient in enumerate(gradients):
      gradient = (gradient + decay * weights[i]) * kept[i]
      buffers[i] = momentum * buffers[i] + gradient
      change = gradient + momentum * buffers[i] if nesterov else buffers[i]
      weights[i] = weights[i] - rate * change
  np.testing.assert_allclose(params["first"]["kernel"], weights[0], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(params["first"]["bias"], weights[1], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(params["second"]["kernel"], weights[2], rtol=1e-4, atol=1e-6)
  trace = optax.tree_utils.tree_get(state, "trace")
  np.testing.assert_allclose(trace["first"]["kernel"], buffers[0], rtol=1e-4, atol=1e-6)


def make_step(optimizer, traces=None):
  def step(params, state, masks):
    if traces is not None:
      traces.append(1)
    gradient = jax.grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params, masks=masks)
    return optax.apply_updates(params, updates), state

  return step


def test_masks_of_update_win_and_may_change_without_a_new_program():
  traces = []
  optimizer = masked(optax.adamw(0.05), jax.tree.map(jnp.ones_like, MASKS))
  step = jax.jit(make_step(optimizer, traces))
  state = optimizer.init(PARAMS)
  masks, params = MASKS, PARAMS
  for share in (0.6, 0.8, 0.9):
    masks = magnitude_masks(params, share, masks=masks)
    params, state = step(params, state, masks)
    params, state = step(params, state, masks)
    for entries in removed_entries([params, state], masks):
      np.testing.assert_array_equal(entries, 0)
  assert len(traces) == 1


def test_masks_as_an_argument_are_no_constants_of_the_program():
  params = {"kernel": jnp.ones((64, 48))}
  masks = {"kernel": jnp.asarray(RNG.random((64, 48)) > 0.5)}
  optimizer = masked(optax.adamw(0.1))

  def step(params, state, masks):
    updates, state = optimizer.update(params, state, params, masks=masks)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  assert all(np.size(c) < 64 for c in jax.make_jaxpr(step)(params, state, masks).consts)
  text = jax.jit(step).lower(params, state, masks).as_text()
  dense = re.findall(r'dense<"0x[^>]*> : tensor<64x48x', text)
  assert not dense


def test_vmap_over_copies_with_a_shared_mask(assert_trees_equal):
  optimizer = masked(optax.adamw(0.05, weight_decay=0.1))
  step = make_step(optimizer)
  copies = [jax.tree.map(lambda x, i=i: x + 0.1 * i, PARAMS) for i in range(3)]
  states = [optimizer.init(p) for p in copies]
  together = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(
    stack(copies), stack(states), MASKS
  )
  one = jax.jit(step)
  for i, both in enumerate(unstack(together)):
    alone = one(copies[i], states[i], MASKS)
    assert_trees_equal(both, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_and_numpy_leaves(dtype):
  params = {"kernel": np.ones((3, 2), dtype)}
  masks = {"kernel": np.array([[True, False]] * 3)}
  optimizer = masked(sgd(momentum=0.9, nesterov=True), masks)
  state = optimizer.init(params)
  for _ in range(2):
    updates, state = optimizer.update(params, state, params)
    assert updates["kernel"].dtype == dtype
    params = optax.apply_updates(params, updates)
  assert params["kernel"].dtype == dtype
  np.testing.assert_array_equal(params["kernel"] != 0, masks["kernel"])


def test_float64():
  with enable_x64():
    params = {"kernel": np.full((2, 2), 1 + 1e-12)}
    masks = {"kernel": np.eye(2, dtype=bool)}
    optimizer = masked(optax.sgd(0.5, momentum=0.9), masks)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert {x.dtype for x in jax.tree.leaves((updates, state))} == {np.dtype(np.float64)}
    after = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(after["kernel"], params["kernel"] / 2 * np.eye(2))


def test_a_bare_array_a_list_and_equal_names():
  # Paths "w" and "a/w" both end in "w": the longer one has to be found first.
  mask = {"w": np.array([True, False, False]), "a": {"w": np.array([False, True, True])}}
  ones = jax.tree.map(lambda m: jnp.ones(m.shape), mask)
  for params, masks in (
    (ones, mask),
    ([ones["w"], ones["w"]], [mask["w"], mask["a"]["w"]]),
    (ones["w"], mask["w"]),
  ):
    optimizer = masked(optax.adam(0.1), masks)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    moments = state[0].mu, state[0].nu
    for tree in (after, *moments):
      leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True)
      for leaf, kept in leaves:
        np.testing.assert_array_equal(leaf != 0, kept)


def test_removed_gradients_do_not_count_in_a_global_norm():
  params, gradient = {"kernel": jnp.zeros((2, 2))}, np.array([[3.0, 1000], [4, 1000]])
  masks = {"kernel": np.array([[True, False]] * 2)}
  clipped = masked(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), masks)
  updates, _ = clipped.update({"kernel": gradient}, clipped.init(params), params)
  np.testing.assert_allclose(updates["kernel"], [[-0.6, 0], [-0.8, 0]], rtol=1e-6)


def test_composes_inside_a_chain():
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), masked(optax.adamw(0.1)))
  step = jax.jit(make_step(optimizer))
  for entries in removed_entries(step(PARAMS, optimizer.init(PARAMS), MASKS), MASKS):
    np.testing.assert_array_equal(entries, 0)


# What comes after `masked` in a chain has the last word.

ADAM = optax.scale_by_adam()
AFTER = {
  "scale": (ADAM, optax.scale(-1e-2)),
  "decay": (optax.chain(ADAM, optax.scale(-1e-2)), optax.add_decayed_weights(-1e-3)),
  "schedule": (ADAM, optax.scale_by_learning_rate(lambda step: 0.1 / (1 + step))),
  "clip": (ADAM, optax.chain(optax.clip_by_global_norm(1.0), optax.scale(-0.1))),
  "sign": (ADAM, optax.chain(optax.scale_by_sign(), optax.scale(-0.1))),
  "momentum": (optax.identity(), optax.sgd(0.1, momentum=0.9, nesterov=True)),
}


@pytest.mark.parametrize("jitted", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", AFTER)
def test_pruned_parameters_stay_sparse_in_any_place_of_a_chain(name, jitted, caplog):
  inner, after = AFTER[name]
  optimizer = optax.chain(masked(inner, MASKS), after)
  params = apply_masks(PARAMS, MASKS)
  expected = float(sparsity(params))
  state = optimizer.init(params)
  step = make_chain_step(optimizer)
  step = jax.jit(step) if jitted else step
  for _ in range(3):
    params, state = step(params, state)
    assert_sparse(params, MASKS)
  assert float(sparsity(params)) == expected
  assert np.all(np.isfinite(params["second"]["kernel"]))
  assert not caplog.records


def make_chain_step(optimizer):
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  return step


def test_dense_parameters_inside_a_chain_are_warned_of(caplog):
  optimizer = optax.chain(masked(ADAM, MASKS), optax.scale(-1e-2))
  state = optimizer.init(PARAMS)
  (record,) = caplog.records
  assert "prune first with jaxsms.apply_masks(params, masks)" in record.message
  params, _ = jax.jit(make_chain_step(optimizer))(PARAMS, state)
  with pytest.raises(AssertionError, match=r"keep jaxsms\.masked outermost"):
    assert_sparse(params, MASKS)
  # Outermost it is right, whatever is inside.
  outermost = masked(optax.chain(ADAM, optax.scale(-1e-2)), MASKS)
  params, _ = jax.jit(make_chain_step(outermost))(PARAMS, outermost.init(PARAMS))
  assert_sparse(params, MASKS)


@pytest.mark.parametrize(
  "after",
  [optax.add_noise(0.1, 0.5, 0), optax.scale(-1e-2), optax.add_decayed_weights(0.1)],
)
def test_removed_entries_that_come_back_are_warned_of(after, caplog):
  start = apply_masks(PARAMS, MASKS) if "noise" in repr(after.init) else PARAMS
  optimizer = optax.chain(masked(ADAM), after)
  params, state = start, optimizer.init(start)
  for _ in range(4):
    updates, state = optimizer.update(params, state, params, masks=MASKS)
    params = optax.apply_updates(params, updates)
  (record,) = caplog.records
  assert "make it outermost, masked(optax.chain(...), masks)" in record.message


def test_masks_made_anew_are_no_reason_to_warn(caplog):
  optimizer = masked(optax.adam(0.01))
  params, state, masks = PARAMS, optimizer.init(PARAMS), None
  for share in (0.2, 0.2, 0.5, 0.5, 0.8):
    masks = magnitude_masks(params, share, masks=masks)
    for _ in range(2):
      updates, state = optimizer.update(params, state, params, masks=masks)
      params = optax.apply_updates(params, updates)
    assert_sparse(params, masks)
  assert not caplog.records


def test_assert_sparse():
  params = {"a": {"kernel": jnp.array([[0.0, 2.0]])}, "b": jnp.array([1.0, -0.0])}
  masks = {"a": {"kernel": np.array([[False, True]])}, "b": np.array([True, False])}
  assert_sparse(params, masks)
  assert_sparse(stack([params, params]), masks)
  assert_sparse(params, {**masks, "b": None})
  wrong = {"a": {"kernel": np.array([[False, False]])}, "b": np.array([False, False])}
  with pytest.raises(AssertionError, match=r"not 0: 1 of a/kernel, 1 of b; keep"):
    assert_sparse(params, wrong)
  with pytest.raises(AssertionError, match="2 of a/kernel, 2 of b"):
    assert_sparse(stack([params, params]), wrong)
  with pytest.raises(AssertionError, match="1 of b"):
    assert_sparse({**params, "b": jnp.array([1.0, jnp.nan])}, masks)


def test_assert_sparse_is_for_outside_of_jit(rejects):
  masks = np.array([True, False])
  with rejects("assert_sparse got traced values: call it outside of jit"):
    jax.jit(lambda x: assert_sparse(x, masks))(jnp.zeros(2))
  jax.jit(lambda x: (assert_sparse(np.zeros(2), masks), x)[1])(jnp.zeros(2))


def test_rejects(rejects):
  optimizer = masked(optax.sgd(0.1))
  state = optimizer.init(PARAMS)
  with rejects("masked() got no masks: pass them to masked(...) or to update"):
    optimizer.update(PARAMS, state, PARAMS)
  with rejects("masked() needs params"):
    optimizer.update(PARAMS, state, masks=MASKS)
  with rejects("params and masks have different tree structures"):
    optimizer.update(PARAMS, state, PARAMS, masks={"first": True})
  with rejects("updates and params have different tree structures"):
    optimizer.update({"first": PARAMS["first"]}, state, PARAMS, masks=MASKS)
  with rejects("params and masks have different tree structures"):
    masked(optax.sgd(0.1), {"first": True}).init(PARAMS)
