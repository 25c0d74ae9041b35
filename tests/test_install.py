"""What is installed: a light base, extras, Colab's versions, and the command jaxsms."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from jaxsms import __main__ as command

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
COLAB = dict(
  line.split("==")
  for line in (ROOT / ".ci" / "colab.txt").read_text().splitlines()
  if not line.startswith("#")
)
# Nothing else that Colab has depends on these.
NOT_ON_COLAB = {"importlib-resources", "tensorboardx"}
COLAB_ENVIRONMENT = {"python_version": "3.13", "python_full_version": "3.13.0"}


def requirements(*extras):
  """What the base and these extras ask for, extras of their own included."""
  lines = list(PROJECT["dependencies"])
  for extra in extras:
    for line in EXTRAS[extra]:
      own = re.fullmatch(r"jaxsms\[(.*)\]", line)
      lines += requirements(*own[1].split(",")) if own else [line]
  return lines


def test_the_base_is_jax_and_its_libraries():
  names = {Requirement(line).name for line in requirements()}
  assert names == {
    "jax", "flax", "optax", "orbax-checkpoint", "absl-py", "numpy", "etils"
  }  # fmt: skip
  assert {"data", "experiments", "test", "docs", "bench", "cuda12", "cuda13", "tpu"} <= {
    *EXTRAS
  }


def extras_installed(name):
  """What the first cell of a notebook installs where jaxsms is missing."""
  notebook = json.loads((ROOT / "experiments" / f"{name}.ipynb").read_text())
  cell = next(c for c in notebook["cells"] if c["cell_type"] == "code")
  text = "".join(cell["source"])
  assert 'find_spec("jaxsms") is None' in text
  (call,) = re.findall(r"subprocess\.run\((\[.*?\])", text)
  assert call == '[sys.executable, "-m", "pip", "install", "-q", wanted]'
  (extras,) = re.findall(r'wanted = f"jaxsms\[([\w,]+)\] @ \{REPOSITORY\}"', text)
  return extras.split(",")


@pytest.mark.parametrize("name", ["first_soup", "your_own_model"])
def test_the_notebooks_install_nothing_that_colab_has(name):
  """Their first cell leaves jax and all others there as they are."""
  missing = set()
  for line in requirements(*extras_installed(name)):
    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate(COLAB_ENVIRONMENT):
      continue
    if wanted.name in COLAB:
      assert wanted.specifier.contains(COLAB[wanted.name]), line
    else:
      missing.add(wanted.name.lower().replace("_", "-"))
  assert missing - {"pillow"} <= NOT_ON_COLAB
  python = Requirement(f"python{PROJECT['requires-python']}").specifier
  assert python.contains("3.13.0")


def test_the_notebook_with_onnx_files_installs_what_writes_them():
  extras = extras_installed("smaller_and_faster")
  names = {Requirement(line).name for line in requirements(*extras)}
  assert {"jax2onnx", "onnxruntime", "matplotlib", "scikit-learn"} <= names


def test_extras_of_accelerators_ask_for_the_same_jax():
  (base,) = (line for line in PROJECT["dependencies"] if line.startswith("jax>"))
  for name in ("cuda12", "cuda13", "tpu"):
    (line,) = EXTRAS[name]
    assert Requirement(line).specifier == Requirement(base).specifier
    assert Version("0.7.2") in Requirement(line).specifier


def run(*words, cwd=None, python=sys.executable):
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return subprocess.run(
    [*map(str, words)] if python is None else [python, *map(str, words)],
    cwd=cwd, env=environment, capture_output=True, text=True, check=False,
  )  # fmt: skip


def exit_status(monkeypatch, *argv):
  monkeypatch.setattr(sys, "argv", ["jaxsms", *argv])
  with pytest.raises(SystemExit) as stop:
    command.main()
  return stop.value.code


def test_the_command_lists_the_binaries(monkeypatch, capsys):
  for argv in (["jaxsms"], ["jaxsms", "--help"]):
    monkeypatch.setattr(sys, "argv", argv)
    command.main()
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["sms", "compare", "soup", "export", "report", "bench"]
  for name in listed:
    assert (ROOT / "experiments" / f"{name}.py").is_file()
  assert PROJECT["scripts"] == {"jaxsms": "jaxsms.__main__:main"}


def test_a_binary_that_does_not_exist(monkeypatch, capsys):
  assert exit_status(monkeypatch, "sopu") == 2
  message = capsys.readouterr().err
  assert message.startswith("error: there is no binary 'sopu': did you mean soup?")
  assert message.count("\n") == 1


def test_a_binary_without_its_packages(monkeypatch, capsys):
  def missing(*_, **__):
    raise ModuleNotFoundError("No module named 'rich'", name="rich.console")

  monkeypatch.setattr(command.runpy, "run_module", missing)
  assert exit_status(monkeypatch, "soup") == 2
  assert "needs rich.console" in capsys.readouterr().err


def test_a_clone_runs_its_own_binaries(tmp_path, monkeypatch):
  """From any folder, also from one that has a package of the same name."""
  (tmp_path / "experiments").mkdir()
  (tmp_path / "experiments" / "__init__.py").touch()
  (tmp_path / "experiments" / "soup.py").write_text("raise SystemExit('the wrong one')")
  code = (
    f"import sys; sys.path.insert(1, {str(ROOT)!r}); import jaxsms.__main__ as m; m.main()"
  )
  done = run("-c", code, "soup", "only_one", cwd=tmp_path)
  assert done.returncode == 2
  assert done.stderr.startswith("error: 1 checkpoints are given"), done.stderr


BASE = """
import sys
import jax, jax.numpy as jnp, jaxsms
from jaxsms import checkpoint
params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}}
masks = jaxsms.magnitude_masks(params, 0.5)
other = jax.tree.map(lambda x: 2 * x, params)
soup = jaxsms.uniform_soup(jaxsms.stack([params, other]))
checkpoint.save("soup", {"params": jaxsms.apply_masks(soup, masks)})
assert float(jaxsms.sparsity(checkpoint.restore("soup")["params"])) == 0.5
module = jaxsms.models.create("mlp", 10)
for name in ("digits", "cifar10"):
  try:
    jaxsms.data.load(name)
  except ImportError as error:
    assert "pip install 'jaxsms[data]'" in str(error), error
  else:
    raise AssertionError(name)
