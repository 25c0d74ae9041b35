"""Networks as others write them: each a function, its parameters and its inputs."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsms.trees import is_array, is_floating

KEY = jax.random.key(0)


class Network(NamedTuple):
  apply: Callable[..., Any]
  params: Any
  inputs: tuple


def _arrays(tree, seed=0):
  """A tree of shapes filled with numbers that are neither 0 nor 1."""
  rng = np.random.default_rng(seed)

  def fill(x):
    if not is_floating(x):
      return jnp.zeros(x.shape, x.dtype) if is_array(x) else x
    return jnp.asarray(
      rng.uniform(0.2, 0.8, x.shape) * rng.choice([-1, 1], x.shape), x.dtype
    )

  def positive(path, x):
    return jnp.abs(x) if "var" in jax.tree_util.keystr(path) else x

  return jax.tree_util.tree_map_with_path(positive, jax.tree.map(fill, tree))


def _input(*shape, seed=1):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _linen(module, *inputs):
  shapes = jax.eval_shape(module.init, KEY, *inputs)
  return Network(module.apply, _arrays(shapes), inputs)


def by_hand():
  """A list of (W, b), with activations that keep 0 and that do not."""
  sizes = (3, 8, 7, 6, 9, 4)
  params = [
    {"W": jnp.zeros((a, b)), "b": jnp.zeros(b)} for a, b in itertools.pairwise(sizes)
  ]

  def apply(params, x):
    acts = [jax.nn.gelu, jax.nn.sigmoid, jax.nn.softplus, jnp.cos, lambda x: x]
    for layer, act in zip(params, acts, strict=True):
      x = act(x @ layer["W"] + layer["b"])
    return x

  return Network(apply, _arrays(params), (_input(5, 3),))


class _MobileBlock(nn.Module):
  @nn.compact
  def __call__(self, x, stride, features):
    y = nn.Conv(12, (1, 1), use_bias=False)(x)
    y = nn.relu6(nn.BatchNorm(use_running_average=True)(y))
    y = nn.Conv(12, (3, 3), strides=stride, feature_group_count=12, use_bias=False)(y)
    y = nn.hard_swish(nn.BatchNorm(use_running_average=True)(y))
    squeezed = nn.relu(nn.Dense(5)(y.mean((1, 2))))
    y = y * nn.sigmoid(nn.Dense(12)(squeezed))[:, None, None]
    y = nn.BatchNorm(use_running_average=True)(nn.Conv(features, (1, 1))(y))
    return x + y if x.shape == y.shape else y


class _Mobile(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu6(nn.Conv(8, (3, 3), strides=2)(x))
    x = _MobileBlock()(_MobileBlock()(x, 1, 8), 2, 10)
    # Two outputs for each channel, then groups of several channels.
    x = nn.relu(nn.Conv(20, (3, 3), feature_group_count=10)(x))
    x = nn.relu(nn.Conv(15, (3, 3), feature_group_count=5)(x))
    return nn.Dense(3)(x.mean((1, 2)))


def mobile():
  """Inverted residuals: depthwise convolutions, squeeze and excite, grouped ones."""
  return _linen(_Mobile(), _input(2, 8, 8, 3))


class _Dense(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3))(x)
    for _ in range(2):
      for _ in range(2):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        y = nn.Conv(5, (1, 1))(y)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
        x = jnp.concatenate([x, nn.Conv(4, (3, 3))(y)], -1)
      x = nn.avg_pool(nn.Conv(7, (1, 1))(x), (2, 2), (2, 2))
    return nn.Dense(3)(nn.relu(x).reshape(x.shape[0], -1))


def densenet():
  """Each layer sees all before it, concatenated; flattened at the end."""
  return _linen(_Dense(), _input(2, 8, 8, 3))


class _UNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    skips = []
    for width in (4, 6):
      x = nn.relu(nn.GroupNorm(width)(nn.Conv(width, (3, 3))(x)))
      skips.append(x)
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.leaky_relu(nn.Conv(8, (3, 3), kernel_dilation=2)(x))
    for width, skip in zip((6, 4), skips[::-1], strict=True):
      x = nn.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
      x = nn.elu(nn.Conv(width, (3, 3))(jnp.concatenate([skip, x], -1)))
    return nn.Conv(2, (1, 1))(x)


def unet():
  """Transposed and dilated convolutions, concatenation, a group for each channel."""
  return _linen(_UNet(), _input(2, 8, 8, 3))


def decoder():
  """A language model: scan over layers, fused qkv, rotary positions, SwiGLU, RMSNorm."""
  layers, width, heads, head, hidden, vocabulary = 2, 8, 3, 4, 10, 11
  params = {
    "embedding": jnp.zeros((vocabulary, width)),
    "blocks": {
      "norm1": jnp.zeros((layers, width)),
      "qkv": jnp.zeros((layers, width, 3 * heads * head)),
      "out": jnp.zeros((layers, heads * head, width)),
      "norm2": jnp.zeros((layers, width)),
      "gate_up": jnp.zeros((layers, width, 2 * hidden)),
      "down": jnp.zeros((layers, hidden, width)),
    },
    "norm": jnp.zeros(width),
  }

  def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

  def apply(params, tokens):
    x = params["embedding"][tokens]
    batch, length = tokens.shape
    mask = jnp.tril(jnp.ones((length, length), bool))

    @jax.checkpoint
    def block(x, p):
      qkv = norm(x, p["norm1"]) @ p["qkv"]
      q, k, v = (y.reshape(batch, length, heads, head) for y in jnp.split(qkv, 3, axis=-1))
      scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / head**0.5
      weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
      y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1)
      x = x + y @ p["out"]
      gate, up = jnp.split(norm(x, p["norm2"]) @ p["gate_up"], 2, axis=-1)
      return x + (jax.nn.silu(gate) * up) @ p["down"], None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return norm(x, params["norm"]) @ params["embedding"].T

  tokens = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, (2, 5)))
  return Network(apply, _arrays(params), (tokens,))


class _Nnx(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.hidden = nnx.Conv(8, 6, (3, 3), strides=2, rngs=rngs)
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    return self.head(nnx.relu(self.hidden(x)).mean((1, 2)))


def nnx_network():
  """Flax NNX, as a State; new batch statistics are among the outputs."""
  graph, state = nnx.split(nnx.eval_shape(lambda: _Nnx(nnx.Rngs(0))))

  def apply(state, x):
    module = nnx.merge(graph, state)
    return module(x), nnx.state(module)

  return Network(apply, _arrays(state), (_input(4, 8, 8, 3),))


class _Equinox(eqx.Module):
  conv: eqx.nn.Conv2d
  attention: eqx.nn.MultiheadAttention
  mlp: eqx.nn.MLP
  act: Callable

  def __init__(self):
    keys = jax.random.split(KEY, 3)
    self.conv = eqx.nn.Conv2d(3, 6, 3, key=keys[0])
    self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[1])
    self.mlp = eqx.nn.MLP(6, 3, 8, 2, key=keys[2])
    self.act = jax.nn.relu

  def __call__(self, x):
    x = self.act(self.conv(x)).reshape(6, -1).T
    return self.mlp(jnp.max(self.attention(x, x, x), 0))


def equinox():
  """An Equinox module, its activation function among the leaves."""
  module = _arrays(eqx.filter_eval_shape(_Equinox))
  return Network(lambda m, x: jax.vmap(m)(x), module, (_input(2, 3, 5, 5),))


def haiku():
  """Haiku, with strings as names of layers."""

  def network(x):
    x = jax.nn.relu(hk.Conv2D(6, 3)(x))
    x = hk.MaxPool(2, 2, "VALID")(jax.nn.relu(hk.Conv2D(8, 3, stride=2)(x)))
    return hk.nets.MLP([7, 3])(hk.Flatten()(x))

  made = hk.without_apply_rng(hk.transform(network))
  inputs = _input(2, 8, 8, 3)
  return Network(made.apply, _arrays(jax.eval_shape(made.init, KEY, inputs)), (inputs,))


def haiku_state():
  """Haiku in training: (params, state), whose averages are written and never read."""

  def network(x):
    x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(6, 3)(x), True)
    x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3)(jax.nn.relu(x)), True)
    return hk.Linear(3)(x.mean((1, 2)))

  made = hk.without_apply_rng(hk.transform_with_state(network))
  inputs = _input(4, 6, 6, 3)
  shapes = jax.eval_shape(made.init, KEY, inputs)
  return Network(lambda both, x: made.apply(*both, x), _arrays(shapes), (inputs,))


class _Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.RNN(nn.LSTMCell(6))(x)
    return nn.Dense(2)(nn.RNN(nn.GRUCell(5))(x)[:, -1])


def recurrent():
  """Recurrent cells: a scan over time whose state is a group."""
  return _linen(_Recurrent(), _input(2, 4, 3))


class _Normalized(eqx.Module):
  conv: eqx.nn.Conv2d
  norm: eqx.nn.BatchNorm
  head: eqx.nn.Linear

  def __init__(self):
    self.conv = eqx.nn.Conv2d(3, 6, 3, key=KEY)
    self.norm = eqx.nn.BatchNorm(6, "batch", mode="batch")
    self.head = eqx.nn.Linear(6, 2, key=KEY)

  def __call__(self, x, state):
    x, state = self.norm(self.conv(x), state)
    return self.head(jax.nn.relu(x).mean((1, 2))), state


def equinox_state():
  """Equinox in training: (module, state), a mean over the axis that vmap has named."""

  def apply(both, x):
    module, state = both
    over = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
    return jax.vmap(module, **over)(x, state)

  return Network(apply, eqx.nn.make_with_state(_Normalized)(), (_input(4, 3, 6, 6),))


NETWORKS = {
  f.__name__: f
  for f in (
    haiku_state,
    recurrent,
    equinox_state,
    by_hand,
    mobile,
    densenet,
    unet,
    decoder,
    nnx_network,
    equinox,
    haiku,
  )
}
