"""A convolution that knows how to be vmapped: own vjp, own batching rule per backend.

`vmap` over convolution kernels makes a grouped convolution, and autodiff's backward
convolutions have layouts that the CPU runs as unoptimised code inside loops. Here
the convolution and its two gradients are three operations on m copies at once, and
each says for itself how m copies run on a backend.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Bytes of windows in memory at a time: what one core's second-level cache holds.
_CACHE = 3 << 19


class _Shifts(NamedTuple):
  """Which outputs and taps the pixels of a block of s meet, along one axis.

  Pixel s * place + u meets output place + first + t through tap `taps[t, u]`, which
  is the kernel's size where there is none.
  """

  first: int
  places: int
  taps: np.ndarray


class _Geometry(NamedTuple):
  """What fixes a convolution apart from its operands."""

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  image: tuple[int, int]
  kernel: tuple[int, int]
  precision: Any

  @property
  def output(self) -> tuple[int, int]:
    return tuple(
      (n + sum(p) - k) // s + 1
      for n, p, k, s in zip(
        self.image, self.padding, self.kernel, self.strides, strict=True
      )
    )

  def shifts(self, axis: int) -> _Shifts:
    s, k, low = self.strides[axis], self.kernel[axis], self.padding[axis][0]
    first, last = -((k - 1 - low) // s), (s - 1 + low) // s
    t = np.arange(first, last + 1)[:, None]
    taps = np.arange(s) + low - s * t
    taps = np.where((taps >= 0) & (taps < k), taps, k)
    return _Shifts(first, -(-self.image[axis] // s), taps)


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

  Pass it to a linen module as `nn.Conv(..., conv_general_dilated=...)`. Two-dimensional
  NHWC/HWIO/NHWC convolutions without dilation and groups get the lowerings of this
  file; all others are `jax.lax.conv_general_dilated` itself. Reverse-mode derivatives
  of any order work, forward-mode ones (`jvp`, `linearize`, `hessian`) do not: a model
  that needs them takes `jax.lax.conv_general_dilated` instead.

  Args:
    lhs: images, [batch, height, width, channels] for the lowerings of this file.
    rhs: kernels, [height, width, channels, features] for the same.
    window_strides: one stride for each spatial dimension.
    padding: "SAME", "VALID", or (low, high) for each spatial dimension.
    lhs_dilation: as in `jax.lax.conv_general_dilated`, like all that follow.
    rhs_dilation: same.
    dimension_numbers: same.
    feature_group_count: same.
    batch_group_count: same.
    precision: same.
    preferred_element_type: same.

  Returns:
    The convolution, of the shape and type `jax.lax.conv_general_dilated` gives.
  """
  native = functools.partial(
    lax.conv_general_dilated,
    window_strides=window_strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    batch_group_count=batch_group_count,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  ones = (None, 1, (1, 1), [1, 1])
  plain = (
    lhs.ndim == rhs.ndim == 4
    and lhs.dtype == rhs.dtype
    and jnp.issubdtype(lhs.dtype, jnp.floating)
    and preferred_element_type in (None, lhs.dtype)
    and feature_group_count == batch_group_count == 1
    and lhs_dilation in ones
    and rhs_dilation in ones
    and _is_nhwc(lhs.shape, rhs.shape, dimension_numbers)
    and lhs.shape[3] == rhs.shape[2]
    and math.prod(lhs.shape) * math.prod(rhs.shape) > 0
  )
  if not plain:
    return native(lhs, rhs)
  image, kernel = lhs.shape[1:3], rhs.shape[:2]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(image, kernel, window_strides, padding)
  padding = tuple((int(low), int(high)) for low, high in padding)
  geometry = _Geometry(tuple(window_strides), padding, image, kernel, precision)
  fits = all(n > 0 for n in geometry.output)
  if not fits or any(p < 0 for low_high in padding for p in low_high):
    return native(lhs, rhs)
  lhs, rhs = _vary_alike(lhs, rhs)
  return _forward(geometry, lhs[None], rhs[None])[0]


def _is_nhwc(lhs_shape, rhs_shape, dimension_numbers) -> bool:
  """Whether `dimension_numbers` say NHWC, HWIO, NHWC."""
  numbers = lax.conv_dimension_numbers(lhs_shape, rhs_shape, dimension_numbers)
  nhwc = lax.conv_dimension_numbers(lhs_shape, rhs_shape, ("NHWC", "HWIO", "NHWC"))
  return numbers == nhwc


def _vary_alike(*operands):
  """Makes all vary over the manual mesh axes that one varies over (`shard_map`).

  The transpose of this sums a gradient over those axes, as autodiff does elsewhere.
  """
  axes = [getattr(jax.typeof(operand), "vma", frozenset()) for operand in operands]
  union = frozenset().union(*axes)
  return tuple(
    lax.pcast(operand, tuple(union - own), to="varying") if union - own else operand
    for operand, own in zip(operands, axes, strict=True)
  )


# The three operations. Their operands have a leading axis of copies, of length m or,
# where all copies share the operand, 1. Each is linear in both operands, and together
# they are closed under differentiation.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(geometry, images, kernels):
  """Convolves images [m or 1, n, h, w, c] with kernels [m or 1, kh, kw, c, o]."""
  return _for_copies(_cpu_forward, _native_forward, geometry)(images, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _image_gradient(geometry, outputs, kernels):
  """Transposes `_forward` in its images: outputs' cotangent -> images'."""
  operation = _for_copies(_cpu_image_gradient, _native_image_gradient, geometry)
  return operation(outputs, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(geometry, images, outputs):
  """Transposes `_forward` in its kernels: outputs' cotangent -> kernels'."""
  operation = _for_copies(_cpu_kernel_gradient, _native_kernel_gradient, geometry)
  return operation(images, outputs)


def _define_vjp(operation, first_vjp, second_vjp):
  """Sets the derivative of a bilinear operation: `first_vjp(geometry, a, b, ct)`."""

  def forward(geometry, a, b):
    return operation(geometry, a, b), (a, b)

  def backward(geometry, operands, cotangent):
    a, b = operands
    first = first_vjp(geometry, a, b, cotangent)
    second = second_vjp(geometry, a, b, cotangent)
    return _sum_copies(first, a), _sum_copies(second, b)

  operation.defvjp(forward, backward)


def _sum_copies(gradient, operand):
  """Sums over the copies an operand was shared by."""
  if gradient.shape[0] == operand.shape[0]:
    return gradient
  return gradient.sum(0, keepdims=True)


_define_vjp(
  _forward,
  lambda g, images, kernels, ct: _image_gradient(g, ct, kernels),
  lambda g, images, kernels, ct: _kernel_gradient(g, images, ct),
)
_define_vjp(
  _image_gradient,
  lambda g, outputs, kernels, ct: _forward(g, ct, kernels),
  lambda g, outputs, kernels, ct: _kernel_gradient(g, ct, outputs),
)
_define_vjp(
  _kernel_gradient,
  lambda g, images, outputs, ct: _image_gradient(g, outputs, ct),
  lambda g, images, outputs, ct: _forward(g, images, ct),
)


@functools.cache
def _for_copies(cpu: Callable, default: Callable, geometry: _Geometry) -> Callable:
  """The operation that runs `cpu` on a CPU, `default` elsewhere, on any copies.

  The platform is the one the program is lowered for, not that of this process.
  """

  @jax.custom_batching.custom_vmap
  def operation(a, b):
    return lax.platform_dependent(
      a,
      b,
      cpu=functools.partial(cpu, geometry),
      default=functools.partial(default, geometry),
    )

  @operation.def_vmap
  def rule(size, batched, a, b):
    # One more mapped axis joins the copies: any nesting of vmap ends in one axis.
    copies = max(x.shape[is_batched] for x, is_batched in zip((a, b), batched, strict=True))
    a, b = (
      _join_copies(x, is_batched, size, copies)
      for x, is_batched in zip((a, b), batched, strict=True)
    )
    out = operation(a, b)
    return out.reshape(size, -1, *out.shape[1:]), True

  return operation


def _join_copies(x, is_batched: bool, size: int, copies: int):
  """Joins a mapped axis and the axis of copies, leaving a shared operand shared."""
  if not is_batched:
    if x.shape[0] == 1:
      return x
    x = jnp.broadcast_to(x, (size, *x.shape))
  elif x.shape[1] < copies:
    x = jnp.broadcast_to(x, (size, copies, *x.shape[2:]))
  return x.reshape(-1, *x.shape[2:])


# Any platform: XLA's convolution and its transposes, vmapped into groups.


def _native(geometry, image, kernel):
  return lax.conv_general_dilated(
    image,
    kernel,
    geometry.strides,
    geometry.padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=geometry.precision,
  )


def _native_forward(geometry, images, kernels):
  return _vmap_copies(functools.partial(_native, geometry), images, kernels)


def _native_image_gradient(geometry, outputs, kernels):
  shape = (*outputs.shape[1:2], *geometry.image, kernels.shape[-2])

  def one(output, kernel):
    image = jax.ShapeDtypeStruct(shape, output.dtype)
    transpose = jax.linear_transpose(lambda x: _native(geometry, x, kernel), image)
    return transpose(output)[0]

  return _vmap_copies(one, outputs, kernels)


def _native_kernel_gradient(geometry, images, outputs):
  shape = (*geometry.kernel, images.shape[-1], outputs.shape[-1])

  def one(image, output):
    kernel = jax.ShapeDtypeStruct(shape, output.dtype)
    transpose = jax.linear_transpose(lambda w: _native(geometry, image, w), kernel)
    return transpose(output)[0]

  return _vmap_copies(one, images, outputs)


def _vmap_copies(function, a, b):
  """Maps `function` over the copies, closing over what they share."""
  if a.shape[0] == b.shape[0] == 1:
    return function(a[0], b[0])[None]
  if a.shape[0] == 1:
    return jax.vmap(lambda one: function(a[0], one))(b)
  if b.shape[0] == 1:
    return jax.vmap(lambda one: function(one, b[0]))(a)
  return jax.vmap(function)(a, b)


# CPU: m separate convolutions in the one layout that is fast everywhere.


def _cpu_forward(geometry, images, kernels):
  return _cpu_copies(
    functools.partial(_convolve, geometry.strides, geometry.padding, geometry.precision),
    images,
    kernels,
  )


def _cpu_image_gradient(geometry, outputs, kernels):
  """One convolution of stride 1 that gives a block of s x s pixels for each place."""
  (height, width), (sh, sw) = geometry.image, geometry.strides
  vertical, horizontal = geometry.shifts(0), geometry.shifts(1)
  c, o = kernels.shape[-2:]
  taps = (len(vertical.taps), len(horizontal.taps))
  zero = jnp.pad(kernels, [(0, 0), (0, 1), (0, 1), (0, 0), (0, 0)])
  blocks = zero[:, vertical.taps][:, :, :, horizontal.taps]
  blocks = blocks.transpose(0, 1, 3, 6, 2, 4, 5).reshape(-1, *taps, o, sh * sw * c)
  # Padding is never negative here: lax would read outside the array on a CPU.
  outputs = _fit(outputs, 2, vertical)
  outputs = _fit(outputs, 3, horizontal)
  convolve = functools.partial(_convolve, (1, 1), "VALID", geometry.precision)
  pixels = _cpu_copies(convolve, outputs, blocks)
  if sh == sw == 1:
    return pixels
  m, n, rows, columns, _ = pixels.shape
  pixels = pixels.reshape(m, n, rows, columns, sh, sw, c).swapaxes(3, 4)
  pixels = pixels.reshape(m, n, rows * sh, columns * sw, c)
  return pixels[:, :, :height, :width]


def _cpu_kernel_gradient(geometry, images, outputs):
  """Windows of images, transposed, times windows of outputs.

  Rows of the kernel come from windows of the images, columns from windows of the
  outputs: for 3x3 that is 3 + 3 copies of the data where patches are 9. A few images
  at a time, so that the windows stay in cache.
  """
  horizontal = geometry.shifts(1)
  (kh, kw), s = geometry.kernel, geometry.strides[1]
  n, c, o = images.shape[1], images.shape[-1], outputs.shape[-1]
  m = max(images.shape[0], outputs.shape[0])
  wide = jnp.promote_types(images.dtype, jnp.float32)
  depth = (kh * s * c, len(horizontal.taps) * o)
  window_bytes = geometry.output[0] * horizontal.places * sum(depth) * wide.itemsize
  group = min(n, 1 << (max(1, _CACHE // window_bytes).bit_length() - 1))

  def products(images, outputs):
    images = [_rows_window(geometry, x.astype(wide)) for x in images]
    outputs = [_columns_window(horizontal, y.astype(wide)) for y in outputs]
    return jnp.stack(
      [
        lax.dot_general(
          images[i % len(images)],
          outputs[i % len(outputs)],
          (((0,), (0,)), ((), ())),
          precision=geometry.precision,
        )
        for i in range(m)
      ]
    )

  whole = n - n % group
  # The loop's axis is the inner one: a batch that is split over devices stays split.
  groups = [
    x[:, :whole].reshape(-1, group, whole // group, *x.shape[2:]) for x in (images, outputs)
  ]

  def add(i, total):
    return total + products(*(lax.dynamic_index_in_dim(x, i, 2, False) for x in groups))

  if whole == group:
    total = add(0, 0.0)
  else:
    zeros, *_ = _vary_alike(jnp.zeros((m, *depth), wide), images, outputs)
    total = lax.fori_loop(0, whole // group, add, zeros)
  if whole < n:
    total = total + products(images[:, whole:], outputs[:, whole:])
  total = total.reshape(m, kh, s, c, -1, o).transpose(0, 1, 4, 2, 3, 5)
  total = total.reshape(m, kh, -1, c, o)
  # Where in the blocks [shift, column of the block] the kernel's columns are.
  order = [horizontal.taps.ravel().tolist().index(k) for k in range(kw)]
  return total[:, :, jnp.array(order)].astype(images.dtype)


def _rows_window(geometry, images):
  """[n, h, w, c] -> [n * oh * places, kh * s * c], kh rows of blocks of s columns."""
  horizontal, (kh, _), (sh, sw) = geometry.shifts(1), geometry.kernel, geometry.strides
  (n, _, w, c), (oh, _) = images.shape, geometry.output
  fill = horizontal.places * sw - w
  images = jnp.pad(images, [(0, 0), geometry.padding[0], (0, fill), (0, 0)])
  images = images.reshape(n, -1, horizontal.places, sw * c)
  rows = [images[:, i : i + sh * (oh - 1) + 1 : sh] for i in range(kh)]
  return jnp.concatenate(rows, -1).reshape(n * oh * horizontal.places, -1)


def _columns_window(horizontal, outputs):
  """[n, oh, ow, o] -> [n * oh * places, shifts * o]."""
  outputs = _fit(outputs, 2, horizontal)
  columns = [
    lax.slice_in_dim(outputs, t, t + horizontal.places, axis=2)
    for t in range(len(horizontal.taps))
  ]
  return jnp.concatenate(columns, -1).reshape(-1, len(columns) * outputs.shape[-1])


def _fit(outputs, axis: int, shifts: "_Shifts"):
  """Pads or cuts an axis of outputs to what windows at all places read."""
  low = -shifts.first
  high = shifts.places + len(shifts.taps) - 1 - low - outputs.shape[axis]
  kept = lax.slice_in_dim(
    outputs, max(0, -low), outputs.shape[axis] + min(0, high), axis=axis
  )
  pad = [(0, 0)] * outputs.ndim
  pad[axis] = (max(low, 0), max(high, 0))
  return jnp.pad(kept, pad)


def _convolve(strides, padding, precision, image, kernel):
  wide = jnp.promote_types(image.dtype, jnp.float32)
  out = lax.conv_general_dilated(
    image.astype(wide),
    kernel.astype(wide),
    strides,
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision,
  )
  return out.astype(image.dtype)


def _cpu_copies(convolve, images, kernels):
  """One convolution for each copy, or a single one where only one operand has copies."""
  m, copies = images.shape[0], kernels.shape[0]
  if copies == 1:
    out = convolve(images.reshape(-1, *images.shape[2:]), kernels[0])
    return out.reshape(m, -1, *out.shape[1:])
  if m == 1:
    _, kh, kw, c, o = kernels.shape
    wide = jnp.moveaxis(kernels, 0, 3).reshape(kh, kw, c, copies * o)
    out = convolve(images[0], wide)
    return jnp.moveaxis(out.reshape(*out.shape[:3], copies, o), 3, 0)
  return jnp.stack([convolve(images[i], kernels[i]) for i in range(m)])
