"""Reports of runs that are not alike, not whole, or not finite."""

import json

import fake_runs
import pytest

from experiments.comparison import run_results
from experiments.report import write_report
from experiments.run.metrics_file import read_lines
from jaxsms.disk import storage


def drawn(page):
  return {path.stem for path in (page.parent / "figures").iterdir()}


def written(page):
  """The report's words, on one line."""
  return " ".join((page.parent / "report.md").read_text().split())


def small_run(path, goal, phases_done=2, lines=(), **flags):
  seeds = [fake_runs.entry(0, methods=(), ood=False, goal=goal)]
  seeds[0]["phases"] = seeds[0]["phases"][:phases_done]
  flags = fake_runs.run_flags(seeds=1, goal=goal) | flags
  return fake_runs.write_run(path, seeds, lines, flags, finished=phases_done == 2)


@pytest.mark.slow
@pytest.mark.parametrize(
  "other, joined",
  [({}, True), ({"seed": 3, "baselines": []}, True), ({"epochs": 7}, False),
   ({"phases": 3}, False), ({"width": 2}, False)],
)  # fmt: skip
def test_only_runs_alike_share_a_line(tmp_path, other, joined):
  a = small_run(tmp_path / "a", 0.8, epochs=5)
  b = small_run(tmp_path / "b", 0.9, **({"epochs": 5} | other))
  found = drawn(write_report([a, b], tmp_path / "out"))
  assert ("accuracy-m3" in found) == joined
  assert ("accuracy-soups" in found) != joined


@pytest.mark.slow
def test_a_run_before_its_goal_is_not_drawn_at_it(tmp_path):
  paths = [small_run(tmp_path / name, goal) for name, goal in (("a", 0.7), ("b", 0.8))]
  paths.append(small_run(tmp_path / "c", 0.9, phases_done=1))
  found = drawn(write_report(paths[1:], tmp_path / "two"))
  assert "accuracy-m3" not in found
  assert "accuracy-soups" in found
  from experiments.reporting import figures

  shown = []
  with pytest.MonkeyPatch.context() as patch:
    whole = figures.over_cases
    patch.setattr(figures, "over_cases", lambda c, *a: shown.append(c) or whole(c, *a))
    write_report(paths, tmp_path / "three")
  assert [[case.title for case in cases] for cases in shown] == [["a", "b"]] * 2


def part(path, method, entries, lines):
  """The own run of a part of a comparison; under way without entries."""
  flags = fake_runs.run_flags(seeds=1, baselines=[] if method == "sms" else [method])
  of = {"method": method, "seed": 0, "goal_sparsity": 0.9, "ingredients": None}
  return fake_runs.write_run(path, entries, lines, flags, part=of)


def lines_of(entry, method):
  """Of a part: no dense training."""
  lines = [
    {**line, "method": method} for line in fake_runs.epochs_of(0) if line["method"] == "sms"
  ]
  found = fake_runs.evaluations_of(entry)
  return lines + [line for line in found if line["method"] == method]


@pytest.mark.parametrize("under_way", [False, True])
def test_a_baselines_own_run(tmp_path, under_way):
  entry = fake_runs.entry(0)
  lines = lines_of(entry, "imp")
  last = entry["phases"][-1]["imp"]["test_accuracy"]
  for phase in entry["phases"]:
    for name in set(phase) - {"phase", "sparsity", "imp"}:
      del phase[name]
  page = write_report([part(tmp_path, "imp", [] if under_way else [entry], lines)])
  text = written(page)
  assert "There is no soup in it. At 90.00 % sparsity IMP has " in text
  assert f"IMP has {100 * last:.2f} % test accuracy" in text
  assert "No phase is finished" not in text
  assert "curves-loss" in drawn(page)
  assert ("the dense network has" in text) != under_way
  assert (
    "Not finished: 0 of 1 seeds are, and 2 of 2 phases of seed 0." in text
  ) == under_way


