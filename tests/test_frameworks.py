"""The same network in four frameworks: what is pruned, and a soup of each."""

from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsms import (
  apply_masks,
  magnitude_masks,
  masked,
  prunable,
  sparse_model_soup,
  sparsity,
  stack,
  unstack,
)
from jaxsms.trees import path_string

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS, WIDTH, HEADS, CLASSES, VOCABULARY = 5, 8, 2, 3, 11
IMAGES = np.random.default_rng(0).standard_normal((4, 4, 4, 2)).astype(np.float32)
WORDS = np.random.default_rng(1).integers(0, VOCABULARY, (4, 4)).astype(np.int32)
LABELS = np.array([0, 1, 2, 0])
KEY = jax.random.key(0)


class Model(NamedTuple):
  """One framework's network.

  Attributes:
    params: its tree of arrays.
    logits: of (params) on the images and words above, [4, classes].
    weights: the leaves that must be prunable, as paths.
    others: how many leaves must not be.
  """

  params: object
  logits: object
  weights: set[str]
  others: int


# Every network: a 2x2 convolution makes 4 patches, normalized over the batch and in groups;
# word embeddings are added, a class token comes first, position embeddings are added;
# attention and two dense layers follow, each after a layer norm.


class Linen(nn.Module):
  @nn.compact
  def __call__(self, images, words):
    x = nn.Conv(WIDTH, (2, 2), strides=2)(images)
    x = nn.GroupNorm(2)(nn.BatchNorm(use_running_average=True)(x)).reshape(4, 4, WIDTH)
    x = x + nn.Embed(VOCABULARY, WIDTH)(words)
    token = self.param("cls", nn.initializers.normal(), (1, 1, WIDTH))
    x = jnp.concatenate([jnp.tile(token, (4, 1, 1)), x], 1)
    x = x + self.param("pos_embedding", nn.initializers.normal(), (1, TOKENS, WIDTH))
    x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
    return nn.Dense(CLASSES)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))[:, 0])


def linen():
  module = Linen()
  variables = jax.jit(module.init)(KEY, IMAGES, WORDS)
  attention = "params/MultiHeadDotProductAttention_0"
  weights = {"params/Conv_0/kernel", "params/Dense_0/kernel", "params/Dense_1/kernel"}
  weights |= {f"{attention}/{part}/kernel" for part in ("query", "key", "value", "out")}
  assert variables["params"]["MultiHeadDotProductAttention_0"]["query"]["bias"].ndim == 2
  # Biases: conv, 4 of attention, 2 dense; 4 norms of two; embedding, cls, position; and
  # the mean and variance of the batch norm.
  return Model(variables, lambda v: module.apply(v, IMAGES, WORDS), weights, 7 + 8 + 3 + 2)


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, WIDTH, (2, 2), strides=2, rngs=rngs)
    self.batch_norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
    self.group_norm = nnx.GroupNorm(WIDTH, 2, rngs=rngs)
    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.cls = nnx.Param(jnp.zeros((1, 1, WIDTH)))
    self.pos_embedding = nnx.Param(jnp.ones((1, TOKENS, WIDTH)))
    self.norms = getattr(nnx, "List", list)(
      [nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)]
    )
    self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
    self.hidden = nnx.Linear(WIDTH, 6, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
    self.head = nnx.Linear(6, CLASSES, rngs=rngs)

  def __call__(self, images, words):
    x = self.group_norm(self.batch_norm(self.conv(images))).reshape(4, 4, WIDTH)
    x = x + self.embed(words)
    x = jnp.concatenate([jnp.tile(self.cls[...], (4, 1, 1)), x], 1)
    x = x + self.pos_embedding[...]
    x = x + self.attention(self.norms[0](x))
    return self.head(self.dropout(nnx.gelu(self.hidden(self.norms[1](x))[:, 0])))


def nnx_state():
  @nnx.jit
  def create():
    return Nnx(nnx.Rngs(0))

  graph, state = nnx.split(create())
  weights = {"conv/kernel", "hidden/kernel", "head/kernel"}
  weights |= {f"attention/{part}/kernel" for part in ("query", "key", "value", "out")}
  # As in linen, and the states of random number generators: pairs of key and count.
  generators = sum(
    jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state)
  )
  assert generators >= 1
  others = 7 + 8 + 3 + 2 + 2 * generators
  logits = lambda state: nnx.merge(graph, state)(IMAGES, WORDS)  # noqa: E731
  return Model(state, logits, weights, others)


