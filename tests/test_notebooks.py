"""The notebooks run from top to bottom, and carry their figures."""

import json
import pathlib
import re
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ("first_soup", "your_own_model", "smaller_and_faster", "paper_figures")
WANTS_ONNX = "smaller_and_faster"
COMPARE = (
  "--sparsities=0.5,0.8", "--copies=2,3", "--seeds=2", "--baselines=imp,imp_mx",
  "--hidden=8", "--epochs=1", "--retrain_epochs=1", "--phases=2", "--batch_size=64",
  "--ood=brightness", "--ood_severities=1",
)  # fmt: skip


def path_of(name):
  return ROOT / "experiments" / f"{name}.ipynb"


def outputs(notebook):
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  return [output for cell in cells for output in cell["outputs"]]


@pytest.mark.parametrize("name", NAMES)
def test_it_was_run_in_order_and_carries_its_figures(name):
  assert path_of(name).stat().st_size < 300_000
  notebook = json.loads(path_of(name).read_text())
  code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  assert not [output for output in outputs(notebook) if output["output_type"] == "error"]
  kinds = [kind for output in outputs(notebook) for kind in output.get("data", {})]
  assert "image/png" in kinds
  # It speaks of no machine: no paths, no host, and no warnings that name either.
  text = re.sub(r'"image/png": "[^"]*"', "", path_of(name).read_text())
  for word in ("/tmp", "/root", "/home", "/Users", "/work", socket.gethostname() + "."):
    assert word not in text, word
  assert not [o for o in outputs(notebook) if o.get("name") == "stderr"]
  assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
  notebook = json.loads(path_of(name).read_text())
  text = "".join(
    "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"
  )
  for link in re.findall(r"\]\(([^)]+)\)", text):
    assert link.startswith("https://") or (path_of(name).parent / link).exists(), link


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
  folder = tmp_path_factory.mktemp("comparison")
  command = [sys.executable, "-m", "experiments.compare", *COMPARE, f"--workdir={folder}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=pytest.mark.onnx) if n == WANTS_ONNX else n for n in NAMES],
)
def test_it_runs(name, request, monkeypatch):
  nbformat = pytest.importorskip("nbformat")
  nbclient = pytest.importorskip("nbclient")
  monkeypatch.setenv("JAXSMS_SMALL", "1")
  if name == "paper_figures":
    monkeypatch.setenv("JAXSMS_COMPARISON", str(request.getfixturevalue("comparison")))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(path_of(name), as_version=4)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = []
  where = {"metadata": {"path": str(ROOT / "experiments")}}
  nbclient.NotebookClient(
    notebook, timeout=1800, kernel_name="python3", resources=where
  ).execute()
  kinds = [kind for output in outputs(notebook) for kind in output.get("data", {})]
  stored = json.loads(path_of(name).read_text())
  wanted = [kind for output in outputs(stored) for kind in output.get("data", {})]
  assert kinds.count("image/png") == wanted.count("image/png") > 0
