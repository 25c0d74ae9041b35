"""Cut networks compute what the masked ones do: values, gradients, and in training."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cut_networks import (
  apply_masks,
  assert_close,
  masks_of,
  number_of_weights,
  outputs_and_gradients,
  random_kept,
  stays,
)
from flax import nnx
from foreign_networks import NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from x64 import enable_x64

from jaxsms import (
  channel_groups,
  compact,
  compact_from,
  convolution,
  filter_masks,
  magnitude_masks,
  make_mesh,
  map_ingredients,
  models,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def numbers(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def filled(shapes, seed=0):
  """Numbers for a tree of shapes; variances positive."""
  rng = np.random.default_rng(seed)

  def fill(path, x):
    value = rng.uniform(0.2, 0.8, x.shape) * rng.choice([-1, 1], x.shape)
    value = np.abs(value) if "var" in jax.tree_util.keystr(path) else value
    return jnp.asarray(value / np.sqrt(max(x.size // max(x.shape[-1:] or [1]), 1)), x.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def cut_at_random(apply, params, inputs, seed=0):
  """(compact network, masks) with half of the channels of each group."""
  groups = channel_groups(apply, params, *inputs)
  masks = masks_of(params, groups, random_kept(groups, seed))
  return compact(apply, params, masks, *inputs), masks


def check(apply, params, inputs, seed=0, tolerance=1e-5):
  """A cut network gives what the masked one does, and no more weights than stay."""
  small, masks = cut_at_random(apply, params, inputs, seed)
  assert number_of_weights(small.params) == stays(params, masks)
  masked = apply_masks(params, masks)
  outs, gradient = outputs_and_gradients(apply, masked, inputs)
  small_outs, small_gradient = outputs_and_gradients(small.apply, small.params, inputs)
  assert_close(jax.tree.leaves(outs)[0], jax.tree.leaves(small_outs)[0], tolerance)
  assert_close(small.shrink(gradient), small_gradient, tolerance)
  return small, outs, small_outs


QUICK = ("by_hand", "equinox_state")


@pytest.mark.parametrize(
  "name",
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in NETWORKS
  ],
)
def test_networks_of_others(name):
  network = NETWORKS[name]()
  small, *_ = check(network.apply, network.params, network.inputs)
  full, cut = number_of_weights(network.params), number_of_weights(small.params)
  assert cut < 0.7 * full


def ours(name, side=8, **options):
  module = models.create(name, 10, **options)
  images = numbers(4, side, side, 3)
  return module, filled(jax.eval_shape(module.init, KEY, images)), images


OURS = [
  ("mlp", 8, {"hidden": (16, 12)}),
  pytest.param("resnet8", 8, {"width": 4}, marks=pytest.mark.slow),
  pytest.param("vit_tiny", 8, {"depth": 1, "width": 12}, marks=pytest.mark.slow),
  pytest.param("resnet20", 8, {"width": 4}, marks=pytest.mark.slow),
  pytest.param("resnet56", 8, {"width": 4}, marks=pytest.mark.slow),
  pytest.param("resnet18", 8, {"width": 4}, marks=pytest.mark.slow),
  pytest.param("resnet50", 8, {"width": 4}, marks=pytest.mark.slow),
  pytest.param("resnet50", 32, {"width": 4, "stem": "imagenet"}, marks=pytest.mark.slow),
  pytest.param("vgg16", 32, {"width": 4}, marks=pytest.mark.slow),
  pytest.param("wide_resnet22_10", 8, {"widening": 1}, marks=pytest.mark.slow),
  pytest.param("wide_resnet28_10", 8, {"widening": 1}, marks=pytest.mark.slow),
  pytest.param("resnet8", 8, {"width": 4, "remat": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "side", "options"), OURS)
def test_our_networks(name, side, options):
  module, variables, images = ours(name, side, **options)
  check(module.apply, variables, (images,))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("resnet8", {"width": 4}),
    pytest.param("resnet18", {"width": 4}, marks=pytest.mark.slow),
    pytest.param("wide_resnet22_10", {"widening": 1, "dropout": 0}, marks=pytest.mark.slow),
  ],
)
def test_training_with_batch_statistics(name, options):
  """Gradients through the batch's own statistics, and new running ones."""
  module, variables, images = ours(name, **options)

  def apply(variables, images):
    return module.apply(variables, images, train=True, mutable=["batch_stats"])

  # A batch of two divides by small numbers: float32 rounding grows with the depth.
  with enable_x64():
    variables, images = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64), (variables, images)
    )
    found = check(apply, variables, (images,), tolerance=1e-9)
    small, (_, state), (_, small_state) = found
    rest = {"params": variables["params"]}
    small_rest = {"params": small.params["params"]}
    assert_close(small.shrink(state | rest), small_state | small_rest, tolerance=1e-9)


