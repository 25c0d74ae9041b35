"""Accuracy on head, middle and tail classes, where training data are long-tailed."""

from collections.abc import Iterator, Sequence

from jaxsms.data.long_tail import HEAD, MIDDLE, TAIL

from ..methods.registry import looks
from .cases import Case
from .document import Block, Folded, Table
from .statistics import summarize
from .tables import accuracy, gain, method_rows, percent

EXPLANATION = (
  "Test accuracy in percent on the third of the classes with most training examples "
  "(head), that with fewest (tail) and those between; the soup's gain on the tail is "
  "paired by seed, with its 95 % interval."
)


def classes_section(cases: Sequence[Case]) -> Iterator[Block]:
  """A table for each case that has such classes."""
  tables = [(case, classes_table(case)) for case in cases]
  found = [(case, table) for case, table in tables if table.rows]
  if found:
    yield EXPLANATION
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
