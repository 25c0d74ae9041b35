"""ONNX files: what they answer, their int8 form, and their times in a report."""

import json
import shutil

import fake_runs
import jax
import main_job
import numpy as np
import pytest
from absl import flags as absl_flags

from experiments import export as binary
from experiments.report import write_report
from experiments.run import latency_file
from jaxsms import channel_groups, channel_masks, compact, export, models
from jaxsms.disk import onnx_files, storage

MS = {"median": 4.0, "min": 3.5, "max": 4.5}


def times_of(**sizes):
  """latency.json: the dense network takes 4 ms, others 1 ms."""
  fast = {"median": 1.0, "min": 0.9, "max": 1.2}
  files = {
    f"{name}.onnx": {
      "bytes": size,
      "milliseconds": {"1": MS if name == "dense" else fast, "32": MS},
    }
    for name, size in sizes.items()
  }
  return {"runtime": "ONNX Runtime 1", "device": "x86_64", "files": files}


@pytest.fixture
def timed_run(tmp_path):
  path = fake_runs.write_run(tmp_path / "run", [fake_runs.entry(0)])
  (path / "onnx").mkdir()
  for name, size in (("dense", 4000), ("soup", 1000)):
    (path / "onnx" / f"{name}.onnx").write_bytes(bytes(size))
  return path


@pytest.mark.slow
def test_the_report_has_the_times_of_onnx_files(timed_run, monkeypatch):
  monkeypatch.setattr(
    latency_file, "times_of", lambda files: times_of(dense=4000, soup=1000)
  )
  monkeypatch.setattr(latency_file.importlib.util, "find_spec", lambda name: True)
  page = write_report([timed_run]).read_text()
  assert "Time of an inference in ONNX Runtime" in page
  rows = (timed_run / "report.md").read_text().splitlines()
  row = next(line for line in rows if "| soup | 1.0 |" in line)
  assert "1 [0.9, 1.2]" in row and "4.00" in row
  # Measured once: a second report reads what the first one wrote.
  monkeypatch.setattr(latency_file, "times_of", None)
  assert "ONNX Runtime 1" in write_report([timed_run]).read_text()
  # Other files of the same size are measured.
  (timed_run / "onnx" / "soup.onnx").write_bytes(b"1" * 1000)
  other = times_of(dense=4000, soup=1000) | {"runtime": "ONNX Runtime 2"}
  monkeypatch.setattr(latency_file, "times_of", lambda files: other)
  assert latency_file.run_latency(timed_run)["runtime"] == "ONNX Runtime 2"


@pytest.mark.slow
@pytest.mark.parametrize(
  "damage", [lambda x: x.pop("runtime"), lambda x: x["files"].pop("soup.onnx")]
)
def test_times_of_other_files_are_not_shown(timed_run, monkeypatch, damage):
  found = times_of(dense=4000, soup=1000)
  damage(found)
  storage.write_json(storage.as_path(timed_run / "onnx" / "latency.json"), found)
  monkeypatch.setattr(latency_file.importlib.util, "find_spec", lambda name: None)
  assert latency_file.run_latency(timed_run) is None
  assert "in ONNX Runtime" not in write_report([timed_run]).read_text()


def session_of(path):
  import onnxruntime

  return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def saved(name, image_shape, path, **options):
  """A cut network's ONNX file, and what JAX says of 4 images."""
  module = models.create(name, 5, **options)
  images = np.random.default_rng(0).standard_normal((4, *image_shape), np.float32)
  variables = jax.jit(module.init)(jax.random.key(0), images)
  groups = channel_groups(module.apply, variables, images)
  masks = channel_masks(variables, 0.5, groups=groups)
  network = compact(module.apply, variables, masks, images)
  export.save_onnx(path, network.apply, network.params, images, input_names=["images"])
  return images, np.asarray(jax.jit(network.apply)(network.params, images))


