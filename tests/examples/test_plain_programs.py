"""Programs with trees of their own, stax, Haiku: made sparse in a few lines each."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.example_libraries import stax
from tasks import GOAL, IMAGES, KEY, LABELS, SEEDS, batches, check, cross_entropy

import jaxsms

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def trained(apply, steps=60, rate=0.1):
  """A training of one copy by stochastic gradient descent."""

  def retrain(key, params, masks, ingredient):
    optimizer = jaxsms.masked(optax.sgd(rate, 0.9), masks)

    def step(carry, batch):
      params, state = carry
      loss = lambda p: cross_entropy(apply(p, IMAGES[batch]), LABELS[batch])  # noqa: E731
      updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      return (optax.apply_updates(params, updates), state), None

    order = batches(key, ingredient, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), order)[0][0]

  return retrain


def check_soup(dense, apply, weights, share=0.9, **options):
  soup = jaxsms.sparse_model_soup(
    KEY, dense, trained(apply, **options), ingredients=SEEDS, goal_sparsity=GOAL, phases=2
  )
  loss = lambda p: cross_entropy(apply(p, IMAGES), LABELS)  # noqa: E731
  check(dense, soup.params, weights, loss, share=share)


def test_stax():
  init, apply = stax.serial(
    stax.Conv(8, (3, 3), padding="SAME"), stax.Relu, stax.MaxPool((2, 2)),
    stax.Flatten, stax.Dense(32), stax.Relu, stax.Dense(10),
  )  # fmt: skip
  _, dense = init(KEY, (-1, 8, 8, 1))
  check_soup(dense, apply, lambda params: [layer[0] for layer in params if layer])


def test_a_list_of_pairs():
  sizes, keys = (64, 48, 10), jax.random.split(KEY, 2)
  dense = [
    (0.2 * jax.random.normal(k, (m, n)), jnp.zeros(n))
    for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
  ]

  def predict(params, images):
    x = images.reshape(len(images), -1)
    for w, b in params[:-1]:
      x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return x @ w + b

  check_soup(dense, predict, lambda params: [w for w, _ in params])


def test_a_dict_of_ones_own():
  keys = jax.random.split(KEY, 2)
  dense = {
    "hidden": {"W": 0.2 * jax.random.normal(keys[0], (64, 48)), "b": jnp.zeros(48)},
    "out": {"W": 0.2 * jax.random.normal(keys[1], (48, 10)), "b": jnp.zeros(10)},
  }

  def predict(params, images):
    x = images.reshape(len(images), -1)
    x = jnp.tanh(x @ params["hidden"]["W"] + params["hidden"]["b"])
    return x @ params["out"]["W"] + params["out"]["b"]

  check_soup(dense, predict, lambda params: [layer["W"] for layer in params.values()])


def test_haiku():
  def network(images):
    x = jax.nn.relu(hk.Conv2D(8, 3)(images))
    x = jax.nn.relu(hk.Linear(32)(hk.Flatten()(x)))
    return hk.Linear(10)(x)

  network = hk.without_apply_rng(hk.transform(network))
  dense = network.init(KEY, IMAGES[:1])
  check_soup(dense, network.apply, lambda params: [x["w"] for x in params.values()])


def test_haiku_with_state():
  def network(images, is_training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3)(images), is_training)
    return hk.Linear(10)(hk.Flatten()(jax.nn.relu(x)))

  network = hk.without_apply_rng(hk.transform_with_state(network))
  params, state = network.init(KEY, IMAGES[:1], True)
  dense = {"params": params, "state": state}

  def retrain(key, model, masks, ingredient):
    optimizer = jaxsms.masked(optax.sgd(0.05, 0.9), masks["params"])

    def step(carry, batch):
      params, state, opt_state = carry

      def loss(params):
        logits, new = network.apply(params, state, IMAGES[batch], True)
        return cross_entropy(logits, LABELS[batch]), new

      grads, state = jax.grad(loss, has_aux=True)(params)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), state, opt_state), None

    carry = model["params"], model["state"], optimizer.init(model["params"])
    (params, state, _), _ = jax.lax.scan(step, carry, batches(key, ingredient, 60))
    return {"params": params, "state": state}

  soup = jaxsms.sparse_model_soup(
    KEY, dense, retrain, ingredients=SEEDS, goal_sparsity=GOAL, phases=2
  )

  def loss(model):
    logits, _ = network.apply(model["params"], model["state"], IMAGES, False)
    return cross_entropy(logits, LABELS)

  weights = lambda model: [model["params"][x]["w"] for x in ("conv2_d", "linear")]  # noqa: E731
  check(dense, soup.params, weights, loss)


def test_a_flax_model_of_hugging_face():
  transformers = pytest.importorskip("transformers")
  if not hasattr(transformers, "FlaxBertForSequenceClassification"):
    pytest.skip("this version of transformers has no Flax models")
  config = transformers.BertConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=32, num_labels=10, max_position_embeddings=64,
  )  # fmt: skip
  model = transformers.FlaxBertForSequenceClassification(config)

  def apply(params, images):
    tokens = images.reshape(len(images), -1).round().astype(int)
    return model(tokens, params=params).logits

  def weights(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [x for path, x in leaves if path[-1].key == "kernel"]

  # It learns slowly: any fall of the loss shows that it trained.
  check_soup(model.params, apply, weights, share=1, rate=0.02)