def test_dropout_draws_from_the_same_distribution():
  module, variables, images = ours("mlp", hidden=(16, 12), dropout=0.5)

  def apply(variables, images, key):
    return module.apply(variables, images, train=True, rngs={"dropout": key})

  small, masks = cut_at_random(apply, variables, (images, KEY))
  assert number_of_weights(small.params) < number_of_weights(variables)
  keys = jax.random.split(KEY, 4000)

  def moments(apply, params):
    outs = jax.jit(jax.vmap(lambda key: apply(params, images, key)))(keys)
    return outs.mean(0), outs.std(0)

  mean, std = moments(apply, apply_masks(variables, masks))
  small_mean, small_std = moments(small.apply, small.params)
  error = np.asarray(std) / np.sqrt(len(keys))
  assert np.all(np.abs(mean - small_mean) < 8 * error)
  np.testing.assert_allclose(std, small_std, rtol=0.1)


@pytest.mark.slow
def test_other_batches_jit_and_copies():
  network = NETWORKS["decoder"]()
  small, masks = cut_at_random(network.apply, network.params, network.inputs)
  masked = apply_masks(network.params, masks)
  for batch, length in ((1, 5), (3, 7)):
    words = jnp.zeros((batch, length), int)
    outs = jax.jit(network.apply)(masked, words), jax.jit(small.apply)(small.params, words)
    assert outs[0].shape == (batch, length, 11)
    assert_close(*outs)

  module, variables, images = ours("resnet8", width=4)
  small, masks = cut_at_random(module.apply, variables, (images,))
  masked = apply_masks(variables, masks)

  copies = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), masked)
  small_copies = jax.vmap(small.shrink)(copies)
  loss = lambda apply: lambda p: jnp.mean(apply(p, images) ** 2)  # noqa: E731
  several = jax.jit(jax.vmap(jax.value_and_grad(loss(module.apply))))(copies)
  cut = jax.jit(jax.vmap(jax.value_and_grad(loss(small.apply))))(small_copies)
  assert_close(several[0], cut[0])
  assert_close(jax.vmap(small.shrink)(several[1]), cut[1])


@pytest.mark.slow
def test_our_convolution_in_place_of_plain_ones_and_one_image_at_a_time():
  """Plain convolutions run as ours; ours under a vmap over images are followed too."""
  module, variables, images = ours("resnet8", width=4)
  plain = models.create("resnet8", 10, width=4, convolution=jax.lax.conv_general_dilated)
  groups = channel_groups(plain.apply, variables, images)
  masks = masks_of(variables, groups, random_kept(groups))
  masked = apply_masks(variables, masks)
  outs, gradient = outputs_and_gradients(plain.apply, masked, (images,))

  def single(variables, images):
    return jax.vmap(lambda x: module.apply(variables, x[None])[0])(images)

  own = compact(
    plain.apply, variables, masks, images, convolution=convolution.conv_general_dilated
  )
  assert "conv_general_dilated" not in {
    equation.primitive.name
    for equation in jax.make_jaxpr(own.apply)(own.params, images).eqns
  }
  for small in (own, compact(single, variables, masks, images)):
    assert number_of_weights(small.params) == stays(variables, masks)
    small_outs, cut = outputs_and_gradients(small.apply, small.params, (images,))
    assert_close(outs, small_outs)
    assert_close(small.shrink(gradient), cut)


