"""PyTorch's networks, with the names of public code, as ours and back."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsms import models
from jaxsms.models.mlp import MLP
from jaxsms.models.resnet import ResNet
from jaxsms.models.resnet_cifar import CifarResNet
from jaxsms.models.vgg import VGG
from jaxsms.models.wide_resnet import WideResNet
from jaxsms.pretrained import fit_model, from_torch, to_torch

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilation")]

torch = pytest.importorskip("torch")
nn = torch.nn
F = nn.functional


def make_block(inputs, features, stride, bottleneck, shortcut):
  """The blocks of torchvision ("downsample") and of CIFAR networks ("shortcut")."""
  outputs = features * (4 if bottleneck else 1)
  block = nn.Module()
  shapes = (
    [(inputs, features, 1, 1), (features, features, 3, stride), (features, outputs, 1, 1)]
    if bottleneck
    else [(inputs, features, 3, stride), (features, features, 3, 1)]
  )
  for i, (a, b, size, step) in enumerate(shapes, 1):
    setattr(block, f"conv{i}", nn.Conv2d(a, b, size, step, size // 2, bias=False))
    setattr(block, f"bn{i}", nn.BatchNorm2d(b))
  if stride != 1 or inputs != outputs:
    layers = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
    setattr(block, shortcut, nn.Sequential(*layers))

  def forward(x):
    y = x
    for i in range(1, len(shapes) + 1):
      y = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(y))
      y = y if i == len(shapes) else y.relu()
    return (y + (getattr(block, shortcut)(x) if hasattr(block, shortcut) else x)).relu()

  block.forward = forward
  return block, outputs


def make_cifar_block(inputs, features, stride):
  """Two convolutions, and option A's shortcut, which has no parameters."""
  block = nn.Module()
  block.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
  block.bn1 = nn.BatchNorm2d(features)
  block.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
  block.bn2 = nn.BatchNorm2d(features)

  def forward(x):
    y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    if stride != 1 or inputs != features:
      x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, features // 4, features // 4))
    return (y + x).relu()

  block.forward = forward
  return block, features


def make_wide_block(inputs, features, stride):
  block = nn.Module()
  block.bn1 = nn.BatchNorm2d(inputs)
  block.conv1 = nn.Conv2d(inputs, features, 3, 1, 1)
  block.bn2 = nn.BatchNorm2d(features)
  block.conv2 = nn.Conv2d(features, features, 3, stride, 1)
  block.shortcut = nn.Sequential()
  if stride != 1 or inputs != features:
    block.shortcut = nn.Sequential(nn.Conv2d(inputs, features, 1, stride))

  def forward(x):
    y = block.conv1(block.bn1(x).relu())
    return block.conv2(block.bn2(y).relu()) + block.shortcut(x)

  block.forward = forward
  return block, features


class Residual(nn.Module):
  """Stem, stages called layer1, layer2, ... and a dense layer called `head`."""

  def __init__(
    self, block, blocks, width, classes, head="linear", imagenet=False, stem=None
  ):
    super().__init__()
    self.head, self.imagenet, self.wide = head, imagenet, stem is not None
    channels = stem or width
    size = 7 if imagenet else 3
    self.conv1 = nn.Conv2d(
      3, channels, size, 2 if imagenet else 1, size // 2, bias=self.wide
    )
    stages = []
    for stage, number in enumerate(blocks):
      layers = []
      for i in range(number):
        layer, channels = block(channels, width * 2**stage, 2 if stage and not i else 1)
        layers.append(layer)
      stages.append(nn.Sequential(*layers))
    self.bn1 = nn.BatchNorm2d(channels if self.wide else width)
    for number, stage in enumerate(stages, 1):
      setattr(self, f"layer{number}", stage)
    self.stages = len(stages)
    setattr(self, head, nn.Linear(channels, classes))

  def forward(self, x):
    x = self.conv1(x)
    x = x if self.wide else self.bn1(x).relu()
    x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
    for number in range(1, self.stages + 1):
      x = getattr(self, f"layer{number}")(x)
    x = self.bn1(x).relu() if self.wide else x
    return getattr(self, self.head)(x.mean((2, 3)))


