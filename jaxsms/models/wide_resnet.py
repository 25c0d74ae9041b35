"""Wide residual networks, for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.models.layers import ConvolutionalNetwork, Layers, residual_stages


class WideResNet(ConvolutionalNetwork):
  """WideResNet of depth 6n + 4: three stages of n blocks, normalized before convolutions.

  It has the fields of `ConvolutionalNetwork` too.

  Attributes:
    num_classes: number of logits.
    depth: 10, 16, 22, 28, ...: four more than a multiple of 6.
    widening: the stages have 16, 32 and 64 times as many channels.
    dropout: rate of dropout between the convolutions of a block, in training.

  References:
    Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146
  """

  num_classes: int
  depth: int = 28
  widening: int = 10
  dropout: float = 0.3

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes]."""
    layers = Layers(self.dtype, self.convolution, norm_momentum=self.norm_momentum)
    x = layers.conv(16, 3, images, use_bias=True)
    x = residual_stages(
      WideBlock,
      x,
      train,
      blocks=[(self.depth - 4) // 6] * 3,
      width=16 * self.widening,
      dropout=self.dropout,
      remat=self.remat,
      layers=layers,
    )
    x = layers.batch_norm(x, train, relu=True)
    return layers.dense(self.num_classes, jnp.mean(x, axis=(1, 2)))


class WideBlock(nn.Module):
  """Two 3x3 convolutions with biases, the stride on the second as in the reference."""

  features: int
  stride: int
  dropout: float
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), features]."""
    y = self.layers.batch_norm(x, train, relu=True)
    y = self.layers.conv(self.features, 3, y, use_bias=True)
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    y = self.layers.batch_norm(y, train, relu=True)
    y = self.layers.conv(self.features, 3, y, self.stride, use_bias=True)
    if self.stride > 1 or x.shape != y.shape:
      x = self.layers.conv(self.features, 1, x, self.stride, use_bias=True)
    return x + y
