"""The loop on a data set: prune, retrain, recalibrate, evaluate, merge, evaluate."""

import functools
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxsms.phases import Prune
from jaxsms.pruning import magnitude_masks
from jaxsms.sms import soup_phases
from jaxsms.training.candidates import merge_candidates
from jaxsms.training.cutting import Cut
from jaxsms.training.distilling import Distillation, check_temperature, distil
from jaxsms.training.engine import Engine, Model, Plan, Record, trained
from jaxsms.training.failures import merged_copies
from jaxsms.training.landscape import measure_landscape
from jaxsms.training.loop import train_copies
from jaxsms.training.measurements import RECALIBRATION, recalibrated
from jaxsms.training.merging import Merging, merging_of
from jaxsms.training.pruned import prune_and_measure
from jaxsms.training.search import (
  Rung,
  Search,
  better_half,
  next_rung,
  rung_records,
  search_copies,
)
from jaxsms.training.state import TrainState
from jaxsms.trees import PyTree, model_at, number_of_models


class Start(NamedTuple):
  """What the phases begin with; after a break, what the last finished phase left.

  Attributes:
    model: the dense model, or the soup of the phase before.
    masks: of that soup; None means dense.
    state: of the copies in the first of these phases, as `train_copies` gave it; None
      begins at step 0.
    rungs: of a search, those up to that state.
  """

  model: Model
  masks: PyTree | None = None
  state: TrainState | None = None
  rungs: Sequence[Rung] = ()


class PhaseRecipe(NamedTuple):
  """The parts of a phase besides its training.

  Attributes:
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    merging: of the candidates.
    landscapes: phases in which the loss between the candidates is measured.
    shrink: `shrink(engine, pruned, masks)` giving the smaller network of a phase, see
      `jaxsms.training.cutting.cut_engine`. Models and masks between phases keep their full
      shapes; candidates have those of their phase.
    distillation: of the candidates into the last phase's soup; its plan is given the record
      of that phase.
    search: compares copies on the way; `plan` also gets values, the better half is merged.
  """

  prune: Prune = magnitude_masks
  merging: Merging = merging_of("uniform")
  landscapes: Collection[int] = ()
  shrink: Callable[[Engine, Model, PyTree], Cut] | None = None
  distillation: Distillation | None = None
  search: Search | None = None


def training_phases(
  engine: Engine,
  key: jax.Array,
  start: Start,
  plan: Plan,
  sparsities: Mapping[int, float],
  recipe: PhaseRecipe | None = None,
) -> Iterator[Any]:
  """Sparse Model Soups of a network on a data set; with one copy, IMP.

  It goes on after a break where it starts from the soup of the last finished phase, and is
  given the sparsities of the phases after it.

  Args:
    engine: the network and its data.
    key: each phase gets `fold_in(key, phase)`, the same for all copies.
    start: the dense model, or what is gone on from.
    plan: given a phase's pruning record (`phase`, `sparsity`, `pruned_fraction`,
      `norm_drop`, `relative_norm_drop`), the ingredients of its copies and their learning
      rates [m, steps].
    sparsities: by phase, see `jaxsms.sms.phase_sparsities`.
    recipe: how a phase prunes, merges, and what else it does; None means the defaults.

  Yields:
    What `train_copies` yields, and after each phase a `jaxsms.Phase`. Its params are a
    `Model`. Its record is that of `jaxsms.prune_phase`, with metrics of `pruned` (before
    retraining), `pruning_instability` (the share of the test accuracy that pruning took),
    that of `merge_candidates`, and where asked for and possible the `landscape`, see
    `measure_landscape`, and the rungs of the `search`.

  Raises:
    ValueError: see `jaxsms.prune_phase`; or, before training, the merging takes images in
      memory and these are streamed, the temperature is not above 0, or see `check_search`.
    FloatingPointError: all copies of a phase diverged.
  """
  recipe = recipe or PhaseRecipe()
  merging = recipe.merging
  merging.check(engine)
  if recipe.search is not None:
    merging = merging._replace(choose=better_half, selects=True)
  if recipe.distillation is not None:
    check_temperature(recipe.distillation.temperature)
  parts = _Parts(engine, plan, recipe._replace(merging=merging))
  parts.resume(start, sparsities)
  return soup_phases(
    key,
    start.model,
    sparsities,
    prune=parts.prune,
    retrain=parts.retrain,
    merge=parts.merge,
    masks=start.masks,
    finish=parts.finish,
  )


