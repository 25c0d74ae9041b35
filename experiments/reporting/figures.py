"""Figures of how good models are: over sparsity, over phases, over numbers of copies."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsms.disk.files import output_file

from ..methods.registry import looks
from .cases import Case
from .drawing import MARKERS, MIDDLE, canvas, colour, file_of, spaced
from .statistics import Results, method_title, summarize

PERCENT = {
  "test_accuracy": "Test accuracy in percent",
  "ood_accuracy": "Accuracy on corrupted data in percent",
  "test_expected_calibration_error": "Calibration error in percent",
}
# What must be seen in any case.
NEAR = ("soup", "mean_candidate", "best_candidate", "prediction_ensemble", "imp", "imp_mx")


def accuracy_figure(results: Results, path: str | os.PathLike) -> None:
  """Draws accuracy over sparsity for all methods of a run.

  Args:
    results: content of `results.json`.
    path: file to write; its ending (.png, .svg) decides the format.
  """
  case = Case("", results["flags"], results["seeds"])
  figure = over_sparsity(case, "test_accuracy")
  with output_file(path) as file:
    file.write(file_of(figure, os.path.splitext(path)[1].removeprefix(".")))


def has_metric(case: Case, metric: str) -> bool:
  """Whether soups have a metric."""
  return any("soup" in row for row in summarize(case.seeds, metric))


def over_sparsity(case: Case, metric: str) -> Any:
  """A metric of all methods over the sparsity of the phases, candidates as dots."""
  rows = summarize(case.seeds, metric)
  positions, labels = sparsity_axis(rows)
  what = "Sparsity of the prunable weights"
  return _over_phases(case, metric, rows, positions, labels, what)


def over_multiply_adds(case: Case, metric: str) -> Any:
  """A metric of all methods over the multiply-adds that each of them takes.

  The ensemble is drawn where the soup is: each of its networks takes as many.
  """
  kept = products_kept(case)
  rows = [row for row in summarize(case.seeds, metric) if row["phase"] in kept]
  shares = [kept[row["phase"]] for row in rows]
  labels = [f"{100 * share:.3g} %" for share in shares]
  what = "Multiply-adds of an inference, of those of the dense network"
  own = {}
  for name in looks():
    of_method = kept | products_kept(case, name)
    own[name] = -np.log10([of_method[row["phase"]] for row in rows])
  return _over_phases(case, metric, rows, -np.log10(shares), labels, what, own)


def products_kept(case: Case, method: str = "soup") -> dict[int, float]:
  """By phase the share of the dense network's multiply-adds that is left, over seeds."""
  shares: dict[int, list[float]] = {}
  for seed in case.seeds:
    dense = seed["dense"].get("multiply_adds")
    for phase in seed["phases"]:
      left = (phase.get(method) or {}).get("sparse_multiply_adds")
      if dense and left:
        shares.setdefault(phase["phase"], []).append(left / dense)
  return {phase: float(np.mean(values)) for phase, values in shares.items()}


def _over_phases(case, metric, rows, positions, labels, what, own=None):
  with canvas(case.setting, what, PERCENT[metric], height=4.2) as (figure, axes):
    dots = _dots(axes, case, metric, rows, positions)
    drawn = method_lines(axes, positions, rows, case.m, own)
    _dense_line(axes, rows)
    _limits(axes, drawn, dots, case.m)
    ticks(axes, positions, labels)
  return figure


def over_cases(
  cases: Sequence[Case],
  metric: str,
  value: Callable[[Case], float],
  label: str,
  title: str,
) -> Any:
  """A metric of all methods at the last phase over what cases differ in.

  Args:
    cases: of one network and data set.
    metric: a key of PERCENT.
    value: what they differ in.
    label: of that.
    title: of the figure.
  """
  cases = sorted(cases, key=value)
  rows = [summarize(case.seeds, metric)[-1] for case in cases]
  positions = np.arange(len(cases), dtype=float)
  with canvas(title, label, PERCENT[metric], height=4.2) as (figure, axes):
    m = cases[0].m if len({case.m for case in cases}) == 1 else "m"
    drawn = method_lines(axes, positions, rows, m)
    _dense_line(axes, rows)
    _limits(axes, drawn, [], m)
    axes.set_xticks(positions, [f"{value(case):g}" for case in cases])
  return figure


def soups_of(cases: Sequence[Case], metric: str) -> Any:
  """The soups of several runs over sparsity, and IMP beside them as dashes."""
  title, label = "Soups (lines) and IMP (dashes)", "Sparsity of the prunable weights"
  with canvas(title, label, PERCENT[metric], height=4.2, columns=1) as (figure, axes):
    drawn, ticks_at = {"soup": []}, {}
    for number, case in enumerate(cases):
      rows = summarize(case.seeds, metric)
      for name, style in (("soup", "-"), ("imp", "--")):
        shown = [row for row in rows if name in row]
        if not shown:
          continue
        x = np.array([_kept(row) for row in shown])
        y = np.array([100 * row[name]["mean"] for row in shown])
        soup = name == "soup"
        axes.plot(
          x,
          y,
          color=colour(number),
          linestyle=style,
          marker=MARKERS[number % len(MARKERS)],
          linewidth=2 if soup else 1.2,
          label=case.title if soup else None,
        )
        if soup:
          _band(axes, x, y, shown, name, colour(number))
        for at, row in zip(x, shown, strict=True):
          ticks_at[at] = f"{100 * row['sparsity']:.1f} %"
        drawn["soup"] += list(y)
    _limits(axes, drawn, [], "m")
    at = sorted(ticks_at)
    ticks(axes, np.array(at), [ticks_at[x] for x in at])
  return figure


