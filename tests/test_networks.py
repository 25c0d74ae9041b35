"""The larger networks: counts, options, initialisation, logits against PyTorch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsms import models, prunable
from jaxsms.models.resnet import ResNet, torchvision_init
from jaxsms.models.resnet_cifar import CifarResNet
from jaxsms.models.vgg import VGG, max_pool
from jaxsms.models.wide_resnet import WideResNet
from jaxsms.training.inference import recalibrate
from jaxsms.training.state import Data, TrainState, sgd
from jaxsms.training.step import Recipe, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def images_of(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes(module, images):
  return jax.eval_shape(module.init, KEY, images)


def random_variables(module, images, seed=0):
  """Values that no fresh network has: every bias, scale and statistic is its own."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    inputs = leaf.size / leaf.shape[-1] if path[-1].key == "kernel" else 4
    return (rng.standard_normal(leaf.shape) / np.sqrt(inputs)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes(module, images))


def random_images(*shape):
  return np.random.default_rng(9).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
  ("name", "classes", "size", "parameters", "prunable_weights"),
  [
    ("resnet18", 10, 32, 11_173_962, 11_164_352),
    ("vgg16", 10, 32, 14_728_266, 14_715_584),
    pytest.param(
      "wide_resnet28_10", 100, 32, 36_546_980, 36_518_832, marks=pytest.mark.slow
    ),
    pytest.param(
      "wide_resnet22_10", 100, 32, 26_863_460, 26_842_032, marks=pytest.mark.slow
    ),
    pytest.param(
      "wide_resnet22_10", 10, 32, 26_805_770, 26_784_432, marks=pytest.mark.slow
    ),
    ("resnet50", 1000, 224, 25_557_032, 25_502_912),
    # Weights: patches 48 * 192, 12 blocks of 4 + 8 squares of 192, classes 192 * 10. The
    # others: biases 192 and 10, token and positions 66 * 192, the last norm 2 * 192, and in
    # each block biases of (4 + 4 + 1) * 192 and two norms of 2 * 192.
    (
      "vit_tiny",
      10,
      32,
      9216 + 12 * 12 * 192**2 + 1920 + 202 + 66 * 192 + 384 + 12 * (9 + 4) * 192,
      9216 + 12 * 12 * 192**2 + 1920,
    ),
  ],
)
def test_counts(name, classes, size, parameters, prunable_weights):
  module, images = models.create(name, classes), images_of(2, size, size, 3)
  variables = shapes(module, images)
  leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
  assert sum(x.size for _, x in leaves) == parameters
  assert sum(x.size for path, x in leaves if prunable(path, x)) == prunable_weights
  assert jax.eval_shape(module.apply, variables, images).shape == (2, classes)


@pytest.mark.parametrize(
  ("name", "options", "image"),
  [
    ("resnet18", {"stem": "imagenet", "width": 16}, (70, 45, 1)),
    ("resnet50", {"stem": "cifar", "width": 16}, (9, 12, 3)),
    ("vgg16", {"width": 8}, (45, 33, 3)),
    ("wide_resnet22_10", {"widening": 2, "dropout": 0.0}, (7, 10, 1)),
    ("vit_tiny", {"patch_size": 7, "depth": 2, "width": 12, "heads": 4}, (28, 14, 1)),
  ],
)
def test_options_and_other_images(name, options, image):
  module, images = models.create(name, 3, **options), images_of(2, *image)
  assert jax.eval_shape(module.apply, shapes(module, images), images).shape == (2, 3)


