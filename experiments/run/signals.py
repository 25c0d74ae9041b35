"""SIGTERM and SIGINT: noted, and obeyed where a run can be saved."""

import signal
import sys
import threading


class Stopped(Exception):
  """A run has saved itself and ends, because a signal asked it to."""

  def __init__(self, number: int):
    """`number`: of the signal."""
    super().__init__(f"stopped by {signal.Signals(number).name}")
    self.status = 128 + number


class StopSignals:
  """While in use, the first signal is only noted; a second one acts at once."""

  NUMBERS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    """Nothing is noted, and nothing installed, before `with`."""
    self.noted: int | None = None
    self.saves = True
    """Whether what is under way will be saved; a method done in one go begins anew."""
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():  # no other one may
      self._before = {n: signal.signal(n, self._note) for n in self.NUMBERS}
    return self

  def __exit__(self, *exception):
    self._restore()

  def _note(self, number, frame):
    self.noted = number
    self._restore()
    name = signal.Signals(number).name
    what = "saves and stops" if self.saves else "stops, to begin this method anew,"
    print(f"{name}: {what} at the next chunk of training; again: stops at once",
          file=sys.stderr)  # fmt: skip

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}
