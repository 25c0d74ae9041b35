"""What a network does with its weights, read from its jaxpr: the products they are in."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from jaxsms.trees import PyTree, is_array, path_string, split_leaves


class WeightUse(NamedTuple):
  """How a network uses one leaf.

  Attributes:
    multiply_adds: of all products of the leaf with activations.
    outputs: axes of the leaf that those products keep: its layer's outputs.
  """

  multiply_adds: int
  outputs: frozenset[int]


class _Origin(NamedTuple):
  """A value computed only from leaves: its largest leaf, and which of that leaf's axes."""

  leaf: str
  axes: tuple[frozenset[int], ...]


# What is made of no leaf: of inputs (and perhaps leaves), or of constants alone.
_ACTIVATION, _CONSTANT = "activation", "constant"


def weight_uses(
  apply: Callable[..., Any], params: PyTree, *inputs: Any
) -> dict[str, WeightUse]:
  """Finds the products of each leaf with what is no leaf; nothing is computed.

  A value that is made of leaves alone, however it was reshaped, transposed, cast, scaled or
  normalized, stays that of the largest of them. Products are dense, convolutions, and the
  look-up of rows, which costs nothing. A scan counts as often as it runs; of a `lax.cond`
  the last branch counts, and what is in a while loop does not.

  Args:
    apply: the network, called with `params` and the inputs.
    params: tree of parameters; shapes are enough.
    *inputs: arrays or `jax.ShapeDtypeStruct`.

  Returns:
    The use of each leaf that is in a product, by its path.
  """
  arrays, filled = split_leaves(params, lambda path, leaf: is_array(leaf))
  function = jax.make_jaxpr(lambda arrays, *inputs: apply(filled(arrays), *inputs))
  leaves = jax.tree.leaves_with_path(params)
  names = [path_string(path) for path, leaf in leaves if is_array(leaf)]
  return uses_in(function(arrays, *inputs).jaxpr, names)


def uses_in(jaxpr: Any, leaves: Sequence[str]) -> dict[str, WeightUse]:
  """As `weight_uses`, for a traced function whose first inputs are these leaves."""
  given: list[Any] = [_ACTIVATION] * len(jaxpr.invars)
  for i, name in enumerate(leaves):
    axes = range(len(jaxpr.invars[i].aval.shape))
    given[i] = _Origin(name, tuple(frozenset({axis}) for axis in axes))
  uses: dict[str, WeightUse] = {}
  _trace_uses(jaxpr, given, 1, uses)
  return uses


def _trace_uses(
  jaxpr: Any, given: Sequence, times: int, uses: dict[str, WeightUse]
) -> list:
  """Adds the uses in a traced function, run `times` times; gives its outputs' origins."""
  made = dict.fromkeys(jaxpr.constvars, _CONSTANT)
  made |= dict(zip(jaxpr.invars, given, strict=True))

  def of(variable):
    return _CONSTANT if isinstance(variable, Literal) else made[variable]

  for equation in jaxpr.eqns:
    ins = [of(v) for v in equation.invars]
    outs = _inside(equation, ins, times, uses)
    if outs is None:
      name = equation.primitive.name
      use = _PRODUCTS[name](equation, ins) if name in _PRODUCTS else None
      if use:
        leaf, count, outputs = use
        before = uses.get(leaf, WeightUse(0, frozenset()))
        uses[leaf] = WeightUse(before[0] + times * count, before[1] | outputs)
      outs = [_ACTIVATION] * len(equation.outvars)
      if not use and _ACTIVATION not in ins:
        outs = [_origin_of(equation, ins, out.aval) for out in equation.outvars]
    made |= dict(zip(equation.outvars, outs, strict=True))
  return [of(v) for v in jaxpr.outvars]


