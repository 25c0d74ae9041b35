"""XLA's own convolutions in a traced function, replaced by those of `jaxsms.convolution`.

So m copies of any network train fast on a CPU, without a change to its code. What is
replaced are single operations of a function that has been differentiated already, so that a
gradient's convolution is known by its form alone: one that dilates its images is an image
gradient, one whose kernel is larger than its output is a kernel gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from jaxsms import convolution
from jaxsms.compat import jaxprs_in_params
from jaxsms.nn.lowerings import Geometry, vary_alike
from jaxsms.trees import split_leaves

_HOW = "auto"
_NONE = ((0, 0), (0, 0))
_ENTERED = {
  "scan": ("jaxpr",),
  "while": ("body_jaxpr",),
  "cond": ("branches",),
  "jit": ("jaxpr",),
  "closed_call": ("call_jaxpr",),
}
if jax.__version_info__ < (0, 11):  # 0.12 fails where they are bound anew
  _ENTERED |= {"remat2": ("jaxpr",)}  # an open one


def with_own_convolutions(function: Callable, *arguments: Any) -> tuple[Any, int]:
  """Calls a function, its convolutions replaced.

  Args:
    function: jittable.
    *arguments: trees of arrays, traced or not; other leaves are handed on.

  Returns:
    Its result, to rounding, and how many convolutions were left as they are: dilated,
    grouped, complex, not over two dimensions, or in a function with a gradient of its own.
  """
  arrays, filled = split_leaves(arguments, lambda path, leaf: _is_value(leaf))
  results: list[Any] = []
  result_of: list[Any] = []

  def of_arrays(*arrays):
    found = function(*filled(arrays))
    results[:], made = jax.tree.flatten(found)
    result_of[:] = [made]
    return [x for x in results if _is_value(x)]

  traced, left = jax.make_jaxpr(of_arrays)(*arrays), [0]
  if _count_convolutions(traced.jaxpr):
    found = iter(_evaluate(traced.jaxpr, traced.consts, arrays, left))
  else:
    found = iter(jaxpr_as_fun(traced)(*arrays))
  results = [next(found) if _is_value(x) else x for x in results]
  return jax.tree.unflatten(result_of[0], results), left[0]


def _is_value(leaf):
  return hasattr(leaf, "dtype")  # Python's numbers are part of the program


def _evaluate(jaxpr, consts, arguments, left):
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

  def read(variable):
    return variable.val if isinstance(variable, Literal) else values[variable]

  for equation in jaxpr.eqns:
    inputs = [read(v) for v in equation.invars]
    found = _replaced(equation, inputs, left)
    if found is None:
      with equation.ctx.manager:
        found = _bind(*_with_inner_replaced(equation, inputs, left))
    values.update(zip(equation.outvars, found, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _bind(equation, inputs):
  """One operation as it is, in a traced function of its own."""
  parameters = equation.primitive.get_bind_params(equation.params)
  functions, parameters = parameters if isinstance(parameters, tuple) else ((), parameters)
  found = equation.primitive.bind(*functions, *inputs, **parameters)
  return found if equation.primitive.multiple_results else [found]


def _with_inner_replaced(equation, inputs, left):
  """The operation and its inputs, with the functions inside it transformed as well."""
  parameters = dict(equation.params)
  entered = _ENTERED.get(equation.primitive.name, ())
  for name in entered:
    inner = parameters[name]
    if isinstance(inner, ClosedJaxpr):
      parameters[name] = _transformed(inner, left)
    elif isinstance(inner, Jaxpr):
      new = _transformed(ClosedJaxpr(inner, ()), left)
      parameters[name], inputs = _opened(new.jaxpr), [*new.consts, *inputs]
    else:
      parameters[name] = tuple(_transformed(branch, left) for branch in inner)
  if not entered:
    left[0] += sum(map(_count_convolutions, _functions_in(equation)))
  return equation.replace(params=parameters), inputs


def _opened(jaxpr):
  """The function with its constants as arguments, the first."""
  if not jaxpr.constvars:
    return jaxpr
  return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])


def _transformed(closed, left):
  if not _count_convolutions(closed.jaxpr):
    return closed

  def function(*arguments):
    return _evaluate(closed.jaxpr, closed.consts, arguments, left)

  new = jax.make_jaxpr(function)(*closed.in_avals)
  same = [(a.shape, a.dtype) for a in new.out_avals] == [
    (a.shape, a.dtype) for a in closed.out_avals
  ]
  return new if same else closed


def _count_convolutions(jaxpr):
  """Of a function, and of those inside it."""
  return sum(
    (equation.primitive.name == "conv_general_dilated")
    + sum(map(_count_convolutions, _functions_in(equation)))
    for equation in jaxpr.eqns
  )


def _functions_in(equation):
  """Those that an operation calls, but for those with a batching rule of their own."""
  if equation.primitive.name == "custom_vmap_call":  # as our convolutions have
    return
  yield from jaxprs_in_params(equation.params)


def _replaced(equation, inputs, left):
  if equation.primitive.name != "conv_general_dilated":
    return None
  found = _convolve(equation.params, *inputs)
  if found is None:
    left[0] += 1
    return None
  return [found.astype(equation.outvars[0].aval.dtype)]


def _convolve(how, images, kernels):
  """The convolution by one of our three operations, or None."""
  images_of, kernels_of, out_of = how["dimension_numbers"]
  simple = (
    images.ndim == 4
    and images.dtype == kernels.dtype
    and jnp.issubdtype(images.dtype, jnp.floating)
    and how["preferred_element_type"] in (None, images.dtype)
    and how["feature_group_count"] == how["batch_group_count"] == 1
    and 0 not in images.shape + kernels.shape
  )
  if not simple:
    return None
  images = images.transpose(*(images_of[i] for i in (0, 2, 3, 1)))
  kernels = kernels.transpose(*(kernels_of[i] for i in (2, 3, 1, 0)))
  strides, padding = how["window_strides"], how["padding"]
  dilations, spread = how["lhs_dilation"], how["rhs_dilation"]
  precision = how["precision"]
  ones = (1, 1)
  out = None
  size = _output_size(images.shape[1:3], kernels.shape[:2], how)
  # Batches come first in every layout that is used, but for sums over the batch.
  summed = images_of[0] != 0 or math.prod(kernels.shape[:2]) > math.prod(size)
  if dilations == ones and strides == ones and summed:
    out = _as_kernel_gradient(images, kernels, size, padding, spread, precision)
  elif spread == ones and strides == ones and dilations != ones:
    out = _as_image_gradient(images, kernels, size, padding, dilations, precision)
  elif spread == dilations == ones:
    out = convolution.conv_general_dilated(
      images, kernels, strides, padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision,
    )  # fmt: skip
  if out is None:
    return None
  order = [out_of.index(axis) for axis in range(4)]  # of N, C, H, W
  return out.transpose(*((0, 3, 1, 2)[i] for i in order))


def _output_size(image, kernel, how):
  sizes = []
  for axis in (0, 1):
    dilated = (image[axis] - 1) * how["lhs_dilation"][axis] + 1
    window = (kernel[axis] - 1) * how["rhs_dilation"][axis] + 1
    room = dilated + sum(how["padding"][axis]) - window
    sizes.append(room // how["window_strides"][axis] + 1)
  return tuple(sizes)


def _as_kernel_gradient(images, outputs, kernel, padding, strides, precision):
  """Images [c, h, w, n], outputs [oh, ow, n, o] -> [c, kh, kw, o]."""
  images, outputs = images.transpose(3, 1, 2, 0), outputs.transpose(2, 0, 1, 3)
  if any(low < 0 for low, _ in padding):
    return None
  # A stride that does not reach the last rows leaves them out.
  cut = [(0, 0, 0), *((0, min(high, 0), 0) for _, high in padding), (0, 0, 0)]
  images = lax.pad(images, jnp.zeros((), images.dtype), cut)
  padding = tuple((low, max(high, 0)) for low, high in padding)
  if kernel == (1, 1) and padding == _NONE:  # whose geometry has no stride
    images, strides = images[:, :: strides[0], :: strides[1]], (1, 1)
  geometry = Geometry(strides, padding, images.shape[1:3], kernel, precision)
  if tuple(map(geometry.output_size, (0, 1))) != outputs.shape[1:3]:
    return None
  images, outputs = vary_alike(images, outputs)
  found = convolution.kernel_gradient((geometry, _HOW), images, outputs)
  return found.transpose(2, 0, 1, 3)


def _as_image_gradient(outputs, kernels, image, padding, strides, precision):
  """Outputs [n, oh, ow, o], kernels [kh, kw, o, c], turned around -> [n, h, w, c]."""
  kernels, kernel = kernels[::-1, ::-1].swapaxes(2, 3), kernels.shape[:2]
  padding = [
    (k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel, padding, strict=True)
  ]
  if any(low < 0 for low, _ in padding):
    return None
  reached = tuple(n + min(high, 0) for n, (_, high) in zip(image, padding, strict=True))
  padding, spread = tuple((low, max(high, 0)) for low, high in padding), (1, 1)
  if kernel == (1, 1) and padding == _NONE:  # whose geometry has no stride
    strides, spread = (1, 1), strides
    reached = outputs.shape[1:3]
  geometry = Geometry(strides, padding, reached, kernel, precision)
  if min(reached) < 1 or tuple(map(geometry.output_size, (0, 1))) != outputs.shape[1:3]:
    return None
  outputs, kernels = vary_alike(outputs, kernels)
  found = convolution.image_gradient((geometry, _HOW), outputs, kernels)
  rest = [
    (0, n - (r - 1) * s - 1, s - 1) for n, r, s in zip(image, reached, spread, strict=True)
  ]
  return lax.pad(found, jnp.zeros((), found.dtype), [(0, 0, 0), *rest, (0, 0, 0)])
