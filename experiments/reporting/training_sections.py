"""Sections on how the copies train and where they lie."""

from collections.abc import Iterator, Sequence

import numpy as np

from . import training_figures
from .cases import Case
from .document import Block, Picture
from .statistics import Results

CASES_DRAWN = 6  # at most so many where each has figures of its own


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
