"""Timing that a busy machine cannot easily mislead: alternating rounds, medians, ratios."""

import math
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

ROUND_SECONDS = 1.5  # of one contender, where the steps are not given


class Spread(NamedTuple):
  """A quantity over rounds.

  Attributes:
    median: of all rounds.
    min: the least of them.
    max: the greatest.
    rounds: one value per round, in their order.
  """

  median: float
  min: float
  max: float
  rounds: list[float]


class Contender(NamedTuple):
  """Something that is timed.

  Attributes:
    run: a round of it, which waits for its own work.
    steps: training steps of every copy in a round.
    facts: what else is reported of it.
  """

  run: Callable[[], None]
  steps: float
  facts: dict[str, Any]


def spread(rounds: Sequence[float]) -> Spread:
  """Median, least and greatest of a value per round."""
  return Spread(statistics.median(rounds), min(rounds), max(rounds), list(rounds))


def ratio(numerator: Spread, denominator: Spread, factor: float = 1.0) -> Spread:
  """The ratio in each round, times a factor: what slows a whole round down cancels."""
  pairs = zip(numerator.rounds, denominator.rounds, strict=True)
  return spread([factor * a / b for a, b in pairs])


def scaled(quantity: Spread, factor: float) -> Spread:
  """A quantity in another unit."""
  return spread([factor * value for value in quantity.rounds])


def seconds(run: Callable[[], None]) -> float:
  """Wall time of one call, which waits for its own work."""
  started = time.perf_counter()
  run()
  return time.perf_counter() - started


def alternate(
  contenders: Mapping[Hashable, Contender], rounds: int
) -> dict[Hashable, Spread]:
  """Times each in every round; every second round goes through them backwards.

  Args:
    contenders: by name, warmed up before.
    rounds: at least 1.

  Returns:
    Seconds of a training step of each.
  """
  times: dict[Hashable, list[float]] = {name: [] for name in contenders}
  for number in range(rounds):
    for name in list(contenders) if number % 2 == 0 else list(contenders)[::-1]:
      run, steps, _ = contenders[name]
      times[name].append(seconds(run) / steps)
  return {name: spread(values) for name, values in times.items()}


def cores() -> int:
  """How many cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def calls_for(wanted: float, measured: float) -> int:
  """How many calls of so many measured seconds fill the wanted seconds, at least 1."""
  return max(1, math.ceil(wanted / max(measured, 1e-9)))


def repeated(call: Callable[[], Any], times: int, steps: float = 1.0) -> Contender:
  """A call so many times in a row, of so many steps each."""

  def run():
    for _ in range(times):
      call()

  return Contender(run, times * steps, {})


def milliseconds(
  calls: Mapping[str, Callable[[], Any]], round_seconds: float, slow: float
) -> dict[str, dict[str, float]]:
  """Milliseconds of calls that take turns, after one each that compiles.

  Args:
    calls: by name.
    round_seconds: about so long is a round of each.
    slow: seconds of a call from which on three rounds are enough, and not five.

  Returns:
    By name, the median of the rounds, the least and the greatest.
  """
  contenders, longest = {}, 0.0
  for name, call in calls.items():
    call()
    once = seconds(call)
    contenders[name] = repeated(call, calls_for(round_seconds, once))
    longest = max(longest, once)
  spreads = alternate(contenders, 5 if longest < slow else 3)
  return {name: in_milliseconds(spread.rounds) for name, spread in spreads.items()}


def in_milliseconds(rounds: Sequence[float]) -> dict[str, float]:
  """Median, least and greatest of the seconds of rounds, in milliseconds."""
  found = scaled(spread(rounds), 1000)
  return {"median": found.median, "min": found.min, "max": found.max}


def shown(quantity: Spread | Mapping[str, Any] | None, unit: float = 1.0) -> str:
  """The median, in brackets the least and the greatest; nothing for None.

  Args:
    quantity: a spread, or the same as JSON has it.
    unit: what it is multiplied by.
  """
  if quantity is None:
    return ""
  values = quantity._asdict() if isinstance(quantity, Spread) else quantity
  middle, low, high = (unit * values[name] for name in ("median", "min", "max"))
  return f"{middle:.3g} [{low:.3g}, {high:.3g}]"
