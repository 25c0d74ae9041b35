"""Every binary on a run that lies in an object store: the same as on a disk."""

import json
import os

import main_job
import pytest
import store
from absl import flags as absl_flags
from test_export_job import assert_same

from experiments import compare, export, report
from experiments.run import exporting, lock
from jaxsms import checkpoint, pretrained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
SMALL = (
  "--hidden=16", "--epochs=2", "--retrain_epochs=1", "--phases=1", "--ingredients=2",
  "--batch_size=64", "--goal_sparsity=0.75", "--baselines=imp", "--mesh=none",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_beside_it(tmp_path_factory, monkeypatch):
  """No folder called "fake:" or so may appear."""
  here = tmp_path_factory.mktemp("here")
  monkeypatch.chdir(here)
  monkeypatch.setattr(lock, "BEAT", 0.05)
  monkeypatch.setattr(lock, "WATCH", 0.5)
  yield
  assert os.listdir(here) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The address of a bucket that holds a run, and its folder."""
  folder = tmp_path_factory.mktemp("store") / "bucket"
  address = store.bucket("jobs", folder)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "WATCH", 0.5)
    assert main_job.run(*SMALL, f"--workdir={address}/run") == 0
  return address, folder


def run(main, *words):
  """Runs a binary of absl: exit status."""
  main_job.unparse("out", "format", "sparsities", "copies")
  return main_job.exit_status(main, absl_flags.FLAGS(["job", *words]))


@pytest.mark.parametrize(
  "flags",
  ["--out=OUT/a.safetensors", "--format=safetensors --out=OUT/b.safetensors",
   "--format=torch --out=OUT/c.safetensors",
   pytest.param("--format=torch --out=OUT/deep/d.pth", marks=pytest.mark.torch)],
)  # fmt: skip
def test_exports(finished, capsys, flags):
  address, folder = finished
  assert run(export.main, f"{address}/run", *flags.replace("OUT", address).split()) == 0
  out = flags.rpartition("OUT/")[2]
  size = (folder / out).stat().st_size
  assert f"{address}/{out}: {size:,} bytes" in capsys.readouterr().out
  soup = checkpoint.restore(folder / "run" / "soup" / "seed_0")
  module, image_shape, _ = exporting.network(exporting.run_config(folder / "run"))
  model = pretrained.load_model(f"{address}/{out}", module, image_shape)
  assert_same(model["params"], soup["params"])


def test_reports(finished, tmp_path, capsys):
  address, folder = finished
  report.main([f"{address}/run"])
  report.main([f"{address}/run", f"--out={tmp_path}"])
  assert capsys.readouterr().out.split()[0] == f"{address}/run/report.html"
  names = {path.name for path in (folder / "run" / "figures").iterdir()}
  assert names and names == {path.name for path in (tmp_path / "figures").iterdir()}
  page = (folder / "run" / "report.html").read_bytes()
  assert page == (tmp_path / "report.html").read_bytes()


def test_a_run_begins_with_the_soup_of_another(finished, capsys):
  address, folder = finished
  init = f"--init={address}/run/soup/seed_0"
  assert main_job.run(*SMALL, init, f"--workdir={address}/next") == 0
  assert main_job.run(*SMALL, init, f"--workdir={address}/next") == 0  # the same weights
  (seed,) = main_job.results(folder / "next")["seeds"]
  (before,) = main_job.results(folder / "run")["seeds"]
  begun_with = before["phases"][0]["soup"]["test_accuracy"]
  assert seed["dense"]["test_accuracy"] == pytest.approx(begun_with, abs=1e-6)
  none = f"--init={address}/run/soup/seed_9"
  assert main_job.run(*SMALL, none, f"--workdir={address}/no") == 2
  assert "seed_9" in capsys.readouterr().err


def test_a_comparison(finished):
  address, folder = finished
  flags = (*SMALL, "--sparsities=0.75", "--copies=2", "--seeds=1")
  assert run(compare.main, *flags, f"--workdir={address}/grid") == 0
  found = json.loads((folder / "grid" / "results.json").read_text())
  (cell,), (alone,) = found["cells"], main_job.results(folder / "run")["seeds"]
  for name in ("soup", "imp"):
    accuracy = cell["seeds"][0]["phases"][0][name]["test_accuracy"]
    assert accuracy == alone["phases"][0][name]["test_accuracy"]
  assert (folder / "grid" / "report.html").exists()