class TorchVGG(nn.Module):
  def __init__(self, stages, width, classes):
    super().__init__()
    layers, inputs = [], 3
    for stage, number in enumerate(stages):
      for _ in range(number):
        features = width * min(2**stage, 8)
        layers += [nn.Conv2d(inputs, features, 3, padding=1), nn.BatchNorm2d(features)]
        layers.append(nn.ReLU())
        inputs = features
      layers.append(nn.MaxPool2d(2, 2))
    self.features = nn.Sequential(*layers, nn.AvgPool2d(1, 1))
    self.classifier = nn.Linear(inputs, classes)

  def forward(self, x):
    return self.classifier(self.features(x).flatten(1))


class TorchMLP(nn.Module):
  def __init__(self, *widths):
    super().__init__()
    self.layers = len(widths) - 1
    for i in range(self.layers):
      setattr(self, f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))

  def forward(self, x):
    x = self.fc1(x.flatten(1))
    for i in range(2, self.layers + 1):
      x = getattr(self, f"fc{i}")(x.relu())
    return x


class TorchAttention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    b, n, width = x.shape
    qkv = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(*qkv)
    return self.proj(x.transpose(1, 2).reshape(b, n, width))


class TorchViT(nn.Module):
  """With the names of timm."""

  def __init__(self, size, patch, depth, width, heads, classes):
    super().__init__()
    norm = lambda: nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    self.patch_embed = nn.Module()
    self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
    self.blocks = nn.Sequential()
    for _ in range(depth):
      block = nn.Module()
      block.norm1, block.attn, block.norm2 = norm(), TorchAttention(width, heads), norm()
      block.mlp = nn.Module()
      block.mlp.fc1 = nn.Linear(width, 4 * width)
      block.mlp.fc2 = nn.Linear(4 * width, width)
      self.blocks.append(block)
    self.norm = norm()
    self.head = nn.Linear(width, classes)

  def forward(self, x):
    x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
    for block in self.blocks:
      x = x + block.attn(block.norm1(x))
      x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return self.head(self.norm(x)[:, 0])


def basic(shortcut):
  return lambda *args: make_block(*args, False, shortcut)


def bottleneck(shortcut):
  return lambda *args: make_block(*args, True, shortcut)


IMAGENET = {"head": "fc", "imagenet": True}
# Our network, PyTorch's with the names of public code, and the size of images.
NETWORKS = {
  "mlp": (MLP(5, hidden=(7, 6)), lambda: TorchMLP(4 * 5 * 3, 7, 6, 5), (4, 5)),
  "resnet14": (
    CifarResNet(5, depth=14, width=4),
    lambda: Residual(make_cifar_block, (2, 2, 2), 4, 5),
    (8, 8),
  ),
  "resnet_cifar": (
    ResNet(5, blocks=(1, 2), width=4),
    lambda: Residual(basic("shortcut"), (1, 2), 4, 5),
    (8, 8),
  ),
  "resnet_imagenet": (
    ResNet(5, blocks=(2, 1), width=4, stem="imagenet"),
    lambda: Residual(basic("downsample"), (2, 1), 4, 5, **IMAGENET),
    (17, 16),
  ),
  "bottleneck_cifar": (
    ResNet(5, blocks=(1, 1), width=4, bottleneck=True),
    lambda: Residual(bottleneck("shortcut"), (1, 1), 4, 5),
    (8, 8),
  ),
  "bottleneck_imagenet": (
    ResNet(5, blocks=(2, 1), width=4, bottleneck=True, stem="imagenet"),
    lambda: Residual(bottleneck("downsample"), (2, 1), 4, 5, **IMAGENET),
    (17, 16),
  ),
  "vgg": (VGG(5, convolutions=(1, 2), width=4), lambda: TorchVGG((1, 2), 4, 5), (4, 4)),
  "wide_resnet": (
    WideResNet(5, depth=16, widening=1),
    lambda: Residual(make_wide_block, (2, 2, 2), 16, 5, stem=16),
    (8, 8),
  ),
  "vit": (
    models.create("vit_tiny", 5, depth=2, width=12),
    lambda: TorchViT(8, 4, 2, 12, 3, 5),
    (8, 8),
  ),
}


