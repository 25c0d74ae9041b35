"""Comparisons: their parts, what these share, how they go on, and what they add up to."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import main_job
import numpy as np
import pytest
from scipy import stats
from test_experiments import ROOT, SMALL, run

from experiments import compare
from experiments.comparison import part_runs
from experiments.comparison import parts as comparison
from experiments.comparison.parts import Part
from experiments.config import run_config
from experiments.config.grid_flags import read_grid
from experiments.report import write_report
from experiments.run import running

PRESETS = sorted((ROOT / "experiments" / "presets").glob("*.txt"))
GRID = (*SMALL, "--mesh=none", "--seeds=2", "--sparsities=0.75,0.5", "--copies=2")
GRID_FLAGS = ("sparsities", "copies")


def parse(*flags):
  main_job.unparse(*GRID_FLAGS)
  return main_job.parse(*flags)


def compare_with(*flags):
  """Runs a comparison: its exit status."""
  with pytest.raises(SystemExit) as stop:
    compare.main(parse(*flags))
  return stop.value.code


def read(workdir):
  return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  """Drawing takes longer than the runs."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(compare, "write_report", lambda paths: None)
    yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("compare") / "grid"
  baselines = "--baselines=imp,imp_mx,dense_soup"
  assert compare_with(*GRID, baselines, f"--workdir={workdir}") == 0
  return workdir


@pytest.mark.slow
def test_its_report(finished, tmp_path):
  page = write_report([finished], tmp_path).read_text()
  drawn = {path.name for path in (tmp_path / "figures").iterdir()}
  assert {"accuracy-m2.svg", "curves-loss-1.svg", "curves-loss-2.png"} <= drawn
  assert "50 %, m = 2: At 50.00 % sparsity the soup of 2 has" in page
  assert "Size and time of an inference" in page


def test_parts_share_what_does_not_depend_on_copies_or_sparsity():
  parts = comparison.parts_of(("imp", "imp_mx", "dense_soup"), (0.5, 0.9), (2, 3), (0, 1))
  of_seed_0 = [part for part in parts if part.seed == 0]
  assert of_seed_0[0] == Part("dense", 0)
  count = {m: sum(p.method == m for p in of_seed_0) for m in {p.method for p in parts}}
  assert count == {"dense": 1, "sms": 4, "imp": 2, "imp_mx": 4, "dense_soup": 2}
  assert len(parts) == len(set(parts)) == len({part.name for part in parts}) == 2 * 13
  seeds = [part.seed for part in parts]
  assert seeds == sorted(seeds), "a whole seed before the next"


@pytest.mark.slow
def test_a_cell_is_what_a_run_of_those_flags_gives(finished, tmp_path):
  alone = tmp_path / "alone"
  flags = (*SMALL, "--mesh=none", "--seed=1", "--baselines=imp,imp_mx,dense_soup")
  assert run(*flags, f"--workdir={alone}") == 0
  (expected,) = read(alone)["seeds"]
  cells = {(c["goal_sparsity"], c["ingredients"]): c for c in read(finished)["cells"]}
  assert list(cells) == [(0.5, 2), (0.75, 2)]
  found = cells[0.75, 2]["seeds"][1]
  # What a dense soup is pruned for is no part of what it is.
  for entry in (expected, found):
    for phase in entry["phases"]:
      for name in ("distance_to_pruned", "relative_distance_to_pruned"):
        phase["dense_soup"].pop(name)
  np.testing.assert_equal(found, expected)


@pytest.mark.slow
def test_environments_of_all_parts_are_listed_once(finished):
  one, two = {"jax": "0.9.1"}, {"jax": "0.10.2"}
  dense, soup = Part("dense", 0), Part("sms", 0, 0.5, 2)
  both = [{"from": "the start", "environment": one}, {"from": "x", "environment": two}]
  found = comparison.environments(
    {dense: {"environment": one}, soup: {"environments": both}}
  )
  assert found == [
    {"from": dense.name, "environment": one},
    {"from": f"{soup.name}, x", "environment": two},
  ]
  results = read(finished)
  assert [x["environment"] for x in results["environments"]] == [results["environment"]]


@pytest.mark.slow
def test_dense_training_is_done_once_a_seed(finished):
  epochs = [
    (json.loads(line)["seed"], path.parent.name)
    for path in finished.glob("parts/*/metrics.jsonl")
    for line in path.read_text().splitlines()
    if json.loads(line)["method"] == "dense" and "epoch" in json.loads(line)
  ]
  assert sorted(epochs) == [(s, f"dense-seed{s}") for s in (0, 1) for _ in range(2)]


@pytest.mark.slow
def test_models_of_checkpoints_go_and_soups_stay(finished):
  assert not list(finished.glob("parts/*/checkpoints/*/arrays"))
  soups = {path.parent.parent.name for path in finished.glob("parts/*/soup/*")}
  assert soups == {f"sms-{goal}-m2-seed{s}" for goal in (0.5, 0.75) for s in (0, 1)}


