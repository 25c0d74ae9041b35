"""What a run shows while it trains."""

import functools
import time

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress

from jaxsms.training import Chunk

from ..methods.planning import MEASURED
from .terminal import print_line, terminal, text_column

LINE_SECONDS = 60  # between two lines, where there is no bar


class TimeLeft:
  """Estimates the seconds left from the speed so far.

  Three things take time: steps, which have a speed of their own for each number of copies
  (until so many have trained it counts m / k times that of the k copies seen; the first
  chunk, in which much is made ready, counts only until there is another); measuring models;
  and compiling, about as long for each number of copies, once to train and once to measure.
  """

  def __init__(self, plan: dict[int, int], model_steps: float = 0.0):
    """Begins with what is planned.

    Args:
      plan: for each number of copies trained at once, how many steps in all; under
        `MEASURED` how many models are measured. It is counted down.
      model_steps: steps of one copy that measuring a model is worth, until one was.
    """
    self._left, self._model_steps = plan, model_steps
    self._seconds: dict[int, float] = {}
    self._done: dict[int, int] = {}
    self._rough: dict[int, float] = {}  # seconds a step, from first chunks alone
    self._compiling = 0.0
    self._trained = 0  # how many copies did so last
    self._compiled: set[tuple[int, bool]] = set()  # for so many, to measure them or not

  def update(self, copies: int, count: int, seconds: float, compiling: float = 0.0) -> None:
    """Counts what was done since the last time.

    Args:
      copies: how many trained; `MEASURED` for measuring.
      count: steps, or models measured.
      seconds: that it took, compiling included.
      compiling: how many of them that was.
    """
    self._left[copies] = max(self._left.get(copies, 0) - count, 0)
    compiling = min(compiling, seconds)
    self._compiling += compiling
    measuring = copies == MEASURED
    self._trained = self._trained if measuring else copies
    self._compiled.add((self._trained, measuring))
    if not measuring and copies not in self._rough:
      self._rough[copies] = (seconds - compiling) / count
      return
    self._seconds[copies] = self._seconds.get(copies, 0.0) + seconds - compiling
    self._done[copies] = self._done.get(copies, 0) + count

  def seconds(self) -> float | None:
    """Seconds left; None before any step was taken."""
    measured = {k: self._seconds[k] / n for k, n in self._done.items()}
    speeds = self._rough | {k: v for k, v in measured.items() if k != MEASURED}
    if not speeds:
      return None
    nearest = max(speeds)
    each = {
      k: speeds.get(k, speeds[nearest] * k / nearest) for k in self._left if k != MEASURED
    }
    in_use = [k for k in each if k in speeds or self._left[k]]
    one_copy = speeds.get(1, speeds[nearest] / nearest)
    each[MEASURED] = measured.get(MEASURED, self._model_steps * one_copy)
    compiled = sum((k, measuring) in self._compiled for k in in_use for measuring in (0, 1))
    compiling = self._compiling * (2 * len(in_use) - compiled) / max(compiled, 1)
    return compiling + sum(n * each[k] for k, n in self._left.items())


class RunProgress:
  """A bar on a terminal: seed, method, phase, epoch, loss, accuracy, time left.

  Elsewhere (a file, a pipe, a terminal that cannot move its cursor) plain lines: one when
  a phase of training ends, and one a minute.
  """

  def __init__(
    self,
    plan: dict[int, int],
    console: Console | None = None,
    quiet: bool = False,
    model_steps: float = 0.0,
  ):
    """`plan` and `model_steps`: as `TimeLeft` takes them; `quiet` shows nothing."""
    self._console = console or terminal(stderr=True, quiet=quiet)
    self._time_left = TimeLeft(plan, model_steps)
    self._started = self._last = self._last_line = time.monotonic()
    self._compiled = compiling_seconds()
    plain = not self._console.is_terminal or self._console.is_dumb_terminal
    self._bar = Progress(
      text_column("{task.description}"),
      BarColumn(bar_width=24),
      text_column("{task.fields[figures]}"),
      console=self._console,
      disable=plain,
      transient=True,
    )
    self._task = self._bar.add_task("compiling", total=1.0, figures="")

  def __enter__(self):
    if not self._bar.disable:
      self._bar.start()
    return self

  def __exit__(self, *exception):
    if not self._bar.disable:  # its end would be an empty line
      self._bar.stop()

  def chunk(self, title: str, epochs: int, chunk: Chunk) -> None:
    """Shows the state after a chunk of training.

    Args:
      title: seed, method and phase.
      epochs: how many epochs this training takes.
      chunk: what `train_copies` reports.
    """
    self._time_left.update(chunk.copies, chunk.taken, *self._since_last())
    left, elapsed = self._time_left.seconds(), self._last - self._started
    figures = (
      f"epoch {chunk.epoch}/{epochs}  loss {np.nanmean(chunk.loss):.3f}  "
      f"accuracy {100 * np.nanmean(chunk.accuracy):.1f} %  "
      + ("" if left is None else f"{clock(left)} left")
    )
    if self._bar.disable:
      if chunk.step == chunk.steps or self._last - self._last_line >= LINE_SECONDS:
        self._last_line = self._last
        print_line(self._console, f"{title}  {figures}")
      return
    share = 0.0 if left is None else elapsed / (elapsed + left)
    self._bar.update(self._task, description=title, completed=share, figures=figures)

  def model_measured(self) -> None:
    """Counts one model that was measured."""
    self._time_left.update(MEASURED, 1, *self._since_last())

  def phase(self) -> None:
    """A phase has ended: what came last in it is like nothing that is to come."""
    self._since_last()

  def _since_last(self):
    """Seconds since the last call, and how many of them went into compiling."""
    now, compiled = time.monotonic(), compiling_seconds()
    since = now - self._last, compiled - self._compiled
    self._last, self._compiled = now, compiled
    return since


def compiling_seconds() -> float:
  """Seconds that this process has traced and compiled, from the first call on."""
  return sum(_durations())


@functools.cache
def _durations():
  durations: list[float] = []

  def listen(event, duration, **_):
    if event.startswith("/jax/core/compile/"):
      durations.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  return durations


def clock(seconds: float) -> str:
  """Seconds as h:mm:ss or m:ss."""
  minutes, second = divmod(round(seconds), 60)
  hours, minute = divmod(minutes, 60)
  return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
