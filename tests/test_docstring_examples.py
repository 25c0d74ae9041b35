"""Every example in a docstring runs as written."""

import doctest
import importlib
import pathlib

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


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
  module = importlib.import_module(module.removesuffix(".__init__"))
  done = doctest.testmod(module, extraglobs=KNOWN, optionflags=doctest.ELLIPSIS)
  assert done.attempted and not done.failed


def test_new_functions_have_one():
  assert {"jaxsms.gradual", "jaxsms.recalibration"} <= set(MODULES)
