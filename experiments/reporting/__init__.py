"""Tables, figures and reports of results.

`HEADER`: the columns of a run's table.
`Results`: what a results.json, or a part of it, is read as.
"""

from ..reporting.cases import Case, Origin
from ..reporting.cost_sections import duration, flag_text
from ..reporting.figures import accuracy_figure
from ..reporting.page import files
from ..reporting.sections import document
from ..reporting.statistics import (
  Estimate,
  Results,
  dataset_title,
  estimate,
  method_title,
  summarize,
)
from ..reporting.tables import (
  HEADER,
  caption,
  console_table,
  markdown_table,
  notes,
  rows,
)

__all__ = [
  "HEADER",
  "Case",
  "Estimate",
  "Origin",
  "Results",
  "accuracy_figure",
  "caption",
  "console_table",
  "dataset_title",
  "document",
  "duration",
  "estimate",
  "files",
  "flag_text",
  "markdown_table",
  "method_title",
  "notes",
  "rows",
  "summarize",
]
