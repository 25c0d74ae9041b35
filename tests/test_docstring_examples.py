"""Every example in a docstring runs as written, and every public function has one."""

import doctest
import importlib
import inspect
import pathlib
import tempfile
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsms

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parent.parent
# What the examples take as imported.
KNOWN = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "jaxsms": jaxsms}
MODULES = [
  ".".join(path.relative_to(ROOT).with_suffix("").parts)
  for path in sorted((ROOT / "jaxsms").rglob("*.py"))
  if ">>>" in path.read_text()
]
# What the examples of a module need beside the base dependencies.
NEEDS = {"jaxsms.disk.programs": "flatbuffers"}
ROOMS = (
  "baselines", "checkpoint", "convolution", "data", "dynamic", "export", "merges", "models",
  "pretrained", "training",
)  # fmt: skip
PREPARED = "reads a data set that TFDS prepared"
TRAINS = "trains a network: compiling takes longer than an example may"
ONNX = "takes packages that want an environment of their own"
WITHOUT = {
  "jaxsms.data.TfdsExamples": PREPARED,
  "jaxsms.data.load_split": PREPARED,
  "jaxsms.data.open_streamed": PREPARED,
  "jaxsms.data.open_streamed_test": PREPARED,
  "jaxsms.export.quantize_onnx": ONNX,
  "jaxsms.export.save_onnx": ONNX,
  "jaxsms.baselines.imp_reprune": TRAINS,
  "jaxsms.baselines.swamp": TRAINS,
  "jaxsms.dynamic.prune_during_training": TRAINS,
  "jaxsms.training.train_chunks": TRAINS,
  "jaxsms.training.train_copies": TRAINS,
}


def public():
  """By its name, everything that a caller may import."""
  found = {f"jaxsms.{name}": getattr(jaxsms, name) for name in jaxsms.__all__}
  for room in ROOMS:
    module = importlib.import_module(f"jaxsms.{room}")
    own = [
      name
      for name, thing in vars(module).items()
      if getattr(thing, "__module__", "") == module.__name__ and name[0] != "_"
    ]
    for name in getattr(module, "__all__", own):
      found[f"jaxsms.{room}.{name}"] = getattr(module, name)
  return found


def is_record(thing):
  """Whether it only holds values, each of which its docstring describes."""
  a_tuple = isinstance(thing, type) and issubclass(thing, tuple)
  return a_tuple or typing.is_typeddict(thing)


@pytest.mark.parametrize("module", MODULES)
def test_examples(module, tmp_path, monkeypatch):
  if module in NEEDS:
    pytest.importorskip(NEEDS[module])
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  module = importlib.import_module(module.removesuffix(".__init__"))
  done = doctest.testmod(module, extraglobs=KNOWN, optionflags=doctest.ELLIPSIS)
  assert done.attempted and not done.failed


def test_every_public_function_has_one():
  functions = {
    name: thing
    for name, thing in public().items()
    if callable(thing) and not is_record(thing)
  }
  assert len(functions) > 100
  without = {
    name for name, thing in functions.items() if ">>>" not in (inspect.getdoc(thing) or "")
  }
  assert without == WITHOUT.keys()
