"""How much of the models was read, and how long the rest takes."""

import contextlib
import time
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def bytes_progress(total: int) -> Iterator[Callable[[int], None]]:
  """A bar of bytes with the time left; now and then a line where there is no terminal.

  Args:
    total: bytes to read.

  Yields:
    What is called with each number of bytes that were read.
  """
  console = terminal(stderr=True)
  plain = not console.is_terminal or console.is_dumb_terminal
  bar = Progress(
    text_column("{task.description}"),
    BarColumn(bar_width=24),
    DownloadColumn(),
    TimeRemainingColumn(),
    console=console,
    disable=plain,
    transient=True,
  )
  task = bar.add_task("reading", total=total)
  done, started = 0, time.monotonic()
  last_line = started

  def add(count):
    nonlocal done, last_line
    done += count
    bar.advance(task, count)
    now = time.monotonic()
    if plain and now - last_line > EVERY:
      last_line = now
      left = (now - started) * max(total - done, 0) / done
      print_line(console, f"read {decimal(done)} of {decimal(total)}, {clock(left)} left")

  with bar:
    yield add
