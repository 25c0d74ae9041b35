"""Tables and figures of a run's results."""

import math
import os
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Results = dict[str, Any]

# Key in a phase's record -> what readers see, in the order of table and figure.
METHODS = {
  "soup": "Sparse soup",
  "mean_candidate": "Mean candidate",
  "best_candidate": "Best candidate",
  "prediction_ensemble": "Ensemble",
  "imp": "IMP",
  "imp_mx": "IMP {m}x",
  "imp_reprune": "IMP-RePrune",
  "swamp": "SWAMP",
  "gmp": "GMP",
  "gmp_soup": "GMP soup",
  "dpf": "DPF",
  "dpf_soup": "DPF soup",
  "bimp": "BIMP",
  "bimp_soup": "BIMP soup",
  "dense_soup": "Dense soup",
}
# Colour-blind safe (Okabe and Ito) and told apart by marker in black and white.
STYLES = {
  "soup": ("#D55E00", "o"),
  "mean_candidate": ("#0072B2", "s"),
  "best_candidate": ("#56B4E9", "^"),
  "prediction_ensemble": ("#F0E442", "*"),
  "imp": ("#009E73", "v"),
  "imp_mx": ("#CC79A7", "D"),
  "imp_reprune": ("#009E73", "X"),
  "swamp": ("#E69F00", "P"),
  "gmp": ("#56B4E9", "<"),
  "gmp_soup": ("#0072B2", "<"),
  "dpf": ("#E69F00", ">"),
  "dpf_soup": ("#D55E00", ">"),
  "bimp": ("#CC79A7", "h"),
  "bimp_soup": ("#000000", "h"),
  "dense_soup": ("#000000", "d"),
}


class Estimate(NamedTuple):
  """Over seeds: mean, standard deviation (n - 1) and half of the mean's 95 % interval.

  With one seed the latter two are NaN.

  Attributes:
    mean: of the values.
    std: their standard deviation, n - 1 in the denominator.
    half_width: half of the 95 % interval of the mean.
  """

  mean: float
  std: float
  half_width: float


def estimate(values: list[float]) -> Estimate:
  """Mean, standard deviation, and half the 95 % interval of the mean (Student t).

  Args:
    values: one for each seed, at least one.

  Returns:
    The estimate, in the unit of the values.
  """
  x = np.asarray(values, np.float64)
  if len(x) < 2:
    return Estimate(float(x.mean()), math.nan, math.nan)
  std = float(x.std(ddof=1))
  half_width = float(stats.t.ppf(0.975, len(x) - 1) * std / math.sqrt(len(x)))
  return Estimate(float(x.mean()), std, half_width)


def summarize(seeds: list[Results], metric: str = "test_accuracy") -> list[Results]:
  """Statistics over the seeds of a run, phase by phase.

  Args:
    seeds: entries of `results.json`, each with `dense` and `phases`; all of equally many
      phases.
    metric: which entry of a model's metrics.

  Returns:
    One dict per phase: `phase`, `sparsity`, and for `dense` and each method that the phase
    holds `mean`, `std`, and (but for the soup itself) `soup_minus`: mean and `half_width`
    of the 95 % interval of the paired difference. What one seed cannot give is None.
  """
  summary = []
  for phases in zip(*(seed["phases"] for seed in seeds), strict=True):
    dense = [seed["dense"][metric] for seed in seeds]
    row = {
      "phase": phases[0]["phase"],
      "sparsity": float(np.mean([p["sparsity"] for p in phases])),
    }
    soup = np.array([p["soup"][metric] for p in phases])
    methods = [name for name in METHODS if name in phases[0]]
    for name in ["dense", *methods]:
      values = dense if name == "dense" else [p[name][metric] for p in phases]
      value = estimate(values)
      row[name] = {"mean": value.mean, "std": _none_for_nan(value.std)}
      if name != "soup":
        gain = estimate(soup - np.array(values))
        row[name]["soup_minus"] = {
          "mean": gain.mean,
          "half_width": _none_for_nan(gain.half_width),
        }
    summary.append(row)
  return summary


def _none_for_nan(value: float) -> float | None:
  return None if math.isnan(value) else value


def method_title(name: str, m: int) -> str:
  """How a method is called in tables and figures.

  Args:
    name: its key in results.json, such as "imp_mx".
    m: number of copies.

  Returns:
    The title, such as "IMP 5x".
  """
  return METHODS[name].format(m=m)


HEADER = ("Phase", "Sparsity", "Model", "Test accuracy", "Soup minus it")


def rows(summary: list[Results], m: int) -> list[list[list[str]]]:
  """A run's tables as text, one for each phase.

  Args:
    summary: what `summarize` gives, of an accuracy.
    m: number of copies.

  Returns:
    For each phase its rows, a method each, with the cells that `HEADER` names: accuracies
    in percent (with standard deviations), and the soup's paired gain over the method (with
    the ends of its 95 % interval).
  """
  tables = []
  for row in summary:
    lines = []
    for name in METHODS:
      if name in row:
        gain = row[name].get("soup_minus")
        accuracy = _percent(row[name]["mean"], row[name]["std"])
        lines.append(["", "", method_title(name, m), accuracy, _gain(gain) if gain else ""])
    lines[0][:2] = str(row["phase"]), f"{100 * row['sparsity']:.2f} %"
    tables.append(lines)
  return tables


def _percent(mean: float, std: float | None) -> str:
  return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _gain(gain: Results) -> str:
  text = f"{100 * gain['mean']:+.2f}"
  if gain["half_width"] is None:
    return text
  ends = (gain["mean"] + sign * gain["half_width"] for sign in (-1, 1))
  return text + " [" + ", ".join(f"{100 * end:+.2f}" for end in ends) + "]"


