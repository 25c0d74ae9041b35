"""Networks as programs that run without their Python code: tracing, and StableHLO files."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import Literal

from jaxsms.channels.calls import WITH_DERIVATIVES
from jaxsms.channels.evaluate import layer_scope
from jaxsms.channels.operations import inner_function, run_alone
from jaxsms.disk import storage
from jaxsms.disk.files import output_file
from jaxsms.disk.storage import first_sentence
from jaxsms.names import check_name
from jaxsms.trees import PyTree, is_concrete

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")
_LARGE = 4096  # entries of a constant that is not worked out ahead unless it shrinks


class Program(NamedTuple):
  """A network of inputs alone, traced for any batch size.

  Attributes:
    jaxpr: of it, with its constants as the first inputs.
    consts: these, among them the parameters.
    inputs: shapes and dtypes, the first axis of each of any length.
    out_tree: structure of what it gives.
  """

  jaxpr: Any
  consts: Sequence[Any]
  inputs: Sequence[jax.ShapeDtypeStruct]
  out_tree: Any

  def __call__(self, *inputs: Any) -> list[Any]:
    """The outputs, flat; traceable."""
    return jax.core.eval_jaxpr(self.jaxpr, (), *self.consts, *inputs)


def traced(apply: Callable[..., Any], params: PyTree, inputs: Sequence[Any]) -> Program:
  """Traces a network for batches of any size, its parameters as constants.

  What depends on no input is worked out, such as the factors of a batch normalization.

  Args:
    apply: the network, called with `params` and `inputs`.
    params: tree of concrete parameters.
    inputs: arrays, or their `jax.ShapeDtypeStruct`s; the first axis of each is the batch.

  Raises:
    ValueError: params are shapes, an input has no axis, or the network cannot be traced
      for a batch of any size.
  """
  if not is_concrete(params):
    raise ValueError("params are traced or shapes: give arrays, outside of jit")
  if not inputs or any(not np.shape(x) for x in inputs):
    raise ValueError(
      f"{len(inputs)} inputs are given: give at least one, each with the batch as its "
      "first axis"
    )
  (batch,) = export.symbolic_shape("batch")
  shapes = [
    jax.ShapeDtypeStruct((batch, *np.shape(x)[1:]), jnp.result_type(x)) for x in inputs
  ]
  try:
    closed, outs = jax.make_jaxpr(lambda *x: apply(params, *x), return_shape=True)(*shapes)
  except Exception as error:
    raise ValueError(
      "the network cannot be traced for a batch of any size "
      f"({type(error).__name__}: {first_sentence(error)}): give one that does not use the "
      'size itself, with plain convolutions (lowering="native")'
    ) from error
  closed = jax.make_jaxpr(lambda *x: evaluate(closed.jaxpr, closed.consts, x, {}))(*shapes)
  jaxpr, consts = _folded(closed)
  return Program(jaxpr, consts, shapes, jax.tree.structure(outs))


# Calls whose function is entered.
_CALLS = ("jit", "closed_call", *WITH_DERIVATIVES)


def evaluate(
  jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], rules: Mapping[str, Callable]
) -> list[Any]:
  """Runs a function without its calls of others, and without derivatives of its own.

  Args:
    jaxpr: of the function.
    consts: its constants.
    args: its inputs.
    rules: by the name of an operation, what runs it instead: `rule(equation, operands)`
      gives its outputs, or None to leave it as it is.
  """
  env = dict(zip(jaxpr.constvars, consts, strict=True))
  env |= zip(jaxpr.invars, args, strict=True)

  def read(variable):
    return variable.val if isinstance(variable, Literal) else env[variable]

  for equation in jaxpr.eqns:
    name, ins, outs = equation.primitive.name, [read(v) for v in equation.invars], None
    with layer_scope(equation):
      if name in _CALLS:
        outs = evaluate(*inner_function(equation), ins, rules)
      elif name in rules:
        outs = rules[name](equation, ins)
    if outs is None:
      outs = run_alone(jaxpr, equation, ins)
    env |= zip(equation.outvars, outs, strict=True)
  return [read(v) for v in jaxpr.outvars]


def _folded(closed):
  """A jaxpr whose first inputs are its constants, with operations on constants folded."""
  jaxpr = closed.jaxpr
  known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  left = []
  for equation in jaxpr.eqns:
    ins = [v.val if isinstance(v, Literal) else known.get(v) for v in equation.invars]
    if not any(x is None for x in ins) and _is_small(equation):
      known |= zip(equation.outvars, run_alone(jaxpr, equation, ins), strict=True)
    else:
      left.append(equation)
  read = {v for e in left for v in e.invars if not isinstance(v, Literal)}
  read |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
  used = [v for v in known if v in read]
  jaxpr = jaxpr.replace(constvars=[], invars=[*used, *jaxpr.invars], eqns=left)
  return jaxpr, [known[v] for v in used]


def _is_small(equation):
  """Whether a result can be a constant: of known size, and not much larger than before."""
  shapes = [v.aval.shape for v in equation.outvars]
  if equation.effects or any(not isinstance(n, int) for shape in shapes for n in shape):
    return False
  before = sum(np.size(v.val) if isinstance(v, Literal) else v.aval.size
               for v in equation.invars)  # fmt: skip
  return sum(v.aval.size for v in equation.outvars) <= max(before, _LARGE)


def save_stablehlo(
  path: str | os.PathLike,
  apply: Callable[..., Any],
  params: PyTree,
  *inputs: Any,
  platforms: Sequence[str] = PLATFORMS,
) -> None:
  """Writes a network with its parameters as a StableHLO program, the batch size free.

  Any process with JAX runs it, without the code of the network: `load_stablehlo`, or
  `jax.export.deserialize` on the bytes of the file. Later versions of JAX read it for at
  least six months (see `jax.export`).

  Args:
    path: the file; its folder is made where it is missing, and an older file replaced.
    apply: the network, called with `params` and `inputs`, such as that of a `Compact`.
      Networks of `jaxsms.models` are made with plain convolutions for it:
      `convolution=jax.lax.conv_general_dilated`.
    params: tree of concrete parameters, which become constants of the program.
    *inputs: arrays, or their `jax.ShapeDtypeStruct`s; the first axis of each is the batch,
      whose size stays free.
    platforms: where it may run, of "cpu", "cuda", "rocm" and "tpu".

  Raises:
    ValueError: the network cannot be traced for a batch of any size, or lowered, or a
      platform is unknown.
    ImportError: flatbuffers is not installed, with which JAX writes programs.
    OSError: the file cannot be written.

  Example:
    >>> import os, tempfile
    >>> path = tempfile.mkdtemp() + "/network.stablehlo"
    >>> params, x = {"w": jnp.ones((2, 1))}, jnp.ones((1, 2))
    >>> jaxsms.export.save_stablehlo(path, lambda p, x: x @ p["w"], params, x)
    >>> os.path.exists(path)
    True
  """
  program = traced(apply, params, inputs)

  def function(*inputs):
    return jax.tree.unflatten(program.out_tree, program(*inputs))

  for platform in platforms:
    check_name("platform", platform, _KNOWN)
  _check_flatbuffers()
  try:
    exported = export.export(jax.jit(function), platforms=tuple(platforms))(*program.inputs)
  except Exception as error:
    raise ValueError(
      f"the network cannot be exported for {', '.join(platforms)} "
      f"({type(error).__name__}: {first_sentence(error)}): give others in platforms, or "
      "another network"
    ) from error
  with output_file(path) as file:
    file.write(exported.serialize())


def _check_flatbuffers():
  """Raises ImportError where the package is missing with which JAX writes programs."""
  if not importlib.util.find_spec("flatbuffers"):
    raise ImportError(
      "JAX writes and reads programs with flatbuffers, which is not installed: run "
      "`pip install flatbuffers`"
    )


def load_stablehlo(path: str | os.PathLike) -> Callable[..., Any]:
  """Reads what `save_stablehlo` wrote.

  Args:
    path: the file.

  Returns:
    A function of the inputs, arrays with batches of any size; it works under `jit`.

  Raises:
    ValueError: the file is missing, damaged, or of a version that this JAX cannot read.
    ImportError: flatbuffers is not installed.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/network.stablehlo"
    >>> params, x = {"w": jnp.ones((2, 1))}, jnp.ones((1, 2))
    >>> jaxsms.export.save_stablehlo(path, lambda p, x: x @ p["w"], params, x)
    >>> jaxsms.export.load_stablehlo(path)(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[3.0], [7.0]]
  """
  _check_flatbuffers()
  try:
    return export.deserialize(bytearray(storage.as_path(path).read_bytes())).call
  except Exception as error:  # its reader raises a dozen kinds
    raise ValueError(
      f"{os.fspath(path)} cannot be read ({first_sentence(error)}): give a whole file that "
      "save_stablehlo wrote, with the JAX that wrote it or a later one"
    ) from error
