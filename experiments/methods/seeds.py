"""One seed of a run: dense training, Sparse Model Soups, and what they compare with."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms import Phase
from jaxsms.data.subsets import Shares
from jaxsms.phases import Prune
from jaxsms.schedule_registry import RETRAIN_SCHEDULES
from jaxsms.training import (
  Engine,
  Ingredients,
  Model,
  TrainState,
  averaged_ingredients,
  retrain_learning_rates,
  train_copies,
)
from jaxsms.training.classifier import logit_adjusted
from jaxsms.training.distilling import Distillation
from jaxsms.training.engine import Plan, Record, one_model
from jaxsms.training.failures import COPY_FAULTS
from jaxsms.training.measurements import measure
from jaxsms.training.merging import (
  BY_RATIOS,
  GIVEN,
  Merging,
  merging_of,
  weights_by_ratios,
)
from jaxsms.training.phases import PhaseRecipe, Start, training_phases
from jaxsms.training.search import Rung
from jaxsms.training.state import seed_ingredients
from jaxsms.trees import model_at

from ..config.pruning_criteria import pruning
from ..setup.seed_streams import INIT, PRETRAIN, PRUNE, RETRAIN, SHARES
from .seed_state import SeedState

if TYPE_CHECKING:  # methods know no flags: the flags know the methods
  from ..config.run_config import Config
  from ..setup.task import Task

SOUP, DENSE = "sms", "dense"  # the names of the soup and of dense training in a run
# What a method yields: chunks of training, states to be saved, and phases.
Events = Generator[Any, None, Any]


class Soup(NamedTuple):
  """A soup of a seed, to be written down: the last one, or a one-shot soup.

  Attributes:
    params: parameters.
    batch_stats: batch statistics.
    masks: its masks.
    phase: whose sparsity a one-shot soup has; None for the last soup of the phases.
  """

  params: Any
  batch_stats: Any
  masks: Any
  phase: int | None = None


class Run(NamedTuple):
  """One seed of a run, for its methods.

  Attributes:
    config: of all seeds.
    task: shared by all seeds.
    key: of the seed.
    seed_state: what is done of it already, and grows; None for a method that begins anew.
  """

  config: Config
  task: Task
  key: jax.Array
  seed_state: SeedState | None = None

  @property
  def engine(self) -> Engine:
    """The network and its data."""
    return self.task.engine

  @property
  def prune(self) -> Prune:
    """The criterion."""
    prune = pruning(self.config, self.stream(PRUNE), self.task.groups)
    if self.task.clock is None:
      return prune
    return functools.partial(prune, measure=self.task.clock)

  @property
  def sparsities(self) -> dict[int, float]:
    """After each phase."""
    return self.config.sparsity_of_phases()

  def shares(self, copies: int) -> Shares | None:
    """The training examples of each copy, where --vary=subset gives several their own."""
    if self.task.shares is None or copies == 1:
      return None
    return self.task.shares(self.stream(SHARES), copies)

  @property
  def retrain_steps(self) -> int:
    """Of one copy in a phase."""
    return self.config.retrain_epochs * self.task.steps_per_epoch

  def stream(self, number: int) -> jax.Array:
    """One of the independent keys of the seed, such as that of `RETRAIN`."""
    return jax.random.fold_in(self.key, number)

  def anew(self) -> Run:
    """The same for a method that cannot be taken up in its midst."""
    engine = self.engine._replace(wants_state=lambda: False)
    return self._replace(task=self.task._replace(engine=engine), seed_state=None)


def given_values(config: Config, m: int) -> dict[str, np.ndarray]:
  """What --values gives the copies, by variable; a single one has the flags' own."""
  given = config.values is not None and (m > 1 or config.vary == "seed")
  return {config.vary: np.array(config.values[:m])} if given else {}


