"""Figures of a search: which copies came from which, and with what values."""

from collections.abc import Sequence
from typing import Any

from .drawing import FAINT, MIDDLE, canvas, colour, name_above
from .statistics import Results

VARIABLES = {"learning_rate": "First learning rate", "weight_decay": "Weight decay"}


def ancestors(rungs: Sequence[Results]) -> list[list[int]]:
  """The copy of the first rung that the values of each copy go back to, by rung.

  Example:
    >>> ancestors([{"parents": [None, None, None]}, {"parents": [0, 0, 2]}])
    [[0, 1, 2], [0, 0, 2]]
  """
  found: list[list[int]] = []
  for rung in rungs:
    before = found[-1] if found else []
    found.append(
      [i if parent is None else before[parent] for i, parent in enumerate(rung["parents"])]
    )
  return found


def inks(rungs: Sequence[Results]) -> list[list[str]]:
  """The colour of each copy, by rung: that of the copy its values go back to.

  Copies that no other came from and that were not kept are grey.
  """
  roots, found, lasting = ancestors(rungs), [], {}
  for rung, of_rung in zip(rungs, roots, strict=True):
    if rung["parents"][0] is None:  # drawn anew
      lasting = {copy: colour(i) for i, copy in enumerate(sorted(rung["kept"]))}
    found.append([lasting.get(root, MIDDLE) for root in of_rung])
  return found


def lineage(rungs: Sequence[Results], title: str, variable: str | None = None) -> Any:
  """A dot for each copy at each rung, and lines to those that its values come from.

  Args:
    rungs: of all phases, in order.
    title: of the figure.
    variable: whose values are drawn; None draws the copies one above the other.
  """

  def height(number, copy):
    return copy if variable is None else rungs[number]["values"][variable][copy]

  along = "Step of a phase at which copies are evaluated"
  label = "Copy" if variable is None else VARIABLES.get(variable, variable)
  with canvas(title, along, label, height=4.1, columns=2) as (figure, axes):
    axes.grid(False)
    for number, (rung, colours) in enumerate(zip(rungs, inks(rungs), strict=True)):
      for copy, parent in enumerate(rung["parents"]):
        kept = copy in rung["kept"]
        x, y = number + 1, height(number, copy)
        origin = y if parent is None else height(number - 1, parent)
        axes.plot(
          [number, x], [origin, y], color=colours[copy],
          linewidth=1.6 if kept else 0.8, zorder=2,
        )  # fmt: skip
        axes.plot(
          x, y, "o" if kept else "X", color=colours[copy],
          markersize=7 if kept else 6, alpha=1 if kept else 0.6, zorder=3,
        )  # fmt: skip
    for marker, name in (("o", "kept"), ("X", "stopped")):
      axes.plot([], [], marker, color=MIDDLE, label=name)
    _name_rungs(axes, rungs)
    if variable is None:
      m = len(rungs[0]["parents"])
      axes.set_yticks(range(0, m, -(-m // 16)))
      axes.set_ylim(-0.5, m - 0.2)
    else:
      import matplotlib.ticker

      axes.set_yscale("log")
      low, high = axes.get_ylim()
      axes.set_ylim(low, high * (high / low) ** 0.06)
      axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter("{x:g}")
      axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  return figure


def _name_rungs(axes, rungs):
  """The phases above, and the step of each rung below."""
  phases = [rung["phase"] for rung in rungs]
  axes.set_xlim(-0.1, len(rungs) + 0.25)
  for phase in dict.fromkeys(phases):
    first, count = phases.index(phase), phases.count(phase)
    if first:
      axes.axvline(first, color=FAINT, linewidth=0.8, zorder=0)
    name_above(axes, first + count / 2, str(phase))
  every = -(-len(rungs) // 10)
  shown = range(every, len(rungs) + 1, every)
  axes.set_xticks(list(shown), [str(rungs[i - 1]["step"]) for i in shown])
