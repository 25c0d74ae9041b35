"""Sections on networks whose whole channels go."""

from collections.abc import Iterator, Sequence

from . import figures
from .cases import Case
from .cost_sections import duration, ratio, spread_text
from .document import Block, Picture, Table, table_of_cases, titled
from .figures import products_kept
from .statistics import Results
from .training_sections import CASES_DRAWN, suffix

DENSE = "Dense"


def channels_section(cases: Sequence[Case]) -> Iterator[Block]:
  """What each phase's network takes, cut, beside the dense one."""
  shown = [case for case in cases if case.inference_by_phase]
  groups = []
  for case in shown:
    found = case.inference_by_phase
    lines = [_dense_line(case, found)]
    lines += [_phase_line(case, found, phase) for phase in found["phases"]]
    groups.append(titled(case.title, lines))
  if not groups:
    return
  header = ["Run", "Network", "Parameters", "Multiply-adds", "kB", "s per epoch"]
  header += ["times as fast", "ms a batch", "times as fast"]
  yield table_of_cases(header, groups, (0, 1), len(cases) > 1)
  yield _reading(shown[0].inference_by_phase)
  for case in shown[:CASES_DRAWN]:
    if kept := products_kept(case):
      yield Picture(
        "multiply-adds" + suffix(cases, case),
        figures.over_multiply_adds(case, "test_accuracy"),
        "Test accuracy over the multiply-adds of one image's inference, cut.",
        "Test accuracy over multiply-adds, a line for each method, down to "
        f"{100 * min(kept.values()):.3g} % of the dense network's.",
      )
  for case in shown:
    yield from _sentences(cases, case)


def _dense_line(case, found):
  dense = found["dense"]
  milliseconds = [phase["dense_milliseconds"] for phase in found["phases"]]
  middle = milliseconds[-1] if milliseconds else None
  return [
    DENSE, *_sizes(dense), _number(_per_copy(case, 0)), "", spread_text(middle), "",
  ]  # fmt: skip


def _phase_line(case, found, phase):
  seconds = _per_copy(case, phase["phase"])
  return [
    f"Phase {phase['phase']}",
    *_sizes(phase),
    _number(seconds),
    ratio(_per_copy(case, 0), seconds),
    spread_text(phase["milliseconds"]),
    ratio(phase["dense_milliseconds"]["median"], phase["milliseconds"]["median"]),
  ]


def _sizes(network: Results) -> list[str]:
  return [
    f"{network['parameters']:,}",
    f"{network['multiply_adds']:,}",
    f"{network['bytes'] / 1000:,.1f}",
  ]


def _number(value):
  return "" if value is None else f"{value:.3g}"


def _per_copy(case, phase):
  """Seconds that one copy takes for an epoch; in phase 0, of dense training."""
  for one in (case.costs or {}).get("phases", []):
    if (one["method"], one["phase"]) == ("sms" if phase else "dense", phase):
      seconds = one["seconds_per_epoch"]
      return None if seconds is None else seconds / one["copies"]
  return None


def _reading(found):
  return (
    f"Of the first seed, the soup's network of each phase cut, on {found['device']}. kB: "
    "parameters and batch statistics. Seconds of an epoch: of all seeds, without "
    "compiling, divided by the copies that train at once; dense training has one. "
    f"Milliseconds: of {found['batch']} images, median of rounds that alternate with the "
    "dense network, and the least and greatest; in the row of the dense network those "
    "beside the last phase."
  )


def _sentences(cases, case):
  """What the run took, and what its networks were in training."""
  name = f"{case.title}: " if len(cases) > 1 else ""
  if not case.flags.get("shrink"):
    yield (
      f"{name}The copies were retrained in the full shapes; --shrink retrains the smaller "
      "networks."
    )
  phases = [p for p in case.costs["phases"] if p["method"] in ("dense", "sms")]
  compiling = ", ".join(
    f"{'dense training' if not p['phase'] else 'phase ' + str(p['phase'])} "
    f"{duration(p['compiling_seconds'])}"
    for p in phases
  )
  total = f" of {duration(case.seconds)} in all" if case.seconds is not None else ""
  yield (
    f"{name}Compiling took {duration(case.costs['compiling_seconds'])}{total}"
    + (
      f": {compiling}, the rest in other methods and in what is measured last."
      if compiling
      else "."
    )
  )


def sensitivity_section(cases: Sequence[Case]) -> Iterator[Block]:
  """What each group of channels costs, and what its loss costs."""
  shown = [case for case in cases if case.sensitivity]
  for case in shown[:1] if len(cases) > 1 else shown:
    found = case.sensitivity
    total = _dense_products(case)
    rows = [
      [
        one["name"].rpartition("/")[0] or one["name"],
        f"{one['channels']:,}",
        f"{one['weights']:,}",
        "" if one["multiply_adds"] is None else f"{one['multiply_adds']:,}",
        share_text(one["multiply_adds"], total),
        f"{one['bytes'] / 1000:,.1f}",
        f"{one['removed']:,}",
        f"{100 * one['loss']:+.1f}".replace("-0.0", "+0.0"),
      ]
      for one in found["groups"]
    ]
    if not rows:
      continue
    header = ["Channels of", "How many", "Weights", "Multiply-adds", "of the network"]
    header += ["kB", "Removed", "Points lost"]
    yield (
      "Of the dense network, first seed"
      + (f", {case.title}" if len(cases) > 1 else "")
      + ": the weights, multiply-adds and bytes that have these channels, and the points "
      "of validation accuracy that are lost, without retraining, where the weakest "
      f"{100 * found['share']:g} % of one group go and all others stay. On "
      f"{found['images']} images. Weights between two groups count for both."
    )
    yield Table(header, [rows], (0,))
    yield f"Measuring that took {found['seconds']:.1f} s."


def share_text(part: float | None, whole: float | None) -> str:
  """A share in percent; empty where one of both is not known."""
  return f"{100 * part / whole:.1f} %" if part is not None and whole else ""


def _dense_products(case):
  for seed in case.seeds:
    if seed["dense"].get("multiply_adds"):
      return seed["dense"]["multiply_adds"]
  return None
