"""Tables, figures and reports of results.

`HEADER`: the columns of a run's table.
`Results`: what a results.json, or a part of it, is read as.
"""

from .cases import Case, Origin
from .cost_sections import duration, flag_text
from .figures import accuracy_figure
from .page import files
from .sections import document
from .statistics import (
  Estimate,
  Results,
  dataset_title,
  estimate,
  method_title,
  summarize,
)
from .tables import (
  HEADER,
  caption,
  caption_of,
  console_table,
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
  "caption_of",
  "console_table",
  "dataset_title",
  "document",
  "duration",
  "estimate",
  "files",
  "flag_text",
  "method_title",
  "notes",
  "rows",
  "summarize",
]
