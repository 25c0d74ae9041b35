"""What a run shows while it trains."""

import math
import time

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxsms.training import Chunk


class TimeLeft:
  """Estimates the seconds left from the speed of the programs so far.

  A step of m copies has its own speed, measured once m copies have trained; until then it
  counts m / k times that of the k copies seen. The first chunk of a training may compile,
  and evaluations lie before it: it counts as speed only until there is something better.
  """

  def __init__(self, plan: dict[int, int]):
    """`plan`: for each number of copies trained at once, how many steps in all.

    It is counted down.
    """
    self._left = plan
    self._seconds: dict[int, float] = {}
    self._steps: dict[int, int] = {}
    self._rough: dict[int, float] = {}  # seconds a step, from first chunks alone

  def update(self, copies: int, steps: int, seconds: float, first: bool) -> None:
    """Counts `steps` of `copies` at once that took `seconds`; `first` of a training."""
    self._left[copies] = max(self._left.get(copies, 0) - steps, 0)
    if first:
      rough = min(self._rough.get(copies, math.inf), seconds / steps)
      self._rough[copies] = rough
    else:
      self._seconds[copies] = self._seconds.get(copies, 0.0) + seconds
      self._steps[copies] = self._steps.get(copies, 0) + steps

  def seconds(self) -> float | None:
    """Seconds left; None before anything was measured."""
    speeds = self._rough | {k: self._seconds[k] / n for k, n in self._steps.items()}
    if not speeds:
      return None
    nearest = max(speeds)
    return sum(
      steps * speeds.get(m, speeds[nearest] * m / nearest)
      for m, steps in self._left.items()
    )


class RunProgress:
  """A bar on a terminal: seed, method, phase, epoch, loss, accuracy, time left.

  Where there is no terminal, one line when a phase of training ends.
  """

  def __init__(
    self, plan: dict[int, int], console: Console | None = None, quiet: bool = False
  ):
    """`plan`: as `TimeLeft` takes it; `quiet` shows nothing."""
    self._console = console or Console(stderr=True, quiet=quiet)
    self._time_left = TimeLeft(plan)
    self._started = self._last = time.monotonic()
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=24),
      TextColumn("{task.fields[figures]}"),
      console=self._console,
      disable=not self._console.is_terminal,
      transient=True,
    )
    self._task = self._bar.add_task("compiling", total=1.0, figures="")
    self._title = ""

  def __enter__(self):
    self._bar.start()
    return self

  def __exit__(self, *exception):
    self._bar.stop()

  def chunk(self, title: str, epochs: int, chunk: Chunk) -> None:
    """Shows the state after a chunk of training.

    Args:
      title: seed, method and phase.
      epochs: how many epochs this training takes.
      chunk: what `train_copies` reports.
    """
    now = time.monotonic()
    first = title != self._title
    self._time_left.update(chunk.copies, chunk.taken, now - self._last, first)
    self._last, self._title = now, title
    left, elapsed = self._time_left.seconds(), now - self._started
    figures = (
      f"epoch {chunk.epoch}/{epochs}  loss {np.nanmean(chunk.loss):.3f}  "
      f"accuracy {100 * np.nanmean(chunk.accuracy):.1f} %  "
      + ("" if left is None else f"{clock(left)} left")
    )
    if self._bar.disable:
      if chunk.step == chunk.steps:
        self._console.print(f"{title}  {figures}", highlight=False, soft_wrap=True)
      return
    share = 0.0 if left is None else elapsed / (elapsed + left)
    self._bar.update(self._task, description=title, completed=share, figures=figures)


def clock(seconds: float) -> str:
  """Seconds as h:mm:ss or m:ss."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
