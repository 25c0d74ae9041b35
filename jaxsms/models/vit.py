"""A small Vision Transformer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.convolution import conv_general_dilated
from jaxsms.models.layers import Layers, caller, kernel_init

# PyTorch's attention draws query, key and value as one matrix [width, 3 * width] from
# U(-sqrt(6 / (4 * width)), ...), with biases of 0.
attention_init = nn.initializers.variance_scaling(1 / 2, "fan_in", "uniform")


class ViT(nn.Module):
  """Vision Transformer: the class token of a sequence of patches, after `depth` blocks.

  Attributes:
    num_classes: number of logits.
    patch_size: height and width of a patch, in pixels.
    depth: number of blocks.
    width: channels of a token, a multiple of `heads`.
    heads: of the attention.
    dropout: rate of dropout after each block's attention and dense layers, in training.
    dtype: of the activations, such as `jax.numpy.bfloat16`; None means that of images and
      parameters. Parameters are always float32.
    convolution: with the signature of `jax.lax.conv_general_dilated`.
    remat: the gradient keeps the input of each block alone and computes the rest again:
      less memory, more time. A CPU's compiler undoes it.

  References:
    Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929
    Touvron et al., 2021, https://arxiv.org/abs/2012.12877 (its "tiny" size)
  """

  num_classes: int
  patch_size: int = 4
  depth: int = 12
  width: int = 192
  heads: int = 3
  dropout: float = 0.0
  dtype: Any = None
  convolution: Callable[..., jax.Array] = conv_general_dilated
  remat: bool = False

  def __post_init__(self):
    if self.width % self.heads:
      raise ValueError(
        f"width is {self.width} with {self.heads} heads: it must be a multiple of heads"
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes].

    Raises:
      ValueError: the images are no whole number of patches.
    """
    batch, height, width, _ = images.shape
    size = self.patch_size
    if height % size or width % size:
      raise ValueError(
        f"images are {height}x{width}: height and width must be multiples of patch_size, "
        f"which is {size}"
      )
    layers = Layers(self.dtype, self.convolution)
    x = layers.conv(self.width, size, images, size, 0, use_bias=True, name="patches")
    x = x.reshape(batch, -1, self.width)
    normal = nn.initializers.normal(0.02)
    token = self.param("class_token", normal, (1, 1, self.width))
    x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (batch, 1, 1)), x], 1)
    position = self.param("position_embedding", normal, (1, *x.shape[1:]))
    x = x + position.astype(x.dtype)
    call = caller(train, self.remat)
    for _ in range(self.depth):
      x = call(TransformerBlock(self.heads, self.dropout, layers), x)
    return layers.dense(self.num_classes, layers.layer_norm(x[:, 0]))


class TransformerBlock(nn.Module):
  """Attention, then two dense layers, each normalized before and added to its input."""

  heads: int
  dropout: float
  layers: Layers

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[batch, tokens, width] -> [batch, tokens, width]."""
    drop = nn.Dropout(self.dropout, deterministic=not train)
    y = nn.MultiHeadDotProductAttention(
      self.heads,
      dtype=self.layers.dtype,
      kernel_init=attention_init,
      out_kernel_init=kernel_init,
    )(self.layers.layer_norm(x))
    x = x + drop(y)
    y = self.layers.dense(4 * x.shape[-1], self.layers.layer_norm(x))
    return x + drop(self.layers.dense(x.shape[-1], nn.gelu(y, approximate=False)))
