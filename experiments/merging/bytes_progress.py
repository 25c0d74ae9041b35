"""How much of the models was read, and how long the rest takes."""

import time

from rich.filesize import decimal
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TimeRemainingColumn,
)

from ..run.progress import clock
from ..run.terminal import print_line, terminal, text_column

EVERY = 10  # seconds between two lines where there is no terminal


class BytesProgress:
  """A bar of bytes with the time left; now and then a line where there is no terminal.

  Args:
    total: bytes to read.
  """

  def __init__(self, total: int):
    self._console = terminal(stderr=True)
    self._plain = not self._console.is_terminal or self._console.is_dumb_terminal
    self._total, self._done = total, 0
    self._started = self._last_line = time.monotonic()
    self._bar = Progress(
      text_column("{task.description}"),
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
    self._done += count
    self._bar.advance(self._task, count)
    now = time.monotonic()
    if self._plain and now - self._last_line > EVERY:
      self._last_line = now
      left = (now - self._started) * max(self._total - self._done, 0) / self._done
      print_line(
        self._console,
        f"read {decimal(self._done)} of {decimal(self._total)}, {clock(left)} left",
      )
