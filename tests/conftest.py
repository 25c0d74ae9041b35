"""Eight simulated devices, a compilation cache for quick reruns, and shared helpers."""

import contextlib
import importlib.util
import os
import pathlib

_CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(config, items):
  """Leaves out what needs a package that is not installed.

  Slow tests are left out unless a -m expression asks for some.
  """
  left_out = {
    mark: f"needs {package}"
    for mark, package in {"torch": "torch", "onnx": "jax2onnx"}.items()
    if not importlib.util.find_spec(package)
  }
  if not config.option.markexpr:
    left_out["slow"] = "slow: run with -m slow"
  for item in items:
    for mark, reason in left_out.items():
      if mark in item.keywords:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def quick_compilation():
  """For tests whose programs run once or twice and take far longer to compile.

  JAX takes a program that it has compiled already for the same function and shapes, however
  it was compiled; another one of the same function, for other shardings say, would round
  differently beside it. So nothing compiled one way is left for the other.
  """
  with quickly_compiled():
    yield


@contextlib.contextmanager
def quickly_compiled():
  """Compiles with few optimizations, and forgets all programs before and after."""
  with _optimizations_disabled(True):
    yield


@pytest.fixture
def usual_compilation():
  """For tests that train long enough to need programs as users have them."""
  with _optimizations_disabled(False):
    yield


@contextlib.contextmanager
def _optimizations_disabled(wanted):
  before = jax.config.read("jax_disable_most_optimizations")
  jax.clear_caches()
  jax.config.update("jax_disable_most_optimizations", wanted)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_figures():
  """Drawing takes longer than the runs."""
  from jaxsms.disk import storage

  with pytest.MonkeyPatch.context() as monkeypatch:
    empty = lambda results, path: storage.write_bytes(path, b"")  # noqa: E731
    monkeypatch.setattr("experiments.reporting.figures.accuracy_figure", empty)
    monkeypatch.setattr("experiments.sms.write_report", lambda paths: None)
    yield


@pytest.fixture(scope="session")
def rejects():
  """`with rejects("words"):` a ValueError of one sentence that holds those words."""

  @contextlib.contextmanager
  def rejects_with(words, error=ValueError):
    with pytest.raises(error) as raised:
      yield
    message = str(raised.value)
    assert words in message
    assert "\n" not in message
    assert ". " not in message, "one sentence"
    assert not message.endswith(".")

  return rejects_with


@pytest.fixture(scope="session")
def assert_trees_equal():
  """Asserts that two trees agree: structure, dtype, and every value (NaN is NaN)."""

  def as_numpy(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)

  def check(a, b, rtol=0.0, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
      assert x.dtype == y.dtype, path
      np.testing.assert_allclose(
        as_numpy(x), as_numpy(y), rtol=rtol, atol=atol, err_msg=str(path)
      )

  return check
