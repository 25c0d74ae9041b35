"""Multilayer perceptron."""

import flax.linen as nn
import jax

from jaxsms.models.layers import dense, flatten


class MLP(nn.Module):
  """Dense layers with ReLU and dropout between them, on flattened images.

  Attributes:
    num_classes: number of logits.
    hidden: width of each hidden layer.
    dropout: rate of dropout after each hidden layer, in training.
  """

  num_classes: int
  hidden: tuple[int, ...] = (512,)
  dropout: float = 0.2

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """[batch, height, width, channels] -> logits [batch, num_classes]."""
    x = flatten(images)
    for width in self.hidden:
      x = nn.relu(dense(width, x))
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return dense(self.num_classes, x)
