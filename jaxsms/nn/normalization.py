"""Batch normalization with its own derivative: fewer passes over the activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsms.trees import widened


class BatchNorm(nn.Module):
  """Batch normalization over all axes but the last, with or without a relu after it.

  Variables are those of `flax.linen.BatchNorm`, and so are the numbers.

  Attributes:
    momentum: of the running statistics; 0 leaves those of the last batch.
    relu: whether a relu follows.
    epsilon: added to the variance.
  """

  momentum: float = 0.9
  relu: bool = False
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[..., features] -> the same shape and dtype."""
    features = x.shape[-1]
    mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(features))
    var = self.variable("batch_stats", "var", lambda: jnp.ones(features))
    scale = self.param("scale", nn.initializers.ones, (features,))
    bias = self.param("bias", nn.initializers.zeros, (features,))
    if not train:
      factor = scale * jax.lax.rsqrt(var.value + self.epsilon)
      return _affine(x, factor, bias - mean.value * factor, self.relu)
    y, batch_mean, batch_var = _normalize(self.relu, self.epsilon, x, scale, bias)
    if not self.is_initializing():
      for running, now in ((mean, batch_mean), (var, batch_var)):
        now = jax.lax.stop_gradient(now)
        running.value = self.momentum * running.value + (1 - self.momentum) * now
    return y


def _affine(x, factor, offset, relu):
  y = widened(x) * factor + offset
  return (jnp.maximum(y, 0) if relu else y).astype(x.dtype)


def _sum(x):
  return jnp.sum(x, axis=tuple(range(x.ndim - 1)))


def _forward(relu, epsilon, x, scale, bias):
  n = x.size // x.shape[-1]
  wide = widened(x)
  mean = _sum(wide) / n
  var = jnp.maximum(_sum(wide * wide) / n - mean**2, 0)
  inverse = jax.lax.rsqrt(var + epsilon)
  factor = scale * inverse
  y = _affine(x, factor, bias - mean * factor, relu)
  return (y, mean, var), (x, scale, bias, mean, inverse)


def _backward(relu, epsilon, residuals, cotangents):
  x, scale, bias, mean, inverse = residuals
  dy = widened(cotangents[0])  # running statistics have no gradient
  wide = widened(x)
  factor = scale * inverse
  if relu:
    dy = jnp.where(wide * factor + (bias - mean * factor) > 0, dy, 0)
  dbias = _sum(dy)
  dscale = inverse * (_sum(dy * wide) - mean * dbias)
  n = x.size // x.shape[-1]
  slope = factor * inverse * dscale / n
  dx = factor * dy - slope * wide + (slope * mean - factor * dbias / n)
  return dx.astype(x.dtype), dscale, dbias


_normalize = jax.custom_vjp(
  lambda relu, epsilon, *args: _forward(relu, epsilon, *args)[0], nondiff_argnums=(0, 1)
)
_normalize.defvjp(_forward, _backward)
