"""The API reference: pdoc makes it without a warning, and every public name is in it."""

import importlib
import inspect
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest

import jaxsms

ROOT = pathlib.Path(__file__).parent.parent
# README's command that makes the reference: what follows `-m`, as the shell reads it.
COMMAND = re.search(r"-m (pdoc jaxsms .*)", (ROOT / "README.md").read_text()).group(1)
MODULES = [
  word
  for word in subprocess.run(
    ["bash", "-c", f"echo {COMMAND}"], capture_output=True, text=True, check=True
  ).stdout.split()
  if word.startswith("jaxsms")
]
EMPTY = inspect.Signature.empty


def public_names(module):
  """What a page of the reference shows: `__all__`, or what the module itself defines."""
  if hasattr(module, "__all__"):
    return list(module.__all__)
  return [
    name
    for name, thing in vars(module).items()
    if not name.startswith("_")
    and callable(thing)
    and getattr(thing, "__module__", None) == module.__name__
  ]


def callables():
  """(name, function or class) of all pages, with the methods of the classes."""
  for module_name in MODULES:
    module = importlib.import_module(module_name)
    for name in public_names(module):
      thing = getattr(module, name)
      if not callable(thing) or isinstance(thing, types.GenericAlias):
        continue
      yield f"{module_name}.{name}", thing
      if inspect.isclass(thing):
        for method, function in vars(thing).items():
          if inspect.isfunction(function) and not method.startswith("_"):
            yield f"{module_name}.{name}.{method}", function


PUBLIC = dict(callables())


def section(text, title):
  """The lines of a section of a docstring, None where it has none."""
  found = re.search(rf"^{title}:\n((?:  .*\n|\n)*)", text + "\n", flags=re.MULTILINE)
  return found and found.group(1)


def entries(text):
  """The names that a section of a docstring explains."""
  groups = re.findall(r"^  \*{0,2}(\w+(?:, \w+)*):", text or "", flags=re.MULTILINE)
  return [name for group in groups for name in group.split(", ")]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
  thing = PUBLIC[name]
  text = inspect.getdoc(thing)
  assert text, "no docstring"
  first, *rest = text.splitlines()
  assert first.endswith(".") and len(first) <= 90
  assert not rest or not rest[0], "the first line stands alone"
  if inspect.isclass(thing):
    assert entries(section(text, "Attributes")) == list(getattr(thing, "_fields", ())) or (
      not hasattr(thing, "_fields")
    )
    return
  signature = inspect.signature(thing)
  parameters = [p for p in signature.parameters if p != "self"]
  assert entries(section(text, "Args")) == parameters
  gives = signature.return_annotation
  assert gives is not EMPTY, "no return annotation"
  # A method whose one line says what it gives needs no more.
  told = section(text, "Returns") or section(text, "Yields") or not parameters
  assert gives in (None, "None") or told
  assert "raise ValueError" not in inspect.getsource(thing) or section(text, "Raises")


def test_the_command_covers_all_modules_that_the_package_hands_out():
  assert {f"jaxsms.{name}" for name in jaxsms._ROOMS} <= set(MODULES)


@pytest.mark.slow
def test_pdoc_makes_the_reference_without_a_warning(tmp_path):
  pytest.importorskip("pdoc")
  command = f"{shlex.quote(sys.executable)} -m {COMMAND}"
  assert " -o build/api" in command
  command = command.replace("build/api", shlex.quote(str(tmp_path)))
  done = subprocess.run(
    ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False,
    env={**os.environ, "PDOC_ALLOW_EXEC": "1"},  # some versions of JAX call lscpu
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "warn" not in done.stderr.lower()
  for module in MODULES:
    page = (tmp_path / (module.replace(".", "/") + ".html")).read_text()
    sections = dict(re.findall(r'<section id="([^"]*)"(.*?)</section>', page, re.DOTALL))
    text = importlib.import_module(module).__doc__
    for name in public_names(importlib.import_module(module)):
      explained = 'class="docstring"' in sections[name] or f"`{name}`: " in text
      assert explained, f"{module}.{name}"


def test_sections_that_are_there_fit_everywhere():
  """Also inside the library, an Args section names the parameters, in their order."""
  seen = 0
  for path in sorted((ROOT / "jaxsms").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name == "jaxsms.disk.torch_networks":  # it is copied to where PyTorch is
      continue
    module = importlib.import_module(name)
    assert module.__doc__, name
    for thing in vars(module).values():
      if not inspect.isfunction(thing) or thing.__module__ != name:
        continue
      arguments = section(inspect.getdoc(thing) or "", "Args")
      if arguments:
        parameters = [p for p in inspect.signature(thing).parameters if p != "self"]
        assert entries(arguments) == parameters, f"{name}.{thing.__name__}"
        seen += 1
  assert seen > 100


def test_entries_reads_what_the_house_writes():
  text = "One line.\n\nArgs:\n  a: one,\n    b: no entry.\n  **c: more.\n\nReturns:\n  d."
  assert entries(section(text, "Args")) == ["a", "c"]
  assert section(text, "Raises") is None
