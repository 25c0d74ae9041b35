"""The sections of a report; those without data are left out."""

from collections.abc import Callable, Iterator, Sequence

from jaxsms.data.long_tail import HEAD, MIDDLE, TAIL

from ..methods.registry import looks
from . import figures
from .cases import Case, Origin
from .channel_sections import channels_section, sensitivity_section
from .cost_sections import (
  cost_section,
  inference_section,
  onnx_section,
  origin_section,
)
from .document import Block, Document, Folded, Picture, Section, Table
from .statistics import Results, method_title, summarize
from .summary import sentences
from .tables import accuracy, accuracy_and_gain, gain, method_rows, notes, percent
from .training_sections import (
  CASES_DRAWN,
  curves_section,
  cut,
  geometry_section,
  landscape_section,
  layers_section,
  search_section,
  suffix,
  uncertainty_section,
)

BAND = (
  "Bands: 95 % interval of the mean over seeds; where they leave the figure, they are cut."
)
OOD = "Corrupted data: the mean over corruptions of the test images and their severities."
ECE = "test_expected_calibration_error"
CLASSES = (
  "Test accuracy in percent on the third of the classes with most training examples "
  "(head), that with fewest (tail) and those between; the soup's gain on the tail is "
  "paired by seed, with its 95 % interval."
)
# What cases of one grid may differ in; anything else makes them other experiments.
VARIED = ("goal_sparsity", "ingredients", "seed", "seeds", "baselines", "workdir")


def document(
  title: str, subtitle: str, cases: Sequence[Case], origins: Sequence[Origin]
) -> Document:
  """The whole report of one run, of several beside each other, or of a comparison.

  Args:
    title: of the report.
    subtitle: one line below it.
    cases: what it shows, at least one.
    origins: where each of them comes from.

  Returns:
    The document, to be written by `files`.
  """
  several = len(cases) > 1
  summary, warnings, shared = [], [], []
  for origin in origins:
    prefix = f"{origin.title}. " if len(origins) > 1 else ""
    warnings += [prefix + sentence for sentence in origin.warnings]
  for case in cases:
    *result, how = sentences(case)
    text = " ".join(result if several and result else [*result, how])
    summary.append(f"{case.title}: {text}" if several else text)
    shared += [how] if several and result and how not in shared else []
    prefix = f"{case.title}. " if several else ""
    warnings += [f"{prefix}Not finished: {case.unfinished}."] if case.unfinished else []
    warnings += [prefix + note for note in notes(case.seeds)]
  summary += shared
  sections = [Section(name, list(blocks(cases))) for name, blocks in SECTIONS.items()]
  sections.append(Section("How this was made", list(origin_section(origins))))
  shown = [section for section in sections if section.blocks]
  return Document(title, subtitle, summary, warnings, shown)


def phases_of(case: Case) -> list[Results]:
  """The phases' summaries that have a soup."""
  return [row for row in summarize(case.seeds) if "soup" in row]


def results_section(cases: Sequence[Case]) -> Iterator[Block]:
  """The table."""
  shown = [case for case in cases if phases_of(case)]
  if not shown:
    return
  yield (
    "Mean ± standard deviation over seeds, in percent. Soup minus it: the mean difference "
    "between soup and model, paired by seed, in points, with its 95 % interval "
    "(Student t); clear of 0 where both ends have the same sign."
  )
  if len(cases) == 1:
    yield table(shown[0], phases_of(shown[0]))
    return
  groups = [table(case, phases_of(case)[-1:], cases) for case in shown]
  header = groups[0].header
  rows = [rows for found in groups for rows in found.rows]
  yield Table(header, rows, (0, 2), "Sparse soup")
  for case in shown:
    yield Folded(case.title, table(case, phases_of(case)))


def table(case: Case, rows: list[Results], cases: Sequence[Case] = ()) -> Table:
  """Accuracies, gains and calibration of all methods.

  Args:
    case: whose.
    rows: of its summary, the phases to show.
    cases: all that share the table, where there are several: a row then begins with the
      name of its case, and not with the phase.
  """
  ood = {r["phase"]: r for r in summarize(case.seeds, "ood_accuracy")}
  ece = {r["phase"]: r for r in summarize(case.seeds, ECE)}
  header = ["Run" if cases else "Phase", "Sparsity", "Model"]
  header += ["Test accuracy", "Soup minus it"]
  has_ood = any(figures.has_metric(c, "ood_accuracy") for c in cases or [case])
  has_ece = any(figures.has_metric(c, ECE) for c in cases or [case])
  header += ["OOD accuracy", "Soup minus it"] if has_ood else []
  header += ["ECE"] if has_ece else []
  groups = []
  for row in rows:
    cells = accuracy_and_gain(row)
    if has_ood:
      cells += accuracy_and_gain(ood[row["phase"]])
    if has_ece:
      cells.append(lambda name, of=ece[row["phase"]]: accuracy(of.get(name)))
    first = case.title if cases else str(row["phase"]), percent(row)
    groups.append(method_rows(first, row, case.m, (*looks(), "dense"), cells))
  return Table(header, groups, (0, 2) if cases else (2,), "Sparse soup")


