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

# Bytes of windows in memory at a time: they stay in a second-level cache of 2 MB.
_WINDOW_BYTES = 3 << 19


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

  def shifts(self, axis: int) -> "_Shifts":
    """How a block of s pixels, s the stride, meets the outputs along an axis."""
    s, k, low = self.strides[axis], self.kernel[axis], self.padding[axis][0]
    first, last = -((k - 1 - low) // s), (s - 1 + low) // s
    taps = np.arange(s) + low - s * np.arange(first, last + 1)[:, None]
    places = -(-self.image[axis] // s)
    high = places + last - self.output_size(axis)
    return _Shifts(places, (-first, high), np.where((taps >= 0) & (taps < k), taps, k))


class _Shifts(NamedTuple):
  """Pixel s * place + u meets padded output place + t through tap `taps[t, u]`.

  The tap is the kernel's size where they do not meet; the padding may be negative.
  """

  places: int
  padding: tuple[int, int]
  taps: np.ndarray


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
      return _forward(geometry, lhs[None], rhs[None])[0]
  options = (lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count)
  options += (batch_group_count, precision, preferred_element_type)
  return lax.conv_general_dilated(lhs, rhs, window_strides, padding, *options)


def _vary_alike(*operands):
  """Makes all vary over the manual mesh axes that one varies over (`shard_map`).

  The transpose of this sums a gradient over those axes, as elsewhere in autodiff.
  """
  kinds = [jax.typeof(x) for x in operands]
  # The names are those of jax 0.10, then of 0.8.
  kinds = [getattr(kind, "manual_axis_type", kind) for kind in kinds]
  own = [getattr(k, "varying", getattr(k, "vma", frozenset())) for k in kinds]
  vary = functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary
  missing = [tuple(frozenset().union(*own) - axes) for axes in own]
  return [vary(x, a) if a else x for x, a in zip(operands, missing, strict=True)]


# The three operations. Operands have a leading axis of copies, here of length 1; in the
# lowerings it is m long or, where the copies share the operand, 1. Each operation is
# linear in both of its operands, and its derivatives are the two others.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(geometry, images, kernels):
  """Images [1, n, h, w, c], kernels [1, kh, kw, c, o] -> outputs [1, n, oh, ow, o]."""
  return _lowerings(geometry, _cpu_forward, _grouped)(images, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _image_gradient(geometry, outputs, kernels):
  """The transpose of `_forward` in its images: outputs, kernels -> images."""
  return _lowerings(geometry, _cpu_image, _grouped_image)(outputs, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(geometry, images, outputs):
  """The transpose of `_forward` in its kernels: images, outputs -> kernels."""
  return _lowerings(geometry, _cpu_kernel, _grouped_kernel)(images, outputs)


def _define_vjp(operation, first, second):
  """Sets the two derivatives of an operation, functions (geometry, a, b, ct)."""

  def backward(geometry, operands, ct):
    return first(geometry, *operands, ct), second(geometry, *operands, ct)

  operation.defvjp(lambda geometry, a, b: (operation(geometry, a, b), (a, b)), backward)


_define_vjp(
  _forward,
  lambda geometry, images, kernels, ct: _image_gradient(geometry, ct, kernels),
  lambda geometry, images, kernels, ct: _kernel_gradient(geometry, images, ct),
)
_define_vjp(
  _image_gradient,
  lambda geometry, outputs, kernels, ct: _forward(geometry, ct, kernels),
  lambda geometry, outputs, kernels, ct: _kernel_gradient(geometry, ct, outputs),
)
_define_vjp(
  _kernel_gradient,
  lambda geometry, images, outputs, ct: _image_gradient(geometry, outputs, ct),
  lambda geometry, images, outputs, ct: _forward(geometry, images, ct),
)


@functools.cache
def _lowerings(geometry, cpu, default):
  """The operation that runs `cpu` on a CPU and `default` elsewhere, on all copies.

  The platform is that of the lowered program, which need not be this process's.
  """
  cpu, default = (functools.partial(f, geometry) for f in (cpu, default))

  @jax.custom_batching.custom_vmap
  def operation(a, b):
    return lax.platform_dependent(a, b, cpu=cpu, default=default)

  @operation.def_vmap
  def join(size, batched, a, b):
    # A mapped axis joins the copies, so that any nesting of vmaps is one axis here.
    a, b = (a if batched[0] else a[None]), (b if batched[1] else b[None])
    copies = max(a.shape[1], b.shape[1])

    def flat(x):
      if x.shape[:2] != (1, 1):
        x = jnp.broadcast_to(x, (size, copies, *x.shape[2:]))
      return x.reshape(-1, *x.shape[2:])

    out = operation(flat(a), flat(b))
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


# CPU: m separate convolutions, all in the one layout that is fast inside loops too.


def _cpu_forward(geometry, images, kernels):
  """One convolution for each copy, or one for all where they share the kernel."""
  wide = jnp.promote_types(images.dtype, jnp.float32)
  x, w = images.astype(wide), kernels.astype(wide)
  if len(w) == 1:
    out = _native(geometry, x.reshape(-1, *x.shape[2:]), w[0])
    out = out.reshape(len(x), -1, *out.shape[1:])
  else:
    out = jnp.stack([_native(geometry, x[i % len(x)], w[i]) for i in range(len(w))])
  return out.astype(images.dtype)


def _cpu_image(geometry, outputs, kernels):
  """One convolution of stride 1 gives a block of s x s pixels for each place."""
  (height, width), (sh, sw) = geometry.image, geometry.strides
  rows, columns = axes = geometry.shifts(0), geometry.shifts(1)
  # The convolution pads without a copy, but a CPU's must not be told to cut.
  for axis, shifts in enumerate(axes):
    outputs = _pad(outputs, axis + 2, [min(p, 0) for p in shifts.padding])
  padding = tuple(tuple(max(p, 0) for p in shifts.padding) for shifts in axes)
  # A tap that does not exist reads the zeros appended here.
  taps = jnp.pad(kernels, [(0, 0), (0, 1), (0, 1), (0, 0), (0, 0)])
  taps = taps[:, rows.taps][:, :, :, columns.taps].transpose(0, 1, 3, 6, 2, 4, 5)
  taps = taps.reshape(*taps.shape[:4], -1)
  shapes = outputs.shape[2:4], taps.shape[1:3]
  stride_one = _Geometry((1, 1), padding, *shapes, geometry.precision)
  blocks = _cpu_forward(stride_one, outputs, taps)
  if sh == sw == 1:
    return blocks
  shape = (*blocks.shape[:2], rows.places, columns.places, sh, sw, -1)
  pixels = blocks.reshape(shape).swapaxes(3, 4)
  pixels = pixels.reshape(*shape[:2], rows.places * sh, columns.places * sw, -1)
  return pixels[:, :, :height, :width]


def _cpu_kernel(geometry, images, outputs):
  """Windows of the images, transposed, times windows of the outputs.

  The kernel's rows are windows of the images, its columns windows of the outputs: for
  3x3, 3 + 3 times the data where patches are 9 times, and of few images, to stay in
  cache.
  """
  (kh, kw), (sh, sw), columns = geometry.kernel, geometry.strides, geometry.shifts(1)
  n, width, c = images.shape[1], images.shape[3], images.shape[4]
  oh, o, shifts = outputs.shape[2], outputs.shape[4], len(columns.taps)
  m, depth = max(len(images), len(outputs)), (kh * sw * c, shifts * o)
  wide = jnp.promote_types(images.dtype, jnp.float32)
  images_in_cache = _WINDOW_BYTES // (oh * columns.places * sum(depth) * wide.itemsize)
  group = min(n, 1 << max(images_in_cache, 1).bit_length() - 1)
  steps = n // group
  fill = [(0, 0), geometry.padding[0], (0, columns.places * sw - width), (0, 0)]

  def image_windows(x):
    x = jnp.pad(x.astype(wide), fill).reshape(len(x), -1, columns.places, sw * c)
    return _windows(x, 1, kh, oh, sh)

  def output_windows(x):
    x = _pad(x.astype(wide), 2, columns.padding)
    return _windows(x, 2, shifts, columns.places, 1)

  def products(images, outputs):
    a, b = [image_windows(x) for x in images], [output_windows(x) for x in outputs]
    pairs = ((a[i % len(a)], b[i % len(b)]) for i in range(m))
    rows = (((0,), (0,)), ((), ()))
    return jnp.stack([lax.dot_general(*ab, rows, geometry.precision) for ab in pairs])

  def add(i, total):
    # Group i is every steps-th image: a batch split over devices stays in place.
    split = (x.reshape(-1, group, steps, *x.shape[2:]) for x in whole)
    return total + products(*(x[:, :, i] for x in split))

  whole = images[:, : steps * group], outputs[:, : steps * group]
  zeros, *_ = _vary_alike(jnp.zeros((m, *depth), wide), images, outputs)
  total = lax.fori_loop(0, steps, add, zeros) if steps > 1 else add(0, zeros)
  if n % group:
    total += products(images[:, steps * group :], outputs[:, steps * group :])
  total = total.reshape(m, kh, sw, c, shifts, o).transpose(0, 1, 4, 2, 3, 5)
  order = [columns.taps.ravel().tolist().index(tap) for tap in range(kw)]
  total = total.reshape(m, kh, -1, c, o)[:, :, np.array(order)]
  return total.astype(images.dtype)


def _pad(x, axis, low_high):
  config = [(0, 0, 0)] * x.ndim
  config[axis] = (*low_high, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), config)


def _windows(x, axis, count, size, stride):
  """Rows of channels: `count` slices of x, each a step on along `axis`, side by side."""
  ends = [(i, i + stride * (size - 1) + 1) for i in range(count)]
  slices = [lax.slice_in_dim(x, *start_end, stride, axis) for start_end in ends]
  return jnp.concatenate(slices, -1).reshape(-1, count * x.shape[-1])
