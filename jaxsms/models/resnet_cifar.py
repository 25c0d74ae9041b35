"""The residual networks of depth 6n + 2 for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.models.layers import batch_norm, conv, dense, residual_stages


class CifarResNet(nn.Module):
  """ResNet of depth 6n + 2: three stages of n basic blocks, parameter-free shortcuts.

  Attributes:
    num_classes: number of logits.
    depth: 8, 14, 20, ...: two more than a multiple of 6.
    width: channels of the first stage; later ones have two and four times as many.
    norm_momentum: of the running batch statistics; 0 leaves those of the last batch.

  References:
    He et al., 2016, https://arxiv.org/abs/1512.03385, section 4.2, option A
  """

  num_classes: int
  depth: int = 20
  width: int = 16
  norm_momentum: float = 0.9

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes]."""
    x = conv(self.width, 3, images)
    x = batch_norm(x, train, self.norm_momentum, relu=True)
    x = residual_stages(
      BasicBlock,
      x,
      train,
      blocks=[(self.depth - 2) // 6] * 3,
      width=self.width,
      norm_momentum=self.norm_momentum,
    )
    return dense(self.num_classes, jnp.mean(x, axis=(1, 2)))


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut without parameters."""

  features: int
  stride: int
  norm_momentum: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), features]."""
    y = conv(self.features, 3, x, stride=self.stride)
    y = batch_norm(y, train, self.norm_momentum, relu=True)
    y = batch_norm(conv(self.features, 3, y), train, self.norm_momentum)
    return nn.relu(y + pad_shortcut(x, self.features, self.stride))


def pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
  """Every `stride`-th pixel, the new channels zero, half of them on each side."""
  x = x[:, ::stride, ::stride]
  new = features - x.shape[-1]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))