def caption(results: Results) -> str:
  """What a table of this run says, in one sentence or two.

  Args:
    results: a run's results.json, with at least one seed.

  Returns:
    The text of a caption.
  """
  flags, seeds = results["flags"], results["seeds"]
  dense = estimate([seed["dense"]["test_accuracy"] for seed in seeds])
  text = (
    f"Test accuracy in percent of {flags['model']} on {dataset_title(flags['dataset'])}, "
    f"m = {flags['ingredients']}, dense {_percent(dense.mean, _none_for_nan(dense.std))}"
  )
  if len(seeds) == 1:
    return text + f", seed {seeds[0]['seed']}."
  return text + (
    f", {len(seeds)} seeds: mean ± standard deviation, and the paired difference between "
    "soup and model with its 95 % interval."
  )


def notes(seeds: list[Results]) -> list[str]:
  """A sentence for everything that went wrong: copies that diverged, failed averages.

  Args:
    seeds: the entries of a run's results.json.

  Returns:
    The sentences, none where all is well.
  """
  found = []
  for seed in seeds:
    for phase in seed["phases"]:
      where = f"Seed {seed['seed']}, phase {phase['phase']}"
      if diverged := phase.get("diverged"):
        copies = ", ".join(map(str, diverged))
        found.append(
          f"{where}: {len(diverged)} of {len(phase['candidates'])} copies diverged and are "
          f"left out (from 0: {copies})."
        )
      for name in METHODS:
        if diverged := phase.get(name, {}).get("diverged"):
          copies = ", ".join(map(str, diverged))
          title = METHODS[name].format(m=len(phase["candidates"]))
          found.append(
            f"{where}, {title}: copies that diverged are left out (from 0: {copies})."
          )
      if failed := phase.get("averaging_failed"):
        found.append(
          f"{where}: averaging failed. The soup has {_of(failed, 'soup')} % on validation "
          f"data, its worst candidate {_of(failed, 'worst_candidate')} %; between copies "
          f"{' and '.join(map(str, failed['copies']))} the loss rises by "
          f"{failed['barrier']:.3g}."
        )
  return found


def _of(failed: Results, name: str) -> str:
  return f"{100 * failed[f'{name}_validation_accuracy']:.2f}"


def dataset_title(name: str) -> str:
  """How a data set is called: a file by its name, without its folders.

  Args:
    name: what --dataset was given.

  Returns:
    The title.
  """
  return os.path.basename(name) if name.endswith(".npz") else name


def markdown_table(tables: list[list[list[str]]]) -> str:
  """What `rows` gives, in Markdown.

  Args:
    tables: rows of cells, a list for each phase.

  Returns:
    The text of one table.
  """
  lines = [list(HEADER), ["---:", "---:", "---", "---:", "---:"]]
  lines += [line for table in tables for line in table]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def console_table(
  tables: list[list[list[str]]], title: str, header: tuple[str, ...] = HEADER
) -> Any:
  """What `rows` gives, to be printed on a `rich.console.Console`.

  Args:
    tables: rows of cells, a list for each phase.
    title: printed above it.
    header: the names of the columns.

  Returns:
    A `rich.table.Table`.
  """
  from rich import box
  from rich.table import Table

  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
  for name in header:
    table.add_column(name, justify="left" if name == "Model" else "right", no_wrap=True)
  for lines in tables:
    for line in lines:
      soup = line[2] == METHODS["soup"]
      table.add_row(*line, style="bold" if soup else None, end_section=line is lines[-1])
  return table


def accuracy_figure(results: Results, path: str) -> None:
  """Draws accuracy over sparsity for all methods of a run.

  Args:
    results: content of `results.json`.
    path: file to write; its ending (.png, .svg) decides the format.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  m, seeds = results["flags"]["ingredients"], results["seeds"]
  summary = summarize(seeds)
  sparsities = np.array([row["sparsity"] for row in summary])
  # Equal steps for equal fractions removed, as the phases remove them.
  positions = -np.log10(1 - sparsities)
  figure, axes = plt.subplots(figsize=(6.4, 4.6), constrained_layout=True)

  dense = summary[0]["dense"]["mean"]
  axes.axhline(100 * dense, color="0.45", linestyle=":", label="Dense")
  methods = [name for name in METHODS if any(name in row for row in summary)]
  spread = 0.012 * (np.ptp(positions) or 1)
  for number, name in enumerate(methods):
    colour, marker = STYLES[name]
    offset = (number - (len(methods) - 1) / 2) * spread
    shown = [i for i, row in enumerate(summary) if name in row]  # some at the goal alone
    half_widths = [
      100 * estimate([s["phases"][i][name]["test_accuracy"] for s in seeds]).half_width
      for i in shown
    ]
    axes.errorbar(
      positions[shown] + offset,
      [100 * summary[i][name]["mean"] for i in shown],
      yerr=None if len(seeds) == 1 else half_widths,
      color=colour,
      marker=marker,
      capsize=2,
      linewidth=2.2 if name == "soup" else 1.3,
      zorder=3 if name == "soup" else 2,
      label=method_title(name, m),
    )
  axes.set_xticks(positions, [f"{100 * s:.1f} %" for s in sparsities])
  axes.minorticks_off()
  axes.set_xlabel("Sparsity of the prunable weights")
  axes.set_ylabel("Test accuracy in percent")
  flags = results["flags"]
  title = f"{flags['model']} on {dataset_title(flags['dataset'])}, m = {m}"
  if len(seeds) > 1:
    title += f", {len(seeds)} seeds, bars: 95 % interval of the mean"
  axes.set_title(title, fontsize="medium")
  axes.grid(axis="y", color="0.9")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False)
  figure.savefig(path, dpi=150)
  plt.close(figure)
