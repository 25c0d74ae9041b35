"""Convolutions of images with fewer pixels than their kernel, as one matrix product.

On a CPU XLA runs them as unoptimised code: 3x3 kernels take twelve times as long on 2x2
images as on 3x3 ones. A product of all pixels by all outputs takes less than either.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.trees import widened


def is_small(geometry: Any) -> bool:
  """Whether an image has fewer pixels than the kernel.

  Args:
    geometry: a `jaxsms.nn.lowerings.Geometry`.
  """
  return math.prod(geometry.image) < math.prod(geometry.kernel)


def forward(geometry: Any, images: jax.Array, kernels: jax.Array) -> jax.Array:
  """Images [m, n, h, w, c], kernels [m, kh, kw, c, o] -> outputs [m, n, oh, ow, o]."""
  x, dtype = _flat(images), images.dtype
  y = jnp.matmul(x, _matrix(geometry, kernels), precision=geometry.precision)
  sides = [geometry.output_size(axis) for axis in (0, 1)]
  return y.reshape(*y.shape[:2], *sides, kernels.shape[4]).astype(dtype)


def image_gradient(geometry: Any, outputs: jax.Array, kernels: jax.Array) -> jax.Array:
  """Outputs [m, n, oh, ow, o], kernels [m, kh, kw, c, o] -> images [m, n, h, w, c]."""
  matrix = _matrix(geometry, kernels).swapaxes(1, 2)
  x = jnp.matmul(_flat(outputs), matrix, precision=geometry.precision)
  return x.reshape(*x.shape[:2], *geometry.image, kernels.shape[3]).astype(outputs.dtype)


def kernel_gradient(geometry: Any, images: jax.Array, outputs: jax.Array) -> jax.Array:
  """Images [m, n, h, w, c], outputs [m, n, oh, ow, o] -> kernels [m, kh, kw, c, o]."""
  x, y = _flat(images).swapaxes(1, 2), _flat(outputs)
  products = jnp.matmul(x, y, precision=geometry.precision)
  taps, c, o = _taps(geometry), images.shape[4], outputs.shape[4]
  products = products.reshape(len(products), len(taps), c, -1, o)
  zeros = jnp.zeros_like(products[:, 0, :, 0])
  sums = [
    sum(
      (products[:, p, :, q] for p, q in zip(*np.nonzero(taps == tap), strict=True)), zeros
    )
    for tap in range(math.prod(geometry.kernel))
  ]
  kernels = jnp.stack(sums, 1).reshape(-1, *geometry.kernel, c, o)
  return kernels.astype(images.dtype)


def _taps(geometry):
  """int [pixels, outputs]: which tap of the kernel joins them, past the last for none."""
  rows, columns = (
    geometry.padding[axis][0]
    + np.arange(geometry.image[axis])[:, None]
    - geometry.strides[axis] * np.arange(geometry.output_size(axis))
    for axis in (0, 1)
  )
  rows, columns = rows[:, None, :, None], columns[None, :, None, :]
  (high, wide), pixels = geometry.kernel, math.prod(geometry.image)
  inside = (rows >= 0) & (rows < high) & (columns >= 0) & (columns < wide)
  return np.where(inside, rows * wide + columns, high * wide).reshape(pixels, -1)


def _matrix(geometry, kernels):
  """[m, pixels * c, outputs * o], 0 where no tap joins a pixel and an output."""
  m, _, _, c, o = kernels.shape
  taps = widened(kernels).reshape(m, -1, c, o)
  taps = jnp.pad(taps, [(0, 0), (0, 1), (0, 0), (0, 0)])[:, _taps(geometry)]
  return taps.swapaxes(2, 3).reshape(m, math.prod(geometry.image) * c, -1)


def _flat(x):
  """[m, n, h, w, c] -> [m, n, h * w * c], in float32 at least."""
  return widened(x.reshape(*x.shape[:2], -1))
