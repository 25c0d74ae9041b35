"""Statistics, table and figure of a run, against SciPy and by hand."""

import fake_runs
import numpy as np
import pytest
from scipy import stats

from experiments.methods.registry import looks
from experiments.reporting import figures, tables
from experiments.reporting.cases import Case
from experiments.reporting.statistics import summarize
from experiments.reporting.training_sections import uncertainty_section


def results(seeds, phases=2, m=3, methods=None):
  methods = tuple(looks()) if methods is None else methods
  rng = np.random.default_rng(0)

  def metrics():
    return {"test_accuracy": float(rng.uniform(0.8, 1))}

  return {
    "flags": {"model": "mlp", "dataset": "digits", "ingredients": m},
    "seeds": [
      {
        "seed": seed,
        "dense": metrics(),
        "phases": [
          {"phase": t, "sparsity": 1 - 0.3**t, **{name: metrics() for name in methods}}
          for t in range(1, phases + 1)
        ],
      }
      for seed in range(seeds)
    ],
  }


def test_paired_differences_are_scipys():
  run = results(6)
  summary = summarize(run["seeds"])
  for t, row in enumerate(summary):
    soup = [s["phases"][t]["soup"]["test_accuracy"] for s in run["seeds"]]
    imp = [s["phases"][t]["imp"]["test_accuracy"] for s in run["seeds"]]
    assert row["soup"]["mean"] == pytest.approx(np.mean(soup))
    assert row["soup"]["std"] == pytest.approx(np.std(soup, ddof=1))
    interval = stats.ttest_rel(soup, imp).confidence_interval(0.95)
    gain = row["imp"]["soup_minus"]
    assert gain["mean"] - gain["half_width"] == pytest.approx(interval.low)
    assert gain["mean"] + gain["half_width"] == pytest.approx(interval.high)
    assert "soup_minus" not in row["soup"]


def test_one_seed_has_no_spread():
  summary = summarize(results(1, methods=("soup", "imp", "imp_mx"))["seeds"])
  assert summary[0]["soup"]["std"] is None
  assert summary[0]["imp"]["soup_minus"]["half_width"] is None
  found = tables.rows(summary, 3)
  assert [table[0][0] for table in found] == ["1", "2"]
  assert found[0][-1][2] == "IMP 3x"
  gain = summary[0]["imp_mx"]["soup_minus"]["mean"]
  assert found[0][-1][4] == f"{100 * gain:+.2f}"


def test_rows_say_percent_and_intervals():
  run = results(2, phases=1, methods=("soup", "imp"))
  for seed, (soup, imp) in zip(run["seeds"], ((0.9, 0.8), (0.94, 0.82)), strict=True):
    seed["phases"][0]["soup"]["test_accuracy"] = soup
    seed["phases"][0]["imp"]["test_accuracy"] = imp
  found = tables.rows(summarize(run["seeds"]), 3)
  # Differences 10 and 12 points: 11 ± 12.706 * sqrt(2) / sqrt(2), 12.706 the t quantile.
  assert found == [
    [
      ["1", "70.00 %", "Sparse soup", "92.00 ± 2.83", ""],
      ["", "", "IMP", "81.00 ± 1.41", "+11.00 [-1.71, +23.71]"],
    ]
  ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_figure_and_caption(tmp_path, seeds):
  run = results(seeds)
  for ending in ("png", "svg"):
    figures.accuracy_figure(run, tmp_path / f"a.{ending}")
  drawn = (tmp_path / "a.svg").read_text()
  assert "<svg" in drawn
  assert ("3 seeds" in tables.caption(run)) == (seeds == 3)


def test_a_run_with_one_phase_and_no_baselines_can_be_drawn(tmp_path):
  run = results(1, phases=1, methods=("soup", "mean_candidate", "best_candidate"))
  figures.accuracy_figure(run, tmp_path / "a.png")
  assert (tmp_path / "a.png").stat().st_size > 1000


def test_products_that_soups_keep_are_shares_of_the_dense_network():
  def seed(kept):
    soups = [{"sparse_multiply_adds": k} for k in kept]
    phases = [{"phase": i, "soup": soup} for i, soup in enumerate(soups, 1)]
    return {"dense": {"multiply_adds": 200}, "phases": [*phases, {"phase": 3}]}

  case = Case("run", {}, [seed([100, 40]), seed([80, 50])])
  assert figures.products_kept(case) == pytest.approx({1: 0.45, 2: 0.225})
  case = Case("run", {}, [{"dense": {}, "phases": [{"phase": 1, "soup": {}}]}])
  assert figures.products_kept(case) == {}


def test_a_figure_over_multiply_adds_has_the_phases_that_have_some():
  seeds = results(2, phases=3)["seeds"]
  for seed in seeds:
    seed["dense"]["multiply_adds"] = 1000
    for phase in seed["phases"][1:]:
      phase["soup"]["sparse_multiply_adds"] = 1000 >> phase["phase"]
      phase["imp"]["sparse_multiply_adds"] = 500
  case = Case("run", results(2)["flags"], seeds)
  (axes,) = figures.over_multiply_adds(case, "test_accuracy").axes
  assert {label.get_text() for label in axes.get_xticklabels()} == {"25 %", "12.5 %"}
  (soup,) = (line for line in axes.lines if line.get_label() == "Sparse soup")
  assert len(soup.get_xdata()) == 2
  # IMP takes half of the products in both phases: one step to the left of the first soup.
  (imp,) = (line for line in axes.lines if line.get_label() == "IMP")
  np.testing.assert_allclose(imp.get_xdata(), np.log10(2), atol=0.05)


def test_uncertainty_is_the_mean_over_seeds_and_corruptions():
  seeds = [fake_runs.entry(seed) for seed in range(2)]
  for seed, share in zip(seeds, (0.02, 0.04), strict=True):
    spread = {"disagreement": share, "predictive_entropy": 0.3, "mutual_information": 0.1}
    spread |= {"error_auroc_of_entropy": None, "error_auroc_of_information": 0.75}
    corrupted = {
      "fog": {"auroc_of_entropy": share + 0.5, "auroc_of_information": 0.5},
      "snow": {"auroc_of_entropy": share + 0.7, "auroc_of_information": 0.5},
    }
    seed["phases"][1]["uncertainty"] = {"test": spread, "corrupted": corrupted}
  case = Case("run", fake_runs.run_flags(), seeds)
  words, table = uncertainty_section([case])
  assert "0.5 tells nothing" in words
  assert table.header[0] == "Phase"
  assert table.rows == [[["2", "3.00", "0.300", "0.100", "-", "0.750", "0.630", "0.500"]]]
  header, rows = list(uncertainty_section([case, case]))[1][:2]
  assert header[0] == "Run" and [group[0][0] for group in rows] == ["run", "run"]
  plain = Case("run", fake_runs.run_flags(), [fake_runs.entry(0)])
  assert not list(uncertainty_section([plain]))