@pytest.mark.slow
def test_more_of_everything_is_added_and_nothing_repeated(finished, capsys):
  before = {path: path.read_bytes() for path in finished.glob("parts/*/results.json")}
  flags = (*SMALL, "--mesh=none", "--sparsities=0.75", "--copies=2", "--baselines=bimp")
  flags += ("--budget_epochs=4", f"--workdir={finished}")
  assert compare_with(*flags, "--seed=2") == 2
  assert "--budget_epochs=2 and not 4" in capsys.readouterr().err
  flags = (*SMALL, "--mesh=none", "--sparsities=0.75", "--copies=2", "--baselines=imp")
  assert compare_with(*flags, "--seed=2", f"--workdir={finished}") == 0
  after = {path: path.read_bytes() for path in finished.glob("parts/*/results.json")}
  new = {path.parent.name for path in after.keys() - before.keys()}
  assert new == {"dense-seed2", "sms-0.75-m2-seed2", "imp-0.75-seed2"}
  assert {path: after[path] for path in before} == before
  wide = [c for c in read(finished)["cells"] if len(c["seeds"]) == 3]
  assert [(c["goal_sparsity"], c["ingredients"]) for c in wide] == [(0.75, 2)]
  last = wide[0]["summary"][-1]
  assert "seeds" not in last["imp"]
  assert last["imp_mx"]["seeds"] == 2
  said = capsys.readouterr().out
  assert "IMP 2x (2 seeds)" in said


@pytest.mark.slow
def test_statistics_are_paired_t_intervals(finished):
  cell = read(finished)["cells"][0]
  soup, other = (
    np.array([seed["phases"][-1][name]["test_accuracy"] for seed in cell["seeds"]])
    for name in ("soup", "imp_mx")
  )
  row = cell["summary"][-1]["imp_mx"]
  assert row["mean"] == pytest.approx(other.mean())
  assert row["std"] == pytest.approx(other.std(ddof=1))
  interval = stats.ttest_rel(soup, other).confidence_interval(0.95)
  gain = row["soup_minus"]
  assert gain["mean"] == pytest.approx((interval.low + interval.high) / 2)
  assert gain["half_width"] == pytest.approx(
    (interval.high - interval.low) / 2, nan_ok=True
  )


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(tmp_path, capsys, monkeypatch):
  flags = (*SMALL, "--mesh=none", "--baselines=imp", f"--workdir={tmp_path / 'c'}")
  real, seen = running.run_seed, []

  def interrupted(task, names, listener, *more):
    seen.append(names)
    if len(seen) == 3:
      raise KeyboardInterrupt
    return real(task, names, listener, *more)

  monkeypatch.setattr(running, "run_seed", interrupted)
  assert compare_with(*flags) == 130
  assert "interrupted (2 of 3 parts finished" in capsys.readouterr().err
  assert compare_with(*flags) == 0
  assert seen == [(), ("sms",), ("imp",), ("imp",)]
  assert "2 of 3 parts are finished" in capsys.readouterr().err
  assert compare_with(*flags) == 0
  assert len(seen) == 4


@pytest.mark.slow
def test_a_method_that_diverges_leaves_the_others(tmp_path, capsys, monkeypatch):
  real = running.run_seed

  def diverging(task, names, listener, *more):
    if names == ("sms",):
      raise FloatingPointError("all 2 copies diverged")
    return real(task, names, listener, *more)

  monkeypatch.setattr(running, "run_seed", diverging)
  flags = (*SMALL, "--mesh=none", "--baselines=imp", f"--workdir={tmp_path / 'c'}")
  assert compare_with(*flags) == 1
  assert "error: sms-0.75-m2-seed0 failed: all 2 copies diverged" in capsys.readouterr().err
  assert (tmp_path / "c" / "parts" / "imp-0.75-seed0" / "results.json").exists()


@pytest.mark.slow
def test_a_damaged_dense_model_is_set_aside_and_trained_again(tmp_path, capsys):
  flags = (*SMALL, "--mesh=none", f"--workdir={tmp_path}")
  assert compare_with(*flags, "--baselines=") == 0
  dense = tmp_path / "parts" / "dense-seed0"
  before = read(dense)["seeds"]
  for path in (dense / "model").rglob("manifest.json"):
    path.write_bytes(path.read_bytes()[:-40])
  assert compare_with(*flags, "--baselines=imp") == 0
  assert "set aside" in capsys.readouterr().err
  assert (tmp_path / "parts" / "dense-seed0.damaged").exists()
  assert read(dense)["seeds"] == before
  assert read(tmp_path)["finished"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--sparsities=0.9,x"], "--sparsities is 0.9,x: give numbers"),
    (["--copies=2.5"], "--copies is 2.5: give whole numbers"),
    (["--copies=3,3"], "give each number once"),
    (["--sparsities=0.9,1.0"], "--sparsities is 1"),
    (["--copies=0,2"], "--copies is 0"),
    (["--copies=2,3", "--values=1,2,3"], "--values gives 3 values for --ingredients=2"),
    (["--baselines=imp,magic"], "magic"),
    (["--criterion=channels", "--budget=latency"], "--budget=latency is measured anew"),
  ],
)
def test_bad_grids_are_refused_before_any_work(tmp_path, capsys, flags, words):
  assert compare_with(*SMALL, *flags, f"--workdir={tmp_path / 'c'}") == 2
  message = capsys.readouterr().err
  assert message.startswith("error: ")
  assert words in message
  assert not (tmp_path / "c").exists()


