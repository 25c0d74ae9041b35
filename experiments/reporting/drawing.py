"""The style of all figures, and how they become files."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

# Of copies, and of cases in one figure.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osv^DXP<>h"
# Greys that a page gives a shade of its own.
FAINT, MIDDLE = "#dddddd", "#777777"
RC = {
  "font.family": "DejaVu Sans",
  "font.size": 10,
  "axes.titlesize": 10,
  "axes.labelsize": 10,
  "legend.fontsize": 9,
  "xtick.labelsize": 9,
  "ytick.labelsize": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.linewidth": 0.8,
  "lines.linewidth": 1.4,
  "lines.markersize": 5,
  "legend.frameon": False,
  "svg.fonttype": "path",
  "svg.hashsalt": "jaxsms",
  "text.parse_math": False,  # a $ in a file name is one
}
WIDTH, HEIGHT = 4.8, 3.7  # inches: two beside each other on a page


@contextlib.contextmanager
def canvas(
  title: str, x: str = "", y: str = "", *, height: float = HEIGHT, columns: int = 3
) -> Iterator[tuple[Any, Any]]:
  """A figure with one pair of axes, in the style of all.

  At its end what has a label gets a legend below the axes, and all is laid out.

  Args:
    title: of the figure.
    x: what lies along the horizontal axis.
    y: what lies along the vertical axis.
    height: in inches.
    columns: of the legend.

  Raises:
    ImportError: matplotlib is not installed.
  """
  try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError(
      "figures are drawn by matplotlib, which is not installed: run "
      "`pip install 'jaxsms[experiments]'`"
    ) from error

  with matplotlib.rc_context(RC):
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    yield figure, axes
    if axes.get_legend_handles_labels()[0]:
      figure.legend(
        loc="outside lower left", ncols=columns, handlelength=1.8, columnspacing=1.2
      )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def name_above(axes: Any, x: float, name: str) -> None:
  """Writes a name at the upper end of the axes."""
  axes.annotate(
    name, (x, 0.995), xycoords=("data", "axes fraction"), ha="center", va="top",
    fontsize=8, color=MIDDLE,
  )  # fmt: skip


def spaced(positions: Sequence[float], room: float) -> list[int]:
  """Those of increasing positions, from the last on, that have so much room each."""
  chosen: list[int] = []
  for i in reversed(range(len(positions))):
    if not chosen or positions[chosen[-1]] - positions[i] >= room:
      chosen.append(i)
  return chosen


def colour(number: int) -> str:
  """Of a copy or a case."""
  return COLOURS[number % len(COLOURS)]


def file_of(figure: Any, ending: str) -> bytes:
  """A figure as a file.

  Args:
    figure: from matplotlib.
    ending: "svg" or "png".
  """
  import matplotlib

  file = io.BytesIO()
  with matplotlib.rc_context(RC):
    metadata = {"Date": None} if ending == "svg" else None
    figure.savefig(file, format=ending, dpi=150, facecolor="white", metadata=metadata)
  return file.getvalue()


def inline_svg(svg: bytes, name: str, alt: str) -> str:
  """An SVG file as an element of a page, in the page's own ink and on its own paper.

  Args:
    svg: as `file_of` gives it.
    name: that no other figure of the page has.
    alt: text for those who do not see it; escaped already.
  """
  text = svg.decode()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
  text = text.replace("xlink:href", "href")
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = re.sub(r"url\(#", f"url(#{name}-", text)
  text = re.sub(r'href="#', f'href="#{name}-', text)
  # The first patch is the white paper.
  text = re.sub(r"fill: #ffffff", "fill: none", text, count=1)
  for ink, variable in (
    ("#000000", "currentColor"),
    ("#ffffff", "var(--paper)"),
    (FAINT, "var(--faint)"),
    (MIDDLE, "var(--middle)"),
  ):
    text = text.replace(f": {ink}", f": {variable}")
  width = re.search(r'width="([\d.]+)pt"', text)
  text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
  style = f'style="max-width: {float(width[1]) * 4 / 3:.0f}px"' if width else ""
  head = f'<svg role="img" aria-label="{alt}" fill="currentColor" {style} '
  return re.sub(r"\n\s*", "\n", text.replace("<svg ", head, 1))