def metric_pictures(cases: Sequence[Case], metric: str, name: str) -> Iterator[Picture]:
  """A metric of all methods, and of several cases beside each other."""
  shown = [case for case in cases if phases_of(case) and figures.has_metric(case, metric)]
  what = figures.PERCENT[metric].removesuffix(" in percent")
  if len(shown) > 1:
    grids = list(_grids(shown, metric, name, what))
    yield from grids
    if grids and metric != "test_accuracy":
      return
    if not grids:
      yield Picture(
        f"{name}-soups",
        figures.soups_of(shown, metric),
        f"{what}: soups as lines, IMP as dashes.",
        f"Lines of {what.lower()} over sparsity for the soups of {len(shown)} runs.",
      )
  for case in shown[:CASES_DRAWN]:
    last = summarize(case.seeds, metric)[-1]
    text = ", ".join(
      f"{method_title(key, case.m)} {100 * last[key]['mean']:.2f}"
      for key in (*looks(), "dense")
      if key in last
    )
    title = f" of {case.title}" if len(cases) > 1 else ""
    yield Picture(
      name + suffix(cases, case),
      figures.over_sparsity(case, metric),
      f"{what}{title} over sparsity.",
      f"{what} over sparsity, a line for each method. At {100 * last['sparsity']:.2f} %: "
      f"{text}.",
    )


def _is_grid(cases):
  keys = {(case.flags["goal_sparsity"], case.m) for case in cases}
  same = [{k: v for k, v in case.flags.items() if k not in VARIED} for case in cases]
  return len(keys) == len(cases) and all(flags == same[0] for flags in same)


def _at_goal(case):
  """Whether some seed's last phase is done: those before it are short of the goal."""
  return any(
    "soup" in phase and phase["phase"] >= case.flags["phases"]
    for seed in case.seeds
    for phase in seed["phases"]
  )


def _percent_at_goal(case):
  return 100 * case.flags["goal_sparsity"]


def _copies(case):
  return case.m


def _grids(cases, metric, name, what):
  """Over goal sparsities for each number of copies, and over these for each sparsity."""
  if not _is_grid(cases):
    return
  cases = [case for case in cases if _at_goal(case)]

  def over(varied, label, along, same, end, title, where):
    return Picture(
      f"{name}-{end}".replace(".", "_"),
      figures.over_cases(same, metric, varied, label, f"{title}, after the last phase"),
      f"{what} {where} over {along}.",
      f"{what} over {along}, a line for each method, {where}.",
    )

  sparsity = _percent_at_goal, "Goal sparsity in percent", "the goal sparsity"
  for m, same in _alike(cases, _copies):
    yield over(*sparsity, same, f"m{m}", f"m = {m}", f"with {m} copies")
  copies = _copies, "Number of copies m", "the number of copies"
  for percent_at_goal, same in _alike(cases, _percent_at_goal):
    goal = f"{percent_at_goal:g}"
    yield over(*copies, same, f"goal{goal}", f"{goal} % sparsity", f"at {goal} % sparsity")


def _alike(cases, key):
  """Values that several cases have, with these cases."""
  for value in sorted(set(map(key, cases))):
    same = [case for case in cases if key(case) == value]
    if len(same) > 1:
      yield value, same


def accuracy_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Accuracy on test data and out of distribution, and calibration."""
  ood = list(metric_pictures(cases, "ood_accuracy", "ood"))
  ece = list(metric_pictures(cases, ECE, "calibration"))
  phases = [row for case in cases for row in phases_of(case)]
  has_bands = any(row["soup"].get("half_width") for row in phases)
  explained = [*([BAND] if has_bands else ()), *([OOD] if ood else ())]
  explained += (
    ["Calibration error: of test data, in 15 bins; less is better."] if ece else []
  )
  if explained:
    yield " ".join(explained)
  yield from metric_pictures(cases, "test_accuracy", "accuracy")
  yield from cut([case for case in cases if phases_of(case)], "Accuracies by phase")
  yield from ood
  yield from ece


def classes_section(cases: Sequence[Case]) -> Iterator[Block]:
  """A table for each case that has such classes."""
  tables = [(case, classes_table(case)) for case in cases]
  found = [(case, table) for case, table in tables if table.rows]
  if found:
    yield CLASSES
  for case, table in found:
    yield table if len(cases) == 1 else Folded(case.title, table)


def classes_table(case: Case) -> Table:
  """Accuracies of all methods by group of classes, phase by phase.

  Args:
    case: whose.

  Returns:
    The table, without rows where nothing was measured by group.
  """
  groups = {
    name: {row["phase"]: row for row in summarize(case.seeds, f"test_{name}_accuracy")}
    for name in (HEAD, MIDDLE, TAIL)
  }
  known = [name for name, rows in groups.items() if any("soup" in r for r in rows.values())]
  header = ["Phase", "Sparsity", "Model", *map(str.capitalize, known), "Soup minus it"]
  parts = []
  for phase, row in groups[TAIL].items():
    cells = [
      lambda name, of=groups[group][phase]: accuracy(of.get(name)) for group in known
    ]
    cells.append(lambda name, row=row: gain(row[name]))
    first = str(phase), percent(row)
    if lines := method_rows(first, row, case.m, (*looks(), "dense"), cells):
      parts.append(lines)
  return Table(header, parts, (2,), "Sparse soup")


# The sections in their order; one without blocks is left out.
SECTIONS: dict[str, Callable[[Sequence[Case]], Iterator[Block]]] = {
  "Results": results_section,
  "Accuracy and calibration": accuracy_section,
  "Head and tail classes": classes_section,
  "Learning curves": curves_section,
  "Search": search_section,
  "Sparsity of each layer": layers_section,
  "Geometry of the soup": geometry_section,
  "Uncertainty of the candidates": uncertainty_section,
  "Loss between the candidates": landscape_section,
  "Size and speed, phase by phase": channels_section,
  "What each group of channels costs": sensitivity_section,
  "Size and time of an inference": inference_section,
  "Time of an inference in ONNX Runtime": onnx_section,
  "Cost of an inference": cost_section,
}
