"""The residual networks of four stages, for small images and for ImageNet."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.models.layers import ConvolutionalNetwork, Layers, kernel_init, residual_stages
from jaxsms.names import check_name

STEMS = ("cifar", "imagenet")

# How torchvision draws the kernels of convolutions.
torchvision_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet(ConvolutionalNetwork):
  """ResNet of four stages, each with half the pixels and twice the channels of the last.

  It has the fields of `ConvolutionalNetwork` too.

  Attributes:
    num_classes: number of logits.
    blocks: how many there are in each stage.
    bottleneck: blocks of three convolutions with four times the channels at their end,
      instead of two 3x3 convolutions.
    stem: "cifar", a 3x3 convolution, or "imagenet", a 7x7 convolution and a 3x3 maximum,
      each of stride 2.
    width: channels of the first stage.
    conv_init: of the kernels of convolutions.

  References:
    He et al., 2016, https://arxiv.org/abs/1512.03385
  """

  num_classes: int
  blocks: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  stem: str = "cifar"
  width: int = 64
  conv_init: nn.initializers.Initializer = kernel_init

  def __post_init__(self):
    check_name("stem", self.stem, STEMS)
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes]."""
    layers = Layers(self.dtype, self.convolution, self.conv_init, self.norm_momentum)
    size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
    x = layers.conv(self.width, size, images, stride)
    x = layers.batch_norm(x, train, relu=True)
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    x = residual_stages(
      Bottleneck if self.bottleneck else BasicBlock,
      x,
      train,
      blocks=self.blocks,
      width=self.width,
      remat=self.remat,
      layers=layers,
    )
    return layers.dense(self.num_classes, jnp.mean(x, axis=(1, 2)))


class BasicBlock(nn.Module):
  """Two 3x3 convolutions; the shortcut is a 1x1 convolution where shapes change."""

  features: int
  stride: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), features]."""
    y = self.layers.conv(self.features, 3, x, self.stride)
    y = self.layers.batch_norm(y, train, relu=True)
    y = self.layers.conv(self.features, 3, y)
    y = self.layers.batch_norm(y, train)
    return nn.relu(y + shortcut(self, x, y, train))


class Bottleneck(nn.Module):
  """1x1, 3x3 with the stride, and 1x1 to four times the features.

  References:
    torchvision's ResNet "v1.5", https://pytorch.org/vision/stable/models/resnet.html
  """

  features: int
  stride: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), 4 * features]."""
    y = self.layers.conv(self.features, 1, x)
    y = self.layers.batch_norm(y, train, relu=True)
    y = self.layers.conv(self.features, 3, y, self.stride)
    y = self.layers.batch_norm(y, train, relu=True)
    y = self.layers.conv(4 * self.features, 1, y)
    y = self.layers.batch_norm(y, train)
    return nn.relu(y + shortcut(self, x, y, train))


def shortcut(
  block: BasicBlock | Bottleneck, x: jax.Array, y: jax.Array, train: bool
) -> jax.Array:
  """The input x of a block as it is, or convolved 1x1 and normalized to the shape of y.

  To be called while `block` is, in whose scope the layers are made.
  """
  if block.stride == 1 and x.shape == y.shape:
    return x
  x = block.layers.conv(y.shape[-1], 1, x, block.stride)
  return block.layers.batch_norm(x, train)
