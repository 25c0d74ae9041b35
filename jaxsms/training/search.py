"""Search inside a phase: copies are compared at rungs, and the worse half begins anew.

At a rung every copy is measured on validation data. The better half goes on as it is. The
others start again from the average of that half, each with values near those of one of it.
Every phase draws its first values anew.
"""

import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.meshes import fetch
from jaxsms.disk.faults import fault_point
from jaxsms.phases import finite_models
from jaxsms.soups import soup_weights, uniform_soup
from jaxsms.training.averaging import has_average
from jaxsms.training.engine import Engine, Model, Record, trained
from jaxsms.training.loop import Chunk, map_events, train_copies
from jaxsms.training.measurements import (
  RECALIBRATION,
  best_first,
  predict,
  recalibrated,
  score,
)
from jaxsms.training.search_values import (
  Ranges,
  Values,
  check_range,
  first_values,
  near_values,
  parents_of,
)
from jaxsms.training.state import Ingredients, TrainState
from jaxsms.trees import PyTree, number_of_models, wait_on_cpu

SEARCH = 2**32 - 2  # a stream of the phase's key that no seed uses
LEAST_COPIES = 4  # half of fewer is no soup
FACTOR = 1.5


class Search(NamedTuple):
  """What is searched for, and when copies are compared.

  Attributes:
    ranges: least and greatest value of each variable, both above 0.
    ends: steps of a phase after which the copies are compared; the last is its end.
    factor: by which new values differ from those that they come from, above 1.
  """

  ranges: Ranges
  ends: tuple[int, ...]
  factor: float = FACTOR


class Rung(NamedTuple):
  """How the copies did at one comparison. JSON can hold its fields.

  Attributes:
    phase: number of the phase, from 1.
    step: of the phase, after which they were compared.
    values: float [m] of each variable, that the copies trained with up to here.
    parents: [m], the copies of the rung before whose values those were or came from; None
      at the first rung, whose values are drawn.
    validation_accuracy: float [m]; NaN for a copy that diverged.
    validation_loss: float [m]; likewise.
    kept: indices of the better half, the best first.
  """

  phase: int
  step: int
  values: dict[str, list[float]]
  parents: list[int | None]
  validation_accuracy: Sequence[float] = ()
  validation_loss: Sequence[float] = ()
  kept: Sequence[int] = ()

  def with_scores(self, scores: Sequence[Record], kept: Sequence[int]) -> "Rung":
    """Gives the rung with the metrics of all copies, and which of them were kept."""
    accuracy, loss = (
      [one[f"validation_{name}"] for one in scores] for name in ("accuracy", "loss")
    )
    return self._replace(
      validation_accuracy=accuracy, validation_loss=loss, kept=list(kept)
    )


def check_search(search: Search, copies: int) -> None:
  """Raises ValueError where there is nothing to search, or too few copies to do so.

  Args:
    search: to be checked.
    copies: m.
  """
  if not search.ranges:
    raise ValueError("ranges are empty: give a range for at least one variable")
  for name, (low, high) in search.ranges.items():
    check_range(name, low, high)
  ends = [0, *search.ends]
  if len(ends) == 1 or any(a >= b for a, b in itertools.pairwise(ends)):
    raise ValueError(
      f"ends are {list(search.ends)}: give at least one step, from 1 on and increasing"
    )
  if not 1 < search.factor < np.inf:
    raise ValueError(f"factor is {search.factor}: give a number above 1")
  if copies < LEAST_COPIES:
    raise ValueError(
      f"a search has {copies} copies: give at least {LEAST_COPIES}, half of which are "
      "merged"
    )


def next_rung(
  key: jax.Array, search: Search, rungs: Sequence[Rung], phase: int, m: int
) -> Rung:
  """What m copies train with up to the next rung; at the first one values are drawn.

  Args:
    key: of the phase.
    search: ranges, ends and factor.
    rungs: of this phase so far.
    phase: its number.
    m: number of copies.

  Returns:
    The rung, not scored yet.
  """
  number = len(rungs)
  key = jax.random.fold_in(jax.random.fold_in(key, SEARCH), number)
  parents: list[int | None] = [None] * m
  if rungs:
    last, sources = rungs[-1], parents_of(rungs[-1].kept, m)
    before = {name: np.array(of, np.float32) for name, of in last.values.items()}
    values = near_values(key, before, sources, search.ranges, search.factor)
    parents = list(sources)
  else:
    values = first_values(key, search.ranges, m)
  by_name = {name: of.tolist() for name, of in values.items()}
  return Rung(phase, search.ends[number], by_name, parents)


