"""Tables, figures and reports of results.

`METHODS`: the titles of methods by their keys in results.json, in the order of tables.
`STYLES`: their colours and markers.
`HEADER`: the columns of a run's table.
`COPY_FAULTS`: what an entry of results.json says of copies that are left out.
`Results`: what a results.json, or a part of it, is read as.
"""

from jaxsms.report.cases import Case, Origin
from jaxsms.report.cost_sections import duration, flag_text
from jaxsms.report.drawing import STYLES
from jaxsms.report.figures import accuracy_figure
from jaxsms.report.page import files
from jaxsms.report.sections import document
from jaxsms.report.statistics import (
  METHODS,
  Estimate,
  Results,
  dataset_title,
  estimate,
  method_title,
  summarize,
)
from jaxsms.report.tables import (
  COPY_FAULTS,
  HEADER,
  caption,
  console_table,
  markdown_table,
  notes,
  rows,
)

__all__ = [
  "COPY_FAULTS",
  "HEADER",
  "METHODS",
  "STYLES",
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