def test_costs_of_channels_belong_to_the_first_seed_of_the_grid(tmp_path, monkeypatch):
  asked = []

  def diverges(task, names, listener, first_seed):
    asked.append((listener.checkpointer.config.seed, first_seed))
    raise FloatingPointError("it diverged")

  monkeypatch.setattr(running, "run_seed", diverges)
  flags = (*SMALL, "--mesh=none", "--seeds=2", "--seed=3", f"--workdir={tmp_path}")
  assert compare_with(*flags) == 1
  assert asked == [(3, 3), (4, 3)]


@pytest.mark.slow
def test_a_run_and_a_comparison_do_not_share_a_folder(finished, capsys):
  assert run(*SMALL, f"--workdir={finished}") == 2
  assert f"{finished} holds a comparison: choose another" in capsys.readouterr().err
  part = finished / "parts" / "sms-0.75-m2-seed0"
  assert compare_with(*SMALL, f"--workdir={part}") == 2
  assert f"{part} holds a run of experiments.sms" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_file_of_the_comparison_costs_nothing(finished, capsys, monkeypatch):
  def never(*arguments):
    raise AssertionError("nothing is to be trained")

  monkeypatch.setattr(running, "run_seed", never)
  flags = (*SMALL, "--mesh=none", "--sparsities=0.75", "--copies=2", "--baselines=imp")
  results = finished / "parts" / "imp-0.75-seed0" / "results.json"
  before = read(results.parent)["seeds"]
  for path in (finished / "run.json", results):
    path.write_bytes(path.read_bytes()[:-30])
  assert compare_with(*flags, f"--workdir={finished}") == 0
  assert read(results.parent)["seeds"] == before
  assert read(finished)["finished"]
  assert (finished / "run.json.damaged").exists()


@pytest.mark.slow
def test_what_another_process_finished_meanwhile_is_left_alone(finished, monkeypatch):
  part = Part("imp", 0, 0.75)
  folder = finished / "parts" / part.name
  before = {p: p.read_bytes() for p in folder.rglob("*.json*")}
  seen = []

  def late(workdir, asked):  # as if it had been looked up before the other one finished
    seen.append(asked)
    return seen.count(asked) > 1 or asked != part

  monkeypatch.setattr(compare, "is_finished", late)
  monkeypatch.setattr(part_runs, "is_finished", lambda workdir, asked: True)
  for checkpoints in folder.glob("checkpoints/*"):  # gone with an older version
    shutil.rmtree(checkpoints)
  flags = (*SMALL, "--mesh=none", "--sparsities=0.75", "--copies=2", "--baselines=imp")
  assert compare_with(*flags, f"--workdir={finished}") == 0
  assert part in seen
  after = {p: p.read_bytes() for p in folder.glob("*.json*")}
  assert {p: before[p] for p in after} == after


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_flags_that_fit(path):
  assert f"experiments/presets/{path.name}" in path.read_text()
  parse(f"--flagfile={path}")
  goals, copies, most = read_grid()
  base = run_config.read_config(**most)
  for goal in goals:
    for m in copies:
      run_config.check(dataclasses.replace(base, goal_sparsity=goal, ingredients=m))


@pytest.mark.slow
def test_two_processes_share_the_parts(tmp_path):
  grid = (*GRID, "--copies=2,3", "--baselines=imp,imp_mx")
  command = [sys.executable, "-m", "experiments.compare", *grid]
  command.append(f"--workdir={tmp_path}")
  both = [
    subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)
  ]
  said = [process.communicate()[1] for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  results = read(tmp_path)
  assert results["finished"]
  parts = list(pathlib.Path(tmp_path, "parts").iterdir())
  assert len(parts) == 2 * (1 + 4 + 2 + 4)
  for part in parts:  # each was done by one of them alone
    lines = [json.loads(x) for x in (part / "metrics.jsonl").read_text().splitlines()]
    epochs = [(x["phase"], x["epoch"]) for x in lines if "epoch" in x]
    assert len(epochs) == len(set(epochs)) >= 2, part.name