PLAIN = {"convolution": jax.lax.conv_general_dilated}
NETWORKS = {
  "mlp": ((4, 4, 1), {"hidden": (8,)}),
  "resnet8": ((8, 8, 3), {"width": 4, **PLAIN}),
  "vit_tiny": ((8, 8, 3), {"depth": 1, "width": 12, **PLAIN}),
}


@pytest.mark.onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_answers_as_jax_does(name, tmp_path):
  image_shape, options = NETWORKS[name]
  images, expected = saved(name, image_shape, tmp_path / "a.onnx", **options)
  session = session_of(tmp_path / "a.onnx")
  for n in (1, 4):  # the batch is free
    (found,) = session.run(None, {"images": images[:n]})
    np.testing.assert_allclose(found, expected[:n], rtol=1e-4, atol=1e-5)


@pytest.mark.onnx
@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch, rejects):
  class Off:
    def __init__(self, session):
      self.session = session

    def run(self, names, inputs):
      return [answer + (len(answer) > 1) for answer in self.session.run(names, inputs)]

  start = onnx_files.start_session
  monkeypatch.setattr(onnx_files, "start_session", lambda data: Off(start(data)))
  with rejects("the network differs from JAX by 1 for a batch of 3"):
    saved("mlp", NETWORKS["mlp"][0], tmp_path / "a.onnx", **NETWORKS["mlp"][1])
  assert list(tmp_path.iterdir()) == []


@pytest.mark.onnx
@pytest.mark.slow
def test_a_file_holds_no_array_that_nothing_reads(tmp_path):
  """ONNX Runtime warns of each in every session."""
  import onnx

  image_shape, options = NETWORKS["mlp"]
  saved("mlp", image_shape, tmp_path / "a.onnx", **options)
  graph = onnx.load(tmp_path / "a.onnx").graph
  read = {name for node in graph.node for name in node.input}
  assert {x.name for x in graph.initializer} <= read


@pytest.mark.onnx
@pytest.mark.slow
def test_what_onnx_cannot_hold_is_named_with_its_layer(tmp_path, rejects):
  options = {"depth": 1, "width": 12}  # with our own convolution, which ONNX lacks
  with rejects("custom_vmap_call of ViT/patches cannot be written as ONNX"):
    saved("vit_tiny", (8, 8, 3), tmp_path / "a.onnx", **options)
  assert not (tmp_path / "a.onnx").exists()


@pytest.mark.onnx
@pytest.mark.slow
def test_a_run_is_exported_to_onnx_and_int8_and_reported(tmp_path, capsys):
  workdir = tmp_path / "run"
  flags = ("--hidden=32", "--epochs=4", "--retrain_epochs=2", "--phases=1")
  flags += ("--ingredients=2", "--batch_size=64", "--goal_sparsity=0.5", "--baselines=")
  flags += ("--mesh=none", "--criterion=channels", "--shrink", f"--workdir={workdir}")
  assert main_job.run(*flags) == 0
  main_job.unparse("out", "format", "cut", "int8")
  words = ["export", str(workdir), "--format=onnx", "--int8"]
  assert main_job.exit_status(binary.main, absl_flags.FLAGS(words)) == 0
  out = capsys.readouterr().out
  (entry,) = json.loads((workdir / "results.json").read_text())["seeds"]
  accuracy = entry["phases"][-1]["soup"]["test_accuracy"]
  assert f"test accuracy {accuracy:.2%} becomes" in out
  sizes = {f.name: f.stat().st_size for f in (workdir / "onnx").iterdir()}
  assert sizes["soup_int8.onnx"] < sizes["soup.onnx"] < sizes["dense.onnx"]
  page = write_report([workdir]).read_text()
  assert "Time of an inference in ONNX Runtime" in page and "soup_int8" in page
  main_job.unparse("out", "format", "cut", "int8")
  assert main_job.exit_status(binary.main, absl_flags.FLAGS(words[:3])) == 2
  assert "exists already" in capsys.readouterr().err
  shutil.rmtree(workdir / "onnx")
