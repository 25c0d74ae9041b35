"""What a directory holds of a run or a comparison, finished or under way."""

import os
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from jaxsms.disk import storage

from ..config.fields import flag_text
from ..methods import DENSE, SOUP, having
from ..reporting.cases import Case, Origin
from ..run import run_directory
from ..run.environment import environments_of
from ..run.latency_file import run_latency
from ..run.metrics_file import read_lines
from ..schemas.json_checks import Unfit
from ..schemas.results_check import KNOWN_FLAGS
from . import parts as comparison


def read(path: str | os.PathLike, with_name: bool = False) -> tuple[list[Case], Origin]:
  """What a report is made of.

  Args:
    path: the --workdir of a run or a comparison.
    with_name: whether the titles of a comparison's cases hold its name.

  Returns:
    One case for a run, whatever is finished of it; for a comparison one for each goal
    sparsity and number of copies.

  Raises:
    ValueError: there is nothing to report.
  """
  path = storage.as_path(path)
  if not path.exists():
    raise ValueError(f"there is no {path}: give the --workdir of a run or a comparison")
  results = _results(path)
  run = {} if results else run_directory.read_run(path) or {}
  if not run and results is None:
    raise ValueError(
      f"{path} holds no run that can be read: give the --workdir of a run or a comparison"
    )
  results = results or {"seeds": []}
  known = {**run.get("flags", {}), **results.get("flags", {})}
  try:
    KNOWN_FLAGS(known)
  except Unfit as error:
    raise ValueError(
      f"{path} does not say with what flags it ran ({error.where.lstrip('.')} should be "
      f"{error.expected}): another version wrote it"
    ) from error
  if "cells" in results:
    cases = comparison_cases(path, results, known, with_name)
    command = comparison_command(known, results)
  else:
    cases = [run_case(path, results, known)]
    command = command_of("sms", known)
  if not any(seed["phases"] for case in cases for seed in case.seeds):
    if "part" in results or "cells" in results:
      raise ValueError(f"{path}: no soup is finished in it yet")
    if not any(case.seeds for case in cases):
      raise ValueError(
        f"{path}: nothing is finished yet, neither a dense training nor a phase"
      )
  return cases, Origin(
    path.name,
    command,
    results.get("seconds"),
    [one["environment"] for one in environments_of(results) or environments_of(run)],
    {k: v for k, v in known.items() if k != "workdir"},
    results.get("ood_sources", {}),
    comparison_warnings(results) if "cells" in results else [],
    "cells" in results and not fills_grid(results),
    (results.get("costs") or {}).get("compiling_seconds"),
  )


def _results(path):
  """results.json, or None; what is wrong with it is said with what to do."""
  try:
    return run_directory.checked_results(path)
  except storage.Damaged as error:
    raise ValueError(
      f"{error}; the command that began the run or comparison writes it anew from what "
      "else is saved"
    ) from error


def run_case(path: storage.epath.Path, results: dict[str, Any], known: dict) -> Case:
  """A run: its finished seeds, and what the metrics say of others."""
  epochs, evaluations = read_metrics(path / run_directory.METRICS_FILE)
  finished = results["seeds"]
  ours = {seed["seed"] for seed in finished}
  others = under_way([e for e in evaluations if e["seed"] not in ours], known["phases"])
  missing = ""
  wanted = known.get("seeds", len(finished))
  if len(finished) < wanted:
    missing = f"{len(finished)} of {wanted} seeds are"
    for seed in others:
      done = len(seed["phases"])
      missing += f", and {done} of {known['phases']} phases of seed {seed['seed']}"
  return Case(
    path.name,
    known,
    finished + others,
    epochs,
    results.get("inference"),
    missing,
    *(results.get(name) for name in ("costs", "sensitivity", "seconds")),
    onnx=run_latency(path),
  )


def under_way(evaluations: Sequence[dict], phases: int) -> list[dict[str, Any]]:
  """Seeds that are not in results.json yet, as entries of it, from lines of the metrics.

  In the own run of a comparison's part dense training has no line, and a baseline's phases
  no soup.

  Args:
    evaluations: lines of them.
    phases: how many the run has.
  """
  seeds: dict[int, dict[str, Any]] = {}
  for line in evaluations:
    seed, method, number, record = (
      line[k] for k in ("seed", "method", "phase", "evaluation")
    )
    entry = seeds.setdefault(seed, {"seed": seed, "dense": {}, "phases": {}})
    if method == DENSE:
      entry["dense"] = record
    elif method == SOUP:
      entry["phases"][number] = dict(record)
    elif number == phases or method not in having("cycles") + having("last_alone"):
      model = record["soup"]
      blank = {"phase": number, "sparsity": model["sparsity"]}
      entry["phases"].setdefault(number, blank)[method] = model
  return [{**seed, "phases": list(seed["phases"].values())} for seed in seeds.values()]