def _inside(equation: Any, ins: list, times: int, uses: dict) -> list | None:
  """The outputs of an operation that holds a function; None where it holds none."""
  name, p = equation.primitive.name, equation.params
  if name == "while":  # how often it runs is not known
    return [_ACTIVATION] * len(equation.outvars)
  if name == "cond":  # of the platforms' lowerings the default, which is the plain one
    inner, ins = p["branches"][-1], ins[1:]
  else:
    inner = next((v for v in p.values() if hasattr(v, "eqns")), None)
  inner = getattr(inner, "jaxpr", inner)
  if inner is None or len(inner.invars) != len(ins):
    return None
  if name == "scan":
    whole = p["num_consts"] + p["num_carry"]
    ins = [x if i < whole else _slice_of(x) for i, x in enumerate(ins)]
    outs = _trace_uses(inner, ins, times * p["length"], uses)
    stacked = [x if x is _CONSTANT else _ACTIVATION for x in outs[p["num_carry"] :]]
    return outs[: p["num_carry"]] + stacked
  return _trace_uses(inner, ins, times, uses)


def _slice_of(made: Any) -> Any:
  """One step's part of what a scan runs over."""
  return _Origin(made.leaf, made.axes[1:]) if isinstance(made, _Origin) else made


def _origin_of(equation: Any, ins: list, out: Any) -> Any:
  """What an operation of leaves and constants gives: its largest part, axis by axis."""
  parts = [
    (v.aval, x) for v, x in zip(equation.invars, ins, strict=True) if isinstance(x, _Origin)
  ]
  if not parts:
    return _CONSTANT
  aval, origin = max(parts, key=lambda part: part[0].size)
  name, p, axes = equation.primitive.name, equation.params, origin.axes
  if name == "transpose":
    axes = tuple(axes[i] for i in p["permutation"])
  elif name == "broadcast_in_dim":
    at = dict(zip(p["broadcast_dimensions"], axes, strict=True))
    axes = tuple(at.get(i, frozenset()) for i in range(len(out.shape)))
  elif name == "squeeze":
    axes = tuple(x for i, x in enumerate(axes) if i not in p["dimensions"])
  elif name == "reshape":
    axes = _reshaped(aval.shape, out.shape, axes)
  elif len(out.shape) != len(axes):
    axes = (frozenset().union(*axes),) * len(out.shape)
  return _Origin(origin.leaf, axes)


def _reshaped(old: Sequence[int], new: Sequence[int], axes: Sequence[frozenset]) -> tuple:
  """For each new axis those of the old ones that it has part of."""

  def spans(shape):
    """Where each axis lies between the row-major strides, as intervals of logarithms."""
    end, found = math.prod(shape), []
    for n in shape:
      found.append((end // n if n else 0, end))
      end = end // n if n else 0
    return found

  before = spans(old)
  return tuple(
    frozenset().union(*(
      a for a, (s, e) in zip(axes, before, strict=True) if s < end and start < e
    ))
    for start, end in spans(new)
  )  # fmt: skip


def _weight_side(ins: Sequence) -> int | None:
  """Which of two operands is the weight: of two leaves (learned queries) the second."""
  if _CONSTANT in ins[:2]:
    return None
  return next((i for i in (1, 0) if isinstance(ins[i], _Origin)), None)


def _dense(equation: Any, ins: list) -> tuple | None:
  side = _weight_side(ins)
  if side is None:
    return None
  contracted = equation.params["dimension_numbers"][0]
  shape = equation.invars[0].aval.shape
  count = equation.outvars[0].aval.size * math.prod(shape[a] for a in contracted[0])
  free = [x for a, x in enumerate(ins[side].axes) if a not in contracted[side]]
  return ins[side].leaf, count, frozenset().union(*free)


def _convolution(equation: Any, ins: list) -> tuple | None:
  side = _weight_side(ins)
  if side is None:
    return None
  kernel, spec = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec
  count = equation.outvars[0].aval.size * (kernel.size // kernel.shape[spec[0]])
  return ins[side].leaf, count, ins[1].axes[spec[0]] if side else frozenset()


def _rows(equation: Any, ins: list) -> tuple | None:
  """Looking up rows of a table by indices that are an input."""
  if not isinstance(ins[0], _Origin) or ins[1] is not _ACTIVATION:
    return None
  sizes, shape = equation.params["slice_sizes"], equation.invars[0].aval.shape
  whole = [x for x, n, size in zip(ins[0].axes, shape, sizes, strict=True) if n == size]
  return ins[0].leaf, 0, frozenset().union(*whole)


_PRODUCTS = {
  "dot_general": _dense,
  "conv_general_dilated": _convolution,
  "gather": _rows,
}
