"""A convolution that knows how to be vmapped: own vjp, own batching rule per backend.

`vmap` over kernels makes grouped convolutions, and autodiff's backward convolutions
have layouts that a CPU runs as unoptimised code inside loops. Here a convolution and
its two gradients are three operations on m copies at once. How they run is a fixed rule:
"loop" on a CPU, "grouped" on any other platform; see `jaxsms.nn.lowerings`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsms.names import check_name
from jaxsms.nn.lowerings import LOWERINGS, NHWC, Geometry, pair, vary_alike

# How the operations run on a platform, by measurement on CPU alone: BUILD_NOTES.md.
RULE = {"cpu": "loop", "default": "grouped"}
CHOICES = ("auto", *LOWERINGS, "native")


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
  out_sharding: Any = None,
  lowering: str = "auto",
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, fast also under `vmap` and inside loops.

  Pass it to a convolution of linen or NNX:
  `nn.Conv(..., conv_general_dilated=jaxsms.convolution.conv_general_dilated)`.
  Floating NHWC/HWIO/NHWC convolutions without dilation and groups get the lowerings of
  this file; all others are `jax.lax.conv_general_dilated` itself. There are
  reverse-mode derivatives of any order and no forward-mode ones (`jvp`, `jacfwd`,
  `hessian`): a model that needs those takes `jax.lax.conv_general_dilated` instead.

  Args:
    lhs: images [batch, height, width, channels].
    rhs: kernels [height, width, channels, features].
    window_strides: one for each spatial dimension.
    padding: "SAME", "VALID" or a pair (low, high) for each spatial dimension.
    lhs_dilation: of the images, one for each spatial dimension; None means 1.
    rhs_dilation: of the kernels, one for each spatial dimension; None means 1.
    dimension_numbers: layouts of images, kernels and outputs, such as
      ("NHWC", "HWIO", "NHWC").
    feature_group_count: into how many groups the channels are divided.
    batch_group_count: into how many groups the batch is divided.
    precision: of the products, such as "highest"; None is the platform's default.
    preferred_element_type: dtype that sums are kept in and the result has; None leaves it
      to XLA.
    out_sharding: of the result; with one, XLA's own convolution runs.
    lowering: "auto" follows the rule of the platform that the program is compiled for;
      "loop", "grouped" or "unrolled" hold on all of them, see `jaxsms.nn.lowerings`;
      "native" is `jax.lax.conv_general_dilated` itself.

  Returns:
    What `jax.lax.conv_general_dilated` returns, to rounding.

  Raises:
    ValueError: `lowering` has another name.

  Example:
    >>> images = jnp.arange(9.0).reshape(1, 3, 3, 1)
    >>> kernel = jnp.ones((3, 3, 1, 1))
    >>> layout = ("NHWC", "HWIO", "NHWC")
    >>> outputs = jaxsms.convolution.conv_general_dilated(
    ...   images, kernel, (1, 1), "VALID", dimension_numbers=layout)
    >>> outputs.tolist()  # 0 + 1 + ... + 8
    [[[[36.0]]]]
  """
  check_name("convolution lowering", lowering, CHOICES)
  simple = (
    lowering != "native"
    and out_sharding is None
    and lhs.ndim == rhs.ndim == 4
    and lhs.dtype == rhs.dtype
    and jnp.issubdtype(lhs.dtype, jnp.floating)
    and preferred_element_type in (None, lhs.dtype)
    and feature_group_count == batch_group_count == 1
    and all(d is None or set(d) == {1} for d in (lhs_dilation, rhs_dilation))
    and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    and lhs.shape[3] == rhs.shape[2]
    and 0 not in lhs.shape + rhs.shape
  )
  if simple:
    strides, image, kernel = map(pair, (window_strides, lhs.shape[1:3], rhs.shape[:2]))
    if isinstance(padding, str):
      padding = lax.padtype_to_pads(image, kernel, strides, padding)
    pads = pair((int(low), int(high)) for low, high in padding)
    if kernel == (1, 1) and pads == ((0, 0), (0, 0)):
      lhs = lhs[:, :: strides[0], :: strides[1]]
      strides, image = (1, 1), pair(lhs.shape[1:3])
    precision = tuple(precision) if isinstance(precision, list) else precision
    geometry = Geometry(strides, pads, image, kernel, precision)
    if min(map(geometry.output_size, (0, 1))) > 0 and min(map(min, pads)) >= 0:
      lhs, rhs = vary_alike(lhs, rhs)
      return _forward((geometry, lowering), lhs, rhs)
  # Not every version of JAX knows the argument.
  placed: dict[str, Any] = {} if out_sharding is None else {"out_sharding": out_sharding}
  return lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    precision,
    preferred_element_type,
    **placed,
  )


