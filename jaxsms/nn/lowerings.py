"""How a convolution and its two gradients run for m copies at once.

Operands have a leading axis of copies, m long or, where the copies share the operand, 1.
Each way has a forward, an image gradient and a kernel gradient:

- "loop": one copy and a few images at a time, in the one layout that a CPU runs well in
  loops too; images with fewer pixels than the kernel as `jaxsms.nn.small_images`;
- "grouped": XLA's convolution under vmap and its transposes, grouped convolutions. XLA
  would gather the whole batch for one on every device where it divides the program among
  several (https://github.com/openxla/xla/issues/47945): there it is as "unrolled";
- "unrolled": XLA's convolution and its transposes, a call for each copy.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsms.devices.partitioning import sum_over_batch, unless_partitioned
from jaxsms.nn import small_images

T = TypeVar("T")
NHWC = ("NHWC", "HWIO", "NHWC")

_GROUP = 16  # images in one step, for a CPU's second-level cache of 2 MB


class Geometry(NamedTuple):
  """What fixes a convolution apart from its operands.

  Attributes:
    strides: along height and width.
    padding: low and high, in pixels, along height and width.
    image: height and width of the images.
    kernel: height and width of the kernel.
    precision: of the products, as `jax.lax.conv_general_dilated` takes it.
  """

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  image: tuple[int, int]
  kernel: tuple[int, int]
  precision: Any

  def output_size(self, axis: int) -> int:
    """How many outputs there are along height (0) or width (1)."""
    padded = self.image[axis] + sum(self.padding[axis])
    return (padded - self.kernel[axis]) // self.strides[axis] + 1

  def shifts(self, axis: int) -> tuple[int, tuple[int, int], np.ndarray]:
    """How a block of s pixels, s the stride, meets the outputs along an axis.

    Returns the number of blocks, low and high padding of the outputs (cut where it is
    negative), and taps: pixel u of a block meets padded output block + t through
    kernel tap `taps[t, u]`, or not at all where that is the kernel's size.
    """
    s, k, low = self.strides[axis], self.kernel[axis], self.padding[axis][0]
    first, last = -((k - 1 - low) // s), (s - 1 + low) // s
    taps = np.arange(s) + low - s * np.arange(first, last + 1)[:, None]
    blocks = -(-self.image[axis] // s)
    padding = (-first, blocks + last - self.output_size(axis))
    return blocks, padding, np.where((taps >= 0) & (taps < k), taps, k)


def pair(values: Iterable[T]) -> tuple[T, T]:
  """Two values, along height and along width."""
  height, width = values
  return height, width


def varying(x: jax.Array) -> frozenset[str]:
  """The manual mesh axes that an array varies over."""
  # The names are those of jax 0.10, then of 0.8.
  kind = jax.typeof(x)
  kind = getattr(kind, "manual_axis_type", kind)
  return getattr(kind, "varying", getattr(kind, "vma", frozenset()))


def vary_alike(*operands):
  """Makes all vary over the manual mesh axes that one does; gradients are summed."""
  own = [varying(x) for x in operands]
  cast = getattr(lax, "pcast", None)  # jax 0.7 has `pvary`, which later ones lack
  vary = functools.partial(cast, to="varying") if cast else lax.pvary  # type: ignore[attr-defined]
  missing = [tuple(frozenset[str]().union(*own) - axes) for axes in own]
  return [vary(x, a) if a else x for x, a in zip(operands, missing, strict=True)]


# "grouped": what vmap and autodiff make of XLA's convolution.


def _native(geometry, image, kernel):
  strides, padding, _, _, precision = geometry
  if geometry.kernel == (1, 1) and padding == ((0, 0), (0, 0)):
    return jnp.tensordot(image, kernel[0, 0], 1, precision=precision)
  return lax.conv_general_dilated(
    image, kernel, strides, padding, dimension_numbers=NHWC, precision=precision
  )


def _grouped(geometry, images, kernels):
  axes = tuple(None if len(x) == 1 else 0 for x in (images, kernels))
  one = functools.partial(_native, geometry)
  images, kernels = (x.squeeze(0) if len(x) == 1 else x for x in (images, kernels))
  if axes == (None, None):
    return one(images, kernels)[None]
  return jax.vmap(one, axes)(images, kernels)


def _grouped_image(geometry, outputs, kernels):
  shape = (outputs.shape[1], *geometry.image, kernels.shape[3])
  return _transpose(lambda x: _grouped(geometry, x, kernels), shape, outputs, kernels)


def _grouped_kernel(geometry, images, outputs):
  shape = (*geometry.kernel, images.shape[4], outputs.shape[4])
  return _transpose(lambda x: _grouped(geometry, images, x), shape, outputs, images)


def _transpose(forward, shape, outputs, other):
  """The transpose of `forward`, with as many copies as the outputs or `other` have."""
  copies = max(len(outputs), len(other))
  outputs = jnp.broadcast_to(outputs, (copies, *outputs.shape[1:]))
  zeros, _ = vary_alike(jnp.zeros((copies, *shape), outputs.dtype), outputs)
  return jax.vjp(forward, zeros)[1](outputs)[0]


# "loop": one copy and a few images at a time.


def _loop_forward(geometry, images, kernels):
  if small_images.is_small(geometry):
    return small_images.forward(geometry, images, kernels)
  return _loop_map(functools.partial(_convolve, geometry), images, kernels)


def _loop_image(geometry, outputs, kernels):
  """One convolution of stride 1 gives a block of s x s pixels for each place."""
  (height, width), (sh, sw), c = geometry.image, geometry.strides, kernels.shape[3]
  (rows, columns), pads, (tall, broad) = zip(*map(geometry.shifts, (0, 1)), strict=True)
  # The convolution pads without a copy, but a CPU's must not be told to cut.
  cropped = outputs
  for axis in (0, 1):
    cropped = _pad(cropped, axis + 2, [min(p, 0) for p in pads[axis]])
  pads = tuple((max(low, 0), max(high, 0)) for low, high in pads)
  # A tap that does not exist reads the zeros appended here.
  taps = jnp.pad(kernels, [(0, 0), (0, 1), (0, 1), (0, 0), (0, 0)])
  taps = taps[:, tall][:, :, :, broad].transpose(0, 1, 3, 6, 2, 4, 5)
  taps = taps.reshape(*taps.shape[:4], -1)
  image, kernel = pair(cropped.shape[2:4]), pair(taps.shape[1:3])
  stride_one = Geometry((1, 1), pads, image, kernel, geometry.precision)
  if small_images.is_small(geometry) or small_images.is_small(stride_one):
    return small_images.image_gradient(geometry, outputs, kernels)

  def one(outputs, taps):
    blocks = _convolve(stride_one, outputs, taps)
    blocks = blocks.reshape(-1, rows, columns, sh, sw, c).swapaxes(2, 3)
    return blocks.reshape(-1, rows * sh, columns * sw, c)[:, :height, :width]

  return _loop_map(one, cropped, taps)


def _convolve(geometry, images, kernel):
  """A convolution whose channels fill a CPU's vector unit."""
  o = kernel.shape[3]
  if geometry.kernel != (1, 1):  # that is a matrix product
    images, kernel = _fill(images, 3), _fill(_fill(kernel, 2), 3)
  return _convolve_columns(geometry, images, kernel)[..., :o]


