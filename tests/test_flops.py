"""Multiply-adds: the paper's networks, networks worked out by hand, other frameworks."""

import math

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsms import (
  layer_sparsities,
  models,
  multiply_adds,
  sparse_multiply_adds,
  theoretical_speedup,
)
from jaxsms.models.layers import Layers

KEY = jax.random.key(0)


def count(module, *shape):
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  return multiply_adds(module.apply, jax.eval_shape(module.init, KEY, images), images)


@pytest.mark.parametrize(
  ("name", "classes", "image", "expected"),
  [
    ("mlp", 10, (28, 28, 1), 406_528),
    pytest.param("resnet56", 10, (32, 32, 3), 125_485_696, marks=pytest.mark.slow),
    ("resnet18", 10, (32, 32, 3), 555_422_720),
    pytest.param("vgg16", 10, (32, 32, 3), 313_201_664, marks=pytest.mark.slow),
    pytest.param(
      "wide_resnet28_10", 100, (32, 32, 3), 5_951_175_168, marks=pytest.mark.slow
    ),
    pytest.param(
      "wide_resnet22_10", 100, (32, 32, 3), 4_535_597_568, marks=pytest.mark.slow
    ),
    pytest.param(
      "wide_resnet22_10", 10, (32, 32, 3), 4_535_539_968, marks=pytest.mark.slow
    ),
    ("resnet50", 1000, (224, 224, 3), 4_089_184_256),
    # 64 patches; 65 tokens through 4 + 8 squares of 192, 12 times; one token to classes.
    ("vit_tiny", 10, (32, 32, 3), 64 * 48 * 192 + 12 * 65 * 12 * 192**2 + 1920),
  ],
)
def test_the_papers_networks(name, classes, image, expected):
  assert sum(count(models.create(name, classes), 1, *image).values()) == expected


class Small(nn.Module):
  """5x5x2 -> 3x3x4 -> 3x3x6 -> 7."""

  @nn.compact
  def __call__(self, x, train=False):
    layers = Layers()
    x = nn.relu(layers.batch_norm(layers.conv(4, 3, x, stride=2, use_bias=True), train))
    return layers.dense(7, jnp.mean(layers.conv(6, 1, x), (1, 2)))


SMALL = {
  "params/Conv_0/kernel": 9 * 4 * (9 * 2),
  "params/Conv_1/kernel": 9 * 6 * 4,
  "params/Dense_0/kernel": 7 * 6,
}


def test_by_hand():
  assert count(Small(), 1, 5, 5, 2) == SMALL
  assert count(Small(), 3, 5, 5, 2) == {name: 3 * n for name, n in SMALL.items()}


class Many(nn.Module):
  """[1, 6, 8] with every way to use a weight."""

  @nn.compact
  def __call__(self, x):
    shared = nn.Dense(8, name="shared")
    x = shared(nn.relu(shared(x)))
    x = nn.Conv(4, (3,), feature_group_count=2, padding="VALID", name="grouped")(x)
    x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
    x = nn.DenseGeneral((3, 5), axis=(-2, -1), name="general")(x)
    w = self.param("kernel", nn.initializers.normal(), (15, 2))
    x = x.reshape(1, 15) @ (w / jnp.linalg.norm(w)).astype(jnp.bfloat16)
    layers = nn.scan(
      Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    return jax.checkpoint(lambda x: x)(layers(name="layers")(x, None)[0])


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(2)(x), None


def test_every_way_to_use_a_weight():
  assert count(Many(), 1, 6, 8) == {
    "params/shared/kernel": 2 * 6 * 8 * 8,
    "params/grouped/kernel": 4 * 4 * (3 * 4),
    **{f"params/attention/{p}/kernel": 4 * 4 * 4 for p in ("query", "key", "value", "out")},
    "params/general/kernel": 16 * 15,
    "params/kernel": 15 * 2,
    "params/layers/Dense_0/kernel": 3 * 2 * 2,
  }


def test_other_frameworks():
  images = jnp.zeros((1, 6, 6, 3))
  wanted = [6 * 6 * 4 * 27, 5 * 4]

  def haiku(x):
    return hk.Linear(5)(hk.Conv2D(4, 3)(x).mean((1, 2)))

  network = hk.without_apply_rng(hk.transform(haiku))
  params = jax.eval_shape(network.init, KEY, images)
  assert list(multiply_adds(network.apply, params, images).values()) == wanted

  network = eqx.nn.Sequential(
    [
      eqx.nn.Conv2d(3, 4, 3, padding=1, key=KEY),
      eqx.nn.Lambda(lambda x: x.mean((1, 2))),
      eqx.nn.Linear(4, 5, key=KEY),
    ]
  )
  params, static = eqx.partition(network, eqx.is_array)

  def apply(params, x):
    return jax.vmap(eqx.combine(params, static))(jnp.moveaxis(x, 3, 1))

  counts = multiply_adds(apply, params, images)
  assert counts == dict(zip(("layers/0/weight", "layers/2/weight"), wanted, strict=True))


def test_sparse_counts_by_hand():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(Small().init, KEY, jnp.zeros((1, 5, 5, 2)))
  variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  params = variables["params"]
  zeros = {"Conv_0": 50, "Conv_1": 0, "Dense_0": 41}
  for name, number in zeros.items():
    kernel = params[name]["kernel"]
    kernel.reshape(-1)[rng.permutation(kernel.size)[:number]] = 0
  params["Conv_0"]["bias"][:] = 0  # biases do not count
  sparse = sparse_multiply_adds(SMALL, variables)
  # 72, 24 and 42 weights, used 9, 9 and 1 times.
  left = dict(zip(SMALL, (9 * 22, 9 * 24, 1), strict=True))
  assert sparse == left
  assert theoretical_speedup(SMALL, variables) == pytest.approx((648 + 216 + 42) / 415)
  shares = dict(zip(SMALL, (50 / 72, 0, 41 / 42), strict=True))
  assert layer_sparsities(variables) == pytest.approx(shares)


def test_speedup_of_dense_and_of_empty_networks():
  params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
  dense = multiply_adds(lambda p, x: x @ p["Dense_0"]["kernel"], params, jnp.ones((1, 3)))
  assert dense == {"Dense_0/kernel": 6}
  assert theoretical_speedup(dense, params) == 1
  assert theoretical_speedup(dense, jax.tree.map(jnp.zeros_like, params)) == math.inf


def test_refuses_what_it_cannot_count(rejects):
  params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
  images = jnp.ones((1, 2))

  def unused(params, x):
    return x @ params["a"]["kernel"]

  def loop(params, x):
    x = jax.lax.while_loop(
      lambda x: x.sum() < 9, lambda x: x @ params["a"]["kernel"], x @ params["b"]["kernel"]
    )
    return x

  with rejects("no product with b/kernel"):
    multiply_adds(unused, params, images)
  with rejects("no product with a/kernel"):
    multiply_adds(loop, params, images)
  with rejects("none of the 1 leaves"):
    multiply_adds(unused, {"bias": jnp.ones(2)}, images)
  with rejects("b/kernel"):
    sparse_multiply_adds({"a/kernel": 4}, params)
  only_a = multiply_adds(unused, params, images, lambda path, _: path[0].key == "a")
  assert only_a == {"a/kernel": 4}
