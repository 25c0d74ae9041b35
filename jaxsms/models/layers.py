"""Layers with PyTorch's default initialisation, for the networks of the paper."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.convolution import conv_general_dilated
from jaxsms.normalization import BatchNorm

# PyTorch draws weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), biases too.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> nn.initializers.Initializer:
  """Uniform in +-1/sqrt(fan_in), as PyTorch draws the bias of a layer with that fan-in."""
  bound = 1 / np.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(features: int, inputs: jax.Array, name: str | None = None) -> jax.Array:
  """A dense layer with bias, [..., inputs] -> [..., features]."""
  layer = nn.Dense(
    features, kernel_init=kernel_init, bias_init=bias_init(inputs.shape[-1]), name=name
  )
  return layer(inputs)


def conv(
  features: int,
  kernel_size: int,
  inputs: jax.Array,
  stride: int = 1,
  use_bias: bool = False,
  name: str | None = None,
  init: nn.initializers.Initializer = kernel_init,
) -> jax.Array:
  """A square convolution, [b, h, w, c] -> [b, h / stride, w / stride, features].

  Padded by kernel_size // 2 on every side, as the reference does; "SAME" would pad strided
  convolutions on one side only.
  """
  pad = kernel_size // 2
  layer = nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    use_bias=use_bias,
    kernel_init=init,
    bias_init=bias_init(kernel_size**2 * inputs.shape[-1]),
    conv_general_dilated=conv_general_dilated,
    name=name,
  )
  return layer(inputs)


def batch_norm(
  inputs: jax.Array,
  train: bool,
  momentum: float,
  name: str | None = None,
  relu: bool = False,
) -> jax.Array:
  """Batch normalization over all axes but the last; `momentum` is of the running mean."""
  return BatchNorm(momentum, relu, name=name)(inputs, train)


def residual_stages(
  block: Callable[..., nn.Module],
  x: jax.Array,
  train: bool,
  *,
  blocks: Sequence[int],
  width: int,
  **options: Any,
) -> jax.Array:
  """Stages of residual blocks: each doubles the features, all but the first halve the size.

  Args:
    block: module class with fields `features` and `stride`, called with (x, train).
    x: [batch, height, width, channels].
    train: handed to the blocks.
    blocks: how many of them each stage has.
    width: features of the first stage.
    **options: further fields of the blocks.

  Returns:
    What the last block gives.
  """
  for stage, number in enumerate(blocks):
    for i in range(number):
      stride = 2 if stage and not i else 1
      x = block(features=width * 2**stage, stride=stride, **options)(x, train)
  return x


def flatten(images: jax.Array) -> jax.Array:
  """[batch, ...] -> [batch, values]."""
  return images.reshape(images.shape[0], -1)


def hidden_widths(hidden: Sequence[int]) -> tuple[int, ...]:
  """Widths as a tuple (linen fields must be hashable); ValueError where one is below 1."""
  widths = tuple(int(w) for w in hidden)
  if any(w < 1 for w in widths):
    raise ValueError(f"hidden widths are {list(widths)}: each must be at least 1")
  return widths
