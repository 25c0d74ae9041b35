"""A comparison: its parts, a method with a seed each, and what they add up to."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsms.disk import storage

from ..config.run_config import Config
from ..methods import DENSE, SOUP, having
from ..methods.registry import looks
from ..reporting import tables
from ..reporting.statistics import network_on_data, summarize
from ..run import run_directory
from ..run.environment import environments_of

PARTS = "parts"
# What a comparison can have more of later.
GROWS = ("baselines", "goal_sparsity", "ingredients", "seed", "seeds")


class Part(NamedTuple):
  """A method with one seed.

  Attributes:
    method: `dense`, `sms`, or a name of --baselines.
    seed: decides everything random.
    goal_sparsity: after the last phase; None where nothing is pruned.
    ingredients: m; None for a single copy.
  """

  method: str
  seed: int
  goal_sparsity: float | None = None
  ingredients: int | None = None

  @property
  def name(self) -> str:
    """Of its folder."""
    goal = [] if self.goal_sparsity is None else [repr(self.goal_sparsity)]
    copies = [] if self.ingredients is None else [f"m{self.ingredients}"]
    return "-".join([self.method, *goal, *copies, f"seed{self.seed}"])

  def config(self, shared: Config) -> Config:
    """That of its run, from what all parts share."""
    return dataclasses.replace(
      shared,
      baselines=() if self.method in (DENSE, SOUP) else (self.method,),
      goal_sparsity=self.goal_sparsity or 0.0,
      ingredients=self.ingredients or 1,
      seed=self.seed,
      seeds=1,
    )

  @property
  def methods(self) -> tuple[str, ...]:
    """What its run does after dense training."""
    return () if self.method == DENSE else (self.method,)


def parts_of(
  methods: Sequence[str],
  goal_sparsities: Sequence[float],
  copies: Sequence[int],
  seeds: Iterable[int],
) -> list[Part]:
  """Everything to do, each part once, a whole seed before the next.

  Args:
    methods: names beside the soup.
    goal_sparsities: after the last phase.
    copies: numbers of them.
    seeds: all.
  """
  # What these do depends on no sparsity, or on no number of copies: done once for all.
  not_pruned, one_copy = having("dense"), having("one_copy")
  parts = []
  for seed in seeds:
    parts.append(Part(DENSE, seed))
    parts += [
      Part(
        method,
        seed,
        None if method in not_pruned else goal,
        None if method in one_copy else m,
      )
      for goal in goal_sparsities
      for m in copies
      for method in (SOUP, *methods)
    ]
  return list(dict.fromkeys(parts))


def folder_of(workdir: storage.epath.Path, part: Part) -> storage.epath.Path:
  """The run directory of a part."""
  return workdir / PARTS / part.name


def read_run(workdir: storage.epath.Path) -> dict[str, Any] | None:
  """What a folder says about its comparison; where that is lost, what a part says.

  Raises:
    ValueError: see `run_directory.read_run`.
  """
  try:
    return run_directory.read_run(workdir)
  except ValueError:
    for folder in (workdir / PARTS).iterdir() if (workdir / PARTS).exists() else []:
      with contextlib.suppress(ValueError):
        if run := run_directory.read_run(folder):
          return run | {"defining": common_of(run["defining"])}
    raise


def common_of(defining: dict[str, Any]) -> dict[str, Any]:
  """What all parts of a comparison have in common, of what defines one of them."""
  common = {name: value for name, value in defining.items() if name not in GROWS}
  return {**common, "kind": "comparison"}


def is_finished(workdir: storage.epath.Path, part: Part) -> bool:
  """Whether its results are there; all processes learn so."""
  return run_directory.agreed(_finished(folder_of(workdir, part)) is not None)


def finished_parts(workdir: str | os.PathLike) -> dict[Part, dict[str, Any]]:
  """The results of all parts that a comparison's folder holds, by part."""
  folder = storage.as_path(workdir) / PARTS
  found = {}
  for path in sorted(folder.iterdir()) if folder.exists() else []:
    results = _finished(path)
    if results is not None and "part" in results:
      part = Part(**results["part"])
      if part.name == path.name:  # and not one that was set aside
        found[part] = results
  return found


