"""XLA's convolutions in a caller's training, replaced: the same values, no groups."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_convolution import ONE_PAD, assert_close, group_counts, normal

import jaxsms
from jaxsms import convolution
from jaxsms.substitution import with_own_convolutions

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")]


def replaced(function):
  def call(*arguments):
    result, left = with_own_convolutions(function, *arguments)
    assert left == 0
    return result

  return call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
  "image, kernel, strides, padding",
  [
    ((8, 8), (3, 3), (1, 1), "SAME"),
    ((8, 7), (3, 3), (2, 2), "SAME"),
    pytest.param((8, 8), (1, 1), (2, 2), "VALID", marks=pytest.mark.slow),
    pytest.param((8, 6), (5, 3), (1, 2), "VALID", marks=pytest.mark.slow),
    ((6, 6), (3, 2), (3, 2), ONE_PAD),
    pytest.param((4, 4), (4, 4), (1, 1), "VALID", marks=pytest.mark.slow),
  ],
)
def test_value_and_gradients_stay(layout, image, kernel, strides, padding):
  x, w = normal(0, 2, 3, *image, 4), normal(1, 2, *kernel, 4, 5)
  if layout[0] == "NCHW":
    x, w = x.transpose(0, 1, 4, 2, 3), w.transpose(0, 4, 3, 1, 2)

  def loss(x, w):
    return jnp.sum(
      jnp.sin(lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout))
    )

  step = jax.value_and_grad(loss, (0, 1))
  got = jax.jit(jax.vmap(replaced(step)))
  assert_close(got(x, w), jax.jit(jax.vmap(step))(x, w))
  text = got.lower(x, w).as_text()
  assert set(group_counts(text)) == {(1, 1)}


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="left alone from JAX 0.11 on")
def test_what_is_computed_again_for_its_gradient_is_entered():
  """`jax.checkpoint`, whose backward pass has convolutions of its own."""
  x, w = normal(0, 2, 3, 6, 6, 4), normal(1, 2, 3, 3, 4, 4)
  shift = np.linspace(0, 1, 6 * 6 * 4, dtype=np.float32).reshape(6, 6, 4)

  @jax.checkpoint
  def layer(x, w):
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUTS[0])
    return jnp.sin(y + shift)

  step = jax.value_and_grad(lambda x, w: jnp.sum(layer(layer(x, w), w) ** 2), (0, 1))
  assert "checkpoint" in (text := str(jax.make_jaxpr(step)(x[0], w[0]))) or "remat" in text
  got = jax.jit(jax.vmap(replaced(step)))
  assert_close(got(x, w), jax.jit(jax.vmap(step))(x, w))
  assert set(group_counts(got.lower(x, w).as_text())) == {(1, 1)}


@pytest.mark.parametrize("kind", ["custom_vjp", "custom_jvp"])
def test_convolutions_with_a_gradient_of_their_own_are_left_and_counted(kind):
  x, w = normal(0, 3, 6, 6, 4), normal(1, 3, 3, 4, 4)

  def convolve(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUTS[0])

  own = getattr(jax, kind)(convolve)
  if kind == "custom_vjp":
    own.defvjp(lambda x, w: (convolve(x, w), (x, w)), lambda kept, g: kept)
  else:
    own.defjvp(lambda primals, tangents: (convolve(*primals), convolve(*primals)))
  found, left = with_own_convolutions(lambda x, w: own(x, w) + convolve(x, w), x, w)
  assert left == 1
  np.testing.assert_allclose(found, 2 * convolve(x, w), 1e-5, 1e-5)


def test_convolutions_of_ours_are_none_that_are_left():
  x, w = normal(0, 3, 6, 6, 4), normal(1, 3, 3, 4, 4)

  def loss(x, w):
    out = convolution.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=LAYOUTS[0]
    )
    return jnp.sum(out**2)

  assert with_own_convolutions(loss, x, w)[1] == 0
  assert with_own_convolutions(jax.grad(loss), x, w)[1] == 0
  assert with_own_convolutions(jax.vmap(loss), x[None], w[None])[1] == 0


class Network(nn.Module):
  """Convolutions of several kinds, a shortcut, batch statistics, dropout."""

  @nn.compact
  def __call__(self, x):
    y = nn.BatchNorm(use_running_average=False)(nn.Conv(6, (3, 3), use_bias=False)(x))
    z = nn.Conv(6, (3, 3), strides=2)(nn.relu(y)) + nn.Conv(6, (1, 1), strides=2)(y)
    z = nn.Conv(4, (5, 3), strides=(1, 2), padding="VALID")(z)
    z = nn.Dropout(0.2, deterministic=False)(z)
    return nn.Dense(3)(z.mean((1, 2)))


def training(network, x, variables):
  def train(params, key):
    def step(carry, key):
      params, stats = carry

      def loss(params):
        logits, updated = network.apply(
          {"params": params, "batch_stats": stats}, x, mutable="batch_stats",
          rngs={"dropout": key},
        )  # fmt: skip
        return jnp.mean(logits**2), updated["batch_stats"]

      (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
      params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
      return lax.cond(value > 1e9, lambda: carry, lambda: (params, new)), value

    return lax.scan(step, (params, variables["batch_stats"]), jax.random.split(key, 3))

  return train


@pytest.mark.slow
def test_a_training_with_loops_conditions_and_statistics_stays():
  network, x = Network(), normal(0, 4, 12, 12, 3)
  variables = network.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
  train = training(network, x, variables)
  params = jax.tree.map(lambda p: jnp.stack([p, 1.1 * p]), variables["params"])
  keys = jax.random.split(jax.random.key(2), 2)
  got = jax.jit(jax.vmap(replaced(train)))(params, keys)
  wanted = jax.jit(jax.vmap(train))(params, keys)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), got, wanted)


def test_leaves_that_are_no_arrays_are_handed_on():
  def function(tree, count):
    return {**tree, "x": tree["x"] * count, "y": None}, 2

  tree = {"x": jnp.ones(3), "relu": jax.nn.relu, "none": None}
  (got, two), left = with_own_convolutions(function, tree, 3)
  assert got["relu"] is jax.nn.relu and got["none"] is got["y"] is None
  np.testing.assert_array_equal(got["x"], 3)
  assert (two, left) == (2, 0)


@pytest.mark.parametrize("groups, at_once", [(1, None), (2, None), (2, 1)])
def test_a_hint_where_convolutions_stay_slow(groups, at_once, caplog):
  """Grouped ones of several copies at once, and no others."""
  x = normal(0, 2, 6, 6, 4)
  params = {"kernel": normal(1, 3, 3, 4 // groups, 4)}

  def retrain(key, params, masks, ingredient):
    def loss(params):
      y = lax.conv_general_dilated(
        x + ingredient["seed"], params["kernel"], (1, 1), "SAME",
        feature_group_count=groups, dimension_numbers=LAYOUTS[0],
      )  # fmt: skip
      return jnp.mean(y**2)

    gradient = jax.grad(loss)(params)
    return jax.tree.map(lambda p, g, m: m * (p - g), params, gradient, masks)

  masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
  with caplog.at_level(logging.WARNING, logger="absl"):
    for _ in range(2):
      arguments = (jax.random.key(0), params, masks, {"seed": jnp.arange(3)})
      jaxsms.retrain_phase(*arguments, retrain, at_once=at_once)
  hints = [r.getMessage() for r in caplog.records if "make_mesh()" in r.getMessage()]
  assert len(hints) == (groups == 2 and at_once is None)
  assert all('"jax_num_cpu_devices", 3' in hint for hint in hints)