@pytest.mark.slow
def test_copies_on_a_mesh():
  """Traced outside of shard_map, run inside: constants vary where parameters do."""
  module, variables, images = ours("resnet8", width=4)

  def apply(variables, images):
    return module.apply(variables, images, train=True, mutable=["batch_stats"])[0]

  small, _ = cut_at_random(apply, variables, (images,))
  copies = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), small.params)

  def step(copies, images):
    loss = lambda params: jnp.mean(small.apply(params, images) ** 2)  # noqa: E731
    return jax.vmap(jax.value_and_grad(loss))(copies)

  own = P("ingredient")
  sharded = jax.shard_map(
    step, mesh=make_mesh(2, 2), in_specs=(own, P()), out_specs=own,
    axis_names={"ingredient"},
  )  # fmt: skip
  assert_close(jax.jit(step)(copies, images), jax.jit(sharded)(copies, images))


def test_on_one_mesh_after_another():
  """Copies lie on other meshes than their soup: each has a trace of its own."""
  params = {"w": jnp.ones((3, 8)), "scale": jnp.ones(8), "out": jnp.ones((8, 2))}
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
  masks["w"][:, 3:] = masks["scale"][3:] = masks["out"][3:] = False

  def apply(params, x):
    x = x @ params["w"] * jax.lax.rsqrt(jnp.square(params["scale"]) + np.float32(1e-5))
    return jax.nn.relu(x) @ params["out"]

  x = jnp.arange(6.0).reshape(2, 3)
  small = compact(apply, params, masks, x)
  copies = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small.params)
  for mesh in (make_mesh(2, 1), make_mesh(1, 2)):
    mapped = map_ingredients(small.apply, (0, None), mesh=mesh)
    # Three channels of sum 3 and 12; w, scale, out twice as large: twice the output.
    once = np.array([[3.0, 3.0], [12.0, 12.0]]) * 3
    np.testing.assert_allclose(mapped(copies, x), [once, 2 * once], rtol=1e-4)


@pytest.mark.slow
def test_a_loss_cut_trains_like_the_masked_network():
  network = NETWORKS["by_hand"]()
  small, masks = cut_at_random(network.apply, network.params, network.inputs)
  labels = jnp.array([0, 1, 2, 3, 0])

  def loss(params, x, *, temperature):
    logits = network.apply(params, x) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  def train(loss, params, masks):
    @jax.jit
    def step(params):
      gradient = jax.grad(loss)(params, *network.inputs, temperature=2.0)
      return apply_masks(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), masks)

    for _ in range(5):
      params = step(params)
    return params

  full = train(loss, apply_masks(network.params, masks), masks)
  cut = train(small.cut(loss), small.params, small.masks)
  assert_close(full, small.expand(cut))
  assert_close(small.shrink(full), cut)


def test_what_masks_of_single_weights_emptied():
  """Outgoing weights gone: whatever comes in. Incoming and bias gone: where f(0) = 0."""
  params = {"a": numbers(3, 6), "b": numbers(6), "c": numbers(6, 5), "d": numbers(5, 2)}
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
  masks["c"][0] = False  # neuron 0 is read by no one
  masks["a"][:, 1] = False  # neuron 1 is relu(b)
  masks["a"][:, 2], masks["b"][2] = False, False  # neuron 2 is relu(0)
  masks["c"][:, 3] = False  # second layer: sigmoid(0) is not 0
  masks["c"][4, 1:4] = False  # some weights

  def apply(params, x):
    x = jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"]
    return jax.nn.sigmoid(x) @ params["d"]

  x = numbers(7, 3)
  small = compact(apply, params, masks, x)
  shapes = jax.tree.map(np.shape, small.params)
  assert shapes == {"a": (3, 4), "b": (4,), "c": (4, 5), "d": (5, 2)}
  assert not small.masks["c"][2, 1:4].any()
  np.testing.assert_array_equal(small.params["c"][2, 1:4], 0)
  assert_close(apply(apply_masks(params, masks), x), small.apply(small.params, x))
  back = small.expand(small.params)
  gone = [0, 2]
  np.testing.assert_array_equal(back["a"][:, gone], 0)
  np.testing.assert_array_equal(np.delete(back["a"], gone, 1), small.params["a"])