class Equinox(eqx.Module):
  conv: eqx.nn.Conv2d
  group_norm: eqx.nn.GroupNorm
  embedding: eqx.nn.Embedding
  cls: jax.Array
  pos_embedding: jax.Array
  norm1: eqx.nn.LayerNorm
  attention: eqx.nn.MultiheadAttention
  norm2: eqx.nn.LayerNorm
  mlp: eqx.nn.MLP

  def __init__(self, key):
    keys = jax.random.split(key, 4)
    self.conv = eqx.nn.Conv2d(2, WIDTH, 2, 2, key=keys[0])
    self.group_norm = eqx.nn.GroupNorm(2, WIDTH)
    self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[1])
    self.cls = jnp.zeros((1, WIDTH))
    self.pos_embedding = jnp.ones((TOKENS, WIDTH))
    # A norm over two axes has weights of rank 2.
    self.norm1 = eqx.nn.LayerNorm((TOKENS, WIDTH))
    self.attention = eqx.nn.MultiheadAttention(
      HEADS, WIDTH, use_query_bias=True, use_output_bias=True, key=keys[2]
    )
    self.norm2 = eqx.nn.LayerNorm(WIDTH)
    self.mlp = eqx.nn.MLP(WIDTH, CLASSES, 6, 1, key=keys[3])

  def __call__(self, image, words):
    x = self.group_norm(self.conv(image.transpose(2, 0, 1))).reshape(WIDTH, 4).T
    x = x + jax.vmap(self.embedding)(words)
    x = jnp.concatenate([self.cls, x]) + self.pos_embedding
    normal = self.norm1(x)
    x = x + self.attention(normal, normal, normal)
    return self.mlp(self.norm2(x[0]))


def equinox():
  params, static = eqx.partition(eqx.filter_jit(Equinox)(KEY), eqx.is_array)
  projections = ("query_proj", "key_proj", "value_proj", "output_proj")
  weights = {"conv/weight", "mlp/layers/0/weight", "mlp/layers/1/weight"}
  weights |= {f"attention/{part}/weight" for part in projections}
  assert params.conv.bias.ndim == 3
  assert params.norm1.weight.ndim == 2
  logits = lambda p: jax.vmap(eqx.combine(p, static))(IMAGES, WORDS)  # noqa: E731
  # Biases: conv, 2 of attention, 2 dense; 3 norms of two; embedding, cls, position.
  return Model(params, logits, weights, 5 + 6 + 3)


def haiku():
  def network(images, words, training=False):
    x = hk.Conv2D(WIDTH, 2, 2)(images)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training=training)
    x = hk.GroupNorm(2)(x).reshape(4, 4, WIDTH)
    x = x + hk.Embed(VOCABULARY, WIDTH)(words)
    token = hk.get_parameter("cls", (1, 1, WIDTH), init=jnp.zeros)
    x = jnp.concatenate([jnp.tile(token, (4, 1, 1)), x], 1)
    x = x + hk.get_parameter("pos_embedding", (1, TOKENS, WIDTH), init=jnp.ones)
    normal = hk.LayerNorm(-1, True, True)(x)
    start = hk.initializers.VarianceScaling()
    x = x + hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=start)(
      normal, normal, normal
    )
    return hk.nets.MLP([6, CLASSES])(hk.LayerNorm(-1, True, True)(x)[:, 0])

  network = hk.without_apply_rng(hk.transform_with_state(network))
  params, statistics = jax.jit(network.init, static_argnums=3)(KEY, IMAGES, WORDS, True)
  tree = {"params": params, "batch_stats": statistics}
  weights = {"conv2_d/w", "mlp/~/linear_0/w", "mlp/~/linear_1/w"}
  weights |= {f"multi_head_attention/{p}/w" for p in ("query", "key", "value", "linear")}
  others = 7 + 8 + 3 + len(jax.tree.leaves(statistics))
  logits = lambda t: network.apply(t["params"], t["batch_stats"], IMAGES, WORDS)[0]  # noqa: E731
  return Model(tree, logits, {f"params/{name}" for name in weights}, others)


FRAMEWORKS = {"linen": linen, "nnx": nnx_state, "equinox": equinox, "haiku": haiku}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def model(request):
  return FRAMEWORKS[request.param]()


