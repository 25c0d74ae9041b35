"""Sections on the copies: how they train, how sure they are, and where they lie."""

from collections.abc import Iterator, Sequence

import numpy as np

from . import search_figures, training_figures
from .cases import Case
from .document import Block, Picture, table_of_cases
from .statistics import Results

CASES_DRAWN = 6  # at most so many where each has figures of its own
UNCERTAINTY = {
  "disagreement": "Disagreement, %",
  "predictive_entropy": "Entropy, nats",
  "mutual_information": "Mutual information, nats",
  "error_auroc_of_entropy": "Errors by entropy",
  "error_auroc_of_information": "Errors by information",
}
CORRUPTED = {
  "auroc_of_entropy": "Corrupted by entropy",
  "auroc_of_information": "Corrupted by information",
}


def suffix(cases: Sequence[Case], case: Case) -> str:
  """Of the names of a case's own figures."""
  return "" if len(cases) == 1 else f"-{list(cases).index(case) + 1}"


def cut(cases: Sequence[Case], what: str) -> Iterator[str]:
  """Says so where not every case is drawn."""
  if len(cases) > CASES_DRAWN:
    yield f"{what} of the first {CASES_DRAWN} of {len(cases)} are drawn."


def curves_section(cases: Sequence[Case]) -> Iterator[Block]:
  """What training does."""
  shown = [case for case in cases if case.epochs]
  if not shown:
    return
  yield (
    "A line for each copy of the first seed, grey for those of other seeds; dense training "
    "first, then the phases one after another. On augmented training images."
  )
  names = ("loss", "accuracy", "learning_rate") if len(cases) == 1 else ("loss",)
  for case in shown[:CASES_DRAWN]:
    for name in names:
      what = training_figures.CURVES[name]
      title = f" of {case.title}" if len(cases) > 1 else ""
      yield Picture(
        f"curves-{name.replace('_', '-')}{suffix(cases, case)}",
        training_figures.curves(case, name),
        f"{what}{title} by epoch.",
        f"{what} of all copies by epoch, phase after phase.",
      )
  yield from cut(shown, "Curves")


def search_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Which copies were kept at the rungs of each phase, of the first seed that has any."""
  found = [(case, searched) for case in cases if (searched := first_search(case))]
  if found:
    yield (
      "At each rung the copies are evaluated on validation data. The better half goes on; "
      "the others start again from the average of that half. A line goes from the copy "
      "whose values, changed by a factor, a copy has. Copies whose values go back to one "
      "that was kept at the first rung share its colour. The better half of a phase's last "
      "rung is merged."
    )
  for case, (seed, rungs) in found[:CASES_DRAWN]:
    where = f"seed {seed}"
    title = f"{case.title}, {where}" if len(cases) > 1 else where.capitalize()
    end = suffix(cases, case)
    accuracy = _accuracies(rungs[-1])
    yield Picture(
      f"search-lineage{end}",
      search_figures.lineage(rungs, title),
      f"Who came from whom, phase after phase; {where}. {accuracy}",
      "Copies by rung, with lines from those that their values come from.",
    )
    for variable in sorted(rungs[0]["values"]):
      name = search_figures.VARIABLES.get(variable, variable)
      yield Picture(
        f"search-{variable.replace('_', '-')}{end}",
        search_figures.lineage(rungs, title, variable),
        f"{name} that each copy trained with up to a rung; {where}.",
        f"{name} of the copies by rung.",
      )
  yield from cut([case for case, _ in found], "Searches")


def _accuracies(rung):
  """How the copies of a rung differ, in a sentence."""
  found = [x for x in rung["validation_accuracy"] if x is not None]
  if not found:
    return ""
  low, high = 100 * min(found), 100 * max(found)
  return f"In the end validation accuracies go from {low:.2f} to {high:.2f} %."


def first_search(case: Case) -> tuple[int, list[Results]] | None:
  """Seed and rungs, phase after phase, of the first seed that has any."""
  for seed in case.seeds:
    rungs = [rung for phase in seed["phases"] for rung in phase.get("search") or ()]
    if rungs:
      return seed["seed"], rungs
  return None


def layers_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Which layers lose most."""
  shown = [
    case
    for case in cases
    if any(
      "layer_sparsities" in soup for soups in case.soups("soup").values() for soup in soups
    )
  ]
  if shown:
    one = len(cases) == 1
    yield Picture(
      "layers",
      training_figures.layers(shown[0]) if one else training_figures.layers_of(shown),
      "Share of removed weights in each layer of the soup, mean over seeds.",
      "A dot for each layer and phase: which share of its weights is removed.",
    )


