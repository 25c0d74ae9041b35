"""Merges beside the mean of the same candidates, as tables in Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

from ..reporting.statistics import estimate

Results = dict[str, Any]
UNIFORM, OF_TWO = "uniform", " of two"  # the latter ends names of merges of two candidates
# Of test data: the title of a metric, its name, and what it is shown in.
METRICS = {
  "accuracy": ("test_accuracy", 100, 2),
  "loss": ("test_loss", 1, 4),
  "ECE": ("test_expected_calibration_error", 100, 2),
  "accuracy, corrupted": ("ood_accuracy", 100, 2),
}


def tables(results: Results) -> list[str]:
  """All tables, a line each row.

  Args:
    results: what `experiments.benchmarks.bench_merges` measured.
  """
  seeds, chosen = results["seeds"], results["flags"]
  lines = [
    f"{chosen['model']}, {chosen['criterion']}, m = {chosen['ingredients']}, seeds "
    f"{seeds[0]['seed']} to {seeds[-1]['seed']}: test data, and paired differences from "
    "uniform (those of two candidates from their mean) with 95 % intervals. Accuracies and "
    "ECE in points; models is the number that the weights come to, 1 / sum of squares."
  ]
  for family in chosen["families"]:
    values = "" if family == "seed" else f" {', '.join(map(str, chosen[f'{family}s']))}"
    for phases in zip(*(seed["families"][family] for seed in seeds), strict=True):
      lines += ["", f"{family}{values}: phase {phases[0]['phase']}, " + sparsity(phases)]
      lines += ["", *table(phases)]
  return lines


def sparsity(phases: Sequence[Results]) -> str:
  """That of a phase, in the mean over seeds; and how many copies are in no merge."""
  mean = estimate([phase["sparsity"] for phase in phases]).mean
  lost = sum(len(phase["diverged"]) + len(phase["collapsed"]) for phase in phases)
  return f"{100 * mean:.2f} %" + (f", {lost} copies diverged or collapsed" if lost else "")


def table(phases: Sequence[Results]) -> Iterator[str]:
  """One phase over seeds: a row for each merge, and for what merges are compared with.

  Args:
    phases: of each seed.
  """
  known = phases[0]["merges"][UNIFORM]
  shown = {title: how for title, how in METRICS.items() if how[0] in known}
  titles = ["merge", "models", "accuracy", *(f"{title} - uniform" for title in shown)]
  yield f"| {' | '.join(titles)} |"
  yield f"| --- |{' ---: |' * (len(titles) - 1)}"
  rows = [UNIFORM, *(name for name in phases[0]["merges"] if name != UNIFORM)]
  for name in rows:
    of = [phase["merges"][name] for phase in phases]
    against = UNIFORM + OF_TWO if name.endswith(OF_TWO) else UNIFORM
    models = [1 / sum(w**2 for w in one["weights"]) for one in of]
    yield _row(name, of, phases, against, shown, f"{estimate(models).mean:.1f}")
  for name in phases[0]["references"]:
    of = [phase["references"][name] for phase in phases]
    yield _row(name.replace("_", " "), of, phases, UNIFORM, shown, "")


def _row(name, of, phases, against, shown, models):
  cells = [name, models, f"{100 * estimate([x['test_accuracy'] for x in of]).mean:.2f}"]
  for metric, factor, digits in shown.values():
    if name == against:
      cells.append("")
      continue
    pairs = zip(of, phases, strict=True)
    gaps = [factor * (x[metric] - phase["merges"][against][metric]) for x, phase in pairs]
    gap = estimate(gaps)
    text = f"{gap.mean:+.{digits}f}"
    if len(gaps) > 1:
      low, high = gap.mean - gap.half_width, gap.mean + gap.half_width
      text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    cells.append(text)
  return f"| {' | '.join(cells)} |"
