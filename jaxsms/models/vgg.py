"""VGG with batch normalization, for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.models.layers import batch_norm, conv, dense


class VGG(nn.Module):
  """Stages of 3x3 convolutions, a 2x2 maximum after each, and one dense layer.

  Attributes:
    num_classes: number of logits.
    convolutions: how many there are in each stage.
    width: channels of the first stage; they double up to eight times as many.
    norm_momentum: of the running batch statistics; 0 leaves those of the last batch.

  References:
    Simonyan and Zisserman, 2015, https://arxiv.org/abs/1409.1556, configuration D
  """

  num_classes: int
  convolutions: tuple[int, ...] = (2, 2, 3, 3, 3)
  width: int = 64
  norm_momentum: float = 0.9

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
    x = images
    for stage, number in enumerate(self.convolutions):
      for _ in range(number):
        x = conv(self.width * min(2**stage, 8), 3, x, use_bias=True)
        x = nn.relu(batch_norm(x, train, self.norm_momentum))
      x = max_pool(x)
    return dense(self.num_classes, jnp.mean(x, axis=(1, 2)))


def max_pool(x: jax.Array) -> jax.Array:
  """The largest of each 2x2 pixels, [b, h, w, c] -> [b, h // 2, w // 2, c].

  Equal pixels share the gradient; after a ReLU that are zeros, where it ends anyway. The
  gradient of `nn.max_pool`, which scatters to the first of them, is several times slower.
  """
  batch, height, width, channels = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
