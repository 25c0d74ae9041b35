"""Batch statistics of a caller's own network, as the mean over batches."""

import functools

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsms import recalibrate, stack, unstack

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
# Seven batches of six examples, with means far from 0.
BATCHES = (RNG.standard_normal((7, 6, 4)) * [1, 2, 3, 4] + [0, 1, -5, 10]).astype("f4")
KEY = jax.random.key(0)


def expected(kernel, batches=BATCHES):
  """The mean over batches of mean and variance after a dense layer, in float64."""
  x = np.asarray(batches, float) @ np.asarray(kernel, float)
  return x.mean(1).mean(0), x.var(1).mean(0)


class Linen(nn.Module):
  momentum: float = 0.99

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(not train, momentum=self.momentum)(nn.Dense(3, use_bias=False)(x))
    return nn.Dropout(0.5, deterministic=not train)(x)


def linen_update(module, params, stats, batch):
  x, key = batch
  _, new = module.apply(
    {"params": params, "batch_stats": stats},
    x,
    train=True,
    rngs={"dropout": key},
    mutable=["batch_stats"],
  )
  return new["batch_stats"]


def linen_model(momentum=0.99, seed=0):
  module = Linen(momentum)
  variables = module.init(jax.random.key(seed), BATCHES[0])
  return module, variables["params"], variables["batch_stats"]


WITH_KEYS = (BATCHES, jax.random.split(KEY, len(BATCHES)))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.997])
def test_linen_with_any_momentum(momentum):
  module, params, stats = linen_model(momentum)
  stats = jax.tree.map(lambda x: x + 3, stats)  # the old values do not matter
  update = functools.partial(linen_update, module, params)
  new = recalibrate(update, stats, WITH_KEYS)
  mean, var = expected(params["Dense_0"]["kernel"])
  np.testing.assert_allclose(new["BatchNorm_0"]["mean"], mean, rtol=2e-5, atol=1e-4)
  np.testing.assert_allclose(new["BatchNorm_0"]["var"], var, rtol=1e-3)


def test_candidates_under_vmap_and_jit(assert_trees_equal):
  models = [linen_model(seed=seed) for seed in range(3)]
  module = models[0][0]
  stats = stack([model[2] for model in models])

  @jax.jit
  @jax.vmap
  def together(params, stats):
    return recalibrate(functools.partial(linen_update, module, params), stats, WITH_KEYS)

  for new, (_, params, _) in zip(
    unstack(together(stack([m[1] for m in models]), stats)), models, strict=True
  ):
    mean, var = expected(params["Dense_0"]["kernel"])
    np.testing.assert_allclose(new["BatchNorm_0"]["mean"], mean, rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(new["BatchNorm_0"]["var"], var, rtol=1e-3)


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.5)

  def __call__(self, x, rngs):
    return self.dropout(self.norm(self.dense(x)), rngs=rngs)


def test_nnx():
  graph, params, stats = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

  def update(stats, batch):
    x, key = batch
    model = nnx.merge(graph, params, stats)
    model.train()
    model(x, nnx.Rngs(dropout=key))
    return nnx.state(model, nnx.BatchStat)

  new = recalibrate(update, stats, WITH_KEYS)
  mean, var = expected(params["dense"]["kernel"][...])
  np.testing.assert_allclose(new["norm"]["mean"][...], mean, rtol=2e-5, atol=1e-4)
  np.testing.assert_allclose(new["norm"]["var"][...], var, rtol=1e-3)


def test_haiku_with_decay_rate_0():
  net = hk.transform_with_state(
    lambda x: hk.BatchNorm(True, True, 0.0)(hk.Linear(3, with_bias=False)(x), True)
  )
  params, state = net.init(KEY, BATCHES[0])
  new = recalibrate(lambda s, x: net.apply(params, s, None, x)[1], state, BATCHES)
  mean, var = expected(params["linear"]["w"])
  for name, value in (("mean", mean), ("var", var)):
    average = new[f"batch_norm/~/{name}_ema"]["average"]
    np.testing.assert_allclose(average.ravel(), value, rtol=1e-3, atol=1e-4)


def test_counters_and_frozen_statistics_stay():
  stats = {"mean": jnp.zeros(2), "count": jnp.int32(5), "frozen": jnp.array([7.0, 8.0])}

  def update(stats, batch):
    mean = 0.5 * stats["mean"] + 0.5 * batch.mean(0)
    return {"mean": mean, "count": stats["count"] + 1, "frozen": stats["frozen"]}

  new = recalibrate(update, stats, BATCHES[..., :2])
  np.testing.assert_allclose(new["mean"], BATCHES[..., :2].mean((0, 1)), rtol=1e-5)
  assert int(new["count"]) == 5
  np.testing.assert_array_equal(new["frozen"], [7, 8])


def test_dtypes_are_kept():
  stats = {"half": jnp.zeros(4, jnp.bfloat16), "none": jnp.zeros(0)}

  def update(stats, batch):
    half = 0.9 * stats["half"].astype("f4") + 0.1 * batch.mean(0)
    return {"half": half.astype(jnp.bfloat16), "none": stats["none"]}

  new = recalibrate(update, stats, BATCHES)
  assert new["half"].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    new["half"].astype("f4"), BATCHES.mean((0, 1)), rtol=0.1, atol=0.1
  )


def test_nothing_to_estimate():
  assert recalibrate(lambda stats, batch: stats, {}, BATCHES) == {}


def test_rejects(rejects):
  stats = {"mean": jnp.ones(4)}
  keep = lambda stats, batch: stats  # noqa: E731
  with rejects("leaves disagree on the number of batches: 0 has 7, 1 has 6"):
    recalibrate(keep, stats, (BATCHES, BATCHES[:6]))
  with rejects("has no leading axis of batches"):
    recalibrate(keep, stats, jnp.float32(1))
  with rejects("update must give batch statistics as it got them"):
    recalibrate(lambda stats, batch: {"var": batch}, stats, BATCHES)
  with rejects("update gives no running average of batch_stats at mean"):
    recalibrate(lambda stats, batch: {"mean": 3 * stats["mean"]}, stats, BATCHES)