def test_a_soups_own_run_under_way_has_no_dense_line(tmp_path, rejects):
  entry = fake_runs.entry(0, methods=())
  lines = lines_of(entry, "sms")
  text = written(write_report([part(tmp_path / "run", "sms", [], lines[:-1])]))
  soup = 100 * entry["phases"][0]["soup"]["test_accuracy"]
  assert f"the soup of 3 has {soup:.2f} % test accuracy" in text
  assert "and 1 of 2 phases of seed 0" in text
  with rejects("nothing is finished yet"):
    write_report([part(tmp_path / "new", "sms", [], lines[:2])])


@pytest.mark.slow
@pytest.mark.parametrize("plane", [0.5, None])
def test_landscapes_that_are_not_finite(tmp_path, plane):
  entry = fake_runs.entry(0)
  record = entry["phases"][-1]["landscape"]
  record["lines"][1] |= {"barrier": None, "loss": [0.3, None, 0.2]}
  record["plane"]["loss"] = [[None] * 7 for _ in range(7)]
  record["plane"]["loss"][0][0] = plane
  page = write_report([fake_runs.write_run(tmp_path, [entry])])
  assert "The loss is not finite on one of them." in written(page)
  assert "rises" not in written(page)
  assert ("plane" in drawn(page)) == (plane is not None)


@pytest.mark.slow
def test_steps_are_not_compared_where_epochs_vary(tmp_path):
  for vary, said in (("epochs", 0), ("seed", 2)):
    entry = fake_runs.entry(0, methods=("imp", "imp_mx"))
    flags = fake_runs.run_flags(vary=vary)
    text = written(write_report([fake_runs.write_run(tmp_path / vary, [entry], (), flags)]))
    assert text.count("which trains as many steps as") == said
    assert "IMP 3x" in text.split("##")[0]


@pytest.mark.slow
def test_a_comparison_that_is_not_whole(tmp_path):
  path = fake_runs.write_comparison(tmp_path, (0.8,), (2,))
  text = written(write_report([path]))
  assert "This command repeats it:" in text
  assert "Not finished" not in text
  results = json.loads((path / "results.json").read_text())
  results.pop("digest", None)
  results["finished"] = False
  results["failed"] = {"imp-0.8-seed1": "all copies diverged."}
  del results["cells"][0]["seeds"][1]["phases"][-1]["imp"]
  del results["cells"][0]["seeds"][1]["phases"][0]["imp"]
  storage.write_json(storage.as_path(path / "results.json"), results)
  text = written(write_report([path]))
  assert "Not finished: some parts of the comparison are missing." in text
  assert "seed1 failed: all copies diverged." in text
  assert "This command repeats it and fills the grid:" in text


@pytest.mark.parametrize(
  "cells, whole",
  [({(0.8, 2): (0, 1), (0.9, 2): (0, 1)}, True), ({(0.8, 2): (0, 2)}, False),
   ({(0.8, 2): (0,), (0.9, 3): (0,)}, False), ({(0.8, 2): (0, 1), (0.9, 2): (0,)}, False)],
)  # fmt: skip
def test_a_grid_is_filled(cells, whole):
  found = [
    {"goal_sparsity": goal, "ingredients": m,
     "seeds": [{"seed": seed, "phases": []} for seed in seeds]}
    for (goal, m), seeds in cells.items()
  ]  # fmt: skip
  assert run_results.fills_grid({"cells": found, "methods": ["sms"]}) == whole


def test_damaged_lines_of_the_metrics_are_left_out():
  good = [fake_runs.epochs_of(0)[0], fake_runs.evaluations_of(fake_runs.entry(0))[0]]
  bad = [b'{"seed": 0, "method": "sm', b"\x00\xff", b"3", b"",
         b'{"seed": 0, "method": "sms", "phase": 1}']  # fmt: skip
  first, second = (json.dumps(line).encode() for line in good)
  assert list(read_lines(b"\n".join([first, *bad, second]))) == good
