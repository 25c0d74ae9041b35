"""The methods of a run: one entry each, with its name, title, colour and what it trains.

A new method is a generator function and an entry of `METHODS`, here or from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from jaxsms.training import Model

from .epochs import (
  all_bimp_epochs,
  by_copies,
  copies_epochs,
  gradual_epochs,
  imp_epochs,
  imp_mx_epochs,
  longest,
  swamp_epochs,
)
from .in_phases import (
  in_phases,
  one_shot_soup,
  reprune,
  soup_classifier,
  soup_distilled,
  sparse_soup,
)
from .seeds import SOUP, Events, Run
from .within_budget import bimp, gradual, rewinding_soup

if TYPE_CHECKING:
  from ..config.run_config import Config


class Look(NamedTuple):
  """How results of a model are shown.

  Attributes:
    title: in tables and figures; `{m}` stands for the number of copies.
    colour: in figures.
    marker: there.
  """

  title: str
  colour: str
  marker: str


class Method(NamedTuple):
  """A method of a run: the soup, or an entry of --baselines.

  Attributes:
    title: in tables and figures; `{m}` stands for the number of copies.
    colour: in figures.
    marker: there.
    run: `run(run, dense)`, a generator that yields chunks, states and phases and returns
      metrics by phase, or by the last phase alone where it makes one model.
    epochs: `epochs(config)` giving how many it trains for, by the number of copies
      that train at once.
    resumes: whether it goes on where it was after a break; else it is done again.
    traits: how else it differs from the others. `one_copy`: no number depends on m.
      `dense`: nothing is pruned. `ramp`: its sparsity rises smoothly, to one model at the
      goal. `one_schedule`: its copies share one schedule.
      `own_masks`: its masks are not those of one model between phases. `cycles`: it
      prunes in cycles within --budget_epochs, and the last one's model counts. `rewinds`:
      its rounds begin at an earlier epoch. `averaged`: its copies end as averages of
      their steps. `distilled`: its last model learns from its candidates. `last_alone`: its
      last model alone differs from the soup's. `labels`: it counts those of all classes.
    help: what it is, for --help.
  """

  title: str
  colour: str
  marker: str
  run: Callable[[Run, Model], Events]
  epochs: Callable[[Config], dict[int, float]]
  resumes: bool = False
  traits: frozenset[str] = frozenset()
  help: str = ""


# In the order of tables. Colours are told apart by those who are colour-blind (Okabe and
# Ito), markers in black and white.
METHODS: dict[str, Method] = {
  SOUP: Method("Sparse soup", "#D55E00", "o", sparse_soup, copies_epochs, True),
  "imp": Method(
    "IMP", "#009E73", "v", in_phases("imp"), imp_epochs, True, frozenset({"one_copy"}),
    "one copy, the same number of epochs",
  ),
  "imp_mx": Method(
    "IMP {m}x", "#CC79A7", "D", in_phases("imp_mx", longer=True), imp_mx_epochs, True,
    help="one copy, m times the epochs",
  ),
  "imp_ema": Method(
    "IMP with EMA", "#009E73", "^", in_phases("imp_ema", average="ema"),
    imp_epochs, True, frozenset({"one_copy", "averaged"}),
    "imp, whose copy ends as an average, see --ema_decay",
  ),
  "imp_mx_ema": Method(
    "IMP {m}x with EMA", "#CC79A7", "p",
    in_phases("imp_mx_ema", longer=True, average="ema"), imp_mx_epochs, True,
    frozenset({"averaged"}), "imp_mx, whose copy ends as an average",
  ),
  "soup_ema": Method(
    "Sparse soup with EMA", "#D55E00", "H",
    in_phases("soup_ema", soup=True, average="ema"), copies_epochs, True,
    frozenset({"averaged"}), "the soup, whose copies end as averages",
  ),
  "soup_distilled": Method(
    "Distilled soup", "#0072B2", "P", soup_distilled,
    lambda c: by_copies((c.ingredients, c.phases * longest(c)), (1, c.distill_epochs)),
    True, frozenset({"distilled", "last_alone"}),
    "the last soup, trained on the mean prediction of its candidates",
  ),
  "soup_classifier": Method(
    "Soup, classifier", "#E69F00", "s", soup_classifier,
    lambda c: by_copies((c.ingredients, c.phases * longest(c)), (1, c.retrain_epochs)),
    True, frozenset({"last_alone", "labels"}),
    "the last soup, with its last layer trained on all data and the classes balanced in "
    "the loss",
  ),
  "imp_reprune": Method(
    "IMP-RePrune", "#009E73", "X", reprune, copies_epochs, False, frozenset({"own_masks"}),
    "m runs of imp, averaged and pruned again",
  ),
  "one_shot_soup": Method(
    "One-shot soup", "#56B4E9", "d", one_shot_soup,
    lambda c: {c.phases * c.ingredients: longest(c)}, False, frozenset({"own_masks"}),
    "a soup for each sparsity, pruned from the dense model at once; all copies in one "
    "program",
  ),
  "swamp": Method(
    "SWAMP", "#E69F00", "P", rewinding_soup, swamp_epochs, False,
    frozenset({"one_schedule", "own_masks", "rewinds"}),
    "rewinding, averages over copies and time",
  ),
  "gmp": Method(
    "GMP", "#56B4E9", "<", gradual("gmp", False), lambda c: gradual_epochs(c, 1),
    False, frozenset({"one_copy", "ramp", "own_masks"}),
    "gradual magnitude pruning from scratch, to the goal sparsity only",
  ),
  "gmp_soup": Method(
    "GMP soup", "#0072B2", "<", gradual("gmp", True),
    lambda c: gradual_epochs(c, c.ingredients), False,
    frozenset({"ramp", "one_schedule", "own_masks"}), "gmp with m copies",
  ),
  "dpf": Method(
    "DPF", "#E69F00", ">", gradual("dpf", False), lambda c: gradual_epochs(c, 1),
    False, frozenset({"one_copy", "ramp", "own_masks"}),
    "dynamic pruning with feedback from scratch, to the goal sparsity only",
  ),
  "dpf_soup": Method(
    "DPF soup", "#D55E00", ">", gradual("dpf", True),
    lambda c: gradual_epochs(c, c.ingredients), False,
    frozenset({"ramp", "one_schedule", "own_masks"}), "dpf with m copies",
  ),
  "bimp": Method(
    "BIMP", "#CC79A7", "h", bimp("bimp", False), lambda c: all_bimp_epochs(c, 1), False,
    frozenset({"one_copy", "cycles"}),
    "a shorter dense training and imp in one budget, to the goal sparsity only",
  ),
  "bimp_soup": Method(
    "BIMP soup", "#000000", "h", bimp("bimp_soup", True),
    lambda c: all_bimp_epochs(c, c.ingredients), False,
    frozenset({"one_schedule", "cycles"}), "bimp with m copies",
  ),
  "dense_soup": Method(
    "Dense soup", "#000000", "d",
    in_phases("dense_soup", soup=True, goal_sparsity=0.0, phase_sparsities=None),
    copies_epochs, True, frozenset({"dense"}), "nothing pruned",
  ),
}  # fmt: skip


# The models that a phase of the soup is measured by.
SOUP_MODELS = {
  "soup": Look(*METHODS[SOUP][:3]),
  "mean_candidate": Look("Mean candidate", "#0072B2", "s"),
  "best_candidate": Look("Best candidate", "#56B4E9", "^"),
  "prediction_ensemble": Look("Ensemble", "#888888", "*"),
}


def looks() -> dict[str, Look]:
  """How everything that results.json holds of a phase is shown, by name, in order."""
  of_methods = {name: Look(*m[:3]) for name, m in METHODS.items() if name != SOUP}
  return SOUP_MODELS | of_methods


def baselines() -> tuple[str, ...]:
  """The names that --baselines takes."""
  return tuple(name for name in METHODS if name != SOUP)


def having(trait: str) -> tuple[str, ...]:
  """The names of the methods with a trait."""
  return tuple(name for name, method in METHODS.items() if trait in method.traits)