class _Parts:
  """What the loop does in a phase: prune, retrain, merge, finish.

  Attributes:
    accuracy: on test data, of the soup that the next phase prunes; None where it is not
      known of the network in its full shapes.
    cut: the network of the phase, smaller where it shrinks.
    base: its pruned model, in those shapes.
    rungs: of its search.
    state: of the copies that a broken run left; None once they train.
    earlier_rungs: of a search, those up to that state.
    of_soup: the state of a distillation that a broken run left.
  """

  def __init__(self, engine: Engine, plan: Plan, recipe: PhaseRecipe):
    """Takes what `training_phases` takes."""
    self._engine, self._plan, self._recipe = engine, plan, recipe
    self.accuracy: float | None = None
    self.cut = Cut(engine)
    self.base: Model | None = None
    self.rungs: list[Rung] = []
    self.state: TrainState | None = None
    self.earlier_rungs: Sequence[Rung] = ()
    self.of_soup: TrainState | None = None
    self._trained_images = self._last = 0

  def resume(self, start: Start, sparsities: Mapping[int, float]) -> None:
    """Goes on from a state, which is of the copies, or with a teacher of the soup."""
    self.earlier_rungs, self._last = start.rungs, max(sparsities, default=0)
    if start.state is not None and start.state.teacher:
      self.of_soup = start.state
    else:
      self.state = start.state

  def prune(
    self, model: Model, masks: PyTree | None, sparsity: float
  ) -> tuple[Model, PyTree, Record]:
    """Prunes, and measures what that does."""
    prune = self._recipe.prune
    return prune_and_measure(self._engine, prune, model, masks, sparsity, self.accuracy)

  def retrain(
    self, key: jax.Array, pruned: Model, masks: PyTree, record: Record
  ) -> Generator[Any, None, tuple[Model, Record]]:
    """All copies of a phase, see `jaxsms.sms.soup_phases`."""
    search, phase = self._recipe.search, record["phase"]
    shrink = self._recipe.shrink or (lambda engine, pruned, masks: Cut(engine))
    self.cut = shrink(self._engine, pruned, masks)
    self.base = self.cut.shrink(pruned)
    chosen, learning_rates = self._plan(record)
    self._trained_images = int(np.sum(chosen["steps"])) * self._engine.programs.batch_size
    copies = number_of_models(chosen, "ingredients")
    begin, self.state = self.state, None
    earlier, self.earlier_rungs = self.earlier_rungs, ()
    if self.of_soup is not None:
      teacher = model_at(self.of_soup.teacher, 0)
      if search is not None:
        self.rungs = [*earlier, next_rung(key, search, earlier, phase, copies)]
      return Model(teacher.params, teacher.batch_stats), {}
    if begin is None:
      begin = self.cut.engine.start(self.base, copies)
    masks = self.cut.masks(masks)
    if search is None:
      end = yield from train_copies(
        self.cut.engine, masks, key, begin, chosen, learning_rates, phase=phase
      )
    else:
      with_values = functools.partial(self._plan, record)
      end, self.rungs = yield from search_copies(
        self.cut.engine, masks, key, begin, search, with_values, earlier, phase=phase
      )
    return trained(end), {}

  def merge(
    self, key: jax.Array, candidates: Model, record: Record
  ) -> tuple[Model, dict[str, Any]]:
    """The soup in its full shapes, and what was measured of it."""
    engine, accuracy = self.cut.engine, record["pruned"]["validation_accuracy"]
    soup, merged = merge_candidates(
      engine, key, candidates, self._recipe.merging, accuracy, self.base
    )
    full = self.cut.network is None
    self.accuracy = merged["soup"]["test_accuracy"] if full else None
    included = merged_copies(merged)
    if self._recipe.search is not None:
      merged["search"] = rung_records(self.rungs, merged["candidates"], included)
    if record["phase"] in self._recipe.landscapes:
      found = measure_landscape(
        engine, key, candidates, included, soup.params, self._trained_images
      )
      if found is not None:
        cast(dict[str, Any], merged)["landscape"] = found
    return self.cut.expand(soup), cast(dict[str, Any], merged)

  def finish(
    self,
    key: jax.Array,
    soup: Model,
    masks: PyTree,
    candidates: Model,
    record: Record,
  ) -> Generator[Any, None, tuple[Model, Record]]:
    """Distils the candidates of the last phase into its soup, where that is asked for."""
    distillation = self._recipe.distillation
    if distillation is None or record["phase"] != self._last:
      return soup, {}
    cut, of_key = self.cut, jax.random.fold_in(key, RECALIBRATION)
    candidates = recalibrated(cut.engine, of_key, candidates)
    begin, self.of_soup = self.of_soup, None
    model, found = yield from distil(
      cut.engine,
      of_key,
      cut.shrink(soup),
      cut.masks(masks),
      candidates,
      record,
      distillation,
      begin,
    )
    return cut.expand(model), found
