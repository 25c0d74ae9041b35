"""The main job: what it leaves behind, what it prints, what it refuses."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from main_job import FLAGS, config_of, run
from rich.console import Console

from experiments import methods, sms
from experiments.config.dense_flags import dense_schedule
from experiments.methods.planning import MEASURED
from experiments.run import run_directory, running
from experiments.run.progress import RunProgress, TimeLeft, clock
from experiments.setup.task import make_task
from jaxsms import checkpoint, data, prunable, training
from jaxsms.training.engine import one_model
from jaxsms.training.measurements import measure

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_figures")

ROOT = pathlib.Path(__file__).parent.parent
SMALL = (
  "--hidden=16", "--epochs=2", "--retrain_epochs=1", "--phases=2", "--ingredients=2",
  "--batch_size=64", "--goal_sparsity=0.75",
)  # fmt: skip
STEP = ("--pretrain_schedule=StepLR", "--decay=0.5", "--step_epochs=2")
MULTI_STEP = ("--pretrain_schedule=MultiStepLR", "--decay=0.1", "--milestones=2,5")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A small run over two seeds, by the command that README gives."""
  workdir = tmp_path_factory.mktemp("runs") / "small"
  command = [sys.executable, "-m", "experiments.sms", *SMALL, "--seeds=2"]
  done = subprocess.run(
    [*command, f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True,
    env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # as the runs beside it
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return workdir, done


def test_results(finished):
  workdir, _ = finished
  results = json.loads((workdir / "results.json").read_text())
  assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
  for seed in results["seeds"]:
    assert 0 <= seed["dense"]["test_accuracy"] <= 1
    assert [phase["phase"] for phase in seed["phases"]] == [1, 2]
    assert [phase["sparsity"] for phase in seed["phases"]] == pytest.approx([0.5, 0.75])
    for phase in seed["phases"]:
      for method in ("soup", "mean_candidate", "best_candidate", "imp", "imp_mx"):
        assert 0 <= phase[method]["test_accuracy"] <= 1
        assert phase[method]["test_loss"] > 0
      assert len(phase["candidates"]) == 2
      assert phase["best_candidate"] in phase["candidates"]
      assert phase["weights"] == [0.5, 0.5]
      assert phase["geometry"]["mean_l2_distance"] > 0
  assert results["flags"]["ingredients"] == 2
  assert results["environment"]["jax"] == jax.__version__


def test_table_and_progress_lines(finished):
  _, done = finished
  for words in ("Sparse soup", "Mean candidate", "IMP 2x", "Soup minus it", "2 seeds"):
    assert words in " ".join(done.stdout.split()), words
  assert "seed 1  SMS phase 2/2  epoch 1/1" in done.stderr
  assert "Traceback" not in done.stderr


def test_metrics_are_json_lines_one_per_epoch_and_evaluation(finished):
  workdir, _ = finished
  lines = [
    json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  results = json.loads((workdir / "results.json").read_text())
  evaluations = [line["evaluation"] for line in lines if "evaluation" in line]
  assert len(evaluations) == 2 * (1 + 3 * 2)  # dense, and three methods in two phases
  assert evaluations[-1]["soup"] == results["seeds"][1]["phases"][1]["imp_mx"]
  lines = [line for line in lines if "epoch" in line]
  # Per seed: 2 dense epochs, 2 phases of 1 (SMS), 1 (IMP) and 2 (IMP 2x) epochs.
  assert len(lines) == 2 * (2 + 2 * (1 + 1 + 2))
  assert {len(line["loss"]) for line in lines if line["method"] == "sms"} == {2}
  assert [line["epoch"] for line in lines if line["method"] == "imp_mx"] == [1, 2] * 4


def test_saved_soup_is_sparse_and_scores_what_the_results_say(finished):
  workdir, _ = finished
  soup = checkpoint.restore(workdir / "soup" / "seed_1")
  kept, removed = 0, 0
  for (path, leaf), mask in zip(
    jax.tree_util.tree_leaves_with_path(soup["params"]),
    jax.tree.leaves(soup["masks"]),
    strict=True,
  ):
    assert mask.dtype == bool
    assert (np.asarray(leaf)[~np.asarray(mask)] == 0).all()
    if prunable(path, leaf):
      kept, removed = kept + mask.sum(), removed + (~mask).sum()
  assert removed == round(0.75 * (kept + removed))
  run_flags = json.loads((workdir / "results.json").read_text())
  task = make_task(config_of(*SMALL), data.load("digits"))
  model = training.Model(soup["params"], {})
  (scores,) = measure(task.engine, one_model(model)).scores
  expected = run_flags["seeds"][1]["phases"][-1]["soup"]
  names = [name for name in scores if name.startswith(("test_", "validation_"))]
  assert len(names) == 12
  for name in names:
    assert scores[name] == pytest.approx(expected[name], abs=1e-5), name


def test_figures_are_there(finished):
  workdir, _ = finished
  assert (workdir / "accuracy.png").read_bytes().startswith(b"\x89PNG")
  assert "<svg" in (workdir / "accuracy.svg").read_text()


@pytest.mark.slow
def test_flags_repeat_the_run(finished, tmp_path):
  workdir, _ = finished
  again = tmp_path / "again"
  assert (
    run(
      f"--flagfile={workdir / 'flags.txt'}",
      "--seeds=1",
      "--mesh=none",
      f"--workdir={again}",
    )
    == 0
  )
  first = json.loads((workdir / "results.json").read_text())["seeds"][0]
  assert json.loads((again / "results.json").read_text())["seeds"][0] == first


def test_a_directory_with_another_run_is_refused(finished, capsys):
  workdir, _ = finished
  before = (workdir / "results.json").read_text()
  assert run(*SMALL, "--seed=3", "--epochs=4", f"--workdir={workdir}") == 2
  message = capsys.readouterr().err
  assert "--epochs=2 and not 4, --seed=0 and not 3, --seeds=2 and not 1" in message
  assert (workdir / "results.json").read_text() == before


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--dataset=digit"], "did you mean digits"),
    (["--model=resnet9"], "did you mean resnet"),
    (["--retrain_schedule=LRR"], "did you mean"),
    (["--pretrain_schedule=linear"], "did you mean Linear"),
    (["--augmentation=flip"], "known are"),
    (["--scope=locally"], "known are global, uniform"),
    (["--baselines=imp,impmx"], "did you mean imp_mx"),
    (["--goal_sparsity=1"], "[0, 1)"),
    (["--goal_sparsity=-0.1"], "[0, 1)"),
    (["--goal_sparsity=nan"], "[0, 1)"),
    (["--phases=0"], "--phases is 0"),
    (["--ingredients=0"], "--ingredients is 0"),
    (["--epochs=0"], "--epochs is 0"),
    (["--seeds=0"], "--seeds is 0"),
    (["--seed=-1"], "--seed is -1"),
    (["--seed=4294967295", "--seeds=2"], "below 2^32"),
    (["--goal_sparsity=0.9999", "--hidden=2"], "removes all 148 weights"),
    (["--model=resnet8", "--hidden=3"], "--hidden belongs to the mlp"),
    (["--hidden=a"], "--hidden is a"),
    (["--hidden=0"], "at least 1"),
    (["--momentum=1"], "--momentum is 1"),
    (["--learning_rate=0"], "--learning_rate is 0"),
    (["--learning_rate=nan"], "--learning_rate is nan"),
    (["--weight_decay=nan"], "--weight_decay is nan"),
    (["--warmup_epochs=3", "--epochs=3"], "--warmup_epochs is 3"),
    (["--pretrain_schedule=StepLR", "--decay=0.1"], "StepLR needs --step_epochs"),
    (["--pretrain_schedule=ExponentialLR"], "ExponentialLR needs --decay"),
    (["--decay=0.1"], "--pretrain_schedule=Linear takes no --decay"),
    (["--milestones=3"], "--pretrain_schedule=Linear takes no --milestones"),
    ([*MULTI_STEP, "--decay=2"], "--decay is 2"),
    ([*MULTI_STEP, "--decay=nan"], "--decay is nan"),
    ([*MULTI_STEP, "--milestones=3,b"], "--milestones is 3,b"),
    ([*MULTI_STEP, "--milestones=20,10"], "--milestones is 20,10 of --epochs 30"),
    ([*MULTI_STEP, "--milestones=30"], "--milestones is 30 of --epochs 30"),
    ([*STEP, "--step_epochs=0"], "--step_epochs is 0"),
    ([*STEP, "--end_lr=0.01"], "--end_lr is for Linear and Cosine"),
    (["--end_lr=0.2"], "--end_lr is 0.2"),
    (["--batch_size=1078"], "1077 examples"),
    (["extra"], "unexpected argument 'extra'"),
  ],
)
def test_bad_flags_end_with_one_sentence(flags, words, tmp_path, capsys):
  workdir = tmp_path / "run"
  assert run(f"--workdir={workdir}", *flags) == 2
  message = capsys.readouterr().err.strip()
  assert words in message
  assert message.startswith("error: ")
  assert "\n" not in message
  assert not workdir.exists()


def test_bad_arrays_and_unprepared_data_sets(tmp_path, capsys):
  path = tmp_path / "few.npz"
  np.savez(path, train_images=np.zeros((4, 2, 2, 1), np.uint8))
  assert run(f"--dataset={path}", f"--workdir={tmp_path / 'a'}") == 2
  assert "train_labels" in capsys.readouterr().err
  flags = ["--dataset=cifar10", f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'b'}"]
  assert run(*flags) == 2
  assert "download_and_prepare" in capsys.readouterr().err


def test_unwritable_workdir(tmp_path, capsys):
  file = tmp_path / "file"
  file.write_text("")
  assert run(*SMALL, f"--workdir={file}") == 2
  assert run(*SMALL, f"--workdir={file}/below") == 2
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 2
  assert all("--workdir" in line for line in errors)


@pytest.mark.slow
def test_arrays_from_a_file(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {}
  for split, n in (("train", 40), ("test", 13)):
    labels = rng.integers(0, 3, n)
    arrays[f"{split}_labels"] = labels
    images = rng.integers(0, 80, (n, 6, 5, 2)) + 80 * labels[:, None, None, None]
    arrays[f"{split}_images"] = images.astype(np.uint8)
  np.savez(tmp_path / "three.npz", **arrays)
  flags = [
    f"--dataset={tmp_path / 'three.npz'}",
    "--model=mlp",
    f"--workdir={tmp_path / 'r'}",
  ]
  flags += ["--batch_size=8", "--baselines=", "--epochs=10", "--mesh=none"]
  assert run(*SMALL, *flags) == 0
  seed = json.loads((tmp_path / "r" / "results.json").read_text())["seeds"][0]
  assert seed["dense"]["test_accuracy"] > 0.8
  assert "imp" not in seed["phases"][0]


@pytest.mark.slow
def test_all_copies_diverging_ends_with_one_sentence(tmp_path, capsys):
  flags = ["--learning_rate=1e30", "--baselines=", f"--workdir={tmp_path / 'run'}"]
  assert run(*SMALL, *flags) != 0
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert message.startswith("error: ")


@pytest.mark.slow
def test_a_model_that_diverges_in_its_last_step_ends_with_one_sentence(tmp_path, capsys):
  flags = ["--epochs=1", "--batch_size=1077", "--learning_rate=1e39", "--retrain_epochs=0"]
  assert run(*SMALL, *flags, f"--workdir={tmp_path / 'run'}") == 1
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert message.startswith("error: the model has parameters that are not finite")
  assert "no seed finished" in message


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_there_is(tmp_path, capsys, monkeypatch):
  run_seed = running.run_seed

  def interrupted(task, names, listener):
    if listener.checkpointer.seed_state.seed == 1:
      raise KeyboardInterrupt
    return run_seed(task, names, listener)

  monkeypatch.setattr(running, "run_seed", interrupted)
  workdir = tmp_path / "run"
  assert (
    run(*SMALL, "--mesh=none", "--seeds=3", "--baselines=", f"--workdir={workdir}") == 130
  )
  assert "interrupted (1 of 3 seeds finished" in capsys.readouterr().err
  assert len(json.loads((workdir / "results.json").read_text())["seeds"]) == 1
  assert (workdir / "accuracy.png").exists()


def test_help_explains_every_flag():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.sms", "--helpshort"],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert "Traceback" not in done.stderr
  for name in FLAGS:
    assert f"--{name}" in done.stdout or f"--[no]{name}" in done.stdout, name


def test_unknown_flags_and_values_end_without_a_traceback():
  for flag in ("--ingredient=3", "--phases=many"):
    done = subprocess.run(
      [sys.executable, "-m", "experiments.sms", flag],
      cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert flag.split("=")[0].strip("-") in done.stderr
    assert "Traceback" not in done.stderr


def test_planned_steps_are_the_steps_taken():
  config = config_of(*SMALL, "--seeds=3")
  # 20 steps an epoch: 2 dense; per phase 1 of two copies, 1 of IMP, 2 of IMP 2x.
  assert methods.planned_steps(config, 20, methods.names_of(config)) == {
    1: 3 * 20 * (2 + 2 * 3),
    2: 3 * 20 * 2,
  }


@pytest.mark.parametrize(
  "flags, factors",
  [
    (STEP, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
    (MULTI_STEP, [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
    (["--end_lr=0.05"], 1 - np.arange(7) / 14),
  ],
)
def test_schedules_count_epochs(flags, factors):
  config = config_of(*flags, "--epochs=7", "--warmup_epochs=0")
  schedule, warmup_steps = dense_schedule(config, 3)
  np.testing.assert_allclose(schedule(np.arange(7) * 3), 0.1 * np.array(factors), 1e-5)
  assert warmup_steps == 0
  # The flag file gives the same settings.
  assert config_of(*config.flagfile().split()) == config


def test_time_left_uses_each_programs_own_speed():
  left = TimeLeft({1: 100, 4: 100, MEASURED: 12}, model_steps=5)
  assert left.seconds() is None
  # The first chunk is all there is to go by. Four copies are unseen: four times as long a
  # step. A model is measured in the time of five steps. Of four times to compile, to train
  # and to measure one copy and four, one is over.
  left.update(1, 10, 45.0, compiling=40.0)
  assert left.seconds() == pytest.approx(90 * 0.5 + 100 * 2 + 12 * 2.5 + 3 * 40)
  left.update(1, 10, 1.0)
  assert left.seconds() == pytest.approx(80 * 0.1 + 100 * 0.4 + 12 * 0.5 + 3 * 40)
  left.update(MEASURED, 2, 26.0, compiling=20.0)
  assert left.seconds() == pytest.approx(80 * 0.1 + 100 * 0.4 + 10 * 3 + 2 * 30)
  left.update(4, 10, 32.0, compiling=30.0)
  left.update(4, 10, 3.0)
  assert left.seconds() == pytest.approx(80 * 0.1 + 80 * 0.3 + 10 * 3 + 30)
  left.update(MEASURED, 5, 25.0, compiling=10.0)
  assert left.seconds() == pytest.approx(80 * 0.1 + 80 * 0.3 + 5 * 3)
  left.update(1, 80, 9.0)
  left.update(4, 95, 18.0)  # more than was planned
  left.update(MEASURED, 5, 20.0)
  assert left.seconds() == 0
  assert clock(61.2) == "1:01"
  assert clock(3723) == "1:02:03"


def shown():
  return training.Chunk(
    copies=2, step=10, steps=40, taken=10, epoch=1,
    loss=np.array([0.5, 0.7]), accuracy=np.array([0.8, 0.9]),
    learning_rate=np.array([0.1, 0.1]),
  )  # fmt: skip


@pytest.mark.parametrize("dumb", [False, True])
def test_without_a_terminal_there_are_plain_lines(monkeypatch, dumb):
  """One when a training ends and one a minute, and no control characters."""
  monkeypatch.setenv("TERM", "dumb" if dumb else "xterm-256color")
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  file = io.StringIO()
  with RunProgress({2: 40}, Console(file=file, force_terminal=dumb)) as progress:
    for seconds, step in ((10, 10), (61, 20), (70, 30), (80, 40)):
      now[0] = seconds
      progress.chunk("SMS", 4, shown()._replace(step=step, epoch=step // 10))
  lines = file.getvalue().splitlines()
  assert [line.split("  ")[:2] for line in lines] == [
    ["SMS", "epoch 2/4"], ["SMS", "epoch 4/4"],
  ]  # fmt: skip
  assert lines[0].endswith("1:42 left")  # 51 s for the last 10 of 40 steps
  assert file.getvalue().replace("\n", "").isprintable()


def test_the_bar_shows_phase_epoch_loss_accuracy_and_time_left():
  with open(os.devnull, "w") as sink:
    console = Console(file=sink, force_terminal=True, width=120, record=True)
    with RunProgress({2: 40}, console) as progress:
      for step in (10, 20, 30):
        progress.chunk(
          "seed 0  SMS phase 1/3",
          4,
          training.Chunk(
            copies=2, step=step, steps=40, taken=10, epoch=step // 10,
            loss=np.array([0.5, 0.7]), accuracy=np.array([0.8, 0.9]),
            learning_rate=np.array([0.1, 0.1]),
          ),
        )  # fmt: skip
  text = console.export_text()
  for words in ("SMS phase 1/3", "epoch 3/4", "loss 0.600", "accuracy 85.0 %", "left"):
    assert words in text


def test_results_stay_whole_while_new_ones_are_written(tmp_path):
  run_directory.write_results(tmp_path, {"value": float("nan"), "array": np.arange(2)})
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["value"] is None
  assert results["array"] == [0, 1]


def test_help_names_every_flag_once_by_subject():
  lines = sms.__doc__.split("in about a minute.")[1].splitlines()
  named = [name for line in lines for name in re.findall(r"\w+", line[14:])]
  assert sorted(named) == sorted(FLAGS)


def test_an_event_that_nobody_knows_is_an_error():
  listener = running.Listener(None, None, 1)
  with pytest.raises(TypeError, match="an event that is a dict"):
    listener.take(methods.DENSE, {})
