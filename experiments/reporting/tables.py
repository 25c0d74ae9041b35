"""A run's results as tables and sentences."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxsms.names import quantity

from ..methods.registry import looks
from .statistics import Results, estimate, method_title, network_on_data

HEADER = ("Phase", "Sparsity", "Model", "Test accuracy", "Soup minus it")


def rows(summary: list[Results], m: int) -> list[list[list[str]]]:
  """A run's tables as text, one for each phase.

  Args:
    summary: what `summarize` gives, of an accuracy.
    m: number of copies.

  Returns:
    For each phase its rows, a method each, with the cells that `HEADER` names: accuracies
    in percent (with standard deviations), and the soup's paired gain over the method (with
    the ends of its 95 % interval).
  """
  return [
    method_rows((str(row["phase"]), percent(row)), row, m, looks(), accuracy_and_gain(row))
    for row in summary
  ]


Cell = Callable[[str], str]


def method_rows(
  first: Sequence[str], row: Results, m: int, names: Iterable[str], cells: Sequence[Cell]
) -> list[list[str]]:
  """The rows of one phase as text, one for each method that it has.

  Args:
    first: what the first row begins with.
    row: of a summary.
    m: number of copies.
    names: of methods, in order.
    cells: gives the text of each column behind the method's title, from its name.
  """
  found = []
  for name in names:
    if name in row:
      n = row[name].get("seeds")
      title = method_title(name, m) + ("" if n is None else f" ({quantity(n, 'seed')})")
      found.append([*("" for _ in first), title, *(cell(name) for cell in cells)])
  if found:
    found[0][: len(first)] = first
  return found


def accuracy_and_gain(row: Results) -> list[Cell]:
  """Two columns of `method_rows`, from a summary that may lack methods."""
  return [lambda name: accuracy(row.get(name)), lambda name: gain(row.get(name))]


def percent(row: Results) -> str:
  """The sparsity of a summary."""
  return f"{100 * row['sparsity']:.2f} %"


def accuracy(entry: Results | None) -> str:
  """A method's entry of a summary in percent, with its standard deviation."""
  if entry is None:
    return ""
  text = f"{100 * entry['mean']:.2f}"
  return text if entry["std"] is None else f"{text} ± {100 * entry['std']:.2f}"


def gain(entry: Results | None) -> str:
  """The soup's paired gain over a method in points, with its 95 % interval."""
  found = (entry or {}).get("soup_minus")
  if not found:
    return ""
  text = signed(found["mean"])
  if found["half_width"] is None:
    return text
  return f"{text} [{', '.join(map(signed, ends(found)))}]"


def ends(found: Results) -> tuple[float, float]:
  """The ends of an interval."""
  return found["mean"] - found["half_width"], found["mean"] + found["half_width"]


def signed(difference: float) -> str:
  """A difference of shares in points; no difference has a sign of its own, as in +0.00."""
  return f"{100 * difference + 0.0:+.2f}".replace("-0.00", "+0.00")


def caption(results: Results) -> str:
  """What a table of this run says, in one sentence or two.

  Args:
    results: a run's results.json, with at least one seed.

  Returns:
    The text of a caption.
  """
  flags, seeds = results["flags"], results["seeds"]
  return caption_of(
    f"{network_on_data(flags)}, m = {flags['ingredients']}",
    [seed["dense"]["test_accuracy"] for seed in seeds],
    len(seeds),
    f"seed {seeds[0]['seed']}",
  )


def caption_of(setting: str, dense: list[float], seeds: int, one_seed: str) -> str:
  """A caption of test accuracies.

  Args:
    setting: what they are of.
    dense: accuracies of the dense models.
    seeds: how many there are.
    one_seed: said where there is one.
  """
  found = estimate(dense)
  spread = "" if math.isnan(found.std) else f" ± {100 * found.std:.2f}"
  text = f"Test accuracy in percent of {setting}, dense {100 * found.mean:.2f}{spread}"
  if seeds == 1:
    return f"{text}, {one_seed}."
  return text + (
    f", {seeds} seeds: mean ± standard deviation, and the paired difference between "
    "soup and model with its 95 % interval."
  )


def notes(seeds: list[Results]) -> list[str]:
  """A sentence for everything in these entries of `results.json` that went wrong.

  Args:
    seeds: the entries.

  Returns:
    The sentences, none where all is well.
  """
  found = []
  for seed in seeds:
    for phase in seed["phases"]:
      where = f"Seed {seed['seed']}, phase {phase['phase']}"
      found += _copies(where, phase)
      for name in looks():
        if entry := phase.get(name):
          title = method_title(name, len(phase.get("candidates", ())))
          found += _copies(f"{where}, {title}", entry)
      if failed := phase.get("averaging_failed"):
        found.append(
          f"{where}: averaging failed. The soup has {_of(failed, 'soup')} % on validation "
          f"data, its worst candidate {_of(failed, 'worst_candidate')} %; between copies "
          f"{' and '.join(map(str, failed['copies']))} the loss rises by "
          f"{_barrier(failed['barrier'])}."
        )
  return found


def _barrier(value: float | None) -> str:
  """A barrier as text; None stands for one that is not finite."""
  return "more than any number" if value is None else f"{value:.3g}"


def _copies(where: str, entry: Results) -> list[str]:
  """What became of the copies of a phase, or of a method in it."""
  found = []
  number = len(entry.get("candidates", ()))
  for name in ("diverged", "collapsed"):
    copies = entry.get(name)
    if not copies:
      continue
    listed = f"(from 0: {', '.join(map(str, copies))})"
    if name == "collapsed" and entry.get("all_collapsed"):
      all_of = "its copy" if len(copies) == 1 else "all its copies"
      found.append(
        f"{where}: {all_of} collapsed on validation data {listed}. Nothing better is left: "
        "do not trust its figures."
      )
      continue
    of = f" of {number}" if number else ""
    one = len(copies) == 1
    what = f"{len(copies)}{of} {'copy' if one and not of else 'copies'} {name}"
    found.append(f"{where}: {what} and {'is' if one else 'are'} left out {listed}.")
  return found


def _of(failed: Results, name: str) -> str:
  return f"{100 * failed[f'{name}_validation_accuracy']:.2f}"


def console_table(
  tables: list[list[list[str]]], title: str, header: tuple[str, ...] = HEADER
) -> Any:
  """What `rows` gives, to be printed on a `rich.console.Console`.

  Args:
    tables: rows of cells, a list for each phase.
    title: printed above it.
    header: the names of the columns.

  Returns:
    A `rich.table.Table`.
  """
  from rich import box
  from rich.table import Table
  from rich.text import Text  # a string would be read as markup

  title = Text(title, style="table.title")
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
  for name in header:
    table.add_column(name, justify="left" if name == "Model" else "right", no_wrap=True)
  for lines in tables:
    for line in lines:
      soup = line[2] == looks()["soup"].title
      table.add_row(
        *map(Text, line), style="bold" if soup else None, end_section=line is lines[-1]
      )
  return table