def prunable_paths(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {path_string(path) for path, leaf in leaves if prunable(path, leaf)}


def test_exactly_the_weights_are_prunable(model):
  assert prunable_paths(model.params) == model.weights
  assert len(jax.tree.leaves(model.params)) == len(model.weights) + model.others
  shapes = jax.eval_shape(lambda p: p, model.params)
  assert prunable_paths(shapes) == model.weights


@jax.jit
def prune_and_restack(params):
  masks = magnitude_masks(params, 0.5)
  pruned = apply_masks(params, masks)
  return masks, pruned, unstack(stack([params, pruned]))[1]


def test_masks_of_each_framework(model, assert_trees_equal):
  masks, pruned, again = prune_and_restack(model.params)
  assert jax.tree.structure(masks) == jax.tree.structure(model.params)
  assert_trees_equal(again, pruned)
  sizes = removed = 0
  for (path, mask), leaf in zip(
    jax.tree_util.tree_leaves_with_path(masks), jax.tree.leaves(pruned), strict=True
  ):
    assert mask.dtype == bool and mask.shape == leaf.shape
    if path_string(path) in model.weights:
      sizes, removed = sizes + mask.size, removed + int(np.sum(~mask))
    else:
      assert np.all(mask)
  assert removed == round(0.5 * sizes)
  assert float(sparsity(pruned)) == pytest.approx(removed / sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
  "model",
  [
    "nnx",
    "equinox",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("linen", "haiku")),
  ],
  indirect=True,
)
def test_a_soup_of_each_framework(model):
  optimizer = optax.sgd(0.01, momentum=0.9)
  trained = jax.tree.map(
    lambda x: bool(jnp.issubdtype(x.dtype, jnp.floating)), model.params
  )
  flat, structure = jax.tree.flatten(trained)

  def select(tree, floating):
    """The leaves that are trained, or those that are not, in a list."""
    leaves = jax.tree.leaves(tree)
    return [x for x, flag in zip(leaves, flat, strict=True) if flag == floating]

  def join(floating, others):
    floating, others = iter(floating), iter(others)
    leaves = [next(floating) if flag else next(others) for flag in flat]
    return jax.tree.unflatten(structure, leaves)

  def loss(floating, others, noise):
    logits = model.logits(join(floating, others)) + noise
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

  def retrain(key, params, masks, ingredient):
    key = jax.random.fold_in(key, ingredient["seed"])
    optimize = masked(optimizer, select(masks, True))
    floating, others = select(params, True), select(params, False)
    noise = jax.random.normal(key, (4, CLASSES))
    value, gradient = jax.value_and_grad(loss)(floating, others, noise)
    updates, _ = optimize.update(gradient, optimize.init(floating), floating)
    return join(optax.apply_updates(floating, updates), others), value

  soup = sparse_model_soup(
    KEY,
    model.params,
    retrain,
    ingredients={"seed": jnp.arange(2)},
    goal_sparsity=0.75,
    phases=2,
  )
  sizes = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    if path_string(path) in model.weights
  )
  assert float(sparsity(soup.params)) == pytest.approx(round(0.75 * sizes) / sizes)
  assert [r["sparsity"] for r in soup.history] == pytest.approx([0.5, 0.75], abs=1 / sizes)
  assert jax.tree.structure(soup.params) == jax.tree.structure(model.params)
  losses = np.array([record["retrain"] for record in soup.history])
  assert losses.shape == (2, 2) and np.all(np.isfinite(losses))
  assert np.all(losses[:, 0] != losses[:, 1])
  for path, mask in jax.tree_util.tree_leaves_with_path(soup.masks):
    assert path_string(path) in model.weights or np.all(mask)


def test_a_linen_state_can_be_masked_whole(assert_trees_equal):
  # The optimizer sees the nested tree here, not a list of leaves.
  params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
  masks = magnitude_masks(params, 0.5)
  optimizer = masked(optax.adamw(0.1), masks)
  updates, state = optimizer.update(params, optimizer.init(params), params)
  after = optax.apply_updates(params, updates)
  moments = state[0].mu["Dense_0"]["kernel"], state[0].nu["Dense_0"]["kernel"]
  for kernel in (after["Dense_0"]["kernel"], *moments):
    np.testing.assert_array_equal(kernel != 0, masks["Dense_0"]["kernel"])


def test_nnx_and_equinox_trees_through_an_optimizer():
  state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
  layer = eqx.nn.Linear(3, 2, key=KEY)
  for params, weight in ((state, lambda t: t["kernel"]), (layer, lambda t: t.weight)):
    masks = magnitude_masks(params, 0.5)
    optimizer = masked(optax.adamw(0.1, weight_decay=0.1))
    ones = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(lambda s, p, m, o=optimizer, g=ones: o.update(g, s, p, masks=m))
    updates, opt_state = update(optimizer.init(params), params, masks)
    after = optax.apply_updates(params, updates)
    kept = np.asarray(jax.tree.leaves(weight(masks))[0])
    for tree in (after, opt_state[0].mu, opt_state[0].nu):
      leaf = np.asarray(jax.tree.leaves(weight(tree))[0])
      np.testing.assert_array_equal(leaf[~kept], 0)
      assert np.all(leaf[kept] != 0)


def test_equinox_layers_in_a_list_are_told_apart_by_their_class():
  keys = jax.random.split(jax.random.key(0), 3)
  model = eqx.nn.Sequential(
    [
      eqx.nn.Embedding(5, 4, key=keys[0]),
      eqx.nn.Linear(4, 4, key=keys[1]),
      eqx.nn.LayerNorm((3, 4)),
      eqx.nn.Linear(4, 2, key=keys[2]),
    ]
  )
  masks = magnitude_masks(eqx.filter(model, eqx.is_array), 0.5)
  removed = [int((~layer.weight).sum()) for layer in masks.layers]
  assert sum(removed) == (4 * 4 + 4 * 2) // 2
  assert removed[0] == removed[2] == 0


@pytest.mark.parametrize("where", ["masked", "update"])
def test_nnx_optimizer_takes_masks_made_from_its_state(where):
  model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
  masks = magnitude_masks(nnx.state(model, nnx.Param), 0.5)
  given = {"masks": masks} if where == "update" else {}
  nnx.update(model, apply_masks(nnx.state(model, nnx.Param), masks))
  transformation = masked(optax.adamw(1e-2), masks if where == "masked" else None)
  optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
  for _ in range(3):
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))) ** 2))(model)
    optimizer.update(model, grads, **given)
  assert int(jnp.sum(model.kernel[...] == 0)) == 12
