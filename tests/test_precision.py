"""What networks share: the type they compute in, convolution and rematerialization."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxsms import models, multiply_adds
from jaxsms.models.layers import Layers
from jaxsms.models.resnet import ResNet
from jaxsms.models.vgg import VGG
from jaxsms.models.wide_resnet import WideResNet
from jaxsms.training.state import TrainState, sgd
from jaxsms.training.step import Recipe, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
DROPOUT = {"dropout": jax.random.key(0, impl="unsafe_rbg")}  # compiles soonest
IMAGES = jax.ShapeDtypeStruct((4, 12, 12, 3), jnp.float32)
BFLOAT16 = {"dtype": jnp.bfloat16}

CONVOLUTIONAL = {
  "resnet8": functools.partial(models.create, "resnet8", 5, width=4),
  "basic": functools.partial(ResNet, 5, blocks=(1, 1), width=4),
  "bottleneck": functools.partial(
    ResNet, 5, blocks=(1, 1), bottleneck=True, stem="imagenet", width=4
  ),
  "vgg": functools.partial(VGG, 5, convolutions=(1, 2), width=4),
  "wide_resnet": functools.partial(WideResNet, 5, depth=10, widening=1),
  "vit": functools.partial(models.create, "vit_tiny", 5, depth=2, width=12, dropout=0.3),
}
NETWORKS = CONVOLUTIONAL | {
  "mlp": functools.partial(models.create, "mlp", 5, hidden=(8, 6))
}

every_network = pytest.mark.parametrize("name", NETWORKS)
every_convolutional = pytest.mark.parametrize("name", CONVOLUTIONAL)


def some(networks, *quick):
  """All of them: the others are slow."""
  return [
    name if name in quick else pytest.param(name, marks=pytest.mark.slow)
    for name in networks
  ]


@functools.cache
def shapes(name):
  return jax.eval_shape(NETWORKS[name]().init, KEY, IMAGES)


def loss(module, params, stats, images):
  """The sum of squared logits in training, and the new batch statistics."""
  variables = {"params": params, "batch_stats": stats}
  logits, updated = module.apply(
    variables, images, train=True, rngs=DROPOUT, mutable=["batch_stats"]
  )
  return jnp.sum(logits.astype(jnp.float32) ** 2), updated.get("batch_stats", {})


def equations(jaxpr):
  """All equations; of the lowerings for different platforms those of the default one."""
  for equation in jaxpr.eqns:
    yield equation
    values = list(equation.params.values())
    if equation.primitive.name == "cond":
      values = equation.params["branches"][-1:]
    for value in values:
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


def types(function, *args, primitives):
  """The types of all operands of these primitives."""
  found = equations(jax.make_jaxpr(function)(*args).jaxpr)
  found = [e for e in found if e.primitive.name in primitives]
  return [v.aval.dtype for e in found for v in e.invars]


def split(name):
  return shapes(name)["params"], shapes(name).get("batch_stats", {})


@pytest.mark.parametrize("name", some(NETWORKS, "mlp", "resnet8", "vit"))
def test_all_products_of_a_training_step_are_of_bfloat16(name):
  gradient = jax.grad(functools.partial(loss, NETWORKS[name](**BFLOAT16)), has_aux=True)
  products = "conv_general_dilated", "dot_general"
  found = types(gradient, *split(name), IMAGES, primitives=products)
  leaves = jax.tree_util.tree_leaves_with_path(shapes(name))
  kernels = sum(path[-1].key == "kernel" for path, _ in leaves)
  # Two operands: forward, in both gradients, but not in the gradient of the images.
  assert len(found) >= 2 * (3 * kernels - 1)
  assert set(found) == {jnp.dtype(jnp.bfloat16)}


@every_network
def test_all_layers_give_bfloat16_and_sum_in_float32(name):
  module = NETWORKS[name](**BFLOAT16)

  def apply(variables, images):
    return module.apply(
      variables,
      images,
      train=True,
      rngs=DROPOUT,
      capture_intermediates=True,
      mutable=["batch_stats", "intermediates"],
    )

  logits, updated = jax.eval_shape(apply, shapes(name), IMAGES)
  outputs = jax.tree.leaves(updated["intermediates"])
  assert len(outputs) > 4 and logits.dtype == jnp.bfloat16
  assert {x.dtype for x in outputs} == {jnp.dtype(jnp.bfloat16)}
  sums = types(apply, shapes(name), IMAGES, primitives=("reduce_sum",))
  assert set(sums) <= {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@every_network
def test_variables_and_training_state_are_float32(name):
  fields = BFLOAT16 if name == "mlp" else BFLOAT16 | {"remat": True}
  module = NETWORKS[name](**fields)
  assert jax.eval_shape(module.init, KEY, IMAGES) == shapes(name)
  params, stats = split(name)
  optimizer = sgd(0.1, 1e-4)

  def step(params, stats, images, labels):
    state = TrainState(params, stats, optimizer.init(params), jnp.zeros((), jnp.int32))
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    return train_step(Recipe(module), optimizer, KEY, state, masks, images, labels)

  copies = jax.ShapeDtypeStruct((2, *IMAGES.shape), jnp.float32)
  labels = jax.ShapeDtypeStruct((2, 4), jnp.int32)
  two_copies = jax.vmap(step, (None, None, 0, 0))
  state, metrics = jax.eval_shape(two_copies, params, stats, copies, labels)
  leaves = jax.tree.leaves((state._replace(step=()), metrics))
  assert {x.dtype for x in leaves} == {jnp.dtype(jnp.float32)}


def test_statistics_of_bfloat16_are_exact_to_float32():
  x = np.random.default_rng(0).normal(3, 0.1, (20_000, 2)).astype(jnp.bfloat16)

  class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
      return Layers(jnp.bfloat16, norm_momentum=0.0).batch_norm(x, True)

  y, updated = Norm().apply(Norm().init(KEY, x), x, mutable=["batch_stats"])
  stats = updated["batch_stats"]["BatchNorm_0"]
  wide = x.astype(np.float64)
  np.testing.assert_allclose(stats["mean"], wide.mean(0), rtol=1e-5)
  np.testing.assert_allclose(stats["var"], wide.var(0), rtol=1e-3)
  expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-7, atol=1e-2)


def random_variables(name):
  """Kernels and biases of the size of fresh ones, scales and statistics around 1."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    inputs = leaf.size / leaf.shape[-1] if leaf.ndim > 1 else 4
    return (rng.standard_normal(leaf.shape) / np.sqrt(inputs)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes(name))


