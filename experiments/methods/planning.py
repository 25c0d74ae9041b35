"""What a run does: its methods in order, how much work that is, and one seed of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from jaxsms.training.engine import Record
from jaxsms.training.loop import map_events

from .epochs import by_copies
from .registry import METHODS
from .seeds import DENSE, SOUP, Run, dense_model

if TYPE_CHECKING:
  from ..config.run_config import Config
  from ..setup.task import Task
  from .seed_state import SeedState

MEASURED = 0  # in a plan, beside the numbers of copies: models to be measured
STATISTICS = 0.2  # share of the training images that batch statistics come from
PASSES = 3  # forward passes that a training step is worth


def names_of(config: Config) -> tuple[str, ...]:
  """The methods of a run: the soup, and what it is compared with."""
  return (SOUP, *config.baselines)


def planned_steps(
  config: Config, steps_per_epoch: int, names: Sequence[str]
) -> dict[int, int]:
  """Steps of a whole run, by the number of copies that a step trains.

  Args:
    config: of the run.
    steps_per_epoch: in training.
    names: of its methods.
  """
  plans = [{1: 0 if config.init else config.epochs}]
  plans += [METHODS[name].epochs(config) for name in names]
  total = by_copies(*(part for plan in plans for part in plan.items()))
  return {m: round(config.seeds * steps_per_epoch * n) for m, n in total.items()}


def planned_work(
  config: Config, steps_per_epoch: int, names: Sequence[str]
) -> dict[int, int]:
  """Those steps, and under `MEASURED` how many models are measured."""
  models = 1
  for name in names:
    copies = min(config.ingredients, max(METHODS[name].epochs(config)))  # of a soup
    phases = 1 if "ramp" in METHODS[name].traits else config.phases
    # Of each the pruned model, the candidates and, of several, a soup.
    models += phases * (2 if copies == 1 else copies + 2)
  steps = planned_steps(config, steps_per_epoch, names)
  return {**steps, MEASURED: config.seeds * models}


def model_steps(task: Task) -> float:
  """Steps of one copy that measuring one model is worth, roughly: by images it sees."""
  splits = task.engine.splits
  images = sum(getattr(splits, name).size for name in (
    "validation", "test", *splits.also_measured))  # fmt: skip
  images += splits.test.size * sum(map(len, splits.corrupted.values()))
  if jax.tree.leaves(task.shapes.batch_stats):
    images += STATISTICS * splits.train.size
  return images / task.engine.programs.batch_size / PASSES


def seed_events(run: Run, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
  """Everything that one seed decides, as it happens; its work grows until all is done.

  Args:
    run: a seed.
    names: of the methods, in the order in which they run.

  Yields:
    The name of a method with what it yields: chunks of training, states of it that are to
    be saved, finished phases, the last soup; and with None where the method begins.
  """
  seed_state = run.seed_state
  if seed_state.dense is None:
    for event in dense_model(run):
      yield DENSE, event
  for name in names:
    method = METHODS[name]
    if name == SOUP:
      finished = len(seed_state.phases.get(SOUP, [])) == run.config.phases
      if finished and seed_state.method != SOUP:
        continue
    elif name in seed_state.baselines:
      continue
    if not method.resumes:
      seed_state.begin(name)
    yield name, None
    events = method.run(run if method.resumes else run.anew(), seed_state.dense)
    metrics = yield from map_events(events, lambda event, name=name: (name, event))
    if name != SOUP:
      seed_state.baselines[name] = list(metrics.items())


def entry_of(seed_state: SeedState, names: Sequence[str]) -> Record:
  """The entry of results.json of a seed whose work is done.

  Its phases are those of the soup, with the metrics of each baseline; without a soup they
  hold those alone.
  """
  phases = {record["phase"]: dict(record) for record in seed_state.phases.get(SOUP, [])}
  for name in names:
    for phase, metrics in seed_state.baselines.get(name, ()):
      record = phases.setdefault(phase, {"phase": phase, "sparsity": metrics["sparsity"]})
      record[name] = metrics
  return {
    "seed": seed_state.seed,
    "dense": seed_state.metrics,
    "phases": list(phases.values()),
  }