SMALL = {
  "basic": ResNet(5, blocks=(1, 1)),
  "bottleneck": ResNet(5, blocks=(2, 1), bottleneck=True, stem="imagenet", width=4),
  "vgg": VGG(5, convolutions=(1, 2), width=4),
  "wide_resnet": WideResNet(5, depth=10, widening=2),
  "vit": models.create("vit_tiny", 5, depth=2, width=12),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow if name in ("basic", "bottleneck") else ())
    for name in SMALL
  ],
)
def test_two_copies_take_a_training_step_and_are_recalibrated(name):
  module, images = SMALL[name], images_of(2, 4, 12, 12, 3)
  variables = shapes(module, images_of(4, 12, 12, 3))
  params, stats = variables["params"], variables.get("batch_stats", {})
  assert bool(stats) == (name != "vit")
  optimizer = sgd(0.1, 1e-4)

  def steps(params, stats, images, labels):
    def step(params, stats, images):
      state = TrainState(params, stats, optimizer.init(params), jnp.zeros((), jnp.int32))
      masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
      recipe = Recipe(module)
      state, metrics = train_step(recipe, optimizer, KEY, state, masks, images, labels)
      data = Data(images, labels)
      return (
        state,
        metrics,
        recalibrate(module, lambda _, x: x, 2, data, KEY, state.params, state.batch_stats),
      )

    return jax.vmap(step, (None, None, 0))(params, stats, images)

  labels = jax.ShapeDtypeStruct((4,), jnp.int32)
  state, metrics, new_stats = jax.eval_shape(steps, params, stats, images, labels)
  two = functools.partial(jax.tree.map, lambda x: (2, *x.shape))
  assert jax.tree.map(lambda x: x.shape, state.params) == two(params)
  assert jax.tree.map(lambda x: x.shape, new_stats) == two(stats)
  assert metrics["loss"].shape == (2,)


