"""What a run takes: seconds of its phases' training, and of compiling.

Kept in its checkpoints beside everything else: no two runs take equally long.
"""

import time
from typing import Any, NamedTuple

from ..methods import DENSE, SOUP
from .progress import compiling_seconds

KINDS = ("steps", "seconds", "first_steps", "first_seconds", "compiling_seconds")


class Moment(NamedTuple):
  """A moment.

  Attributes:
    seconds: of a clock that only goes on.
    compiling: seconds that went into compiling before it.
  """

  seconds: float
  compiling: float


class RunCosts:
  """Seconds of each phase, all seeds and processes that took turns together.

  Attributes:
    inference: times of inferences, see `network_costs.ChannelCosts`; None where none are.
    sensitivity: of the dense network to the loss of channels, see
      `channel_costs.sensitivity_record`; None where it was not measured.
    latencies: the seconds in `latency_budget.NetworkClock`.
  """

  def __init__(self, saved: dict[str, Any] | None = None):
    """Begins now.

    Args:
      saved: what `saved` gave, where a run goes on; None for a new one.

    Raises:
      TypeError, ValueError, KeyError, AttributeError: it is something else.
    """
    saved = saved or {}
    self.inference = saved.get("inference")
    self.sensitivity = saved.get("sensitivity")
    self.latencies = {
      str(name): float(seconds) for name, seconds in saved.get("latencies", {}).items()
    }
    self._before = float(saved.get("compiling_seconds", 0.0))
    self._phases = {
      (str(one["method"]), int(one["phase"])): {
        "copies": int(one["copies"]), **{kind: float(one[kind]) for kind in KINDS}
      }
      for one in saved.get("phases", [])
    }  # fmt: skip
    self._begun = self._trained = self._noted = moment()
    self._first = True

  def mark(self) -> None:
    """What comes before this is no training, and the next chunk the first of its kind."""
    self._trained, self._first = moment(), True

  def resume(self) -> None:
    """Training goes on: what came since its last chunk is no part of it."""
    self._trained = moment()

  def skip(self) -> None:
    """What came since the last call is part of no phase."""
    self.mark()
    self._noted = self._trained

  def chunk(self, method: str, phase: int, copies: int, steps: int) -> None:
    """Counts a chunk of training that has just ended.

    The first one of a training is counted apart: much is made ready in it.

    Args:
      method: that trains.
      phase: number; 0 in dense training.
      copies: that train at once.
      steps: of each.
    """
    now = moment()
    one = self._phase(method, phase)
    compiling = now.compiling - self._trained.compiling
    seconds = max(now.seconds - self._trained.seconds - compiling, 0.0)
    first = "first_" if self._first else ""
    one["copies"] = copies
    one[f"{first}steps"] += steps
    one[f"{first}seconds"] += seconds
    self._trained, self._first = now, False
    self._compiled(one, now)

  def phase(self, method: str, phase: int) -> None:
    """A phase has ended: what was compiled since its last chunk belongs to it."""
    self._compiled(self._phase(method, phase), moment())
    self.mark()

  def saved(self) -> dict[str, Any]:
    """All of it, as JSON holds it."""
    phases = [
      {"method": method, "phase": phase, **one}
      for (method, phase), one in self._phases.items()
    ]
    return {
      "compiling_seconds": self._compiling(),
      "phases": phases,
      "inference": self.inference,
      "sensitivity": self.sensitivity,
      "latencies": self.latencies,
    }

  def record(self, steps_per_epoch: int) -> dict[str, Any]:
    """What results.json holds.

    Args:
      steps_per_epoch: in training.

    Returns:
      `compiling_seconds` of the run, and `phases`: for each method and phase its `copies`,
      `steps`, `seconds_per_epoch` of all copies together without compiling (None without
      training), and `compiling_seconds`. Sums are over seeds. Of methods other than the
      soup only what trained is there: some make models of several phases in one training.
    """
    phases = []
    for (method, phase), one in self._phases.items():
      first = "" if one["steps"] else "first_"
      steps, seconds = one[f"{first}steps"], one[f"{first}seconds"]
      if not steps and method not in (DENSE, SOUP):
        continue
      phases.append(
        {
          "method": method,
          "phase": phase,
          "copies": one["copies"],
          "steps": round(one["steps"] + one["first_steps"]),
          "seconds_per_epoch": seconds / steps * steps_per_epoch if steps else None,
          "compiling_seconds": one["compiling_seconds"],
        }
      )
    return {"compiling_seconds": self._compiling(), "phases": phases}

  def _phase(self, method, phase):
    blank = {"copies": 1, **dict.fromkeys(KINDS, 0.0)}
    return self._phases.setdefault((method, phase), blank)

  def _compiled(self, one, now):
    one["compiling_seconds"] += now.compiling - self._noted.compiling
    self._noted = now

  def _compiling(self):
    return self._before + compiling_seconds() - self._begun.compiling


def moment() -> Moment:
  """The present one."""
  return Moment(time.monotonic(), compiling_seconds())