def _fill(x, axis):
  """An odd number of channels costs up to twice as much as the next multiple of 4."""
  size = x.shape[axis]
  return _pad(x, axis, (0, -size % 4)) if size % 2 and 8 < size < 48 else x


def _convolve_columns(geometry, images, kernel):
  """Up to 16 features leave the vector unit half empty: columns become features."""
  _, width, c, o = kernel.shape
  columns, places = 4 if c < 8 else 2, geometry.output_size(1)
  if o > 16 or width == 1 or geometry.strides[1] > 1 or places % columns:
    return _native(geometry, images, kernel)
  fill = [[(0, 0), (i, columns - 1 - i), (0, 0), (0, 0)] for i in range(columns)]
  kernel = jnp.concatenate([jnp.pad(kernel, low_high) for low_high in fill], -1)
  geometry = geometry._replace(strides=(geometry.strides[0], columns))
  return _native(geometry, images, kernel).reshape(len(images), -1, places, o)


def _loop_map(function, images, kernels):
  """[m, n, ...] of a function of a few images and one kernel.

  The loop puts results in their place while in cache: stacking them costs as much as
  half of a convolution.
  """
  m, n, dtype = max(len(images), len(kernels)), images.shape[1], images.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  kernels = kernels.astype(wide)
  if len(kernels) == 1:
    out = function(images.reshape(-1, *images.shape[2:]).astype(wide), kernels[0])
    return out.reshape(m, n, *out.shape[1:]).astype(dtype)
  group = _groups(n)
  steps = n // group
  shape = jax.eval_shape(function, images[0, :1].astype(wide), kernels[0]).shape[1:]
  zeros, *_ = vary_alike(jnp.zeros((m, group, steps, *shape), dtype), images, kernels)

  def step(i, out):
    copy = lax.div(i, steps)
    y = function(_take(images, group, i).astype(wide), kernels[copy]).astype(dtype)
    start = (copy, 0, lax.rem(i, steps), 0, 0, 0)
    return lax.dynamic_update_slice(out, y[None, :, None], start)

  return lax.fori_loop(0, m * steps, step, zeros).reshape(m, n, *shape)


