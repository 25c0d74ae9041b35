"""The main job with a search: flags, report, stops and kills."""

import signal

import fake_runs
import numpy as np
import pytest
from main_job import assert_same_run, results, run
from test_data import pairs_of_several_sizes, prepare
from test_kills import launch, tear  # noqa: F401
from test_report_page import headings

from experiments.report import write_report
from experiments.reporting import search_figures
from experiments.run import checkpointing
from experiments.schemas import json_checks, results_check
from jaxsms import checkpoint
from jaxsms.training import search_values

RANGES = "--ranges=learning_rate:0.01:0.3,weight_decay:1e-5:1e-2"
FLAGS = (
  "--hidden=16", "--epochs=2", "--retrain_epochs=2", "--phases=2", "--ingredients=4",
  "--batch_size=64", "--goal_sparsity=0.75", "--chunk_steps=8", "--save_minutes=0",
  "--mesh=none", "--baselines=imp", "--vary=seed,learning_rate,weight_decay",
  RANGES, "--rungs=2",
)  # fmt: skip


def rung(number, m=4, phase=1, **others):
  """Of copies whose parents are those of the rung before, in a circle."""
  found = {
    "phase": phase,
    "step": 10 * number,
    "values": {"learning_rate": [0.1 * (i + 1) for i in range(m)]},
    "parents": [None] * m if number == 1 else [(i + 1) % m for i in range(m)],
    "validation_accuracy": [0.9, None, 0.8, 0.7][:m],
    "validation_loss": [0.1, None, 0.3, 0.4][:m],
    "kept": [0, 2],
  }
  return found | others


def test_ancestors_and_their_colours():
  rungs = [rung(1), rung(2), rung(3)]
  assert search_figures.ancestors(rungs) == [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1]]
  first, second, _ = search_figures.inks(rungs)
  assert first[0] != first[2] and first[1] == first[3] == search_figures.MIDDLE
  assert second == [first[1], first[2], first[3], first[0]]


def lines_of(figure):
  """The lines between rungs, as pairs of ends; markers alone left out."""
  lines = [line.get_xydata() for line in figure.axes[0].lines]
  return {tuple(map(tuple, xy.tolist())) for xy in lines if len(xy) == 2}


def test_the_figure_draws_who_came_from_whom():
  rungs = [rung(1), rung(2)]
  found = lines_of(search_figures.lineage(rungs, "Seed 0"))
  assert {((0.0, i), (1.0, i)) for i in range(4)} <= found
  assert {((1.0, (i + 1) % 4), (2.0, i)) for i in range(4)} <= found
  found = lines_of(search_figures.lineage(rungs, "Seed 0", "learning_rate"))
  assert any(np.allclose(line, ((1, 0.1), (2, 0.4))) for line in found)


@pytest.mark.slow
def test_the_report_has_a_section_on_it(tmp_path):
  entry = fake_runs.entry(0)
  flags = fake_runs.run_flags(vary="learning_rate")
  plain = write_report([fake_runs.write_run(tmp_path / "plain", [entry], (), flags)])
  assert "Search" not in headings(plain.parent / "report.html")
  entry["phases"][0]["search"] = [rung(1), rung(2)]
  entry["phases"][1]["search"] = [rung(1, phase=2)]
  path = write_report([fake_runs.write_run(tmp_path / "run", [entry], (), flags)])
  folder = path.parent
  assert "Search" in headings(folder / "report.html")
  assert len((folder / "figures" / "search-lineage.png").read_bytes()) > 5000
  text = (folder / "report.md").read_text()
  assert "go from 70.00 to 90.00 %" in text
  assert "First learning rate that each copy trained with" in text


@pytest.mark.parametrize(
  ("edit", "where"),
  [
    ({"kept": [4]}, ".search[1].parents"),
    ({"kept": []}, ".search[1].kept"),
    ({"parents": [0, 1, 2, 9]}, ".search[1].parents"),
    ({"parents": [0, 1]}, ".search[1].validation_accuracy"),
    ({"values": {"learning_rate": [0.1, 0.2]}}, ".search[1].values.learning_rate"),
    ({"values": {"learning_rate": [0.1, 0.2, 0.3, None]}}, ".search[1].values"),
    ({"validation_accuracy": [0.9, 2.0, 0.1, 0.1]}, ".search[1].validation_accuracy"),
  ],
)
def test_edited_rungs_are_refused_and_named(edit, where):
  phase = {"phase": 1, "sparsity": 0.5, "search": [rung(1), rung(2)]}
  results_check.PHASE(phase)
  phase["search"][1] |= edit
  with pytest.raises(json_checks.Unfit) as raised:
    results_check.PHASE(phase)
  assert raised.value.where.startswith(where)


