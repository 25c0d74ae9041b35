"""PyTorch's networks with the parameters of jaxsms's, for the benchmark."""

import torch.nn.functional as F
from torch import nn

from jaxsms.models.mlp import MLP
from jaxsms.models.resnet import ResNet
from jaxsms.models.resnet_cifar import CifarResNet


class Dense(nn.Module):
  """An MLP on images flattened in PyTorch's order."""

  def __init__(self, inputs: int, hidden: tuple[int, ...], classes: int):
    """Layers are called fc1, fc2, ..."""
    super().__init__()
    widths = [inputs, *hidden, classes]
    self.layers = len(widths) - 1
    for i in range(self.layers):
      setattr(self, f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))

  def forward(self, images):
    """[batch, channels, height, width] -> logits [batch, classes]."""
    x = images.flatten(1)
    for i in range(1, self.layers):
      x = F.relu(getattr(self, f"fc{i}")(x))
    return getattr(self, f"fc{self.layers}")(x)


class VmappedBatchNorm(nn.BatchNorm2d):
  """Batch normalization in training that vmap takes: no running statistics.

  Scale and shift are cast to the activations' type: under vmap the derivative of PyTorch's
  own normalization takes no two types.
  """

  def __init__(self, features: int):
    """Nothing but the number of features can be chosen."""
    super().__init__(features, track_running_stats=False)

  def forward(self, x):
    """[batch, features, height, width] -> the same."""
    weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)


class Block(nn.Module):
  """Two 3x3 convolutions; the shortcut pads with zeros or is a 1x1 convolution."""

  def __init__(self, inputs, features, stride, projected, norm):
    """`projected`: whether a 1x1 convolution bridges a change of shape."""
    super().__init__()
    self.stride, self.new = stride, features - inputs
    self.conv1 = _conv(inputs, features, 3, stride)
    self.bn1 = norm(features)
    self.conv2 = _conv(features, features, 3)
    self.bn2 = norm(features)
    self.shortcut = None
    if projected and (stride > 1 or self.new):
      self.shortcut = nn.Sequential(_conv(inputs, features, 1, stride), norm(features))

  def forward(self, x):
    """[batch, inputs, height, width] -> [batch, features, height / stride, ...]."""
    y = F.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    if self.shortcut is not None:
      x = self.shortcut(x)
    elif self.stride > 1 or self.new:
      pads = (0, 0, 0, 0, self.new // 2, self.new - self.new // 2)
      x = F.pad(x[:, :, :: self.stride, :: self.stride], pads)
    return F.relu(y + x)


class Residual(nn.Module):
  """A residual network for small images: a 3x3 stem, and stages of `Block`."""

  def __init__(self, channels, classes, width, blocks, projected, norm):
    """`blocks`: how many each stage has; `norm`: makes a normalization."""
    super().__init__()
    self.conv1, self.bn1 = _conv(channels, width, 3), norm(width)
    self.stages, inputs = len(blocks), width
    for stage, number in enumerate(blocks):
      features, layers = width * 2**stage, []
      for i in range(number):
        stride = 2 if stage and not i else 1
        layers.append(Block(inputs, features, stride, projected, norm))
        inputs = features
      setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
    self.linear = nn.Linear(inputs, classes)

  def forward(self, images):
    """[batch, channels, height, width] -> logits [batch, classes]."""
    x = F.relu(self.bn1(self.conv1(images)))
    for stage in range(self.stages):
      x = getattr(self, f"layer{stage + 1}")(x)
    return self.linear(x.mean((2, 3)))


def _conv(inputs, features, size, stride=1):
  return nn.Conv2d(inputs, features, size, stride, size // 2, bias=False)


def make_network(module, image_shape: tuple[int, int, int], vmapped: bool) -> nn.Module:
  """PyTorch's network of the same parameters, called as `jaxsms.pretrained` calls them.

  Args:
    module: of jaxsms: an MLP without dropout, or a residual network for small images.
    image_shape: [height, width, channels].
    vmapped: whether vmap is to train it.

  Returns:
    The network in training mode.

  Raises:
    ValueError: the network is another one.
  """
  height, width, channels = image_shape
  norm = VmappedBatchNorm if vmapped else nn.BatchNorm2d
  if isinstance(module, MLP) and not module.dropout:
    return Dense(height * width * channels, module.hidden, module.num_classes)
  shared = (channels, module.num_classes)
  if isinstance(module, CifarResNet):
    blocks = [(module.depth - 2) // 6] * 3
    return Residual(*shared, module.width, blocks, False, norm)
  if isinstance(module, ResNet) and not module.bottleneck and module.stem == "cifar":
    return Residual(*shared, module.width, module.blocks, True, norm)
  raise ValueError(
    f"this {type(module).__name__} is not written in PyTorch here: give --torch=none, "
    "or --model=mlp, resnet8, resnet20, resnet56 or resnet18"
  )
