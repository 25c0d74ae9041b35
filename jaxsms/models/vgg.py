"""VGG with batch normalization, for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.models.layers import ConvolutionalNetwork, Layers


class VGG(ConvolutionalNetwork):
  """Stages of 3x3 convolutions, a 2x2 maximum after each, and one dense layer.

  It has the fields of `ConvolutionalNetwork` too.

  Attributes:
    num_classes: number of logits.
    convolutions: how many there are in each stage.
    width: channels of the first stage; they double up to eight times as many.

  References:
    Simonyan and Zisserman, 2015, https://arxiv.org/abs/1409.1556, configuration D
  """

  num_classes: int
  convolutions: tuple[int, ...] = (2, 2, 3, 3, 3)
  width: int = 64

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes].

    Raises:
      ValueError: the images are too small to be halved after every stage.
    """
    smallest = 2 ** len(self.convolutions)
    if min(images.shape[1:3]) < smallest:
      raise ValueError(
        f"images are {images.shape[1]}x{images.shape[2]}: this network halves them "
        f"{len(self.convolutions)} times, so give at least {smallest}x{smallest}"
      )
    layers = Layers(self.dtype, self.convolution, norm_momentum=self.norm_momentum)

    def unit(self, x, features):
      x = layers.conv(features, 3, x, use_bias=True)
      return layers.batch_norm(x, train, relu=True)

    unit = nn.remat(unit, static_argnums=2) if self.remat else unit
    x = images
    for stage, number in enumerate(self.convolutions):
      for _ in range(number):
        x = unit(self, x, self.width * min(2**stage, 8))
      x = max_pool(x)
    return layers.dense(self.num_classes, jnp.mean(x, axis=(1, 2)))


def max_pool(x: jax.Array) -> jax.Array:
  """The largest of each 2x2 pixels, [b, h, w, c] -> [b, h // 2, w // 2, c].

  Of equal pixels the first has the gradient. That of `nn.max_pool`, which scatters, is
  several times slower; that of `x.max` divides by the number of pixels that equal the
  maximum, which is 0 where the compiler works out the two with different rounding.
  """
  batch, height, width, channels = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  x = _larger(x[..., 0, :], x[..., 1, :])
  return _larger(x[:, :, 0], x[:, :, 1])


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.where(b > a, b, a)