# The three operations. In the lowerings operands have a leading axis of copies, m long
# or, where the copies share the operand, 1. Each operation is linear in both of its
# operands, and its derivatives are the two others.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(how, images, kernels):
  """Images [n, h, w, c], kernel [kh, kw, c, o] -> outputs [n, oh, ow, o]."""
  return _operation(how, 0)(images, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def image_gradient(
  how: tuple[Geometry, str], outputs: jax.Array, kernels: jax.Array
) -> jax.Array:
  """The transpose of a convolution in its images.

  Args:
    how: (its geometry, "auto" or the name of a lowering).
    outputs: [n, out_h, out_w, o].
    kernels: [h, w, c, o].

  Returns:
    Images [n, h, w, c].

  Example:
    >>> no_padding, sides = ((0, 0), (0, 0)), (2, 2)
    >>> geometry = jaxsms.nn.lowerings.Geometry((1, 1), no_padding, sides, sides, None)
    >>> outputs, kernel = jnp.ones((1, 1, 1, 1)), jnp.arange(4.0).reshape(2, 2, 1, 1)
    >>> images = jaxsms.convolution.image_gradient((geometry, "auto"), outputs, kernel)
    >>> images.ravel().tolist()  # one output: its gradient in the images is the kernel
    [0.0, 1.0, 2.0, 3.0]
  """
  return _operation(how, 1)(outputs, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kernel_gradient(
  how: tuple[Geometry, str], images: jax.Array, outputs: jax.Array
) -> jax.Array:
  """The transpose of a convolution in its kernels.

  Args:
    how: (its geometry, "auto" or the name of a lowering).
    images: [n, h, w, c].
    outputs: [n, out_h, out_w, o].

  Returns:
    Kernels [h, w, c, o].

  Example:
    >>> no_padding, sides = ((0, 0), (0, 0)), (2, 2)
    >>> geometry = jaxsms.nn.lowerings.Geometry((1, 1), no_padding, sides, sides, None)
    >>> images, outputs = jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.ones((1, 1, 1, 1))
    >>> kernel = jaxsms.convolution.kernel_gradient((geometry, "auto"), images, outputs)
    >>> kernel.ravel().tolist()  # one output: its gradient in the kernel is the image
    [0.0, 1.0, 2.0, 3.0]
  """
  return _operation(how, 2)(images, outputs)


_forward.defvjp(
  lambda g, x, w: (_forward(g, x, w), (x, w)),
  lambda g, xw, ct: (image_gradient(g, ct, xw[1]), kernel_gradient(g, xw[0], ct)),
)
image_gradient.defvjp(
  lambda g, y, w: (image_gradient(g, y, w), (y, w)),
  lambda g, yw, ct: (_forward(g, ct, yw[1]), kernel_gradient(g, ct, yw[0])),
)
kernel_gradient.defvjp(
  lambda g, x, y: (kernel_gradient(g, x, y), (x, y)),
  lambda g, xy, ct: (image_gradient(g, xy[1], ct), _forward(g, xy[0], ct)),
)


OPERATIONS = (_forward, image_gradient, kernel_gradient)


@functools.cache
def _operation(how, index):
  """One of the three operations, with the lowering of the rule or the caller."""
  geometry, lowering = how
  rule = RULE if lowering == "auto" else {"default": lowering}
  ways = {
    platform: functools.partial(LOWERINGS[name][index], geometry)
    for platform, name in rule.items()
  }

  @jax.custom_batching.custom_vmap
  def operation(a, b):
    alone = {k: lambda a, b, way=way: way(a[None], b[None])[0] for k, way in ways.items()}
    return lax.platform_dependent(a, b, **alone)

  @jax.custom_batching.custom_vmap
  def stacked(a, b):
    return lax.platform_dependent(a, b, **ways)

  @operation.def_vmap
  def stack(size, batched, a, b):
    a, b = (x if on else x[None] for x, on in zip((a, b), batched, strict=True))
    return stacked(a, b), True

  # By which `jaxsms.channels` knows it in a jaxpr.
  stack.convolution = (how, index)  # type: ignore[attr-defined]  # a name on a function

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

  join.stacked_convolution = (how, index)  # type: ignore[attr-defined]  # the same
  return operation