def better_half(scores: Sequence[Record], copies: Sequence[int] | None = None) -> list[int]:
  """The better half of m copies, rounded up; the best first.

  Args:
    scores: `validation_accuracy` and, among equals, `validation_loss` of all; NaN for a
      copy that diverged, which is never taken.
    copies: indices of those that may be taken; None means all.

  Returns:
    Indices, fewer than half where fewer may be taken.

  Example:
    >>> scores = [(0.5, 1.0), (0.7, 1.0), (0.5, 0.9), (float("nan"), 0.0)]
    >>> better_half(
    ...   [{"validation_accuracy": a, "validation_loss": b} for a, b in scores]
    ... )
    [1, 2]
  """
  m = len(scores)
  return best_first(scores, range(m) if copies is None else copies)[: (m + 1) // 2]


def rung_records(
  rungs: Sequence[Rung], scores: Sequence[Record], copies: Sequence[int]
) -> list[Record]:
  """The rungs of a phase, the last one scored by its candidates.

  Args:
    rungs: of the phase, the last one not scored yet.
    scores: metrics of all candidates.
    copies: those that count, see `jaxsms.training.failures.merged_copies`.

  Returns:
    All of them, as JSON can hold them.
  """
  *before, last = rungs
  found = [*before, last.with_scores(scores, better_half(scores, copies))]
  return [rung._asdict() for rung in found]


def validation_scores(engine: Engine, key: jax.Array, models: Model) -> list[Record]:
  """Metrics of m models on validation data, measured as candidates are.

  Args:
    engine: the network and its data.
    key: of the phase.
    models: leaves [m, ...].

  Returns:
    Metrics of each, NaN for those with values that are not finite.
  """
  models = recalibrated(engine, jax.random.fold_in(key, RECALIBRATION), models)
  predictions = predict(engine.programs, engine.splits.validation, models)
  scores = score(engine.programs, {"validation": predictions})
  finite = fetch(finite_models(models))
  return [
    one if healthy else dict.fromkeys(one, np.nan)
    for one, healthy in zip(scores, finite, strict=True)
  ]


def restarted(state: TrainState, kept: Sequence[int]) -> TrainState:
  """The state after a rung: copies that were not kept are the average of those that were.

  Args:
    state: of all copies, leaves [m, ...]; donated.
    kept: indices of the better half.

  Returns:
    The state, whose parameters, statistics and momentum are averaged alike. A mask that
    all copies share is that of the average too.
  """
  m = number_of_models(state)
  weights = soup_weights(list(kept), m)
  return wait_on_cpu(_restarted(state, jnp.asarray(weights, jnp.float32)))


@functools.partial(jax.jit, donate_argnums=0)
def _restarted(state, weights):
  average = uniform_soup(state, weights)

  def leaf(one, all_copies):
    stopped = (weights == 0).reshape(-1, *[1] * one.ndim)
    return jnp.where(stopped, one[None], all_copies)

  return jax.tree.map(leaf, average, state)


def search_copies(
  engine: Engine,
  masks: PyTree,
  key: jax.Array,
  state: TrainState,
  search: Search,
  plan: Callable[[Values], tuple[Ingredients, np.ndarray]],
  rungs: Sequence[Rung] = (),
  *,
  phase: int = 0,
) -> Generator[Any, None, tuple[TrainState, list[Rung]]]:
  """Trains m copies to the end of a phase, and compares them on the way.

  It goes on after a break from a state that it yielded, with the rungs up to that state.

  Args:
    engine: the network and its data.
    masks: shared by all copies.
    key: of the phase.
    state: of all copies, leaves [m, ...]; donated.
    search: ranges, and the steps at which copies are compared.
    plan: gives ingredients and learning rates [m, steps] for values [m] by variable.
    rungs: of this phase so far.
    phase: its number.

  Yields:
    What `train_copies` yields; and each `Rung` but the last.

  Returns:
    The last state; and the rungs, the last of them not scored yet.

  Raises:
    ValueError: see `check_search`.
    FloatingPointError: every copy has become NaN or infinite.
    MemoryError: the device is too small for so many copies at once.

  References:
    Jamieson and Talwalkar, 2016, https://arxiv.org/abs/1502.07943 (successive halving)
    Jaderberg et al., 2017, https://arxiv.org/abs/1711.09846 (population-based training)
  """
  m, rungs = number_of_models(state), list(rungs)
  check_search(search, m)

  def of_whole_phase(event):
    return event._replace(steps=search.ends[-1]) if isinstance(event, Chunk) else event

  for end in search.ends[len(rungs) :]:
    rung = next_rung(key, search, rungs, phase, m)
    values = {name: np.array(of, np.float32) for name, of in rung.values.items()}
    chosen, learning_rates = plan(values)
    until = chosen.copy()
    until["steps"] = np.full([m], end, np.int32)
    training = train_copies(engine, masks, key, state, until, learning_rates, phase=phase)
    state = yield from map_events(training, of_whole_phase)
    if end == search.ends[-1]:
      rungs.append(rung)
      break
    averaged = has_average(chosen, end)
    now = trained(state) if averaged else Model(state.params, state.batch_stats)
    scores = validation_scores(engine, key, now)
    kept = better_half(scores)
    if not kept:
      raise FloatingPointError(
        f"all {m} copies have metrics that are not finite: lower the learning rates of the "
        "search"
      )
    rungs.append(rung.with_scores(scores, kept))
    fault_point("rung")
    yield rungs[-1]
    state = restarted(state, rungs[-1].kept)
  return state, rungs
