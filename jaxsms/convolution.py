"""A convolution that knows how to be vmapped: own vjp, own batching rule per backend.

`vmap` over kernels makes grouped convolutions, and autodiff's backward convolutions
have layouts that a CPU runs as unoptimised code inside loops. Here a convolution and
its two gradients are three operations on m copies at once, each lowered by platform.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")

_GROUP = 16  # images in one step, for a CPU's second-level cache of 2 MB


class _Geometry(NamedTuple):
  """What fixes a convolution apart from its operands."""

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  image: tuple[int, int]
  kernel: tuple[int, int]
  precision: Any

  def output_size(self, axis: int) -> int:
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


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, fast also under `vmap` and inside loops.

  Pass it to a linen module: `nn.Conv(..., conv_general_dilated=conv_general_dilated)`.
  Floating NHWC/HWIO/NHWC convolutions without dilation and groups get the lowerings of
  this file; all others are `jax.lax.conv_general_dilated` itself. There are
  reverse-mode derivatives of any order and no forward-mode ones (`jvp`, `jacfwd`,
  `hessian`): a model that needs those takes `jax.lax.conv_general_dilated` instead.

  Args:
    lhs: images [batch, height, width, channels].
    rhs: kernels [height, width, channels, features].
    window_strides: one for each spatial dimension.
    padding: "SAME", "VALID" or a pair (low, high) for each spatial dimension.
    lhs_dilation: as in `jax.lax.conv_general_dilated`, like all that follow.
    rhs_dilation: the same.
    dimension_numbers: the same.
    feature_group_count: the same.
    batch_group_count: the same.
    precision: the same.
    preferred_element_type: the same.

  Returns:
    What `jax.lax.conv_general_dilated` returns, to rounding.
  """
  simple = (
    lhs.ndim == rhs.ndim == 4
    and lhs.dtype == rhs.dtype
    and jnp.issubdtype(lhs.dtype, jnp.floating)
    and preferred_element_type in (None, lhs.dtype)
    and feature_group_count == batch_group_count == 1
    and all(d is None or set(d) == {1} for d in (lhs_dilation, rhs_dilation))
    and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
    and lhs.shape[3] == rhs.shape[2]
    and 0 not in lhs.shape + rhs.shape
  )
  if simple:
    strides, image, kernel = tuple(window_strides), lhs.shape[1:3], rhs.shape[:2]
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(image, kernel, strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    if kernel == (1, 1) and padding == ((0, 0), (0, 0)):
      lhs = lhs[:, :: strides[0], :: strides[1]]
      strides, image = (1, 1), lhs.shape[1:3]
    precision = tuple(precision) if isinstance(precision, list) else precision
    geometry = _Geometry(strides, padding, image, kernel, precision)
    if min(map(geometry.output_size, (0, 1))) > 0 and min(sum(padding, ())) >= 0:
      lhs, rhs = _vary_alike(lhs, rhs)
      return _forward(geometry, lhs, rhs)
  options = (lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count)
  options += (batch_group_count, precision, preferred_element_type)
  return lax.conv_general_dilated(lhs, rhs, window_strides, padding, *options)


def _vary_alike(*operands):
  """Makes all vary over the manual mesh axes that one does; gradients are summed."""
  kinds = [jax.typeof(x) for x in operands]
  # The names are those of jax 0.10, then of 0.8.
  kinds = [getattr(kind, "manual_axis_type", kind) for kind in kinds]
  own = [getattr(k, "varying", getattr(k, "vma", frozenset())) for k in kinds]
  vary = functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary
  missing = [tuple(frozenset().union(*own) - axes) for axes in own]
  return [vary(x, a) if a else x for x, a in zip(operands, missing, strict=True)]


# The three operations. In the lowerings operands have a leading axis of copies, m long
# or, where the copies share the operand, 1. Each operation is linear in both of its
# operands, and its derivatives are the two others.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(geometry, images, kernels):
  """Images [n, h, w, c], kernel [kh, kw, c, o] -> outputs [n, oh, ow, o]."""
  return _lowerings(geometry, _cpu_forward, _grouped)(images, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _image_gradient(geometry, outputs, kernels):
  """The transpose of `_forward` in its images: outputs, kernels -> images."""
  return _lowerings(geometry, _cpu_image, _grouped_image)(outputs, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(geometry, images, outputs):
  """The transpose of `_forward` in its kernels: images, outputs -> kernels."""
  return _lowerings(geometry, _cpu_kernel, _grouped_kernel)(images, outputs)


_forward.defvjp(
  lambda g, x, w: (_forward(g, x, w), (x, w)),
  lambda g, xw, ct: (_image_gradient(g, ct, xw[1]), _kernel_gradient(g, xw[0], ct)),
)
_image_gradient.defvjp(
  lambda g, y, w: (_image_gradient(g, y, w), (y, w)),
  lambda g, yw, ct: (_forward(g, ct, yw[1]), _kernel_gradient(g, ct, yw[0])),
)
_kernel_gradient.defvjp(
  lambda g, x, y: (_kernel_gradient(g, x, y), (x, y)),
  lambda g, xy, ct: (_image_gradient(g, xy[1], ct), _forward(g, xy[0], ct)),
)


@functools.cache
def _lowerings(geometry, cpu, default):
  """The operation, on any copies, that runs `cpu` in a program for a CPU only."""
  cpu, default = (functools.partial(f, geometry) for f in (cpu, default))

  @jax.custom_batching.custom_vmap
  def operation(a, b):
    return lax.platform_dependent(
      a,
      b,
      cpu=lambda a, b: cpu(a[None], b[None])[0],
      default=lambda a, b: default(a[None], b[None])[0],
    )

  @jax.custom_batching.custom_vmap
  def stacked(a, b):
    return lax.platform_dependent(a, b, cpu=cpu, default=default)

  @operation.def_vmap
  def stack(size, batched, a, b):
    a, b = (x if on else x[None] for x, on in zip((a, b), batched, strict=True))
    return stacked(a, b), True

  @stacked.def_vmap
  def join(size, batched, a, b):
    # A mapped axis joins the copies, so that any nesting of vmaps is one axis here.
    a, b = (a if batched[0] else a[None]), (b if batched[1] else b[None])
    copies = max(a.shape[1], b.shape[1])

    def flat(x):
      if x.shape[:2] != (1, 1):
        x = jnp.broadcast_to(x, (size, copies, *x.shape[2:]))
      return x.reshape(-1, *x.shape[2:])

    out = stacked(flat(a), flat(b))
    return out.reshape(size, copies, *out.shape[1:]), True

  return operation


# Any platform: XLA's convolution and its transposes, vmapped into grouped ones.


def _native(geometry, image, kernel):
  strides, padding, _, _, precision = geometry
  if geometry.kernel == (1, 1) and padding == ((0, 0), (0, 0)):
    return jnp.tensordot(image, kernel[0, 0], 1, precision=precision)
  return lax.conv_general_dilated(
    image, kernel, strides, padding, dimension_numbers=_NHWC, precision=precision
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
  zeros, _ = _vary_alike(jnp.zeros((copies, *shape), outputs.dtype), outputs)
  return jax.vjp(forward, zeros)[1](outputs)[0]


# CPU: one copy and a few images at a time, in the one layout that is fast in loops too.


def _cpu_forward(geometry, images, kernels):
  return _cpu_map(functools.partial(_convolve, geometry), images, kernels)


def _cpu_image(geometry, outputs, kernels):
  """One convolution of stride 1 gives a block of s x s pixels for each place."""
  (height, width), (sh, sw), c = geometry.image, geometry.strides, kernels.shape[3]
  (rows, columns), pads, (tall, broad) = zip(*map(geometry.shifts, (0, 1)), strict=True)
  # The convolution pads without a copy, but a CPU's must not be told to cut.
  for axis in (0, 1):
    outputs = _pad(outputs, axis + 2, [min(p, 0) for p in pads[axis]])
  pads = tuple((max(low, 0), max(high, 0)) for low, high in pads)
  # A tap that does not exist reads the zeros appended here.
  taps = jnp.pad(kernels, [(0, 0), (0, 1), (0, 1), (0, 0), (0, 0)])
  taps = taps[:, tall][:, :, :, broad].transpose(0, 1, 3, 6, 2, 4, 5)
  taps = taps.reshape(*taps.shape[:4], -1)
  shapes = outputs.shape[2:4], taps.shape[1:3]
  stride_one = _Geometry((1, 1), pads, *shapes, geometry.precision)

  def one(outputs, taps):
    blocks = _convolve(stride_one, outputs, taps)
    blocks = blocks.reshape(-1, rows, columns, sh, sw, c).swapaxes(2, 3)
    return blocks.reshape(-1, rows * sh, columns * sw, c)[:, :height, :width]

  return _cpu_map(one, outputs, taps)


def _convolve(geometry, images, kernel):
  """Up to 16 features leave the vector unit half empty: columns become features."""
  _, width, c, o = kernel.shape
  columns, places = 4 if c < 8 else 2, geometry.output_size(1)
  if o > 16 or width == 1 or geometry.strides[1] > 1 or places % columns:
    return _native(geometry, images, kernel)
  fill = [[(0, 0), (i, columns - 1 - i), (0, 0), (0, 0)] for i in range(columns)]
  kernel = jnp.concatenate([jnp.pad(kernel, low_high) for low_high in fill], -1)
  geometry = geometry._replace(strides=(geometry.strides[0], columns))
  return _native(geometry, images, kernel).reshape(len(images), -1, places, o)


def _cpu_map(function, images, kernels):
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
  zeros, *_ = _vary_alike(jnp.zeros((m, group, steps, *shape), dtype), images, kernels)

  def step(i, out):
    copy = lax.div(i, steps)
    y = function(_take(images, group, i).astype(wide), kernels[copy]).astype(dtype)
    start = (copy, 0, lax.rem(i, steps), 0, 0, 0)
    return lax.dynamic_update_slice(out, y[None, :, None], start)

  return lax.fori_loop(0, m * steps, step, zeros).reshape(m, n, *shape)


def _cpu_kernel(geometry, images, outputs):
  """A convolution of images by outputs, with examples as channels.

  Blocks of s x s pixels, s the stride, are its batch: its stride is then 1.
  """
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
      dimension_numbers=_NHWC,
      precision=geometry.precision,
    )
    return total.at[lax.div(i, n // group)].add(product)

  shape = (m, sh * sw * c, *sizes, o)
  zeros, *_ = _vary_alike(jnp.zeros(shape, wide), images, outputs)
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
