"""The section on the uncertainty that the candidates' disagreement measures."""

from collections.abc import Iterator, Sequence

import numpy as np

from .cases import Case
from .document import Block, table_of_cases

COLUMNS = {
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


def uncertainty_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Disagreement of the candidates on test data, and how well it detects errors."""
  groups = []
  phases = [case.soups("uncertainty") for case in cases]
  corrupted = any(
    "corrupted" in one for found in phases for records in found.values() for one in records
  )
  for case, found in zip(cases, phases, strict=True):
    rows = []
    for number, records in sorted(found.items()):
      row = [case.title, str(number)]
      row += [_mean([r["test"].get(name) for r in records], name) for name in COLUMNS]
      if corrupted:
        of_all = [r.get("corrupted", {}) for r in records]
        row += [
          _mean([kind.get(name) for r in of_all for kind in r.values()], name)
          for name in CORRUPTED
        ]
      rows.append(row)
    if rows:
      groups.append(rows)
  if groups:
    header = ["Run", "Phase", *COLUMNS.values(), *(CORRUPTED.values() if corrupted else ())]
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
