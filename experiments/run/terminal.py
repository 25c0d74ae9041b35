"""The one way of printing with rich: what is printed is text, never markup.

Paths, flags and messages hold brackets and colons, such as `runs/[lr0.1]`, `'.[bench]'` and
`:x:`, which rich would take for styles and emoji.
"""

from typing import Any

from rich.console import Console
from rich.progress import TextColumn


def terminal(**options: Any) -> Console:
  """A console that prints text as it is.

  Args:
    **options: of `rich.console.Console`, such as `stderr=True`.
  """
  return Console(markup=False, emoji=False, highlight=False, **options)


def print_line(console: Console, text: str, style: str | None = None) -> None:
  """Prints a sentence on one line, however long: a path in it can be copied."""
  console.print(text, style=style, soft_wrap=True)


def text_column(template: str) -> TextColumn:
  """A column of a progress bar that shows text as it is."""
  return TextColumn(template, markup=False)