def geometry_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Where the copies lie."""
  shown = [case for case in cases if case.soups("geometry") and case.m > 1]
  if shown:
    for name, (title, label) in training_figures.GEOMETRY.items():
      yield Picture(
        f"geometry-{name.replace('_', '-')}",
        training_figures.geometry(shown, name),
        f"{title} that are averaged, by phase, mean over seeds.",
        f"{title} by phase. {label}.",
      )


def uncertainty_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Disagreement of the candidates on test data, and how well it detects errors."""
  groups = []
  phases = [case.soups("uncertainty") for case in cases]
  known = [one for found in phases for records in found.values() for one in records]
  of_corrupted = CORRUPTED if any("corrupted" in one for one in known) else {}
  for case, found in zip(cases, phases, strict=True):
    rows = []
    for number, records in sorted(found.items()):
      row = [case.title, str(number)]
      row += [_mean([r["test"].get(name) for r in records], name) for name in UNCERTAINTY]
      kinds = [kind for r in records for kind in r.get("corrupted", {}).values()]
      row += [_mean([kind.get(name) for kind in kinds], name) for name in of_corrupted]
      rows.append(row)
    if rows:
      groups.append(rows)
  if groups:
    header = ["Run", "Phase", *UNCERTAINTY.values(), *of_corrupted.values()]
    yield (
      "On test data, means over seeds. Disagreement: examples for which two candidates "
      "predict different classes. The last columns are areas under the ROC curve (0.5 "
      "tells nothing, 1 all): of telling what the ensemble gets wrong, and corrupted from "
      "clean images, by the entropy of the mean prediction and by its mutual information "
      "with the candidate."
    )
    yield table_of_cases(header, groups, (0,), len(cases) > 1)


def _mean(values, name):
  """The mean of those that are known, as text."""
  known = [value for value in values if value is not None and np.isfinite(value)]
  if not known:
    return "-"
  mean = float(np.mean(known))
  return f"{100 * mean:.2f}" if name == "disagreement" else f"{mean:.3f}"


def landscape_section(cases: Sequence[Case]) -> Iterator[Block]:
  """The loss between the candidates."""
  found = [(case, measured) for case in cases if (measured := last_landscape(case))]
  for case, (seed, phase, record) in found[:CASES_DRAWN]:
    where = f"seed {seed}, phase {phase}"
    title = f"{case.title}, {where}" if len(cases) > 1 else where.capitalize()
    end = suffix(cases, case)
    on = f"On {record['images']} {record['split']} images; {where}."
    for name in ("loss", "accuracy") if len(cases) == 1 else ("loss",):
      text = _barriers(record) if name == "loss" else ""
      yield Picture(
        f"lines-{name}{end}",
        training_figures.lines_between(record, title, name),
        f"{name.capitalize()} on the straight lines between pairs of candidates. "
        f"{text} {on}",
        f"{name.capitalize()} between pairs of candidates. {text}",
      )
    if record.get("plane") and np.isfinite(np.array(record["plane"]["loss"], float)).any():
      distance = (record["plane"].get("distance_from_plane") or {}).get("soup")
      beside = (
        f" The soup is {distance:.3g} away from this plane and drawn where it is nearest."
        if distance is not None and distance > 1e-3
        else ""
      )
      through = ", ".join(map(str, record["plane"]["through"]))
      yield Picture(
        f"plane{end}",
        training_figures.plane(record, title),
        f"Loss on the plane through candidates {through}.{beside} {on}",
        f"Contours of the loss on the plane through candidates {through}, with the soup.",
      )
  yield from cut([case for case, _ in found], "Planes and lines")


def _barriers(record):
  """How far the loss rises between copies, in a sentence."""
  barriers = np.array([line["barrier"] for line in record["lines"]], float)
  if not np.isfinite(barriers).all():
    return "The loss is not finite on one of them."
  if barriers.max() > 0:
    return (
      f"Above the straight line between its ends it rises by at most {barriers.max():.3g}."
    )
  return "None rises above the straight line between its ends."


def last_landscape(case: Case) -> tuple[int, int, Results] | None:
  """Seed, phase and record of the first seed's last phase that has one."""
  for seed in case.seeds:
    for phase in reversed(seed["phases"]):
      if phase.get("landscape"):
        return seed["seed"], phase["phase"], phase["landscape"]
  return None
