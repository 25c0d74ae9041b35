"""The section on a search: who came from whom."""

from collections.abc import Iterator, Sequence

from . import search_figures
from .cases import Case
from .document import Block, Picture
from .statistics import Results
from .training_sections import CASES_DRAWN, cut, suffix


def search_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Which copies were kept at the rungs of each phase, of the first seed that has any."""
  found = [(case, searched) for case in cases if (searched := first_search(case))]
  if found:
    yield (
      "At each rung the copies are evaluated on validation data. The better half goes on; "
      "the others start again from the average of that half. A line goes from the copy "
      "whose values, changed by a factor, a copy has. Copies whose values go back to one "
      "that was kept at the first rung share its colour. The better half of a phase's last "
      "rung is merged."
    )
  for case, (seed, rungs) in found[:CASES_DRAWN]:
    where = f"seed {seed}"
    title = f"{case.title}, {where}" if len(cases) > 1 else where.capitalize()
    end = suffix(cases, case)
    accuracy = _accuracies(rungs[-1])
    yield Picture(
      f"search-lineage{end}",
      search_figures.lineage(rungs, title),
      f"Who came from whom, phase after phase; {where}. {accuracy}",
      "Copies by rung, with lines from those that their values come from.",
    )
    for variable in sorted(rungs[0]["values"]):
      name = search_figures.VARIABLES.get(variable, variable)
      yield Picture(
        f"search-{variable.replace('_', '-')}{end}",
        search_figures.lineage(rungs, title, variable),
        f"{name} that each copy trained with up to a rung; {where}.",
        f"{name} of the copies by rung.",
      )
  yield from cut([case for case, _ in found], "Searches")


def _accuracies(rung):
  """How the copies of a rung differ, in a sentence."""
  found = [x for x in rung["validation_accuracy"] if x is not None]
  if not found:
    return ""
  low, high = 100 * min(found), 100 * max(found)
  return f"In the end validation accuracies go from {low:.2f} to {high:.2f} %."


def first_search(case: Case) -> tuple[int, list[Results]] | None:
  """Seed and rungs, phase after phase, of the first seed that has any."""
  for seed in case.seeds:
    rungs = [rung for phase in seed["phases"] for rung in phase.get("search") or ()]
    if rungs:
      return seed["seed"], rungs
  return None
