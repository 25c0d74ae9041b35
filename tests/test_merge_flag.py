"""--merge of the main job: what it takes, what it refuses, and what a run records."""

import operator

import jax
import main_job
import numpy as np
import pytest
from absl import flags

from experiments.config.run_config import read_config
from experiments.merging import bytes_progress as soup_progress
from jaxsms.merges import MERGES
from jaxsms.merges.entries import Entry
from jaxsms.training import Engine, Model, Splits
from jaxsms.training.merging import GIVEN, candidate_merges, merging_of
from jaxsms.training.phases import PhaseRecipe, Start, training_phases
from jaxsms.training.streamed import StreamedData

FIRST = operator.itemgetter(0)
IN_RUNS = sorted(MERGES.keys() - {"weighted", "task_arithmetic", "uniform", "greedy"})


def test_merges_that_need_more_are_not_those_of_a_run():
  of_runs = set(candidate_merges()) - set(GIVEN)
  assert sorted(of_runs | {"weighted", "task_arithmetic"}) == sorted(MERGES)
  for name in candidate_merges():
    assert name in flags.FLAGS["merge"].help


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--merge=slerp"], "--merge=slerp takes two copies, and --ingredients is 5"),
    (["--merge=tie"], "did you mean ties?"),
    (["--merge=weighted"], "unknown merge 'weighted'"),
    (["--merge=learned", "--dataset=cifar10", "--stream"], "needs images in memory"),
  ],
)
def test_what_a_run_cannot_merge_is_refused(tmp_path, capsys, flags, words):
  assert main_job.run(*flags, f"--workdir={tmp_path / 'run'}") == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_merge_from_outside_is_a_value_of_the_flag(monkeypatch):
  first = Entry("the first", (), lambda means: lambda models: jax.tree.map(FIRST, models))
  monkeypatch.setitem(MERGES, "first", first)
  main_job.parse("--merge=first")
  assert read_config().merge == "first"
  models = Model({"w": np.array([1.0, 5.0])}, {})
  merge = merging_of("first").of(Engine(None, Splits(None, None, None)), None, None)
  assert merge(models) == Model({"w": 1.0}, {})


def test_streamed_images_are_refused_before_anything_is_trained():
  data = StreamedData(np.zeros(3), np.arange(3))
  engine = Engine(None, Splits(data, data, data))
  for name in set(candidate_merges()) - set(GIVEN):
    merging = merging_of(name)
    arguments = engine, None, Start(None), None, {1: 0.5}
    if not MERGES[name].in_memory:
      training_phases(*arguments, PhaseRecipe(merging=merging))
      continue
    with pytest.raises(ValueError, match=f"merge {name} needs images in memory") as error:
      training_phases(*arguments, PhaseRecipe(merging=merging))
    assert "--" not in str(error.value)


def test_progress_without_a_terminal_says_bytes_and_time_left(capsys, monkeypatch):
  monkeypatch.setattr(soup_progress, "EVERY", -1)
  with soup_progress.bytes_progress(4000) as add:
    add(1000)
    add(3000)
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("read 1.0 kB of 4.0 kB, ") and lines[0].endswith(" left")
  assert lines[1].startswith("read 4.0 kB of 4.0 kB, 0:00")


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_RUNS)
def test_a_run_merges_by_every_name(tmp_path, name):
  workdir = tmp_path / "run"
  copies = 2 if MERGES[name].two else 3
  flags = [*main_job.SMALL, f"--ingredients={copies}", f"--merge={name}"]
  assert main_job.run(*flags, f"--workdir={workdir}") == 0
  for phase in main_job.results(workdir)["seeds"][0]["phases"]:
    assert np.isclose(sum(phase["weights"]), 1)
    assert phase["soup"]["test_accuracy"] > 0.2
    assert np.isclose(phase["sparsity"], phase["soup"].get("sparsity", phase["sparsity"]))
  assert f"| merge | {name} |" in (workdir / "report.md").read_text()