def random_images():
  return np.random.default_rng(1).standard_normal(IMAGES.shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(CONVOLUTIONAL, "resnet8", "vit"))
def test_remat_changes_neither_losses_nor_statistics_nor_gradients(
  name, assert_trees_equal
):
  # The convolution that compiles soon; one network shows that the default one goes too.
  fields = {} if name == "resnet8" else {"convolution": lax.conv_general_dilated}
  variables = random_variables(name)

  def run(remat):
    module = NETWORKS[name](remat=remat, **fields)
    gradient = jax.value_and_grad(functools.partial(loss, module), has_aux=True)
    stats = variables.get("batch_stats", {})
    return jax.jit(gradient)(variables["params"], stats, random_images())

  kept, again = run(False), run(True)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
  assert_trees_equal(kept, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["basic", "vgg"])
def test_remat_starts_from_the_same_values(name, assert_trees_equal):
  images = random_images()
  kept, again = (
    jax.jit(NETWORKS[name](remat=remat).init)(KEY, images) for remat in (False, True)
  )
  assert_trees_equal(kept, again)


@pytest.mark.parametrize("name", ["basic", "vit"])
def test_logits_of_bfloat16_are_near_those_of_float32(name):
  variables, images = random_variables(name), random_images()
  wide, narrow = (
    np.asarray(jax.jit(NETWORKS[name](**fields).apply)(variables, images), np.float32)
    for fields in ({}, BFLOAT16)
  )
  difference = np.abs(wide - narrow).max()
  assert 0 < difference < 0.05 * np.std(wide)


@every_convolutional
def test_the_convolution_of_all_layers_is_the_one_given(name):
  kernels = []

  def spy(lhs, rhs, *args, **options):
    kernels.append(rhs.shape)
    return lax.conv_general_dilated(lhs, rhs, *args, **options)

  module, variables = NETWORKS[name](convolution=spy), shapes(name)
  # In forward mode, which the default convolution does not have.
  jax.eval_shape(lambda *args: jax.jvp(module.apply, args, args), variables, IMAGES)
  ndim4 = [x.shape for x in jax.tree.leaves(variables) if x.ndim == 4]
  assert sorted(kernels) == sorted(ndim4)


def kept_bytes(module, params, stats):
  """Of what the forward pass leaves for the gradient."""

  def kept(params, stats, images):
    return jax.vjp(lambda p: loss(module, p, stats, images), params, has_aux=True)[1]

  arrays = jax.tree.leaves(jax.eval_shape(kept, params, stats, IMAGES))
  return sum(x.size * x.dtype.itemsize for x in arrays)


@every_convolutional
def test_remat_keeps_less_for_the_gradient(name):
  kept, again = (
    kept_bytes(NETWORKS[name](remat=remat), *split(name)) for remat in (False, True)
  )
  # Both ways keep these.
  given = sum(x.size * 4 for x in jax.tree.leaves((shapes(name), IMAGES)))
  assert again - given < 0.6 * (kept - given)


@pytest.mark.slow
def test_remat_lowers_peak_memory():
  images = jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.float32)

  def peak(remat):
    module = models.create(
      "resnet20", 10, width=4, convolution=lax.conv_general_dilated, remat=remat
    )
    variables = jax.eval_shape(module.init, KEY, images)
    gradient = jax.jit(jax.grad(functools.partial(loss, module), has_aux=True))
    lowered = gradient.lower(variables["params"], variables["batch_stats"], images)
    # Without this pass the compiler keeps the barriers of remat: a CPU's, which removes
    # them early, then merges what is computed twice.
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    return lowered.compile(options).memory_analysis().temp_size_in_bytes

  assert peak(True) < 0.6 * peak(False)


@every_convolutional
def test_multiply_adds_do_not_depend_on_how_they_are_computed(name):
  counts = [
    multiply_adds(NETWORKS[name](**fields).apply, shapes(name), IMAGES)
    for fields in ({}, {"dtype": "bfloat16", "remat": True})
  ]
  assert counts[0] == counts[1]


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("mlp", {"remat": True}, "does not take"),
    ("mlp", {"convolution": lax.conv_general_dilated}, "does not take"),
    ("resnet8", {"dtype": jnp.int8}, "dtype is int8"),
    ("resnet8", {"dtype": "bfloat17"}, "bfloat17"),
    ("vit_tiny", {"convolution": "native"}, "convolution is 'native'"),
  ],
)
def test_bad_fields(name, options, words, rejects):
  with rejects(words):
    models.create(name, 10, **options)
