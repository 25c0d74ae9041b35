"""What a report is about: a run, or a cell of a comparison."""

from collections.abc import Sequence
from typing import NamedTuple

from .statistics import Results, network_on_data


class Case(NamedTuple):
  """Results that belong together.

  Attributes:
    title: its name, which no other case has.
    flags: of the run; `goal_sparsity` and `ingredients` are those of the case.
    seeds: entries as in results.json; the last may be of a seed under way. Where dense
      training was not its own, `dense` may be empty.
    epochs: lines of metrics.jsonl with the loss of each copy.
    inference: sizes and times dense and sparse, where they were measured.
    unfinished: what is missing yet, a sentence without its end; empty for nothing.
    costs: seconds by phase, as in results.json.
    sensitivity: of the groups of channels, as in results.json.
    seconds: that it took; None where that is not known.
    onnx: sizes and times of the run's ONNX files, where there are some.
  """

  title: str
  flags: Results
  seeds: list[Results]
  epochs: Sequence[Results] = ()
  inference: Results | None = None
  unfinished: str = ""
  costs: Results | None = None
  sensitivity: Results | None = None
  seconds: float | None = None
  onnx: Results | None = None

  @property
  def m(self) -> int:
    """Number of copies."""
    return self.flags["ingredients"]

  @property
  def inference_by_phase(self) -> Results | None:
    """Sizes and times of the network that each phase leaves, where they were measured."""
    found = (self.costs or {}).get("inference")
    return found if found and found["phases"] else None

  def soups(self, key: str) -> dict[int, list]:
    """What the soup's phases hold under a key, by phase, over the seeds that have it.

    Args:
      key: of a phase's record, such as "geometry".

    Returns:
      For each phase, from 1, a list over the seeds.
    """
    found: dict[int, list] = {}
    for seed in self.seeds:
      for phase in seed["phases"]:
        if phase.get(key) is not None:
          found.setdefault(phase["phase"], []).append(phase[key])
    return found

  @property
  def setting(self) -> str:
    """Network, data, copies and seeds in a few words."""
    n = len(self.seeds)
    return f"{network_on_data(self.flags)}, m = {self.m}, " + (
      f"{n} seeds" if n != 1 else "one seed"
    )


class Origin(NamedTuple):
  """How results were made.

  Attributes:
    title: of the run or comparison.
    command: repeats it.
    seconds: how long it took; None while it goes on.
    environments: versions and devices, each that did a part of it.
    flags: all of them.
    ood_sources: where each corruption comes from.
    warnings: what is missing of it or failed, a sentence each.
    grows: whether the command also fills the gaps of a grid.
    compiling: seconds of it that went into compiling, where they were counted.
  """

  title: str
  command: str
  seconds: float | None
  environments: Sequence[Results]
  flags: Results
  ood_sources: Results
  warnings: Sequence[str] = ()
  grows: bool = False
  compiling: float | None = None
