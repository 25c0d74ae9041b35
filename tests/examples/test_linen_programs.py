"""Programs in the manner of Flax's linen examples, made sparse in a few lines each."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from tasks import GOAL, IMAGES, KEY, LABELS, SEEDS, TOKENS, batches, check, cross_entropy

import jaxsms

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def kernels(variables):
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return [x for path, x in leaves if path[-1].key == "kernel"]


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.avg_pool(nn.relu(nn.Conv(8, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.avg_pool(nn.relu(nn.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.relu(nn.Dense(32)(x.reshape(len(x), -1)))
    return nn.Dense(10)(x)


def test_a_loop_with_train_state():
  cnn = CNN()

  @jax.jit
  def train_step(state, images, labels):
    loss_fn = lambda params: cross_entropy(state.apply_fn(params, images), labels)  # noqa: E731
    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

  dense = cnn.init(KEY, IMAGES[:1])
  tx = jaxsms.masked(optax.sgd(0.1, 0.9), jaxsms.magnitude_masks(dense, GOAL))
  state = train_state.TrainState.create(apply_fn=cnn.apply, params=dense, tx=tx)
  for batch in batches(KEY, {"seed": 0}, steps=250):
    state = train_step(state, IMAGES[batch], LABELS[batch])
  check(dense, state.params, kernels, lambda p: cross_entropy(cnn.apply(p, IMAGES), LABELS))


class ResNetBlock(nn.Module):
  filters: int
  strides: tuple[int, int] = (1, 1)
  conv: Any = nn.Conv
  norm: Any = nn.BatchNorm

  @nn.compact
  def __call__(self, x):
    y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
    y = self.norm(scale_init=nn.initializers.zeros_init())(
      self.conv(self.filters, (3, 3))(y)
    )
    if x.shape != y.shape:
      x = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
      x = self.norm(name="norm_proj")(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    fast = jaxsms.convolution.conv_general_dilated  # for several copies on a CPU
    conv = functools.partial(nn.Conv, use_bias=False, conv_general_dilated=fast)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
    )
    x = nn.relu(norm(name="bn_init")(conv(8, (3, 3), name="conv_init")(x)))
    for i, filters in enumerate((8, 16)):
      x = ResNetBlock(filters, (1 + i, 1 + i), conv, norm)(x)
    return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class TrainState(train_state.TrainState):
  batch_stats: Any


def test_a_resnet_with_batch_stats():
  model = ResNet()

  def forward(params, batch_stats, images):
    return model.apply(
      {"params": params, "batch_stats": batch_stats}, images, mutable=["batch_stats"]
    )

  def train_step(state, batch):
    def loss_fn(params):
      logits, new = forward(params, state.batch_stats, IMAGES[batch])
      return cross_entropy(logits, LABELS[batch]), new["batch_stats"]

    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), None

  def retrain(key, variables, masks, ingredient):
    tx = jaxsms.masked(optax.sgd(0.05, 0.9, nesterov=True), masks["params"])
    state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
    state, _ = jax.lax.scan(train_step, state, batches(key, ingredient, steps=60))
    return {"params": state.params, "batch_stats": state.batch_stats}

  dense = jax.jit(model.init)(KEY, IMAGES[:1])
  soup = jaxsms.sparse_model_soup(
    KEY, dense, retrain, ingredients=SEEDS, goal_sparsity=GOAL, phases=2
  ).params

  def update(batch_stats, images):
    return forward(soup["params"], batch_stats, images)[1]["batch_stats"]

  recalibrated = jaxsms.recalibrate(
    update, soup["batch_stats"], IMAGES.reshape(8, 64, 8, 8, 1)
  )
  soup = {"params": soup["params"], "batch_stats": recalibrated}
  loss = lambda v: cross_entropy(model.apply(v, IMAGES, train=False), LABELS)  # noqa: E731
  check(dense, soup, kernels, loss)
  # The first statistics are those of a convolution of the images, in eight batches.
  x = jax.lax.conv_general_dilated(
    IMAGES, soup["params"]["conv_init"]["kernel"], (1, 1), "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip
  x = np.asarray(x, float).reshape(8, -1, 8)
  np.testing.assert_allclose(recalibrated["bn_init"]["mean"], x.mean((0, 1)), atol=1e-5)
  np.testing.assert_allclose(recalibrated["bn_init"]["var"], x.var(1).mean(0), rtol=1e-3)


class Block(nn.Module):
  """A decoder's block, as `nn.scan` wants it."""

  width: int

  @nn.compact
  def __call__(self, x, _):
    length, heads = x.shape[1], 2
    project = functools.partial(
      nn.DenseGeneral, features=(heads, self.width // heads), use_bias=False
    )
    y = nn.LayerNorm(use_bias=False)(x)
    q, k, v = (project(name=name)(y) for name in ("query", "key", "value"))
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    y = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), v)
    x = x + nn.DenseGeneral(self.width, (-2, -1), use_bias=False, name="attn_out_proj")(y)
    y = nn.gelu(nn.Dense(4 * self.width, use_bias=False)(nn.LayerNorm()(x)))
    return x + nn.Dense(self.width, use_bias=False)(y), None