def randomize(network, seed=0):
  """Values that no fresh network has, in eval mode."""
  generator = torch.Generator().manual_seed(seed)
  # Without residual connections signals fade where ReLUs halve their variance.
  gain = 2 if isinstance(network, TorchVGG) else 1
  for name, tensor in network.state_dict().items():
    if name.endswith("num_batches_tracked"):
      tensor.fill_(3)
    elif tensor.ndim > 1:
      fan_in = tensor[0].numel()
      tensor.normal_(0, (gain / fan_in) ** 0.5, generator=generator)
    elif name.endswith(("running_var", "weight")):
      tensor.uniform_(0.5, 1.5, generator=generator)
    else:
      tensor.normal_(0, 0.3, generator=generator)
  return network.eval()


def network_and_state(name):
  module, make, size = NETWORKS[name]
  network = randomize(make())
  return module, network, network.state_dict(), (*size, 3)


def assert_same_logits(module, network, variables, image_shape, count=2):
  images = np.random.default_rng(1).standard_normal((count, *image_shape), np.float32)
  with torch.no_grad():
    expected = network(torch.tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
  assert np.ptp(expected, axis=0).max() > 1e-2, "the images make a difference"
  logits = jax.jit(module.apply)(variables, images)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_pytorchs_and_the_way_back_gives_the_same_weights(name):
  module, network, state, image_shape = network_and_state(name)
  variables = from_torch(state, module, image_shape)
  assert_same_logits(module, network, variables, image_shape)
  again = to_torch(variables, module, image_shape)
  weights = {n: x for n, x in state.items() if not n.endswith("num_batches_tracked")}
  assert again.keys() == weights.keys()
  for tensor_name, tensor in weights.items():
    np.testing.assert_array_equal(again[tensor_name], tensor)
  tensors = {n: torch.from_numpy(x) for n, x in again.items()}
  randomize(NETWORKS[name][1](), seed=1).load_state_dict(tensors)  # strict


FULL = {
  "resnet8": (lambda: Residual(make_cifar_block, (1, 1, 1), 16, 10), 32, 10),
  "resnet20": (lambda: Residual(make_cifar_block, (3, 3, 3), 16, 10), 32, 10),
  "resnet56": (lambda: Residual(make_cifar_block, (9, 9, 9), 16, 10), 32, 10),
  "resnet18": (lambda: Residual(basic("shortcut"), (2, 2, 2, 2), 64, 10), 32, 10),
  "vgg16": (lambda: TorchVGG((2, 2, 3, 3, 3), 64, 10), 32, 10),
  "wide_resnet22_10": (
    lambda: Residual(make_wide_block, (3, 3, 3), 160, 100, stem=16),
    16,
    100,
  ),
  "wide_resnet28_10": (
    lambda: Residual(make_wide_block, (4, 4, 4), 160, 100, stem=16),
    16,
    100,
  ),
  "resnet50": (
    lambda: Residual(bottleneck("downsample"), (3, 4, 6, 3), 64, 1000, **IMAGENET),
    64,
    1000,
  ),
}


# Same tables as the others, only more blocks.
SLOW = ("resnet20", "resnet50", "resnet56", "wide_resnet22_10", "wide_resnet28_10")


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FULL]
)
def test_the_papers_networks_in_full_size(name):
  make, size, classes = FULL[name]
  network, module = randomize(make()), models.create(name, classes)
  variables = from_torch(network.state_dict(), module, (size, size, 3))
  assert_same_logits(module, network, variables, (size, size, 3))


def test_other_names_and_prefixes_are_understood(assert_trees_equal):
  module, _, state, image_shape = network_and_state("resnet_cifar")
  expected = from_torch(state, module, image_shape)
  torchvisions = {
    "module._orig_mod." + n.replace("shortcut", "downsample").replace("linear", "fc"): x
    for n, x in state.items()
  }
  torchvisions["n_averaged"] = torch.tensor(3)
  assert_trees_equal(from_torch(torchvisions, module, image_shape), expected)
  arrays = {n: x.double().numpy() for n, x in state.items()}
  assert_trees_equal(from_torch(arrays, module, image_shape), expected)


def test_pruned_layers_are_masked():
  from torch.nn.utils import prune

  module, network, _, image_shape = network_and_state("mlp")
  prune.random_unstructured(network.fc1, "weight", 0.5)
  state = network.state_dict()
  assert "fc1.weight_mask" in state
  variables = from_torch(state, module, image_shape)
  assert np.mean(variables["params"]["Dense_0"]["kernel"] == 0) == 0.5
  assert_same_logits(module, network, variables, image_shape)


