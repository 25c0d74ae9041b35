"""Multilayer perceptron."""

from typing import Any

import flax.linen as nn
import jax

from jaxsms.models.layers import Layers


class MLP(nn.Module):
  """Dense layers with ReLU and dropout between them, on flattened images.

  Attributes:
    num_classes: number of logits.
    hidden: width of each hidden layer.
    dropout: rate of dropout after each hidden layer, in training.
    dtype: of the activations, such as `jax.numpy.bfloat16`; None means that of images and
      parameters. Parameters are always float32.
  """

  num_classes: int
  hidden: tuple[int, ...] = (512,)
  dropout: float = 0.2
  dtype: Any = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes]."""
    layers = Layers(self.dtype)
    x = images.reshape(images.shape[0], -1)
    for width in self.hidden:
      x = nn.relu(layers.dense(width, x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return layers.dense(self.num_classes, x)