@pytest.mark.parametrize(
  "place",
  [
    np.asarray,
    jnp.asarray,
    lambda x: jax.device_put(x, jax.devices()[1]),
    lambda x: jax.device_put(x, NamedSharding(make_mesh(8), P())),
    lambda x: jax.device_put(x, NamedSharding(make_mesh(8), P(None, "ingredient"))),
  ],
  ids=["numpy", "free", "one device", "on all devices", "in parts"],
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, bool])
def test_shrinking_and_expanding_wherever_the_arrays_lie(place, dtype):
  masks = {"a": np.ones((8, 8), bool), "b": np.ones((8, 8), bool)}
  masks["a"][:, [1, 4]], masks["b"][[1, 4]] = False, False
  full = {name: np.arange(1, 65).reshape(8, 8).astype(dtype) for name in masks}
  shapes = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in masks}
  network = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
  small = compact(network, shapes, masks, np.ones((1, 8)))
  left = {"a": np.delete(full["a"], [1, 4], 1), "b": np.delete(full["b"], [1, 4], 0)}
  zeroed = {name: np.where(masks[name], full[name], 0).astype(dtype) for name in masks}
  placed = jax.tree.map(place, full)
  for shrink, expand in (
    (small.shrink, small.expand),
    (jax.jit(small.shrink), jax.jit(small.expand)),
  ):
    shrunk = shrink(placed)
    back = expand(shrunk)
    for name in masks:
      np.testing.assert_array_equal(shrunk[name], left[name])
      np.testing.assert_array_equal(back[name], zeroed[name])
      assert shrunk[name].dtype == back[name].dtype == dtype
      if isinstance(placed[name], jax.Array):
        devices = placed[name].sharding.device_set
        assert shrunk[name].sharding.device_set == back[name].sharding.device_set == devices


@pytest.mark.slow
def test_magnitude_masks_and_nothing_to_cut():
  network = NETWORKS["by_hand"]()
  masks = magnitude_masks(network.params, 0.5, prunable=lambda path, leaf: leaf.ndim == 2)
  small = compact(network.apply, network.params, masks, *network.inputs)
  masked = apply_masks(network.params, masks)
  assert_close(
    network.apply(masked, *network.inputs), small.apply(small.params, *network.inputs)
  )
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), network.params)
  small = compact(network.apply, network.params, masks, *network.inputs)
  assert number_of_weights(small.params) == number_of_weights(network.params)


def test_one_position_of_each_axis_stays():
  params = {"a": numbers(3, 6), "c": numbers(6, 2)}
  masks = jax.tree.map(lambda x: np.zeros(x.shape, bool), params)
  apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"]  # noqa: E731
  small = compact(apply, params, masks, numbers(2, 3))
  assert jax.tree.map(np.shape, small.params) == {"a": (3, 1), "c": (1, 2)}
  np.testing.assert_array_equal(small.apply(small.params, numbers(2, 3)), np.zeros((2, 2)))


def test_derivatives_of_ones_own_stay():
  """A straight-through estimator, and relu's derivative at 0."""

  @jax.custom_vjp
  def rounded(x):
    return jnp.round(x)

  rounded.defvjp(lambda x: (rounded(x), jnp.cos(x)), lambda kept, g: (7 * g * kept,))
  params = {"a": numbers(3, 6).at[:, 0].set(0), "c": numbers(6, 2)}
  kept = [np.array([1, 1, 0, 1, 0, 1], bool)]
  x = numbers(4, 3)
  for act in (rounded, jax.nn.relu, jax.nn.relu6, jax.nn.silu, jax.nn.softmax):
    axis = {"axis": 0} if act is jax.nn.softmax else {}
    apply = lambda p, x, act=act, axis=axis: act(3 * x @ p["a"], **axis) @ p["c"]  # noqa: E731
    groups = channel_groups(apply, params, x)
    masks = masks_of(params, groups, kept)
    small = compact(apply, params, masks, x)
    assert small.params["a"].shape == (3, 4)
    _, gradient = outputs_and_gradients(apply, apply_masks(params, masks), (x,))
    _, cut = outputs_and_gradients(small.apply, small.params, (x,))
    assert_close(small.shrink(gradient), cut)


