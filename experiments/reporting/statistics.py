"""Statistics over the seeds of a run, and how its methods are called."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ..methods.registry import looks

Results = dict[str, Any]


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


def estimate(values: Sequence[float]) -> Estimate:
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
    seeds: entries of `results.json`, each with `dense` and `phases`. Phases and methods may
      be missing from some, as while a run goes on: each method is then of those that have
      it.
    metric: which entry of a model's metrics.

  Returns:
    One dict per phase: `phase`, `sparsity`, and for `dense` and each method that the phase
    holds `mean`, `std`, `half_width` (of the mean's 95 % interval), and (but for the soup
    itself) `soup_minus`: mean and `half_width` of the 95 % interval of the paired
    difference. What one seed cannot give is None. Where not all seeds have a method,
    `seeds` says how many do.
  """
  numbers = sorted({p["phase"] for seed in seeds for p in seed["phases"]})
  return [_summary_of(number, seeds, metric) for number in numbers]


def of_phase(number: int, seeds: list[Results]) -> list[tuple[Results, Results]]:
  """The entries of the seeds that have a phase, each with that phase."""
  return [(seed, p) for seed in seeds for p in seed["phases"] if p["phase"] == number]


def _summary_of(number, seeds, metric):
  pairs = of_phase(number, seeds)
  row = {"phase": number, "sparsity": float(np.mean([p["sparsity"] for _, p in pairs]))}
  soups = [_finite(phase.get("soup"), metric) for _, phase in pairs]
  for name in ("dense", *looks()):
    values = [
      _finite(seed["dense"] if name == "dense" else phase.get(name), metric)
      for seed, phase in pairs
    ]
    known = [value for value in values if value is not None]
    if not known:
      continue
    row[name] = _plain(estimate(known))
    if len(known) < len(seeds):
      row[name]["seeds"] = len(known)
    both = [
      (soup, value)
      for soup, value in zip(soups, values, strict=True)
      if None not in (soup, value)
    ]
    if name != "soup" and both:
      gain = _plain(estimate([soup - value for soup, value in both]))
      row[name]["soup_minus"] = {key: gain[key] for key in ("mean", "half_width")}
  return row


def _finite(metrics, metric):
  value = (metrics or {}).get(metric)
  return value if value is not None and math.isfinite(value) else None


def _plain(value: Estimate) -> Results:
  return {k: None if math.isnan(v) else v for k, v in value._asdict().items()}


def method_title(name: str, m: int | str) -> str:
  """How a method is called in tables and figures.

  Args:
    name: its key in results.json, such as "imp_mx".
    m: number of copies, or a letter for it.

  Returns:
    The title, such as "IMP 5x".
  """
  return "Dense" if name == "dense" else looks()[name].title.format(m=m)


def network_on_data(flags: Results) -> str:
  """Network and data set of a run, in words."""
  return f"{flags['model']} on {dataset_title(flags['dataset'])}"


def dataset_title(name: str) -> str:
  """How a data set is called: a file by its name, without its folders.

  Args:
    name: what --dataset was given.

  Returns:
    The title.
  """
  return os.path.basename(name) if name.endswith(".npz") else name
