"""The main job with channels and networks that shrink."""

import itertools
import signal

import numpy as np
import pytest
from main_job import assert_same_run, config_of, results, run

from experiments.run import checkpointing
from jaxsms import checkpoint

FLAGS = (
  "--hidden=16,12", "--epochs=2", "--retrain_epochs=1", "--phases=2", "--ingredients=2",
  "--batch_size=64", "--goal_sparsity=0.6", "--chunk_steps=8", "--save_minutes=0",
  "--mesh=none", "--baselines=imp", "--criterion=channels", "--landscape=last",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  pass


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "shrunk"
  assert run(*FLAGS, "--shrink", f"--workdir={workdir}") == 0
  return workdir


def test_a_shrinking_run_gives_the_soup_of_masks_of_channels(shrunk, tmp_path):
  masked = tmp_path / "masked"
  assert run(*FLAGS, f"--workdir={masked}") == 0
  (cut,), (whole,) = (results(w)["seeds"] for w in (shrunk, masked))
  for a, b in zip(cut["phases"], whole["phases"], strict=True):
    assert a["sparsity"] == b["sparsity"]
    for name in ("soup", "mean_candidate", "imp"):
      assert a[name]["validation_loss"] == pytest.approx(b[name]["validation_loss"], 1e-3)
    # Counted as stored: the masked network keeps its size, the cut one does not.
    assert b["parameters"] == whole["dense"]["parameters"] > a["parameters"]
    assert b["multiply_adds"] == whole["dense"]["multiply_adds"] > a["multiply_adds"]
    assert a["imp"]["parameters"] < b["imp"]["parameters"]
  first, last = (phase["parameters"] for phase in cut["phases"])
  assert first > last
  # 64 inputs, 10 classes, and the widths that the masks of the soup leave.
  soup = checkpoint.restore(shrunk / "soup" / "seed_0")
  widths = [int(soup["masks"][f"Dense_{i}"]["bias"].sum()) for i in (0, 1)]
  sizes = [64, *widths, 10]
  expected = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
  assert last == expected
  for i in (0, 1):
    kernel = np.asarray(soup["params"][f"Dense_{i}"]["kernel"])
    assert (kernel != 0).any(0).sum() == widths[i]


def test_a_run_that_was_stopped_goes_on_in_the_shapes_of_its_phase(
  shrunk, tmp_path, monkeypatch
):
  passed, workdir = [], tmp_path / "stopped"

  def fault_point(name):
    passed.append(name)
    if len(passed) == 9:  # in the second phase
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patched:
    patched.setattr(checkpointing, "fault_point", fault_point)
    assert run(*FLAGS, "--shrink", f"--workdir={workdir}") == 143
  assert run(*FLAGS, "--shrink", f"--workdir={workdir}") == 0
  assert_same_run(workdir, shrunk)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--shrink", "--baselines=swamp"], "whose masks are its own"),
    (["--shrink", "--baselines=imp_reprune"], "whose masks are its own"),
    (["--shrink", "--split_params"], "--shrink cuts models that lie whole"),
    (["--budget=channels"], "belongs to --criterion=channels"),
    (["--criterion=channels", "--budget=weight"], "did you mean weights"),
    (["--criterion=channels", "--goal_sparsity=0.9999"], "weights"),
  ],
)
def test_what_cannot_shrink_is_refused(tmp_path, capsys, flags, words):
  assert run(*flags, f"--workdir={tmp_path / 'run'}") == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_run_from_before_these_flags_goes_on():
  config = config_of()
  assert not config.shrink
  assert config.budget == "weights"