def changed(state, **changes):
  """The state dict with entries replaced; None removes one."""
  state = dict(state)
  for name, value in changes.items():
    state[name.replace("__", ".")] = value
  return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"conv1__weight": None}, "(missing: conv1.weight): make the network"),
    ({"extra": torch.zeros(1)}, "(left over: extra)"),
    ({"fc__weight": torch.zeros(5, 8)}, "linear.weight and fc.weight are names of one"),
    ({"module__bn1__bias": torch.zeros(4)}, "bn1.bias comes twice"),
    ({"bn1__bias": torch.zeros(6)}, "bn1.bias is (6,) and should be (4,)"),
    ({"bn1__bias": torch.zeros(4, dtype=torch.int8)}, "bn1.bias is int8"),
    ({"bn1__bias": torch.zeros(4, dtype=torch.complex64)}, "is complex64"),
    ({"bn1__bias": torch.zeros(4, device="meta")}, "'bn1.bias' in the state dict is"),
    ({"bn1__bias": torch.zeros(4).to_sparse()}, "'bn1.bias' in the state dict is"),
    ({"bn1__bias": "none"}, "is str"),
    ({"bn1__bias_orig": torch.zeros(4)}, "left over: bn1.bias_orig"),
    (
      {"linear__weight": torch.zeros(1000, 8), "linear__bias": torch.zeros(1000)},
      "linear.weight is (1000, 8) and should be (5, 8)): make the network with num_classes"
      "=1000",
    ),
  ],
)
def test_what_does_not_fit_is_said(rejects, changes, words):
  module, _, state, image_shape = network_and_state("resnet_cifar")
  with rejects(words):
    from_torch(changed(state, **changes), module, image_shape)


def test_another_network_or_image_is_refused(rejects):
  module, _, state, image_shape = network_and_state("mlp")
  with rejects("left over: fc1.weight, fc1.bias, fc2.weight and 3 more"):
    from_torch(state, NETWORKS["vgg"][0], image_shape)
  with rejects("fc1.weight is (7, 60) and should be (7, 20)"):
    from_torch(state, module, (4, 5, 1))
  with rejects("image_shape is (20,)"):
    from_torch(state, module, (20,))
  with rejects("the network is Dense: give one of"):
    from_torch(state, flax.linen.Dense(3), image_shape)
  with rejects("missing: params/Dense_2/bias"):
    variables = from_torch(state, module, image_shape)
    del variables["params"]["Dense_2"]["bias"]
    to_torch(variables, module, image_shape)


def test_bfloat16_weights_become_float32(assert_trees_equal):
  module, _, state, image_shape = network_and_state("mlp")
  half = {n: x.bfloat16() for n, x in state.items()}
  expected = from_torch({n: x.float() for n, x in half.items()}, module, image_shape)
  assert_trees_equal(from_torch(half, module, image_shape), expected)
  arrays = {
    n: np.asarray(jnp.array(x.float().numpy(), "bfloat16")) for n, x in half.items()
  }
  assert_trees_equal(from_torch(arrays, module, image_shape), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_weights_with_the_other_stem_name_the_option(rejects, name, stem):
  other = {"cifar": "imagenet", "imagenet": "cifar"}[stem]
  size = {"cifar": 3, "imagenet": 7}[stem]
  ours, theirs = models.create(name, 5, stem=other), {"conv1.weight": (64, 3, size, size)}
  theirs = {name: np.zeros(shape, np.float32) for name, shape in theirs.items()}
  with rejects(f'make the network with stem="{stem}"'):
    from_torch(theirs, ours, (32, 32, 3))
  with rejects(f'make the network with stem="{stem}" and num_classes=1000'):
    from_torch({**theirs, "fc.bias": np.zeros(1000, np.float32)}, ours, (32, 32, 3))
  flax = {"params/Conv_0/kernel": np.zeros((size, size, 3, 64), np.float32)}
  with rejects(f'make the network with stem="{stem}"'):
    fit_model(flax, ours, (32, 32, 3), "x.safetensors")
  with rejects("the options and the image shape of these weights"):
    from_torch(theirs, models.create(name, 5, stem=stem), (32, 32, 3))
