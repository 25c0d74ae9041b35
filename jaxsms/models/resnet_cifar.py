"""The residual networks of depth 6n + 2 for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.models.layers import ConvolutionalNetwork, Layers, residual_stages


class CifarResNet(ConvolutionalNetwork):
  """ResNet of depth 6n + 2: three stages of n basic blocks, parameter-free shortcuts.

  It has the fields of `ConvolutionalNetwork` too.

  Attributes:
    num_classes: number of logits.
    depth: 8, 14, 20, ...: two more than a multiple of 6.
    width: channels of the first stage; later ones have two and four times as many.

  References:
    He et al., 2016, https://arxiv.org/abs/1512.03385, section 4.2, option A
  """

  num_classes: int
  depth: int = 20
  width: int = 16

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes]."""
    layers = Layers(self.dtype, self.convolution, norm_momentum=self.norm_momentum)
    x = layers.conv(self.width, 3, images)
    x = layers.batch_norm(x, train, relu=True)
    x = residual_stages(
      BasicBlock,
      x,
      train,
      blocks=[(self.depth - 2) // 6] * 3,
      width=self.width,
      remat=self.remat,
      layers=layers,
    )
    return layers.dense(self.num_classes, jnp.mean(x, axis=(1, 2)))


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut without parameters."""

  features: int
  stride: int
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), features]."""
    y = self.layers.conv(self.features, 3, x, stride=self.stride)
    y = self.layers.batch_norm(y, train, relu=True)
    y = self.layers.batch_norm(self.layers.conv(self.features, 3, y), train)
    return nn.relu(y + pad_shortcut(x, self.features, self.stride))


def pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
  """Every `stride`-th pixel, the new channels zero, half of them on each side."""
  x = x[:, ::stride, ::stride]
  new = features - x.shape[-1]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