def stopping_at(chunk, monkeypatch):
  """Stops what runs next with a signal, once, after so many chunks."""
  left = [chunk]

  def fault_point(name):
    left[0] -= name == "chunk"
    if name == "chunk" and left[0] == 0:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(checkpointing, "fault_point", fault_point)


def check_search(seed, steps=(16, 32)):
  """Values, parents and what is kept of two phases, and that the kept ones are merged."""
  for phase, number in zip(seed["phases"], (1, 2), strict=True):
    before = None
    for one, step in zip(phase["search"], steps, strict=True):
      assert (one["phase"], one["step"]) == (number, step)
      expected = before and search_values.parents_of(before["kept"], 4)
      assert one["parents"] == (expected or [None] * 4)
      for name, low, high in (("learning_rate", 0.01, 0.3), ("weight_decay", 1e-5, 0.01)):
        values = one["values"][name]
        assert all(np.float32(low) <= value <= np.float32(high) for value in values)
      assert len(one["kept"]) == 2
      before = one
    accuracies = [one["validation_accuracy"] for one in phase["candidates"]]
    assert phase["search"][-1]["validation_accuracy"] == accuracies
    kept = phase["search"][-1]["kept"]
    assert phase["weights"] == [0.5 if i in kept else 0 for i in range(4)]
    assert min(accuracies[i] for i in kept) >= max(
      accuracy for i, accuracy in enumerate(accuracies) if i not in kept
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
  assert run(*FLAGS, f"--workdir={workdir}") == 0
  return workdir


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
class TestRuns:
  """They share what is compiled."""

  def test_what_results_hold(self, undisturbed):
    (seed,) = results(undisturbed)["seeds"]
    check_search(seed)
    assert all("search" not in phase["imp"] for phase in seed["phases"])
    assert (undisturbed / "figures" / "search-weight-decay.svg").exists()

  def test_stopped_at_rungs_it_goes_on_bit_by_bit(self, undisturbed, tmp_path, monkeypatch):
    """Where the copies are scored, and in the chunk after that, in both phases."""
    workdir, saved = tmp_path / "stopped", []
    for stop in (6, 1, 3, 1):  # four chunks of dense training, and four of each phase
      stopping_at(stop, monkeypatch)
      assert run(*FLAGS, f"--workdir={workdir}") == 143
      newest = sorted((workdir / "checkpoints").iterdir())[-1]
      work = checkpoint.read_manifest(newest)["meta"]["work"]
      saved.append((len(work["phases"].get("sms", [])), len(work["rungs"])))
    assert saved == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert run(*FLAGS, f"--workdir={workdir}") == 0
    assert_same_run(workdir, undisturbed)

  def test_on_a_mesh_with_copies_one_after_another_and_networks_that_shrink(self, tmp_path):
    flags = ("--mesh=2x1", "--ingredients_at_once=1", "--criterion=channels", "--shrink")
    workdir = tmp_path / "run"
    assert run(*FLAGS, "--baselines=", *flags, f"--workdir={workdir}") == 0
    (seed,) = results(workdir)["seeds"]
    check_search(seed)
    first, last = (phase["parameters"] for phase in seed["phases"])
    assert last < first

  def test_on_streamed_images_stopped_after_a_rung(self, tmp_path, monkeypatch):
    """The order of the examples goes on where it was, from part to part of a phase."""
    pairs = pairs_of_several_sizes()
    prepare(tmp_path, {"train": pairs, "validation": pairs[:9]})
    flags = (
      *FLAGS, "--dataset=tiny", f"--data_dir={tmp_path}", "--stream", "--image_size=8",
      "--model=mlp", "--batch_size=9", "--chunk_steps=2", "--baselines=", "--phases=1",
    )  # fmt: skip
    assert run(*flags, f"--workdir={tmp_path / 'whole'}") == 0
    # 54 images, 6 steps an epoch: the rung is after 6 chunks of dense training and 3 more.
    stopping_at(10, monkeypatch)
    stopped = tmp_path / "stopped"
    assert run(*flags, f"--workdir={stopped}") == 143
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    assert len(checkpoint.read_manifest(newest)["meta"]["work"]["rungs"]) == 1
    assert run(*flags, f"--workdir={stopped}") == 0
    assert_same_run(stopped, tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_rungs_it_ends_as_if_undisturbed(tmp_path, launch):  # noqa: F811
  flags = (*FLAGS, "--baselines=")
  whole, killed = tmp_path / "undisturbed", tmp_path / "killed"
  assert launch(*flags, f"--workdir={whole}")[0] == 0
  for fault in ("rung:1", "save arrays:2", "rung:1"):  # the second phase has one, too
    status, said = launch(*flags, f"--workdir={killed}", fault=fault)
    assert status == -signal.SIGKILL, (fault, said)
    tear(killed)
  assert launch(*flags, f"--workdir={killed}")[0] == 0
  assert_same_run(killed, whole)
