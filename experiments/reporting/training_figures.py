"""Figures of how copies train, which weights go, and where the models lie."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..methods import DENSE, SOUP
from .cases import Case
from .drawing import COLOURS, FAINT, MARKERS, MIDDLE, canvas, colour, name_above, spaced

CURVES = {
  "loss": "Training loss",
  "accuracy": "Training accuracy in percent",
  "learning_rate": "Learning rate at the end of an epoch",
}
ON_COLOUR = "#010101"  # ink on a coloured ground, which is no darker on a dark page
PHASES_SHOWN = 12


def curve_lines(case: Case) -> list[dict]:
  """Epochs of dense training and of the soup; of a baseline alone its own."""
  ours = [line for line in case.epochs if line["method"] in (DENSE, SOUP)]
  return ours or list(case.epochs)


def curves(case: Case, name: str) -> Any:
  """What each copy does from epoch to epoch, dense training and the phases in a row.

  The first seed's copies have a colour each, those of the others are grey. Dense training
  is squeezed where it is longer than half of all phases together.
  """
  lines = curve_lines(case)
  starts, last = starts_of_phases(lines)
  place = squeezed(starts, last)
  first = lines[0]["seed"]
  groups: dict[tuple[int, int], list] = {}
  for line in lines:
    groups.setdefault((line["seed"], line["phase"]), []).append(line)
  scale = 100 if name == "accuracy" else 1
  with canvas(case.setting, "Epoch", CURVES[name], columns=4) as (figure, axes):
    labelled = set()
    for (seed, phase), group in groups.items():
      x = place([starts[phase] + line["epoch"] for line in group])
      y = scale * np.array([line[name] for line in group], float)
      mine = seed == first
      for copy in range(y.shape[1] if mine or name != "learning_rate" else 0):
        label = "dense" if phase == 0 and y.shape[1] == 1 else f"copy {copy}"
        axes.plot(
          x,
          y[:, copy],
          color=(MIDDLE if label == "dense" else colour(copy)) if mine else FAINT,
          linewidth=1.3 if mine else 0.8,
          marker="." if len(x) < 4 and mine else None,
          zorder=3 if mine else 1,
          label=label if mine and label not in labelled else None,
        )
        labelled.add(label)
    _name_phases(axes, starts, last, place)
  return figure


def starts_of_phases(lines: Sequence[dict]) -> tuple[dict[int, int], int]:
  """How many epochs there were before each phase (dense training is 0), and in all."""
  longest: dict[int, int] = {}
  for line in lines:
    longest[line["phase"]] = max(longest.get(line["phase"], 0), line["epoch"])
  starts, total = {}, 0
  for phase in sorted(longest):
    starts[phase], total = total, total + longest[phase]
  return starts, total


def squeezed(starts: dict[int, int], last: int) -> Callable[[Any], np.ndarray]:
  """Where epochs are drawn: dense training takes a third of the width at most."""
  dense = starts.get(1, 0) if 0 in starts else 0
  width = min(dense, (last - dense) / 2) or dense
  return lambda epochs: np.interp(
    epochs, [0, dense, last], [0, width, width + last - dense]
  )


def _name_phases(axes, starts, last, place):
  ends = [*list(starts.values())[1:], last]
  right = float(place(last))
  axes.set_xlim(0, right * 1.01)
  for (phase, start), end in zip(starts.items(), ends, strict=True):
    if start:
      axes.axvline(place(start), color=FAINT, linewidth=0.8, zorder=0)
    name = "dense" if phase == 0 else str(phase)
    if place(end) - place(start) >= 0.04 * right:
      name_above(axes, (place(start) + place(end)) / 2, name)
  marks = sorted(
    {0, last, *starts.values(), *([starts.get(1, 0) // 2] if 0 in starts else [])}
  )
  shown = [marks[i] for i in spaced(place(marks), 0.09 * right)]
  axes.set_xticks(place(shown), [str(mark) for mark in shown])


def layers(case: Case) -> Any:
  """How much of each layer is gone, phase by phase."""
  found = {
    number: _mean_layers([soup["layer_sparsities"] for soup in soups])
    for number, soups in case.soups("soup").items()
  }
  names = list(next(iter(found.values())))
  with _rows_of_layers(case.setting, names, columns=4) as (figure, axes, y):
    shades = _shades(len(found))
    shown = sorted(found)
    for number, shade in zip(shown, shades, strict=True):
      few = len(shown) <= PHASES_SHOWN or number in (shown[0], shown[-1])
      axes.plot(
        [100 * found[number][name] for name in names], y, "o", color=shade,
        label=f"phase {number}" if few else None,
      )  # fmt: skip
  return figure


def layers_of(cases: Sequence[Case]) -> Any:
  """How much of each layer is gone in the end, case by case."""
  last = []
  for case in cases:
    soups = case.soups("soup")
    last.append(_mean_layers([soup["layer_sparsities"] for soup in soups[max(soups)]]))
  names = list(dict.fromkeys(name for found in last for name in found))
  title, n = "After the last phase", len(cases)
  with _rows_of_layers(title, names, columns=1, below=0.2 * n) as (figure, axes, y):
    for number, (case, found) in enumerate(zip(cases, last, strict=True)):
      at = [i for i, name in enumerate(names) if name in found]
      axes.plot(
        [100 * found[names[i]] for i in at], y[at], MARKERS[number % len(MARKERS)],
        color=colour(number), label=case.title,
      )  # fmt: skip
  return figure


@contextlib.contextmanager
def _rows_of_layers(title, names, columns, below=0.0):
  """A canvas with a row for each layer, and where these lie."""
  step, size = (0.3, 9) if len(names) <= 12 else (0.17, 7)
  height = 1.7 + step * max(len(names), 3) + below
  label = "Removed weights of the layer in percent"
  with canvas(title, label, height=height, columns=columns) as (figure, axes):
    y = np.arange(len(names))[::-1]
    axes.set_yticks(y, names, fontsize=size)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(-2, 102)
    yield figure, axes, y


def _mean_layers(records):
  return {name: float(np.mean([r[name] for r in records])) for name in records[0]}


def _shades(n):
  """Of one hue, light to dark enough on white and on black."""
  import matplotlib

  ramp = matplotlib.colormaps["viridis"]
  return [matplotlib.colors.to_hex(ramp(x)) for x in np.linspace(0.9, 0.3, n)]


GEOMETRY = {
  "l2_distance": ("Distance between two copies", "L2 distance of the parameters"),
  "angle": ("Angle between two copies", "Degrees, seen from the origin"),
}


def geometry(cases: Sequence[Case], name: str) -> Any:
  """How far apart the copies end up in each phase.

  Args:
    cases: one, with the range over its pairs and the distance to the soup; or several.
    name: a key of GEOMETRY.
  """
  (title, label), alone = GEOMETRY[name], len(cases) == 1
  with canvas(title, "Phase", label, columns=2 if alone else 1) as (figure, axes):
    phases: set[int] = set()
    for number, case in enumerate(cases):
      found = case.soups("geometry")
      x = sorted(found)
      phases |= set(x)

      def over(key, x=x, found=found):
        return np.array(
          [np.mean([g[key] for g in found[t] if g[key] is not None]) for t in x]
        )

      ink = colour(number)
      axes.plot(
        x, over(f"mean_{name}"), color=ink, marker=MARKERS[number % len(MARKERS)],
        label="mean over pairs" if alone else case.title,
      )  # fmt: skip
      if alone:
        low, high = over(f"min_{name}"), over(f"max_{name}")
        axes.fill_between(
          x, low, high, color=ink, alpha=0.2, linewidth=0, label="nearest to farthest pair"
        )
        if name == "l2_distance":
          axes.plot(
            x, over("max_barycentre_distance"), color=COLOURS[1], marker="s",
            label="farthest copy from their mean",
          )  # fmt: skip
    axes.set_ylim(bottom=0)
    step = -(-len(phases) // 10)
    axes.set_xticks(sorted(phases)[::step])
  return figure


LINES = {"loss": "loss", "accuracy": "accuracy in percent"}


def lines_between(landscape: dict, title: str, name: str) -> Any:
  """Loss or accuracy on the straight lines between pairs of copies."""
  scale = 100 if name == "accuracy" else 1
  label = f"{landscape['split'].capitalize()} {LINES[name]}"
  with canvas(title, y=label) as (figure, axes):
    for number, line in enumerate(landscape["lines"]):
      i, j = line["between"]
      y = scale * np.array(line[name], float)
      axes.plot(
        line["positions"], y, color=colour(number), marker=MARKERS[number % len(MARKERS)],
        markersize=4, label=f"copies {i} and {j}",
      )  # fmt: skip
    axes.set_xticks([0, 0.5, 1], ["first copy", "their mean", "second copy"])
    for tick, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
      tick.set_horizontalalignment(side)
  return figure


def plane(landscape: dict, title: str) -> Any:
  """The loss on the plane through three copies, and where the soup lies."""
  record = landscape["plane"]
  loss = np.array(record["loss"], float)
  with canvas(title, record["unit"], height=4.1) as (figure, axes):
    axes.grid(False)
    finite = loss[np.isfinite(loss)]
    # Equal steps of the logarithm where a plane goes from a valley far up its walls.
    low, high = max(finite.min(), 1e-12), finite.max()
    if high > 5 * low:
      levels = np.geomspace(low, high, 13)
    else:
      levels = np.linspace(finite.min(), high or 1.0, 13)
    if levels[0] >= levels[-1]:
      levels = levels[0] + np.linspace(0, 1e-6, 13)
    import matplotlib

    norm = matplotlib.colors.BoundaryNorm(levels, 256)
    filled = axes.contourf(
      record["x"], record["y"], loss, levels, cmap="cividis_r", norm=norm, extend="both"
    )
    axes.contour(record["x"], record["y"], loss, levels, colors="white", linewidths=0.5)
    bar = figure.colorbar(filled, ax=axes, pad=0.02, format="%.3g")
    bar.set_label(f"{landscape['split'].capitalize()} loss")
    bar.set_ticks(levels[::3])
    for name, (x, y) in record["points"].items():
      soup = name == "soup"
      axes.plot(
        x, y, "*" if soup else "o", color="#D55E00" if soup else "#fefefe",
        markersize=15 if soup else 14, markeredgecolor=ON_COLOUR, markeredgewidth=0.9,
      )  # fmt: skip
      if soup:
        axes.annotate(
          "soup", (x, y), xytext=(0, -9), textcoords="offset points", va="top",
          ha="center", color=ON_COLOUR, fontsize=10, fontweight="bold",
          bbox={"boxstyle": "round,pad=0.15", "facecolor": "#fefefe", "alpha": 0.8,
                "edgecolor": "none"},
        )  # fmt: skip
      else:
        axes.text(
          x, y, name, color=ON_COLOUR, fontsize=9, ha="center", va="center_baseline"
        )
    axes.set_aspect("equal")
  return figure
