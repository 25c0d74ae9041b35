"""Which merge is worth it: that all merge the same candidates, and what is printed."""

import json

import main_job
import numpy as np
import pytest
from scipy import stats

from experiments.benchmarks import bench_merges
from experiments.benchmarks.bench_merges_tables import table, tables
from experiments.methods.seeds import prune_and_retrain
from jaxsms import Phase

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = [flag for flag in main_job.SMALL if "baselines" not in flag]


def parse(*given):
  return main_job.flag_values(bench_merges.Config, *SMALL, "--ingredients=3", *given)


@pytest.mark.slow
@pytest.mark.parametrize(
  "names",
  [
    ("uniform", "learned", "slerp"),
    pytest.param(bench_merges.NAMES, marks=pytest.mark.slow),
  ],
  ids=["some", "all"],
)
def test_merges_are_of_the_candidates_of_the_loop(tmp_path, monkeypatch, capsys, names):
  file, runs = tmp_path / "all.json", []
  monkeypatch.setattr(bench_merges, "NAMES", names)
  measured_phases = bench_merges.measured_phases

  def noted(run, dense):
    runs.append((run, dense))
    return measured_phases(run, dense)

  monkeypatch.setattr(bench_merges, "measured_phases", noted)
  bench_merges.main(["bench_merges"], parse("--families=seed", f"--json={file}"))
  results = json.loads(file.read_text())
  phases = results["seeds"][0]["families"]["seed"]
  assert [phase["phase"] for phase in phases] == [1, 2]
  printed = capsys.readouterr().out
  (run, dense), = runs  # fmt: skip
  events = prune_and_retrain(run, dense, "sms", 3, run.retrain_steps)
  records = [event.record for event in events if isinstance(event, Phase)]
  for phase, record in zip(phases, records, strict=True):
    assert {"slerp of two", "uniform of two", *names} - {"slerp"} == phase["merges"].keys()
    assert phase["candidates"] == record["candidates"]
    merges = phase["merges"]
    for name, metric in record["soup"].items():
      assert merges["uniform"][name] == pytest.approx(metric, abs=1e-6), name
    for merge in merges.values():
      assert merge["sparsity"] == pytest.approx(phase["sparsity"])
      assert sum(merge["weights"]) == pytest.approx(1)
    assert merges["uniform of two"]["weights"] == [0.5, 0.5]
    # Learning stops at no average that is worse on its data, which are all of validation.
    for name in {"learned", "learned_by_layer"} & set(names):
      loss = merges["uniform"]["validation_loss"]
      assert merges[name]["validation_loss"] <= loss + 1e-5
    assert f"seed: phase {phase['phase']}, {100 * phase['sparsity']:.2f} %" in printed


def phase_of(uniform, greedy, two, slerp):
  """What one seed gives, of these accuracies."""
  weights = {"uniform": [0.5, 0.5], "greedy": [1.0, 0.0]}

  def one(name, accuracy):
    return {"test_accuracy": accuracy, "test_loss": 1 - accuracy,
            "test_expected_calibration_error": 0.01,
            "weights": weights.get(name, [0.5, 0.5])}  # fmt: skip

  names = {"uniform": uniform, "greedy": greedy, "uniform of two": two}
  merges = {n: one(n, x) for n, x in (names | {"slerp of two": slerp}).items()}
  return {
    "phase": 1, "sparsity": 0.5, "diverged": [], "collapsed": [1], "merges": merges,
    "references": {"mean_candidate": one("", uniform - 0.01)},
  }  # fmt: skip


def test_differences_are_paired():
  uniform, greedy = [0.9, 0.8, 0.95], [0.91, 0.83, 0.95]
  two, slerp = [0.7, 0.6, 0.5], [0.7, 0.61, 0.5]
  phases = [phase_of(*values) for values in zip(uniform, greedy, two, slerp, strict=True)]
  rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table(phases)}
  for name, values, against in (("greedy", greedy, uniform), ("slerp of two", slerp, two)):
    gaps = 100 * (np.array(values) - against)
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    cell = f"{gaps.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
    assert rows[name][3] == cell
  assert rows["greedy"][1] == "1.0" and rows["uniform"][1] == "2.0"
  assert rows["uniform"][2] == f"{100 * np.mean(uniform):.2f}" == "88.33"
  assert rows["mean candidate"][3].startswith("-1.00 [")
  chosen = {"model": "mlp", "criterion": "magnitude", "ingredients": 2}
  chosen |= {"families": ["weight_decay"], "weight_decays": [0.1, 0.2]}
  seeds = [{"seed": 7, "families": {"weight_decay": phases[:1]}}]
  lines = tables({"flags": chosen, "seeds": seeds})
  assert (
    lines[2] == "weight_decay 0.1, 0.2: phase 1, 50.00 %, 1 copies diverged or collapsed"
  )
  assert "[" not in "".join(lines[3:])  # one seed has no interval


def test_what_the_copies_have_by_default():
  config = bench_merges.read_config(parse("--weight_decay=1e-4", "--learning_rate=0.1"))
  np.testing.assert_allclose(config.weight_decays, [1e-4, 1e-3, 1e-2])
  np.testing.assert_allclose(config.learning_rates, [0.003, 0.0173, 0.1])


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--families=epochs", "unknown family 'epochs'"),
    ("--ingredients=1", "--ingredients is 1: a merge is of two"),
    ("--weight_decays=0,1", "--weight_decays is 0,1: give 3 numbers"),
    ("--weight_decays=0,1,1", "each copy another one"),
    ("--learning_rates=a,b,c", "--learning_rates is a,b,c"),
    ("--learning_rates=0,1,2", "learning_rate is a number, above 0"),
    ("--merge=greedy", "--merge is of the main job"),
    ("--stream", "--stream is of the main job"),
    ("--json=/no/such/file", "/no/such/file cannot be written"),
  ],
)
def test_bad_flags(flag, words, rejects):
  with rejects(words):
    bench_merges.read_config(parse(flag))
