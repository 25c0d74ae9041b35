"""Programs in the manner of NNX and Equinox examples, made sparse in a few lines each."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tasks import GOAL, IMAGES, KEY, LABELS, SEEDS, batches, check, cross_entropy

import jaxsms

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


class CNN(nnx.Module):
  def __init__(self, rngs):
    self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.batch_norm = nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.025)
    self.conv2 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
    self.linear = nnx.Linear(16 * 16, 10, rngs=rngs)

  def __call__(self, x, rngs=None):
    x = nnx.relu(self.batch_norm(self.dropout(self.conv1(x), rngs=rngs)))
    x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
    return self.linear(x.reshape(len(x), -1))


def nnx_weights(model):
  return [x[...] for x in (model.conv1.kernel, model.conv2.kernel, model.linear.kernel)]


def nnx_loss(model):
  model.eval()
  return cross_entropy(model(IMAGES), LABELS)


def test_a_loop_of_nnx_with_dropout_and_batch_norm():
  @nnx.jit
  def train_step(model, optimizer, images, labels, rngs):
    loss = lambda model, rngs: cross_entropy(model(images, rngs), labels)  # noqa: E731
    optimizer.update(model, nnx.grad(loss)(model, rngs))

  model, dense, rngs = CNN(nnx.Rngs(0)), CNN(nnx.Rngs(0)), nnx.Rngs(0)
  masks = jaxsms.magnitude_masks(nnx.state(model, nnx.Param), GOAL)
  optimizer = nnx.Optimizer(
    model, jaxsms.masked(optax.sgd(0.05, 0.9), masks), wrt=nnx.Param
  )
  model.train()
  for batch in batches(KEY, {"seed": 0}, steps=150):
    train_step(model, optimizer, IMAGES[batch], LABELS[batch], rngs)
  check(dense, model, nnx_weights, nnx_loss)


class EquinoxCNN(eqx.Module):
  """Layers and functions in one list."""

  layers: list

  def __init__(self, key):
    keys = jax.random.split(key, 3)
    self.layers = [
      eqx.nn.Conv2d(1, 3, kernel_size=3, key=keys[0]),
      eqx.nn.MaxPool2d(kernel_size=2),
      jax.nn.relu,
      jnp.ravel,
      eqx.nn.Linear(3 * 5 * 5, 32, key=keys[1]),
      jax.nn.sigmoid,
      eqx.nn.Linear(32, 10, key=keys[2]),
      jax.nn.log_softmax,
    ]

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return x


def equinox_loss(model, batch=slice(None)):
  images = jnp.moveaxis(IMAGES[batch], -1, 1)
  return cross_entropy(jax.vmap(model)(images), LABELS[batch])


def equinox_weights(model):
  is_layer = lambda x: isinstance(x, eqx.nn.Linear | eqx.nn.Conv2d)  # noqa: E731
  layers = jax.tree.leaves(model, is_leaf=is_layer)
  return [layer.weight for layer in layers if is_layer(layer)]


def test_a_loop_of_equinox():
  @eqx.filter_jit
  def make_step(model, opt_state, masks, batch):
    grads = eqx.filter_grad(equinox_loss)(model, batch)
    updates, opt_state = optim.update(grads, opt_state, model, masks=masks)
    return eqx.apply_updates(model, updates), opt_state

  dense = model = EquinoxCNN(KEY)
  masks = jaxsms.magnitude_masks(model, GOAL)
  optim = jaxsms.masked(optax.adamw(1e-2))
  opt_state = optim.init(eqx.filter(model, eqx.is_array))
  for batch in batches(KEY, {"seed": 0}, steps=300):
    model, opt_state = make_step(model, opt_state, masks, batch)
  check(dense, model, equinox_weights, equinox_loss)


class PatchEmbedding(eqx.Module):
  linear: eqx.nn.Linear

  def __init__(self, key):
    self.linear = eqx.nn.Linear(4, 16, key=key)

  def __call__(self, x):
    patches = x.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4)
    return jax.vmap(self.linear)(patches)


class AttentionBlock(eqx.Module):
  layer_norm1: eqx.nn.LayerNorm
  layer_norm2: eqx.nn.LayerNorm
  attention: eqx.nn.MultiheadAttention
  linear1: eqx.nn.Linear
  linear2: eqx.nn.Linear
  dropout: eqx.nn.Dropout

  def __init__(self, key):
    keys = jax.random.split(key, 3)
    self.layer_norm1, self.layer_norm2 = eqx.nn.LayerNorm(16), eqx.nn.LayerNorm(16)
    self.attention = eqx.nn.MultiheadAttention(2, 16, key=keys[0])
    self.linear1 = eqx.nn.Linear(16, 32, key=keys[1])
    self.linear2 = eqx.nn.Linear(32, 16, key=keys[2])
    self.dropout = eqx.nn.Dropout(0.1)

  def __call__(self, x, key):
    y = jax.vmap(self.layer_norm1)(x)
    x = x + self.attention(y, y, y)
    y = jax.vmap(self.linear1)(jax.vmap(self.layer_norm2)(x))
    y = self.dropout(jax.nn.gelu(y), inference=key is None, key=key)
    return x + jax.vmap(self.linear2)(y)


class VisionTransformer(eqx.Module):
  patch_embedding: PatchEmbedding
  positional_embedding: jax.Array
  cls_token: jax.Array
  blocks: list[AttentionBlock]
  mlp: eqx.nn.Sequential

  def __init__(self, key):
    keys = jax.random.split(key, 6)
    self.patch_embedding = PatchEmbedding(keys[0])
    self.positional_embedding = jax.random.normal(keys[1], (17, 16))
    self.cls_token = jax.random.normal(keys[2], (1, 16))
    self.blocks = [AttentionBlock(k) for k in keys[3:5]]
    head = eqx.nn.Linear(16, 10, key=keys[5])
    self.mlp = eqx.nn.Sequential([eqx.nn.LayerNorm(16), head])

  def __call__(self, x, key=None):
    x = jnp.concatenate([self.cls_token, self.patch_embedding(x)])
    x = x + self.positional_embedding
    keys = (None, None) if key is None else jax.random.split(key)
    for block, block_key in zip(self.blocks, keys, strict=True):
      x = block(x, block_key)
    return self.mlp(x[0])


def test_a_soup_of_vision_transformers():
  def retrain(key, model, masks, ingredient):
    optim = jaxsms.masked(optax.adam(3e-3), masks)
    params, static = eqx.partition(model, eqx.is_array)

    def step(carry, inputs):
      params, opt_state = carry
      batch, key = inputs

      def loss(params):
        keys = jax.random.split(key, len(batch))
        logits = jax.vmap(eqx.combine(params, static))(IMAGES[batch], keys)
        return cross_entropy(logits, LABELS[batch])

      updates, opt_state = optim.update(jax.grad(loss)(params), opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    order = batches(key, ingredient, steps=150)
    inputs = order, jax.random.split(jax.random.fold_in(key, ingredient["seed"]), 150)
    (params, _), _ = jax.lax.scan(step, (params, optim.init(params)), inputs)
    return eqx.combine(params, static)

  dense = VisionTransformer(KEY)
  soup = jaxsms.sparse_model_soup(
    KEY, dense, retrain, ingredients=SEEDS, goal_sparsity=GOAL, phases=2
  )
  loss = lambda model: cross_entropy(jax.vmap(model)(IMAGES), LABELS)  # noqa: E731
  check(dense, soup.params, equinox_weights, loss)
  assert len(equinox_weights(dense)) == 1 + 2 * 6 + 1
  assert np.all(soup.params.positional_embedding != 0)