class Decoder(nn.Module):
  """Tied embeddings; blocks that are scanned and worked out again for gradients."""

  width: int = 32

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(16, self.width, name="embed")
    x = embed(tokens) + nn.Embed(16, self.width, name="pos_embed")(
      jnp.arange(tokens.shape[1])
    )
    blocks = nn.scan(
      nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    x, _ = blocks(self.width, name="blocks")(x, None)
    return embed.attend(nn.LayerNorm(use_bias=False)(x))


def next_token_loss(model, params, tokens=TOKENS):
  return cross_entropy(model.apply(params, tokens[:, :-1]), tokens[:, 1:])


def test_a_decoder_that_scans_its_blocks():
  model = Decoder()

  def retrain(key, params, masks, ingredient):
    optimizer = jaxsms.masked(optax.adamw(3e-3), masks)

    def step(carry, batch):
      params, state = carry
      grads = jax.grad(lambda p: next_token_loss(model, p, TOKENS[batch]))(params)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    steps = batches(key, ingredient, n=len(TOKENS))
    return jax.lax.scan(step, (params, optimizer.init(params)), steps)[0][0]

  dense = jax.jit(model.init)(KEY, TOKENS[:, :-1])
  soup = jaxsms.sparse_model_soup(
    KEY, dense, retrain, ingredients=SEEDS, goal_sparsity=GOAL, phases=2
  )
  check(dense, soup.params, kernels, functools.partial(next_token_loss, model))
  # Queries, keys, values, their output and the two of the MLP; no embedding.
  assert len(kernels(soup.params)) == 6
  assert np.all(soup.params["params"]["embed"]["embedding"] != 0)


class Translator(nn.Module):
  """An encoder and a decoder that looks at it."""

  @nn.compact
  def __call__(self, inputs, targets):
    embed = nn.Embed(16, 32, name="shared_embedding")
    position = self.param("pos_embedding", nn.initializers.normal(0.02), (1, 10, 32))

    def mlp(x):
      return nn.Dense(32)(nn.relu(nn.Dense(64)(nn.LayerNorm()(x))))

    attention = functools.partial(nn.MultiHeadDotProductAttention, num_heads=2)
    x = embed(inputs) + position[:, : inputs.shape[1]]
    x = x + attention(name="encoder_attention")(nn.LayerNorm()(x))
    x = x + mlp(x)
    y = embed(jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))) + position[:, : targets.shape[1]]
    causal = nn.make_causal_mask(targets)
    y = y + attention(name="self_attention")(nn.LayerNorm()(y), mask=causal)
    y = y + attention(name="cross_attention")(nn.LayerNorm()(y), x)
    return nn.Dense(16, name="logitdense")(y + mlp(y))


def test_an_encoder_and_decoder_with_a_schedule():
  model, inputs, targets = Translator(), TOKENS[:, :5], TOKENS[:, 5:]
  loss = lambda params: cross_entropy(model.apply(params, inputs, targets), targets)  # noqa: E731
  schedule = optax.polynomial_schedule(0.0, GOAL, power=3, transition_steps=60)
  tx = jaxsms.pruned(optax.adam(3e-3), schedule, every=10)
  dense = jax.jit(model.init)(KEY, inputs, targets)
  state = train_state.TrainState.create(apply_fn=model.apply, params=dense, tx=tx)

  @jax.jit
  def train_step(state):
    return state.apply_gradients(grads=jax.grad(loss)(state.params))

  for _ in range(90):
    state = train_step(state)
  check(dense, state.params, kernels, loss)
  jaxsms.assert_sparse(state.params, state.opt_state.masks)
  # Three attentions of four, two MLPs of two, and the logits.
  assert len(kernels(state.params)) == 3 * 4 + 2 * 2 + 1
