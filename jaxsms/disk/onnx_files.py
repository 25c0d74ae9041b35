"""ONNX files of networks, checked against JAX before they are written, and int8 of them."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.compat import jaxprs_in_params
from jaxsms.disk.files import on_disk, output_file
from jaxsms.disk.programs import Program, evaluate, traced
from jaxsms.disk.storage import first_sentence
from jaxsms.trees import PyTree, is_concrete

TOLERANCE = 1e-4  # of the largest output of JAX
_INSTALL = (
  "run `pip install 'jaxsms[onnx]'` in an environment of its own: jax2onnx 0.17 wants "
  "jax from 0.8.1 on, flax from 0.12.1 on and orbax-checkpoint below 0.11.37"
)


def save_onnx(
  path: str | os.PathLike,
  apply: Callable[..., Any],
  params: PyTree,
  *inputs: Any,
  input_names: Sequence[str] | None = None,
  output_names: Sequence[str] | None = None,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a network with its parameters to an ONNX file, the batch size free.

  Its outputs in ONNX Runtime are compared with those of JAX for two batch sizes, before the
  file gets its name.

  Args:
    path: the file; its folder is made where it is missing, and an older file replaced.
    apply: the network, called with `params` and `inputs`, such as that of a `Compact`.
      Networks of `jaxsms.models` are made with plain convolutions for it:
      `convolution=jax.lax.conv_general_dilated`.
    params: tree of concrete parameters, which become constants of the graph.
    *inputs: arrays, or their `jax.ShapeDtypeStruct`s; the first axis of each is the batch.
    input_names: of the graph's inputs; None gives "input_0", "input_1", ...
    output_names: of its outputs, in the order of `jax.tree.leaves`; None gives
      "output_0", ...
    metadata: text to store with the graph, by name.

  Raises:
    ValueError: the network cannot be traced for a batch of any size, has an operation that
      ONNX does not (the layer is named where it is known), or the outputs of the file are
      not those of JAX.
    ImportError: jax2onnx or onnxruntime is not installed, or does not fit this JAX.
    OSError: the file cannot be written.

  References:
    https://github.com/enpasos/jax2onnx
  """
  to_onnx = _converter()
  program = traced(apply, params, inputs)
  ins = _names_of("input", input_names, len(program.inputs))
  outs = _names_of("output", output_names, program.out_tree.num_leaves)
  with _quiet():
    try:
      model = to_onnx(
        lambda *x: tuple(evaluate(program.jaxpr, (), [*program.consts, *x], _RULES)),
        list(program.inputs),
        model_name="network",
        input_names=ins,
        output_names=outs,
      )
    except Exception as error:  # of any kind: its plugins raise what they like
      raise ValueError(_refusal(error, program)) from error
  _drop_zero_biases(model.graph)
  for name, text in (metadata or {}).items():
    model.metadata_props.add(key=name, value=text)
  data = model.SerializeToString()
  _check(data, program, ins, jax.jit(lambda *x: jax.tree.leaves(apply(params, *x))))
  with output_file(path) as file:
    file.write(data)


def _names_of(kind: str, given: Sequence[str] | None, number: int) -> list[str]:
  """The given names of inputs or outputs, or "input_0" and so on; ValueError if too few."""
  names = [f"{kind}_{i}" for i in range(number)] if given is None else list(given)
  if len(names) != number:
    raise ValueError(f"{kind}_names are {names}: the network has {number}, name each")
  return names


def _drop_zero_biases(graph):
  """Products without the scalar 0 that jax2onnx adds: int8 has a scale for each channel."""
  from onnx import numpy_helper

  zeros = {
    x.name for x in graph.initializer if not x.dims and not numpy_helper.to_array(x).any()
  }
  for node in graph.node:
    if node.op_type == "Gemm" and len(node.input) == 3 and node.input[2] in zeros:
      del node.input[2]
  unused = zeros - set(_names_read(graph))
  for x in [x for x in graph.initializer if x.name in unused]:
    graph.initializer.remove(x)  # ONNX Runtime warns of it in each session


def _names_read(graph):
  """What the nodes of a graph read, also in graphs within them, and what it gives."""
  yield from (x.name for x in graph.output)
  for node in graph.node:
    yield from node.input
    for attribute in node.attribute:
      for inner in (attribute.g, *attribute.graphs):
        yield from _names_read(inner)


def _pad(equation, ins):
  """Padding by concatenation: jax2onnx 0.17 pads no array whose batch is of any size."""
  x, fill = ins
  config = equation.params["padding_config"]
  if any(low < 0 or high < 0 or inside for low, high, inside in config):
    return None
  for axis, (low, high, _) in enumerate(config):
    for n, where in ((low, 0), (high, 1)):
      if n:
        shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
        more = jax.lax.broadcast_in_dim(jnp.asarray(fill, x.dtype), shape, ())
        x = jax.lax.concatenate([x, more] if where else [more, x], axis)
  return [x]


def _max(equation, ins):
  """A maximum with 0 as ReLU, which runtimes join with the operation before."""
  for x, other in (ins, ins[::-1]):
    if np.shape(other) == () and is_concrete(other) and other == 0:
      return [jax.nn.relu(x)]
  return None


