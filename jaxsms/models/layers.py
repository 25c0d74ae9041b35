"""Layers with PyTorch's default initialisation, for the networks of the paper."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.convolution import conv_general_dilated
from jaxsms.nn.normalization import BatchNorm

# PyTorch draws weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), biases too.
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> nn.initializers.Initializer:
  """Uniform in +-1/sqrt(fan_in), as PyTorch draws the bias of a layer with that fan-in."""
  bound = 1 / np.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Layers(NamedTuple):
  """The layers of one network, with what they share. To be used in its compact method.

  Attributes:
    dtype: of the activations; None means what inputs and parameters promote to. Parameters,
      batch statistics and the sums of normalizations are always float32.
    convolution: with the signature of `jax.lax.conv_general_dilated`.
    conv_init: of the kernels of convolutions.
    norm_momentum: of the running batch statistics.
  """

  dtype: Any = None
  convolution: Callable[..., jax.Array] = conv_general_dilated
  conv_init: nn.initializers.Initializer = kernel_init
  norm_momentum: float = 0.9

  def dense(self, features: int, inputs: jax.Array) -> jax.Array:
    """A dense layer with bias, [..., inputs] -> [..., features]."""
    return nn.Dense(
      features,
      dtype=self.dtype,
      kernel_init=kernel_init,
      bias_init=bias_init(inputs.shape[-1]),
    )(inputs)

  def conv(
    self,
    features: int,
    kernel_size: int,
    inputs: jax.Array,
    stride: int = 1,
    padding: int | None = None,
    use_bias: bool = False,
    name: str | None = None,
  ) -> jax.Array:
    """A square convolution, [b, h, w, c] -> [b, h / stride, w / stride, features].

    Padded by kernel_size // 2 on every side where `padding` is None, as the reference
    does; "SAME" would pad strided convolutions on one side only.
    """
    pad = kernel_size // 2 if padding is None else padding
    return nn.Conv(
      features,
      (kernel_size, kernel_size),
      strides=(stride, stride),
      padding=((pad, pad), (pad, pad)),
      use_bias=use_bias,
      dtype=self.dtype,
      kernel_init=self.conv_init,
      bias_init=bias_init(kernel_size**2 * inputs.shape[-1]),
      conv_general_dilated=self.convolution,
      name=name,
    )(inputs)

  def batch_norm(self, inputs: jax.Array, train: bool, relu: bool = False) -> jax.Array:
    """Batch normalization over all axes but the last, and a relu after it if wanted."""
    return BatchNorm(self.norm_momentum, relu)(inputs, train)

  def layer_norm(self, inputs: jax.Array) -> jax.Array:
    """Normalization over the last axis."""
    return nn.LayerNorm(dtype=self.dtype)(inputs)


class ConvolutionalNetwork(nn.Module, kw_only=True):
  """The fields by name that all convolutional networks have.

  Attributes:
    norm_momentum: of the running batch statistics; 0 leaves those of the last batch.
    dtype: of the activations, such as `jax.numpy.bfloat16`; None means that of images and
      parameters. Parameters and batch statistics are always float32.
    convolution: with the signature of `jax.lax.conv_general_dilated`.
    remat: the gradient keeps only the input of each block, or of each convolution of a VGG,
      and computes the rest again: less memory, more time. A CPU's compiler undoes it.
  """

  norm_momentum: float = 0.9
  dtype: Any = None
  convolution: Callable[..., jax.Array] = conv_general_dilated
  remat: bool = False


def residual_stages(
  block: Callable[..., nn.Module],
  x: jax.Array,
  train: bool,
  *,
  blocks: Sequence[int],
  width: int,
  remat: bool,
  **options: Any,
) -> jax.Array:
  """Stages of residual blocks: each doubles the features, all but the first halve the size.

  Args:
    block: module class with fields `features` and `stride`, called with (x, train).
    x: [batch, height, width, channels].
    train: handed to the blocks.
    blocks: how many of them each stage has.
    width: features of the first stage.
    remat: whether the gradient computes each block's activations again.
    **options: further fields of the blocks.

  Returns:
    What the last block gives.
  """
  call = caller(train, remat)
  for stage, number in enumerate(blocks):
    for i in range(number):
      stride = 2 if stage and not i else 1
      x = call(block(features=width * 2**stage, stride=stride, **options), x)
  return x


def caller(train: bool, remat: bool) -> Callable[[nn.Module, jax.Array], jax.Array]:
  """Gives `call(block, x)`: `block(x, train)`, of which `remat` keeps x alone.

  Args:
    train: handed to the block.
    remat: whether the gradient computes what is inside the block again. XLA for CPUs
      merges the two computations, unless `xla_disable_hlo_passes` names its
      "cse_barrier_expander".

  Returns:
    A function to be called in the compact method that makes the block.
  """

  def call(block, x):
    return block(x, train)

  # Of the call, because a rematerialized class gives its parameters another name.
  return nn.remat(call) if remat else call


def hidden_widths(hidden: Sequence[int]) -> tuple[int, ...]:
  """Widths as a tuple (linen fields must be hashable); ValueError where one is below 1."""
  widths = tuple(int(w) for w in hidden)
  if any(w < 1 for w in widths):
    raise ValueError(f"hidden widths are {list(widths)}: each must be at least 1")
  return widths