@pytest.mark.slow
def test_resnet50_starts_as_torchvisions():
  module = ResNet(10, blocks=(1,), bottleneck=True, conv_init=torchvision_init)
  assert models.create("resnet50", 10).conv_init is torchvision_init
  params = jax.jit(module.init)(KEY, jnp.zeros((1, 8, 8, 3)))["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    owner, name = path[-2].key, path[-1].key
    if owner.startswith("Conv"):
      height, width, _, features = leaf.shape
      deviation = np.sqrt(2 / (height * width * features))
      assert np.std(leaf) == pytest.approx(deviation, rel=0.05)
      assert np.abs(leaf).max() > 2.5 * deviation  # neither uniform nor truncated
    elif owner.startswith("BatchNorm"):
      np.testing.assert_array_equal(leaf, 1 if name == "scale" else 0)
    else:
      assert np.abs(leaf).max() <= 1 / np.sqrt(256)


@pytest.mark.slow
def test_attention_starts_as_pytorchs():
  module = models.create("vit_tiny", 10, depth=1, width=96)
  params = jax.jit(module.init)(KEY, jnp.zeros((1, 8, 8, 3)))["params"]
  block = params["TransformerBlock_0"]
  attention = block["MultiHeadDotProductAttention_0"]
  bounds = dict.fromkeys(("query", "key", "value"), np.sqrt(6 / (4 * 96)))
  for name, bound in (bounds | {"out": 1 / np.sqrt(96)}).items():
    largest = np.abs(attention[name]["kernel"]).max()
    assert 0.99 * bound < largest <= bound
    assert not np.any(attention[name]["bias"])
  for name, inputs in (("Dense_0", 96), ("Dense_1", 384)):
    for leaf in block[name].values():
      assert 0.95 / np.sqrt(inputs) < np.abs(leaf).max() <= 1 / np.sqrt(inputs)


class Torch:
  """PyTorch's functions on our variables, images [batch, channels, height, width]."""

  def __init__(self, variables):
    import torch

    self.torch = torch
    self.functional = self.torch.nn.functional
    self.variables = variables

  def tensor(self, array):
    return self.torch.tensor(np.array(array))

  def get(self, *names, collection="params"):
    return functools.reduce(
      lambda tree, name: tree[name], names, self.variables[collection]
    )

  def conv(self, x, *names, stride=1):
    layer = self.get(*names)
    kernel = self.tensor(layer["kernel"].transpose(3, 2, 0, 1))
    bias = self.tensor(layer["bias"]) if "bias" in layer else None
    padding = kernel.shape[-1] // 2
    return self.functional.conv2d(x, kernel, bias, stride=stride, padding=padding)

  def norm(self, x, *names):
    layer, stats = self.get(*names), self.get(*names, collection="batch_stats")
    arrays = (stats["mean"], stats["var"], layer["scale"], layer["bias"])
    return self.functional.batch_norm(x, *map(self.tensor, arrays))

  def dense(self, x, *names):
    layer = self.get(*names)
    return self.functional.linear(
      x, self.tensor(layer["kernel"].T), self.tensor(layer["bias"])
    )

  def layer_norm(self, x, *names):
    layer = self.get(*names)
    arrays = self.tensor(layer["scale"]), self.tensor(layer["bias"])
    return self.functional.layer_norm(x, x.shape[-1:], *arrays, eps=1e-6)

  def attention(self, x, heads, *names):
    width = x.shape[-1]
    parts = [self.get(*names, part) for part in ("query", "key", "value")]
    weight = np.concatenate([p["kernel"].reshape(width, width).T for p in parts])
    bias = np.concatenate([p["bias"].ravel() for p in parts])
    module = self.torch.nn.MultiheadAttention(width, heads, batch_first=True)
    out = self.get(*names, "out")
    state = {
      "in_proj_weight": weight,
      "in_proj_bias": bias,
      "out_proj.weight": out["kernel"].reshape(width, width).T,
      "out_proj.bias": out["bias"],
    }
    module.load_state_dict({name: self.tensor(x) for name, x in state.items()})
    return module(x, x, x, need_weights=False)[0]


def torch_resnet18(net, x):
  x = net.norm(net.conv(x, "Conv_0"), "BatchNorm_0").relu()
  for number in range(8):
    block, stride = f"BasicBlock_{number}", 2 if number in (2, 4, 6) else 1
    y = net.norm(net.conv(x, block, "Conv_0", stride=stride), block, "BatchNorm_0").relu()
    y = net.norm(net.conv(y, block, "Conv_1"), block, "BatchNorm_1")
    if stride == 2:
      x = net.norm(net.conv(x, block, "Conv_2", stride=2), block, "BatchNorm_2")
    x = (x + y).relu()
  return net.dense(x.mean((2, 3)), "Dense_0")


def torch_bottlenecks(net, x):
  """Stages of 2 and 1 blocks after the stem for ImageNet."""
  x = net.norm(net.conv(x, "Conv_0", stride=2), "BatchNorm_0").relu()
  x = net.functional.max_pool2d(x, 3, stride=2, padding=1)
  for number, (stride, projection) in enumerate([(1, True), (1, False), (2, True)]):
    block = f"Bottleneck_{number}"
    y = net.norm(net.conv(x, block, "Conv_0"), block, "BatchNorm_0").relu()
    y = net.norm(net.conv(y, block, "Conv_1", stride=stride), block, "BatchNorm_1").relu()
    y = net.norm(net.conv(y, block, "Conv_2"), block, "BatchNorm_2")
    if projection:
      x = net.norm(net.conv(x, block, "Conv_3", stride=stride), block, "BatchNorm_3")
    x = (x + y).relu()
  return net.dense(x.mean((2, 3)), "Dense_0")


def torch_vgg16(net, x):
  number = 0
  for layers in (2, 2, 3, 3, 3):
    for _ in range(layers):
      x = net.norm(net.conv(x, f"Conv_{number}"), f"BatchNorm_{number}").relu()
      number += 1
    x = net.functional.max_pool2d(x, 2)
  return net.dense(x.flatten(1), "Dense_0")


def torch_wide_resnet10(net, x):
  x = net.conv(x, "Conv_0")
  for number, stride in enumerate((1, 2, 2)):
    block = f"WideBlock_{number}"
    y = net.conv(net.norm(x, block, "BatchNorm_0").relu(), block, "Conv_0")
    y = net.norm(y, block, "BatchNorm_1").relu()
    y = net.conv(y, block, "Conv_1", stride=stride)
    x = y + net.conv(x, block, "Conv_2", stride=stride)
  return net.dense(net.norm(x, "BatchNorm_0").relu().mean((2, 3)), "Dense_0")


def torch_vit(net, x):
  patches = net.get("patches")
  kernel = net.tensor(patches["kernel"].transpose(3, 2, 0, 1))
  x = net.functional.conv2d(x, kernel, net.tensor(patches["bias"]), stride=4)
  x = x.flatten(2).transpose(1, 2)
  token = net.tensor(net.get("class_token")).expand(len(x), -1, -1)
  x = net.torch.cat([token, x], 1) + net.tensor(net.get("position_embedding"))
  for number in range(2):
    block = f"TransformerBlock_{number}"
    y = net.layer_norm(x, block, "LayerNorm_0")
    x = x + net.attention(y, 3, block, "MultiHeadDotProductAttention_0")
    y = net.dense(net.layer_norm(x, block, "LayerNorm_1"), block, "Dense_0")
    x = x + net.dense(net.functional.gelu(y), block, "Dense_1")
  return net.dense(net.layer_norm(x, "LayerNorm_0")[:, 0], "Dense_0")


def test_fields_of_the_shape_come_first():
  assert (CifarResNet(10, 20, 8).depth, CifarResNet(10, 20, 8).width) == (20, 8)
  assert (ResNet(10, (2, 2)).blocks, VGG(10, (1, 2)).convolutions) == ((2, 2), (1, 2))
  assert WideResNet(10, 16).depth == 16


@pytest.mark.torch
@pytest.mark.parametrize(
  ("module", "torch_network", "size"),
  [
    (models.create("resnet18", 5, width=4), torch_resnet18, 11),
    (models.create("vgg16", 5, width=4), torch_vgg16, 32),
    (SMALL["wide_resnet"], torch_wide_resnet10, 11),
    (SMALL["bottleneck"], torch_bottlenecks, 35),
    (SMALL["vit"], torch_vit, 12),
  ],
  ids=["resnet18", "vgg16", "wide_resnet", "bottleneck", "vit"],
)
def test_logits_equal_pytorchs(module, torch_network, size):
  images = random_images(3, size, size, 3)
  variables = random_variables(module, images)
  net = Torch(variables)
  with net.torch.no_grad():
    expected = torch_network(net, net.tensor(images.transpose(0, 3, 1, 2))).numpy()
  assert np.std(expected) > 0.05
  logits = jax.jit(module.apply)(variables, images)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_max_pool_and_its_gradient_are_linens_after_a_relu():
  x = random_images(2, 7, 4, 3)

  def value_and_gradient(pool):
    def value(x):
      y = pool(nn.relu(x))
      return (y**3).sum(), y

    return jax.jit(jax.grad(value, has_aux=True))(x)

  ours = value_and_gradient(max_pool)
  theirs = value_and_gradient(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
  "module",
  [
    WideResNet(3, depth=10, widening=1),
    models.create("vit_tiny", 3, depth=1, width=6, dropout=0.3),
  ],
  ids=["wide_resnet", "vit"],
)
def test_dropout_acts_in_training_alone(module):
  images = random_images(2, 8, 8, 1)
  variables = random_variables(module, images)

  @functools.partial(jax.jit, static_argnames="train")
  def logits(seed, train):
    rngs = {"dropout": jax.random.key(seed)}
    mutable = ["batch_stats"] if train else False
    out = module.apply(variables, images, train=train, rngs=rngs, mutable=mutable)
    return out[0] if train else out

  assert np.abs(logits(0, True) - logits(1, True)).max() > 1e-3
  np.testing.assert_array_equal(logits(0, False), logits(1, False))


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("resnet18", {"stem": "cifra"}, "did you mean cifar"),
    ("resnet18", {"width": 0}, "width is 0"),
    ("resnet50", {"blocks": (1,)}, "does not take"),
    ("resnet20", {"depth": 8}, "does not take"),
    ("vgg16", {"width": "64"}, "does not take"),
    ("wide_resnet28_10", {"depth": 10}, "does not take"),
    ("wide_resnet28_10", {"dropout": 1.0}, "in [0, 1)"),
    ("vit_tiny", {"width": 64}, "multiple of heads"),
    ("vit_tiny", {"heads": 0}, "heads is 0"),
  ],
)
def test_bad_options(name, options, words, rejects):
  if words == "does not take":
    with pytest.raises(ValueError, match=words):
      models.create(name, 10, **options)
  else:
    with rejects(words):
      models.create(name, 10, **options)


@pytest.mark.parametrize(
  ("name", "size", "words"),
  [("vgg16", 28, "at least 32x32"), ("vit_tiny", 30, "multiples of patch_size")],
)
def test_images_that_do_not_fit(name, size, words, rejects):
  with rejects(words):
    shapes(models.create(name, 10), images_of(1, size, size, 3))