def sparsity_axis(rows: Sequence[Results]) -> tuple[np.ndarray, list[str]]:
  """Positions of phases, equal steps for equal fractions removed, and what they are.

  Where sparsity does not grow from phase to phase the phases are evenly spaced.
  """
  positions = np.array([_kept(row) for row in rows])
  if len(rows) > 1 and not np.all(np.diff(positions) > 0):
    positions = np.arange(len(rows), dtype=float)
  return positions, [f"{100 * row['sparsity']:.1f} %" for row in rows]


def _kept(row):
  return -np.log10(max(1 - row["sparsity"], 1e-6))


def ticks(axes: Any, positions: np.ndarray, labels: Sequence[str]) -> None:
  """As many labels as there is room for, the last one always."""
  room = max((positions[-1] - positions[0]) / 5.5, 1e-9) if len(positions) else 1
  chosen = spaced(positions, room)
  axes.set_xticks(positions, ["" for _ in positions])
  axes.set_xticks(positions[chosen], [labels[i] for i in chosen])
  axes.minorticks_off()


def method_lines(
  axes: Any,
  positions: np.ndarray,
  rows: Sequence[Results],
  m: int | str,
  own: Mapping[str, np.ndarray] | None = None,
) -> dict[str, list[float]]:
  """A line for each method, with the 95 % interval of its mean as a band.

  Args:
    axes: to draw on.
    positions: float [rows].
    rows: of `summarize`.
    m: number of copies, or a letter for several numbers.
    own: by method float [rows], its positions where they are its own.

  Returns:
    By method its means, in percent.
  """
  drawn = {}
  names = [name for name in looks() if any(name in row for row in rows)]
  spread = 0.01 * (np.ptp(positions) or 1)
  for number, name in enumerate(names):
    shown = [i for i, row in enumerate(rows) if name in row]  # some at the goal alone
    x = (own or {}).get(name, positions)[shown] + (number - (len(names) - 1) / 2) * spread
    y = np.array([100 * rows[i][name]["mean"] for i in shown])
    _, ink, marker = looks()[name]
    soup = name == "soup"
    # A method whose colour another one has already is dashed.
    inks = [look.colour for look in list(looks().values())[: list(looks()).index(name)]]
    axes.plot(
      x,
      y,
      color=ink,
      marker=marker,
      linestyle="--" if ink in inks else "-",
      linewidth=2.4 if soup else 1.3,
      markersize=6.5 if soup else 5,
      zorder=4 if soup else 3,
      label=method_title(name, m),
    )
    _band(axes, x, y, [rows[i] for i in shown], name, ink)
    drawn[name] = list(y)
  return drawn


def _band(axes, x, y, rows, name, ink):
  half = [row[name]["half_width"] for row in rows]
  half = np.array([np.nan if h is None else 100 * h for h in half])
  if np.isnan(half).all():
    return
  if len(x) == 1:
    axes.errorbar(x, y, yerr=half, color=ink, capsize=2, linewidth=1, zorder=2)
    return
  alpha = 0.22 if name == "soup" else 0.08
  axes.fill_between(x, y - half, y + half, color=ink, alpha=alpha, linewidth=0, zorder=1)


def _dots(axes, case, metric, rows, positions):
  x, y = [], []
  where = {row["phase"]: at for row, at in zip(rows, positions, strict=True)}
  for seed in case.seeds:
    for phase in seed["phases"]:
      if phase["phase"] not in where:
        continue
      for one in phase.get("candidates", ()):
        value = one.get(metric)
        if value is not None and np.isfinite(value):
          x.append(where[phase["phase"]])
          y.append(100 * value)
  if x:
    axes.scatter(
      x, y, s=9, color=MIDDLE, alpha=0.55, linewidths=0, zorder=2, label="Each candidate"
    )
  return y


def _dense_line(axes, rows):
  known = [row["dense"]["mean"] for row in rows if "dense" in row]
  if known:
    axes.axhline(100 * known[-1], color=MIDDLE, linestyle=":", label="Dense", zorder=1)


def _limits(axes, drawn, dots, m):
  """Decides what is seen.

  Bands of few seeds may be wide and have no say. Methods that are far off would squeeze all
  others: they leave the figure, and are named with their last value where they do.
  """
  near = [y for name, ys in drawn.items() if name in NEAR for y in ys] + dots
  near = near or [y for ys in drawn.values() for y in ys]
  if not near:
    return
  low, high = min(near), max(near)
  most = 1.5 * max(high - low, 0.5)
  gone = {}
  for name, ys in drawn.items():
    if min(ys) < low - most or max(ys) > high + most:
      gone[name] = ys[-1]
    else:
      low, high = min(low, *ys), max(high, *ys)
  room = 0.2 * (high - low) or 0.5
  axes.set_ylim(max(low - room, 0), min(high + room, 101) if high <= 100 else high + room)
  below = {name: y for name, y in gone.items() if y < low}
  for side, found, at, sign in (
    ("bottom", below, 0.02, "\N{DOWNWARDS ARROW}"),
    ("top", {k: y for k, y in gone.items() if k not in below}, 0.98, "\N{UPWARDS ARROW}"),
  ):
    text = ", ".join(f"{method_title(name, m)} {y:.2f}" for name, y in found.items())
    if text:
      axes.text(
        0.02, at, f"{sign} {text}", transform=axes.transAxes, fontsize=8, va=side, zorder=5,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
      )  # fmt: skip