_RULES = {"pad": _pad, "max": _max}


def _converter():
  """jax2onnx's `to_onnx`; ImportError with one sentence where it cannot be imported."""
  for package in ("onnxruntime", "jax2onnx"):
    try:
      module = __import__(package)
    except ImportError as error:
      if error.name == package:
        problem = f"ONNX files need {package}, which is not installed"
      else:
        problem = f"{package} does not work here ({first_sentence(error)})"
      raise ImportError(f"{problem}: {_INSTALL}") from error
    except Exception as error:  # attributes of JAX that another version lacks
      raise ImportError(
        f"{package} does not work with jax {jax.__version__} ({first_sentence(error)}): "
        f"{_INSTALL}"
      ) from error
  return module.to_onnx


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what others log, such as of plugins that another version of JAX would need."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    yield
  finally:
    logging.disable(before)


def _operations(jaxpr: Any) -> Iterator[tuple[str, str]]:
  """(name, layer) of each operation, inner ones too; the layer as Flax names it, or ""."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name, str(equation.source_info.name_stack)
    for inner in jaxprs_in_params(equation.params):
      yield from _operations(inner)


def _refusal(error: Exception, program: Program) -> str:
  words = set(re.findall(r"\w+", str(error)))
  if isinstance(error, NotImplementedError):
    for name, layer in _operations(program.jaxpr):
      if name in words:
        where = f" of {layer}" if layer else ""
        return (
          f"the operation {name}{where} cannot be written as ONNX: leave it out of the "
          "network, or write a StableHLO file"
        )
  return (
    f"the network cannot be written as ONNX ({type(error).__name__}: "
    f"{first_sentence(error)}): write a StableHLO file instead"
  )


def _check(
  data: bytes, program: Program, names: Sequence[str], function: Callable[..., Any]
) -> None:
  """Raises ValueError where ONNX Runtime answers otherwise than JAX."""
  try:
    session = start_session(data)
  except Exception as error:
    raise ValueError(
      f"ONNX Runtime cannot run what jax2onnx made ({first_sentence(error)}): write a "
      "StableHLO file instead"
    ) from error
  for batch in (1, 3):
    inputs = _samples(program.inputs, batch)
    answers = session.run(None, dict(zip(names, inputs, strict=True)))
    for answer, expected in zip(answers, function(*inputs), strict=True):
      expected = np.asarray(expected)
      difference = float(np.abs(answer - expected).max(initial=0))
      if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0))):
        raise ValueError(
          f"in ONNX Runtime the network differs from JAX by {difference:.3g} for a batch "
          f"of {batch}: write a StableHLO file instead"
        )


def _samples(inputs: Sequence[jax.ShapeDtypeStruct], batch: int) -> list[np.ndarray]:
  """Random inputs of a batch size, for trying a program: normal numbers, or 0 and 1."""
  rng = np.random.default_rng(0)
  return [
    rng.standard_normal((batch, *x.shape[1:])).astype(x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating)
    else rng.integers(0, 2, (batch, *x.shape[1:])).astype(x.dtype)
    for x in inputs
  ]


def start_session(model: bytes | str) -> Any:
  """An ONNX Runtime session on the CPU, of the bytes of a file or of its path."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors
  return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def quantize_onnx(
  path: str | os.PathLike, out: str | os.PathLike, batches: Iterable[np.ndarray]
) -> None:
  """Writes an ONNX file whose products are of int8, by onnxruntime's quantization.

  Weights have one scale per channel. Activations have one per tensor, from their range on
  the batches.

  Args:
    path: of an ONNX file with one input, as `save_onnx` writes it.
    out: the file to write.
    batches: inputs, some hundred examples as in training, for the ranges of activations.

  Raises:
    ValueError: there is no batch, or the file cannot be quantized.
    ImportError: onnxruntime is not installed.
    OSError: the file cannot be written.

  References:
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
  """
  try:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
  except ImportError as error:
    raise ImportError(
      f"int8 needs onnxruntime and onnx ({first_sentence(error)}): {_INSTALL}"
    ) from error
  found = list(batches)
  if not found:
    raise ValueError("no batches are given: give some hundred examples")

  class Reader(quantization.CalibrationDataReader):
    def __init__(self, name):
      self._left = iter([{name: x} for x in found])

    def get_next(self):
      return next(self._left, None)

  with on_disk(path) as source, tempfile.TemporaryDirectory() as folder, _quiet():
    ready, made = (os.path.join(folder, name) for name in ("ready.onnx", "int8.onnx"))
    name = start_session(source).get_inputs()[0].name
    try:
      quant_pre_process(source, ready, skip_symbolic_shape=True)
      quantization.quantize_static(
        ready,
        made,
        Reader(name),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
      )
    except Exception as error:
      raise ValueError(
        f"{os.fspath(path)} cannot be quantized ({type(error).__name__}: "
        f"{first_sentence(error)}): use the file as it is"
      ) from error
    with open(made, "rb") as reader, output_file(out) as file:
      file.write(reader.read())
