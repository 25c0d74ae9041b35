"""How much of the models was read, and how long the rest takes."""

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)


class BytesProgress:
  """A bar of bytes with the time left; a line for every tenth where there is no terminal.

  Args:
    total: bytes to read.
    console: to show it on.
  """

  def __init__(self, total: int, console: Console | None = None):
    self._console = console or Console(stderr=True)
    self._plain = not self._console.is_terminal or self._console.is_dumb_terminal
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=24),
      DownloadColumn(),
      TimeRemainingColumn(),
      console=self._console,
      disable=self._plain,
      transient=True,
    )
    self._task = self._bar.add_task("reading", total=total)

  def __enter__(self):
    self._bar.start()
    return self

  def __exit__(self, *exception):
    self._bar.stop()

  def add(self, count: int) -> None:
    """So many bytes more were read."""
    self._bar.advance(self._task, count)