def _loop_kernel(geometry, images, outputs):
  """A convolution of images by outputs, with examples as channels.

  Where devices share the batch, each loops over its part, and the parts are summed at the
  end: the compiler would sum them in every step of the loop.
  """
  if small_images.is_small(geometry):
    return small_images.kernel_gradient(geometry, images, outputs)
  own = functools.partial(_loop_own_kernel, geometry)
  return vary_alike(sum_over_batch(own, images, outputs), images, outputs)[0]


def _loop_own_kernel(geometry, images, outputs):
  """Blocks of s x s pixels, s the stride, are its batch: its stride is then 1."""
  (sh, sw), (n, height, width, c) = geometry.strides, images.shape[1:]
  m, o, group = max(len(images), len(outputs)), outputs.shape[4], _groups(images.shape[1])
  (rows, columns), pads, taps = zip(*map(geometry.shifts, (0, 1)), strict=True)
  sizes = [len(t) for t in taps]
  lows = [size - 1 - low for size, (low, _) in zip(sizes, pads, strict=True)]
  ends = [
    size - 1 - low + places
    for size, low, places in zip(sizes, lows, outputs.shape[2:4], strict=True)
  ]
  wide = jnp.promote_types(images.dtype, jnp.float32)
  fill = [(0, 0), (0, rows * sh - height), (0, columns * sw - width), (0, 0)]
  cut = [min(end, blocks) for end, blocks in zip(ends, (rows, columns), strict=True)]
  padding = [(low, end - kept) for low, end, kept in zip(lows, ends, cut, strict=True)]
  # XLA would work a copy of its own out, for an axis of length 1 alone.
  images, outputs = (x[0] if len(x) == 1 else x for x in (images, outputs))

  def step(i, total):
    x, y = (_take(operand, group, i).astype(wide) for operand in (images, outputs))
    x = jnp.pad(x, fill).reshape(group, rows, sh, columns, sw, c)
    x = x.transpose(2, 4, 5, 1, 3, 0).reshape(-1, rows, columns, group)
    product = lax.conv_general_dilated(
      x[:, : cut[0], : cut[1]],
      y.transpose(1, 2, 0, 3),
      (1, 1),
      padding,
      dimension_numbers=NHWC,
      precision=geometry.precision,
    )
    return total.at[lax.div(i, n // group)].add(product)

  shape = (m, sh * sw * c, *sizes, o)
  zeros, *_ = vary_alike(jnp.zeros(shape, wide), images, outputs)
  total = lax.fori_loop(0, m * (n // group), step, zeros)
  total = total.reshape(m, sh, sw, c, *sizes, o)[:, :, :, :, ::-1, ::-1]
  total = total.transpose(0, 4, 1, 5, 2, 3, 6)  # m, shift and pixel of both axes, c, o
  for axis in (0, 1):
    total = total.reshape(m, *total.shape[1 : 1 + axis], -1, *total.shape[3 + axis :])
    order = np.argsort(taps[axis].ravel())[: geometry.kernel[axis]]
    total = jnp.take(total, order, axis=1 + axis)
  return total.astype(images.dtype)


def _groups(n):
  """The size of the largest equal groups of n images, at most 16."""
  return max(size for size in range(1, _GROUP + 1) if n % size == 0)


def _take(x, group, i):
  """[group, ...] of step i. A group is spread out: a batch split over devices stays."""
  shared, shape = x.ndim == 4, x.shape[-3:]
  steps = x.shape[-4] // group
  x = x.reshape(-1, group, steps, *shape)
  return x[0 if shared else lax.div(i, steps), :, lax.rem(i, steps)]


def _pad(x, axis, low_high):
  config = [(0, 0, 0)] * x.ndim
  config[axis] = (*low_high, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), config)


# "unrolled": a call for each copy, for the scheduler to run side by side.


def _of_copy(x, copy):
  return x[copy if len(x) > 1 else 0][None]


def _unrolled(one, geometry, a, b):
  copies = range(max(len(a), len(b)))
  return jnp.concatenate([one(geometry, _of_copy(a, i), _of_copy(b, i)) for i in copies])


def _grouped_or_unrolled(one, geometry, a, b):
  together = functools.partial(one, geometry)
  if 1 in (len(a), len(b)):  # copies that share an operand need no groups
    return together(a, b)
  return unless_partitioned(together, functools.partial(_unrolled, one, geometry))(a, b)


_GROUPED = (_grouped, _grouped_image, _grouped_kernel)

LOWERINGS = {
  "loop": (_loop_forward, _loop_image, _loop_kernel),
  "grouped": tuple(functools.partial(_grouped_or_unrolled, one) for one in _GROUPED),
  "unrolled": tuple(functools.partial(_unrolled, one) for one in _GROUPED),
}