def test_what_is_saved_loads_again():
  network = NETWORKS["decoder"]()
  small, _ = cut_at_random(network.apply, network.params, network.inputs)
  layout = json.loads(json.dumps(small.layout))
  arrays = [np.asarray(x) for x in jax.tree.leaves(small.params)]
  params = jax.tree.unflatten(jax.tree.structure(network.params), arrays)
  again = compact_from(network.apply, params, layout)
  np.testing.assert_array_equal(
    small.apply(small.params, *network.inputs), again.apply(again.params, *network.inputs)
  )
  jax.tree.map(
    np.testing.assert_array_equal, small.expand(small.params), again.expand(params)
  )


class Module(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_an_nnx_module_comes_back_and_trains_in_its_own_loop():
  graph, state = nnx.split(nnx.eval_shape(lambda: Module(nnx.Rngs(0))))
  state, images = filled(state), numbers(4, 8, 8, 3)

  def apply(state, x):
    module = nnx.merge(graph, state)
    return module(x), nnx.state(module)

  small, masks = cut_at_random(apply, state, (images,))
  labels = jnp.array([0, 1, 2, 0])

  def trained(state, masks):
    """Three steps of the module's own loop; removed weights stay 0."""
    module = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    optimizer = nnx.Optimizer(module, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
      def loss(module):
        logits = module(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

      value, gradient = nnx.value_and_grad(loss)(module)
      optimizer.update(module, gradient)
      nnx.update(module, apply_masks(nnx.state(module), masks))
      return value

    losses = [float(step(module, optimizer)) for _ in range(3)]
    return losses, nnx.state(module)

  assert small.params["conv"]["kernel"][...].shape[-1] < 8
  logits = small.apply(small.params, images)[0]
  # Called outside of a trace, the module writes new batch statistics into its state.
  masked_logits = apply(apply_masks(state, masks), images)[0]
  assert_close(masked_logits, logits)
  module = nnx.merge(graph, jax.tree.map(jnp.copy, small.params))
  assert_close(module(images), logits)  # its own call
  losses, after = trained(small.params, jax.tree.map(lambda x: True, small.params))
  full_losses, full = trained(apply_masks(state, masks), masks)
  assert losses[-1] < losses[0]
  np.testing.assert_allclose(losses, full_losses, rtol=1e-5)
  assert_close(apply_masks(full, masks), small.expand(after))
  assert_close(small.shrink(full), after)


def test_an_equinox_module_comes_back_as_one():
  module = filled_module = eqx.nn.MLP(4, 3, 8, 2, key=KEY)
  apply = lambda m, x: jax.vmap(m)(x)  # noqa: E731
  x = numbers(5, 4)
  small, masks = cut_at_random(apply, filled_module, (x,))
  assert isinstance(small.params, eqx.nn.MLP)
  assert small.params.activation is module.activation

  def trained(module, masks):
    """Four steps with momentum; removed weights stay 0."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = optimizer.init(eqx.filter(module, eqx.is_array))

    @eqx.filter_jit
    def step(module, state):
      loss = lambda m: jnp.mean(jax.vmap(m)(x) ** 2)  # noqa: E731
      value, gradient = eqx.filter_value_and_grad(loss)(module)
      updates, state = optimizer.update(gradient, state)
      return apply_masks(eqx.apply_updates(module, updates), masks), state, value

    losses = []
    for _ in range(4):
      module, state, value = step(module, state)
      losses.append(float(value))
    return losses, module

  losses, after = trained(small.params, jax.tree.map(lambda x: True, small.params))
  full_losses, full = trained(apply_masks(module, masks), masks)
  assert losses[-1] < losses[0]
  np.testing.assert_allclose(losses, full_losses, rtol=1e-5)
  arrays = lambda tree: eqx.filter(tree, eqx.is_array)  # noqa: E731
  assert_close(arrays(full), arrays(small.expand(after)))
  assert_close(arrays(small.shrink(full)), arrays(after))


ACTS = {
  "relu": jax.nn.relu, "gelu": jax.nn.gelu, "sigmoid": jax.nn.sigmoid, "cos": jnp.cos,
  "glu": lambda x: jnp.multiply(*jnp.split(x, 2, -1)),
  "heads": lambda x: jax.nn.softmax(x.reshape(*x.shape[:-1], 2, -1), -2).reshape(x.shape),
  "softmax": jax.nn.softmax, "norm": jax.nn.standardize,
  "double": lambda x: jnp.concatenate([x, jnp.sin(x)], -1),
  "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2))), "slice": lambda x: x[:, 1::2],
  "shuffle": lambda x: x.reshape(-1, 2, x.shape[-1] // 2).swapaxes(1, 2).reshape(x.shape),
  "residual": lambda x: x + jnp.flip(x, -1), "sum": lambda x: x * x.sum(-1, keepdims=True),
  "nothing": lambda x: jnp.concatenate([x[:, :0], x], -1),
  "scan": lambda x: jax.lax.associative_scan(
    lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (jnp.ones(x.shape), x), axis=0
  )[1],
}  # fmt: skip


@pytest.mark.parametrize("name", ["nothing", "scan"])
def test_axes_of_length_0(name):
  params = {"a": numbers(3, 6), "c": numbers(6, 2)}
  check(lambda p, x: ACTS[name](x @ p["a"]) @ p["c"], params, (numbers(4, 3),))


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(st.sampled_from(sorted(ACTS)), min_size=1, max_size=4), st.integers(0, 99))
def test_any_network(names, seed):
  """Whatever the operations between its layers: a cut network is the masked one."""
  rng = np.random.default_rng(seed)
  x = numbers(3, 4)
  params, width = [], 4
  for name in names:
    features = 2 * int(rng.integers(2, 5))
    params.append({
      "w": jnp.asarray(rng.normal(size=(width, features)), jnp.float32),
      "b": jnp.asarray(rng.normal(size=features), jnp.float32),
    })  # fmt: skip
    width = ACTS[name](jnp.zeros((3, features))).shape[-1]
  params.append({"w": jnp.asarray(rng.normal(size=(width, 2)), jnp.float32)})

  def apply(params, x):
    for layer, name in zip(params, names, strict=False):
      x = ACTS[name](x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"]

  small, masks = cut_at_random(apply, params, (x,), seed)
  assert number_of_weights(small.params) == stays(params, masks)
  masked = apply_masks(params, masks)
  assert_close(apply(masked, x), small.apply(small.params, x), 1e-4, nonzero=False)
  # Of any masks at all, also of those that no group makes.
  masks = jax.tree.map(lambda x: rng.random(x.shape) < 0.3, params)
  small = compact(apply, params, masks, x)
  masked = apply_masks(params, masks)
  assert_close(apply(masked, x), small.apply(small.params, x), 1e-4, nonzero=False)


def test_refuses(rejects):
  params = {"a": {"w": numbers(3, 4)}, "c": {"w": numbers(4, 2)}}
  x = numbers(2, 3)
  apply = lambda p, x: jnp.tanh(x @ p["a"]["w"]) @ p["c"]["w"]  # noqa: E731
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
  masks["a"]["w"][:, 0] = False
  small = compact(apply, params, masks, x)
  assert small.params["a"]["w"].shape == (3, 3)
  with rejects("a/w has shape [3, 4] and the cut network [3, 3]"):
    small.apply(params, x)
  with rejects("does not have the leaves"):
    small.apply({"a": params["a"]}, x)
  with rejects("a/w has shape [3, 4] and the cut network [3, 3]: pass its params"):
    small.expand(params)
  with rejects("tree has no leaf of the cut network, such as a/w: pass a tree like"):
    small.expand({})
  assert small.expand({"a": small.params["a"], "step": 3})["step"] == 3
  with rejects("cannot have the channels of a/w cut"):
    small.cut(lambda p, x: x @ p["a"]["w"])(small.params, x)
  with rejects("different tree structures"):
    compact(apply, params, {"a": masks["a"]}, x)
  with rejects("differ in shape at a/w"):
    compact(apply, params, masks | {"a": {"w": np.ones((2, 4), bool)}}, x)
  with rejects("apply cannot be traced"):
    compact(apply, params, masks, numbers(2, 5))
  with rejects("does not have the leaves"):
    compact_from(apply, {"a": params["a"]}, small.layout)


@pytest.mark.slow
def test_shapes_alone():
  """Parameters that are shapes are cut to shapes, and nothing is computed."""
  module, variables, images = ours("resnet8", width=4)
  shapes = jax.eval_shape(lambda: variables)
  groups = channel_groups(module.apply, shapes, images)
  masks = masks_of(shapes, groups, random_kept(groups))
  small = compact(module.apply, shapes, masks, images)
  assert stays(variables, masks) == sum(x.size for x in jax.tree.leaves(small.params))
  assert jax.eval_shape(small.apply, small.params, images).shape == (4, 10)


def two_layers():
  """Masks that empty neuron 0 of the first layer, and no bias; the function; an input."""
  params = {"a": {"w": numbers(3, 4), "b": numbers(4)}, "c": {"w": numbers(4, 3)}}
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
  masks["a"]["w"][:, 0] = False

  def apply(params, x):
    return jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) @ params["c"]["w"]

  return apply, params, masks, numbers(2, 3)


WORDS = "masks empty 1 of the 4 positions of a/w, axis 1, and none of them can be cut"


def no_bias(masks):
  masks["a"]["b"][0] = False  # so the channel is cut


def no_class(masks):
  no_bias(masks)
  masks["c"]["w"][:, 1] = False


def no_class_and_single_weights(masks):
  no_class(masks)
  masks["c"]["w"][2, 0] = False


def no_reader(masks):
  masks["c"]["w"][0] = False


@pytest.mark.parametrize(
  ("change", "place", "words"),
  [
    (lambda masks: None, "a/w, axis 1", f"{WORDS}: a product sums over numbers that are"),
    (no_bias, None, None),
    (no_reader, None, None),
    (
      no_class,
      "c/w, axis 1",
      "positions of c/w, axis 1, and none of them can be cut: it is",
    ),
    # Single weights may happen to leave an output without any: no reason for a warning.
    (no_class_and_single_weights, "c/w, axis 1", None),
  ],
)
def test_whole_channels_that_no_cut_can_honour_are_named(change, place, words, caplog):
  apply, params, masks, x = two_layers()
  change(masks)
  small = compact(apply, params, masks, x)
  assert list(small.left_alone) == ([place] if place else [])
  said = [record.message for record in caplog.records]
  assert len(said) == bool(words)
  assert not words or words in said[0]
  assert_close(apply(apply_masks(params, masks), x), small.apply(small.params, x))


def test_masks_of_channels_leave_nothing_to_say(caplog):
  apply, params, _, x = two_layers()
  groups = channel_groups(apply, params, x)
  masks = masks_of(params, groups, [np.array([True, False, False, True])])
  small = compact(apply, params, masks, x)
  assert small.params["a"]["w"].shape == (3, 2)
  assert not small.left_alone
  assert not caplog.records


@pytest.mark.parametrize("biases", [False, True])
def test_filters_are_cut_where_that_is_exact(biases, caplog):
  """A filter whose bias stays is a constant, and no 0."""
  params = {"a": {"kernel": numbers(3, 3, 2, 8)}, "c": {"kernel": numbers(3, 3, 8, 6)}}
  params["head"] = {"kernel": numbers(6, 3)}
  if biases:
    for name, n in (("a", 8), ("c", 6)):
      params[name]["bias"] = numbers(n)

  def apply(params, x):
    for name in "ac":
      x = jax.lax.conv_general_dilated(
        x, params[name]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )  # fmt: skip
      x = jax.nn.relu(x + params[name].get("bias", 0))
    return x.mean((1, 2)) @ params["head"]["kernel"]

  x = numbers(2, 5, 5, 2)
  hidden = lambda path, leaf: leaf.ndim == 4  # noqa: E731
  masks = filter_masks(params, 0.5, scope="uniform", prunable=hidden)
  small = compact(apply, params, masks, x)
  shapes = {name: layer["kernel"].shape for name, layer in small.params.items()}
  cut = {"a": (3, 3, 2, 4), "c": (3, 3, 4, 3), "head": (3, 3)}
  full = {"a": (3, 3, 2, 8), "c": (3, 3, 8, 6), "head": (6, 3)}
  assert shapes == (full if biases else cut)
  assert len(caplog.records) == biases
  assert_close(apply(apply_masks(params, masks), x), small.apply(small.params, x))
