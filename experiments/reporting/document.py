"""A document as data, whatever it is written in."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
  """Cells of text.

  Attributes:
    header: names of the columns.
    rows: a group of rows each, set off from the next.
    left: columns with words, by index; all others hold numbers.
    strong: what a row to stand out has among its cells.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[Sequence[str]]]
  left: Sequence[int] = (0,)
  strong: str | None = None


class Picture(NamedTuple):
  """A figure.

  Attributes:
    name: of its files.
    figure: a matplotlib figure.
    caption: what it shows and how it was made.
    alt: what one would see.
  """

  name: str
  figure: Any
  caption: str
  alt: str


class Code(NamedTuple):
  """Something to type.

  Attributes:
    text: as it is.
  """

  text: str


class Folded(NamedTuple):
  """A table that is looked up, not read.

  Attributes:
    title: of it.
    table: itself.
  """

  title: str
  table: Table


Block = str | Table | Picture | Code | Folded


class Section(NamedTuple):
  """A heading and what is under it.

  Attributes:
    title: the heading.
    blocks: sentences (str), tables, pictures, code.
  """

  title: str
  blocks: list[Block]


def titled(title: str, rows: Sequence[Sequence[str]]) -> list[list[str]]:
  """Rows with a title in front of the first."""
  return [["" if i else title, *row] for i, row in enumerate(rows)]


def table_of_cases(
  header: Sequence[str],
  groups: Sequence[Sequence[Sequence[str]]],
  left: Sequence[int],
  several: bool,
) -> Table:
  """A table whose first column names the case, and goes where there is only one.

  Args:
    header: names of the columns.
    groups: rows of each case.
    left: columns with words.
    several: whether there are several cases.
  """
  if several:
    return Table(header, groups, left)
  rows = [[row[1:] for row in group] for group in groups]
  return Table(header[1:], rows, [i - 1 for i in left if i])


class Document(NamedTuple):
  """All of it.

  Attributes:
    title: the heading.
    subtitle: below it.
    summary: paragraphs.
    warnings: a sentence each.
    sections: in their order.
  """

  title: str
  subtitle: str
  summary: list[str]
  warnings: list[str]
  sections: list[Section]
