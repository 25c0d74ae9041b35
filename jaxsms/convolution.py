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
from jax import lax

# Images whose patches are in memory at a time.
_GROUP = 16


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
  """One convolution of stride 1 that gives a block of s x s pixels for each place.

  Pixel s * q + u - low of the image meets output q - t through tap s * t + u.
  """
  (sh, sw), (height, width), (kh, kw) = (
    geometry.strides,
    geometry.image,
    geometry.kernel,
  )
  taps = (-(-kh // sh), -(-kw // sw))
  m, _, _, c, o = kernels.shape
  fill = [(0, 0), (0, taps[0] * sh - kh), (0, taps[1] * sw - kw), (0, 0), (0, 0)]
  kernels = jnp.pad(kernels, fill).reshape(m, taps[0], sh, taps[1], sw, c, o)
  kernels = kernels[:, ::-1, :, ::-1].transpose(0, 1, 3, 6, 2, 4, 5)
  kernels = kernels.reshape(m, *taps, o, sh * sw * c)
  places, padding, start = [], [], []
  for i in range(2):
    s, low, size = geometry.strides[i], geometry.padding[i][0], geometry.image[i]
    first, last = low // s, (size - 1 + low) // s
    places.append(last - first + 1)
    # Output j of the padded array must be q - (taps - 1) for place q.
    padding.append((taps[i] - 1 - first, last - (geometry.output[i] - 1)))
    start.append(low - first * s)
  outputs = lax.pad(
    outputs,
    jnp.zeros((), outputs.dtype),
    [(0, 0, 0), (0, 0, 0)] + [(min(a, 0), min(b, 0), 0) for a, b in padding] + [(0, 0, 0)],
  )
  padding = tuple((max(a, 0), max(b, 0)) for a, b in padding)
  blocks = _cpu_copies(
    functools.partial(_convolve, (1, 1), padding, geometry.precision), outputs, kernels
  )
  if sh == sw == 1:
    return blocks
  copies, n = blocks.shape[:2]
  blocks = blocks.reshape(copies, n, *places, sh, sw, c).swapaxes(3, 4)
  pixels = blocks.reshape(copies, n, places[0] * sh, places[1] * sw, c)
  return pixels[:, :, start[0] : start[0] + height, start[1] : start[1] + width]


def _cpu_kernel_gradient(geometry, images, outputs):
  """Patches, transposed, times outputs: a few images at a time, to stay in cache."""
  n, group = images.shape[1], min(_GROUP, images.shape[1])
  m = max(images.shape[0], outputs.shape[0])
  c, o = images.shape[-1], outputs.shape[-1]
  wide = jnp.promote_types(images.dtype, jnp.float32)

  def product(start, size):
    def part(x):
      return lax.dynamic_slice_in_dim(x, start, size, 0).astype(wide)

    patches = [_patches(geometry, part(x)) for x in images]
    rows = [part(y).reshape(-1, o) for y in outputs]
    return jnp.stack(
      [
        lax.dot_general(
          patches[i % len(patches)],
          rows[i % len(rows)],
          (((0,), (0,)), ((), ())),
          precision=geometry.precision,
        )
        for i in range(m)
      ]
    )

  total = product(n - n % group, n % group) if n % group else 0.0
  if n == group:
    total = total + product(0, group)
  else:
    total = lax.fori_loop(
      0,
      n // group,
      lambda i, total: total + product(i * group, group),
      total + jnp.zeros((m, math.prod(geometry.kernel) * c, o), wide),
    )
  return total.reshape(m, *geometry.kernel, c, o).astype(images.dtype)


def _patches(geometry, images):
  """[n, h, w, c] -> [n * oh * ow, kh * kw * c]."""
  (oh, ow), (sh, sw) = geometry.output, geometry.strides
  images = jnp.pad(images, [(0, 0), *geometry.padding, (0, 0)])
  slices = [
    images[:, i : i + sh * (oh - 1) + 1 : sh, j : j + sw * (ow - 1) + 1 : sw]
    for i in range(geometry.kernel[0])
    for j in range(geometry.kernel[1])
  ]
  return jnp.concatenate(slices, -1).reshape(images.shape[0] * oh * ow, -1)


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