for name in ("tensorflow_datasets", "pyarrow", "sklearn", "matplotlib", "PIL", "grain"):
  assert name not in sys.modules
print(jaxsms.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A wheel in an environment of its own: the environment, the wheel, a folder outside."""
  folder = tmp_path_factory.mktemp("installed")
  quiet = ("--quiet", "--disable-pip-version-check")
  done = run("-m", "pip", "wheel", *quiet, "--no-deps", "-w", folder / "wheel", ROOT)
  if done.returncode and not os.environ.get("CI"):
    pytest.skip("pip cannot fetch what builds a wheel")
  assert done.returncode == 0, done.stderr
  (wheel,) = (folder / "wheel").glob("*.whl")
  done = run("-m", "venv", folder / "env")
  assert done.returncode == 0, done.stderr
  python = str(folder / "env" / "bin" / "python")
  done = run("-m", "pip", "install", *quiet, wheel, python=python)
  assert done.returncode == 0, done.stderr
  (folder / "here").mkdir()
  return folder, wheel, python


@pytest.mark.slow
def test_the_base_alone_makes_masks_soups_and_checkpoints(installed):
  folder, _, python = installed
  done = run("-c", BASE, cwd=folder / "here", python=python)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(str(folder))
  listed = run("-m", "pip", "list", "--format=json", python=python).stdout
  names = {package["name"].lower() for package in json.loads(listed)}
  assert not names & {"tensorflow-datasets", "pyarrow", "scikit-learn", "matplotlib"}
  assert len(names) < 40


@pytest.mark.slow
def test_binaries_run_from_a_wheel_outside_a_clone(installed):
  folder, wheel, python = installed
  done = run(
    "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
    f"jaxsms[experiments] @ {wheel.as_uri()}", python=python,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  here, jaxsms = folder / "here", folder / "env" / "bin" / "jaxsms"
  small = (
    "--hidden=8", "--epochs=1", "--retrain_epochs=1", "--phases=1", "--ingredients=2",
    "--baselines=", "--workdir=run",
  )  # fmt: skip
  for words, printed in (
    (("soup", "--help"), "Averages checkpoints"),
    (("sms", *small), "Results, soup, metrics and report:"),
    (("report", "run", "--out=page"), "page/report.html"),
    (("export", "run", "--out=a.safetensors"), "a.safetensors: "),
    (("soup", "run/soup/seed_0", "run/soup/seed_0", "--out=b.npz"), "Soup: "),
  ):
    done = run(jaxsms, *words, cwd=here, python=None)
    assert done.returncode == ("--help" in words), done.stderr  # absl's help ends with 1
    assert printed in " ".join(done.stdout.split()), done.stdout
  done = run("-m", "jaxsms", "report", "run", cwd=here, python=python)
  assert done.stdout.strip().endswith("run/report.html"), done.stderr
