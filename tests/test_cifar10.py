"""The main job on real CIFAR-10, compiled as users compile it."""

import json

import pytest
from main_job import ROOT, run

SHARED = ROOT.parent / "shared" / "data" / "tfds"


@pytest.mark.slow
@pytest.mark.skipif(
  not SHARED.exists(), reason="CIFAR-10 is not prepared beside the project"
)
def test_cifar10_with_a_residual_network(tmp_path, usual_compilation):
  workdir = tmp_path / "cifar"
  flags = [
    "--dataset=cifar10", f"--data_dir={SHARED}", "--model=resnet8", "--width=8",
    "--epochs=1", "--retrain_epochs=1", "--phases=1", "--ingredients=2", "--baselines=",
    "--landscape=none", "--mesh=none", "--imbalance=50", f"--workdir={workdir}",
  ]  # fmt: skip
  assert run(*flags) == 0  # the long tail leaves a fourth of the images: it is quicker
  seed = json.loads((workdir / "results.json").read_text())["seeds"][0]
  assert seed["dense"]["test_accuracy"] > 0.15
  assert seed["phases"][0]["soup"]["test_accuracy"] > 0.15