def read_metrics(path: storage.epath.Path) -> tuple[list[dict], list[dict]]:
  """Lines of epochs and of evaluations; one that is being written is left out."""
  epochs, evaluations = [], []
  if not path.exists():
    return epochs, evaluations
  for line in read_lines(path.read_bytes()):
    (evaluations if "evaluation" in line else epochs).append(line)
  return epochs, evaluations


def comparison_cases(
  path: storage.epath.Path, results: dict[str, Any], known: dict, with_name: bool
) -> list[Case]:
  """The cells of a comparison, the curves of their soups from their own runs."""
  cases = []
  most = max((len(cell["seeds"]) for cell in results["cells"]), default=0)
  for cell in results["cells"]:
    goal, m = cell["goal_sparsity"], cell["ingredients"]
    epochs = []
    for seed in (entry["seed"] for entry in cell["seeds"]):
      for part in (
        comparison.Part(comparison.DENSE, seed), comparison.Part(SOUP, seed, goal, m)
      ):  # fmt: skip
        folder = comparison.folder_of(path, part)
        epochs += read_metrics(folder / run_directory.METRICS_FILE)[0]
    first = comparison.Part(SOUP, cell["seeds"][0]["seed"], goal, m)
    of_first = run_directory.read_results(comparison.folder_of(path, first)) or {}
    n = len(cell["seeds"])
    missing = f"{n} of {most} seeds are" if n < most else ""
    title = f"{100 * goal:g} %, m = {m}"
    cases.append(
      Case(
        f"{path.name}, {title}" if with_name else title,
        {**known, "goal_sparsity": goal, "ingredients": m},
        cell["seeds"],
        epochs,
        of_first.get("inference"),
        missing,
        *(of_first.get(name) for name in ("costs", "sensitivity", "seconds")),
      )
    )
  return cases


def comparison_warnings(results: dict[str, Any]) -> list[str]:
  """What is missing from a comparison, a sentence each."""
  found = []
  if not results.get("finished", True):
    found.append("Not finished: some parts of the comparison are missing.")
  for name, reason in (results.get("failed") or {}).items():
    found.append(f"{name} failed: {str(reason).rstrip('.')}.")
  return found


def grid_of(results: dict[str, Any]) -> dict[str, Any]:
  """Flags of the smallest grid that holds all cells of a comparison."""
  cells = results["cells"]
  seeds = [entry["seed"] for cell in cells for entry in cell["seeds"]] or [0]
  return {
    "sparsities": sorted({cell["goal_sparsity"] for cell in cells}),
    "copies": sorted({cell["ingredients"] for cell in cells}),
    "baselines": [name for name in results.get("methods", ()) if name != SOUP],
    "seed": min(seeds),
    "seeds": max(seeds) - min(seeds) + 1,
  }


def fills_grid(results: dict[str, Any]) -> bool:
  """Whether that grid has every method with every seed, and nothing is left to do."""
  grid = grid_of(results)
  entries = [entry for cell in results["cells"] for entry in cell["seeds"]]
  size = len(grid["sparsities"]) * len(grid["copies"]) * grid["seeds"]
  return len(entries) == size and all(
    any(name in phase for phase in entry["phases"])
    for entry in entries
    for name in grid["baselines"]
  )


def comparison_command(known: dict[str, Any], results: dict[str, Any]) -> str:
  """Repeats a comparison."""
  shared = {k: v for k, v in known.items() if k not in comparison.GROWS}
  return command_of("compare", shared | grid_of(results))


def command_of(binary: str, known: dict[str, Any]) -> str:
  """A command with every flag that is not at its default, in a new --workdir."""
  package = __package__.rpartition(".")[0]  # its name is another where it is installed
  words = ["python", "-m", f"{package}.{binary}"]
  for name, value in known.items():
    if value is None or name == "workdir":
      continue
    default = flags.FLAGS[name].default if name in flags.FLAGS else None
    if flag_text(value) != flag_text(default):
      words.append(f"--{name}={flag_text(value)}")
  return " ".join(map(shlex.quote, words)) + " --workdir=DIR"