def environments(parts: Mapping[Part, dict[str, Any]]) -> list[dict[str, Any]]:
  """All versions and devices that parts ran on, each with the first place it had.

  Args:
    parts: their results.
  """
  found: list[dict[str, Any]] = []
  for part, results in parts.items():
    for one in environments_of(results):
      if one["environment"] not in (known["environment"] for known in found):
        where = "" if one["from"] == "the start" else f", {one['from']}"
        found.append({"from": part.name + where, "environment": one["environment"]})
  return found


def _finished(folder):
  """The results of a finished run; None where it is not, or they are damaged."""
  try:
    stat = (folder / run_directory.RESULTS_FILE).stat()
  except OSError:
    return None
  return _read_finished(folder, stat.mtime, stat.length)


@functools.lru_cache(None)
def _read_finished(folder, mtime, length):
  results = run_directory.read_results(folder)
  return results if results and results.get("finished") else None


def cells_of(parts: dict[Part, dict[str, Any]]) -> list[dict[str, Any]]:
  """What finished parts add up to.

  Args:
    parts: results by part.

  Returns:
    For each goal sparsity and number of copies with a soup: `goal_sparsity`,
    `ingredients`, `seeds` (as in the results of a run, each phase of the soup with the
    metrics of every method) and `summary`, see `summarize`.
  """
  cells: dict[tuple[float, int], dict[int, dict]] = {}
  for part, results in parts.items():
    if part.method == SOUP:
      (entry,) = results["seeds"]
      entry = {**entry, "phases": [dict(phase) for phase in entry["phases"]]}
      cells.setdefault((part.goal_sparsity, part.ingredients), {})[part.seed] = entry
  for part, results in parts.items():
    if part.method in (DENSE, SOUP):
      continue
    for (goal, m), seeds in cells.items():
      if (
        part.seed in seeds
        and part.goal_sparsity in (None, goal)
        and part.ingredients in (None, m)
      ):
        _add(seeds[part.seed], part.method, results["seeds"][0])
  found = []
  for goal, m in sorted(cells):
    seeds = [cells[goal, m][seed] for seed in sorted(cells[goal, m])]
    cell = {"goal_sparsity": goal, "ingredients": m, "seeds": seeds}
    found.append(cell | {"summary": summarize(seeds)})
  return found


def _add(entry, method, other):
  by_phase = {phase["phase"]: phase for phase in other["phases"]}
  for phase in entry["phases"]:
    if phase["phase"] in by_phase:
      phase[method] = by_phase[phase["phase"]][method]


HEADER = ("Sparsity", "m", "Model", "Test accuracy", "Soup minus it")
OOD_HEADER = ("OOD accuracy", "Soup minus it")


def table(cells: list[dict[str, Any]]) -> list[list[list[str]]]:
  """The last phases of all cells as text, a table for each.

  Returns:
    For each cell its rows, with the cells that `HEADER` names, and `OOD_HEADER` where
    accuracy out of distribution was measured.
  """
  found = []
  for cell in cells:
    row, m = cell["summary"][-1], cell["ingredients"]
    cells_of_row = tables.accuracy_and_gain(row)
    if has_ood(cells):
      ood = summarize(cell["seeds"], "ood_accuracy")[-1]
      cells_of_row += tables.accuracy_and_gain(ood)
    first = tables.percent(row), str(m)
    found.append(tables.method_rows(first, row, m, looks(), cells_of_row))
  return found


def has_ood(cells: list[dict[str, Any]]) -> bool:
  """Whether accuracy out of distribution was measured in all of them."""
  return all(
    math.isfinite(phase["soup"].get("ood_accuracy", math.nan))
    for cell in cells
    for seed in cell["seeds"]
    for phase in seed["phases"]
  )


def caption(results: dict[str, Any]) -> str:
  """What the table says, in a sentence or two."""
  flags = results["flags"]
  return tables.caption_of(
    f"{network_on_data(flags)} after {flags['phases']} phases",
    [model["test_accuracy"] for model in results["dense"].values()],
    max(len(cell["seeds"]) for cell in results["cells"]),
    "one seed",
  )