def varied_ingredients(
  run: Run, m: int, steps: int, values: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
  """Ingredients that differ in what --vary says; a single one has the flags' own values.

  Args:
    run: a seed of it.
    m: how many.
    steps: of each copy, unless that is what varies.
    values: [m] by variable; None means those of the flags.
  """
  config, shares = run.config, run.shares(m)
  chosen = seed_ingredients(m, config.weight_decay, steps)
  if shares is not None:
    chosen |= {"examples": shares.indices, "size": shares.sizes}
  if config.logit_adjustment:
    labels = run.engine.splits.train.labels
    chosen = logit_adjusted(chosen, labels, run.task.module.num_classes)
  if config.vary == "subset":
    return chosen
  if "seed" not in config.vary.split(","):
    chosen["seed"][:] = 0
  for name, of in (given_values(config, m) if values is None else values).items():
    if name == "epochs":
      chosen["steps"] = of.astype(np.int32) * run.task.steps_per_epoch
    elif name in chosen:
      chosen[name] = of.astype(chosen[name].dtype)
  return chosen


def averaged(config: Config, chosen: Ingredients) -> Ingredients:
  """The ingredients with the average of --average, if there is one."""
  if config.average == "none":
    return chosen
  ema, share = config.average == "ema", config.average_from
  if share is None:
    share = 0.0 if ema else 0.5
  return averaged_ingredients(
    chosen,
    decay=config.ema_decay if ema else 1.0,
    after=(share * chosen["steps"]).astype(np.int32),
    every=config.average_every,
  )


def fresh_model(run: Run) -> Model:
  """Before any training."""
  return run.engine.init(run.task.module, run.stream(INIT), run.task.image_shape)


def train_dense(run: Run, learning_rates: np.ndarray, stream: int) -> Events:
  """Trains a new model without pruning, a step for each learning rate; returns it."""
  engine, fresh = run.engine, fresh_model(run)
  state = take_state(run) or engine.start(fresh, 1)
  end = yield from train_copies(
    engine,
    jax.tree.map(lambda x: jnp.ones_like(x, bool), fresh.params),
    run.stream(stream),
    state,
    seed_ingredients(1, run.config.weight_decay, len(learning_rates)),
    learning_rates[None],
  )
  return model_at(Model(end.params, end.batch_stats), 0)


def dense_model(run: Run) -> Events:
  """The dense model of a seed, trained or given, and its metrics."""
  task, seed_state = run.task, run.seed_state
  seed_state.dense = task.initial
  if seed_state.dense is None:
    seed_state.dense = yield from train_dense(run, task.pretrain_lrs, PRETRAIN)
  (seed_state.metrics,) = measure(run.engine, one_model(seed_state.dense)).scores
  yield Phase(seed_state.dense, None, None, seed_state.metrics)


def take_state(run: Run) -> TrainState | None:
  """That of the training that was under way, for the first one that goes on."""
  if run.seed_state is None:
    return None
  state, run.seed_state.state = run.seed_state.state, None
  return state


def retraining_plan(run: Run, m: int, steps: int) -> Plan:
  """Ingredients and learning rates of m copies, of so many steps unless that varies.

  Args:
    run: a seed of it.
    m: number of copies.
    steps: of each.

  Returns:
    A plan; with values [m] by variable it is one of these.
  """
  config, task = run.config, run.task

  def plan(record, values=None):
    values = given_values(config, m) if values is None else values
    chosen = averaged(config, varied_ingredients(run, m, steps, values))
    if not np.max(chosen["steps"]):
      return chosen, np.zeros([m, 0], np.float32)
    needs = RETRAIN_SCHEDULES[config.retrain_schedule].needs
    options = {name: record[name] for name in needs}
    if "learning_rate" in values:
      options["initial_lr"] = values["learning_rate"].astype(np.float32)
    lrs = retrain_learning_rates(
      config.retrain_schedule,
      task.pretrain_lrs,
      chosen["steps"],
      pretrain_warmup_steps=task.warmup_steps,
      **options,
    )
    return chosen, lrs

  return plan


def merging_for(run: Run, m: int) -> Merging:
  """That of --merge, for m copies."""
  config = run.config
  merging = merging_of(config.merge, config.weight_decay, copy_weights(run, m))
  if config.subsets in ("dirichlet", "groups"):  # their copies may know few classes
    merging = merging._replace(may_collapse=False)
  return merging


def prune_and_retrain(
  run: Run,
  dense: Model,
  method: str,
  m: int,
  steps: int,
  *,
  distillation: Distillation | None = None,
) -> Events:
  """All phases of one method: m copies of so many steps each; returns their records.

  What its seed_state holds of them already is not done again.
  """
  seed_state = run.seed_state or SeedState(0)  # which then nobody reads
  seed_state.begin(method)
  model, masks, records = dense, None, []
  if seed_state.model is not None:
    model, masks = seed_state.model, seed_state.masks
    records = list(seed_state.phases[method])
  rungs = [Rung(**rung) for rung in seed_state.rungs]
  for event in training_phases(
    run.engine,
    run.stream(RETRAIN),
    Start(model, masks, take_state(run), rungs),
    retraining_plan(run, m, steps),
    {phase: s for phase, s in run.sparsities.items() if phase > len(records)},
    PhaseRecipe(
      prune=run.prune,
      merging=merging_for(run, m),
      landscapes=landscape_phases(run) if method == SOUP else (),
      shrink=run.task.shrink,
      distillation=distillation,
      search=run.config.search(steps, run.task.steps_per_epoch) if m > 1 else None,
    ),
  ):
    if isinstance(event, Rung):  # it is saved with the next state
      seed_state.rungs.append(event._asdict())
      continue
    if isinstance(event, Phase):
      records.append(event.record)
      seed_state.model, seed_state.masks = event.params, event.masks
      seed_state.phases[method], seed_state.rungs = list(records), []
    yield event
  return records


def copy_weights(run: Run, m: int) -> np.ndarray | None:
  """What --merge=by_samples and by_ratios weight copies by; one copy has all."""
  config = run.config
  if config.merge not in GIVEN:
    return None
  if config.merge == BY_RATIOS and m > 1:
    return weights_by_ratios(config.values[:m], config.retained)
  shares = run.shares(m)
  return np.ones(m) if shares is None else shares.sizes


def landscape_phases(run: Run) -> range:
  """The phases of --landscape."""
  phases = run.config.phases
  first = {"last": phases, "all": 1, "none": phases + 1}[run.config.landscape]
  return range(first, phases + 1)


def records_of(events: Iterator[Any]) -> Events:
  """Passes events on, but for those of a dense round; returns the phases' records."""
  records = []
  for event in events:
    if isinstance(event, Phase):
      if not event.record["phase"]:
        continue
      records.append(event.record)
    yield event
  return records


def metrics_by_phase(records: list[Record]) -> dict[int, Record]:
  """Metrics of the soups, with the copies that diverged or collapsed, if any did."""
  return {
    record["phase"]: record["soup"]
    | {name: record[name] for name in COPY_FAULTS if record.get(name)}
    for record in records
  }
