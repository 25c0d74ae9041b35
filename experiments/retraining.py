"""What the methods of a run are made of: dense training, and phases of retraining."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.criteria import pruning
from experiments.method_flags import MethodFlags, landscape_phases
from experiments.settings import Settings
from experiments.task import Task
from experiments.work import Work
from jaxsms.training import (
  Chunk,
  Saving,
  TrainState,
  init_variables,
  retrain_learning_rates,
  train_copies,
)
from jaxsms.training.measurements import Model, Record, measure, one_model
from jaxsms.training.phases import Phases, Plan, run_phases
from jaxsms.trees import model_at

# Independent streams of a seed's key.
INIT, PRETRAIN, RETRAIN, PRUNE, SCRATCH = 0, 1, 2, 3, 4


class Observer(NamedTuple):
  """What a run tells and asks while it goes on.

  Attributes:
    chunk: called with method, phase (0 in dense training) and each chunk of training.
    phase: called with method and the record of each phase; for dense training, once,
      with its metrics.
    soup: called with the last soup as soon as there is one: `params`, `batch_stats`,
      `masks`.
    due: whether the training under way is to be saved, asked after every chunk.
    save: called with a seed's work when it is, and after each phase.
    begin: called with the work before a method that is done in one go: what is there has
      to be saved, for nothing is before its end.
    pause: called after each of its chunks: whoever wants the run to stop raises.
  """

  chunk: Callable[[str, int, Chunk], None]
  phase: Callable[[str, Record], None]
  soup: Callable[[dict[str, Any]], None]
  due: Callable[[], bool] = lambda: False
  save: Callable[[Work], None] = lambda work: None
  begin: Callable[[Work], None] = lambda work: None
  pause: Callable[[], None] = lambda: None


class Run(NamedTuple):
  """One seed of a run, for its methods.

  Attributes:
    settings: of all seeds.
    task: shared by all seeds.
    key: of the seed.
    observer: told of everything on the way.
    work: what is done of it already, and grows; None while a method is done in one go.
  """

  settings: Settings
  task: Task
  key: jax.Array
  observer: Observer
  work: Work | None = None

  def on(self, method: str) -> dict[str, Any]:
    """What `run_phases` and its like take: how to prune, measure and tell."""
    return {
      "prune": pruning(
        self.settings, self.task.method, jax.random.fold_in(self.key, PRUNE)
      ),
      "describe": self.task.describe,
      "chunk_steps": chunk_steps(self.settings),
      "on_chunk": functools.partial(self.observer.chunk, method),
      "on_phase": functools.partial(self.observer.phase, method),
    }


def saving(run: Run) -> Saving | None:
  """Hands a seed's work to the observer, with the state of the training under way."""
  work = run.work
  if work is None:
    return None

  def save_state(state):
    run.observer.save(dataclasses.replace(work, state=state))

  def save_phases(done):
    work.model, work.masks, work.phases[work.method] = done
    run.observer.save(work)

  return Saving(run.observer.due, save_state, save_phases)


def in_one_go(run: Run) -> Run:
  """The same for a method that cannot be taken up in its midst."""
  observer = run.observer

  def on_chunk(method, phase, chunk):
    observer.chunk(method, phase, chunk)
    observer.pause()

  return run._replace(observer=observer._replace(chunk=on_chunk), work=None)


def chunk_steps(settings: Settings) -> int:
  """Most steps in one dispatch: an epoch, where the host need not look more often."""
  if settings.chunk_steps is not None:
    return settings.chunk_steps
  often = settings.stream or jax.default_backend() == "cpu"
  return 50 if often else 2**31


def ingredients(m: int, weight_decay: float, steps: int) -> dict[str, np.ndarray]:
  """Ingredients that differ in their seed."""
  return {
    "seed": np.arange(m, dtype=np.int32),
    "weight_decay": np.full([m], weight_decay, np.float32),
    "steps": np.full([m], steps, np.int32),
  }


def varied(
  settings: Settings, method: MethodFlags, m: int, steps: int, steps_per_epoch: int
) -> dict[str, np.ndarray]:
  """Ingredients that differ in what --vary says; a single one has the flags' own values.

  Args:
    settings: of the run.
    method: the same.
    m: how many.
    steps: of each copy, unless that is what varies.
    steps_per_epoch: in training.
  """
  chosen = ingredients(m, settings.weight_decay, steps)
  if method.vary == "seed":
    if method.values is not None:
      chosen["seed"] = np.array(method.values[:m], np.int32)
    return chosen
  chosen["seed"][:] = 0
  if m > 1 and method.vary == "weight_decay":
    chosen["weight_decay"] = np.array(method.values, np.float32)
  if m > 1 and method.vary == "epochs":
    chosen["steps"] = np.array(method.values, np.int32) * steps_per_epoch
  return chosen


def first_model(run: Run) -> None:
  """The dense model of a seed's work, trained or given, and its metrics."""
  task, work = run.task, run.work
  dense = task.initial
  if dense is None:
    dense = train_dense(run, "dense", task.pretrain_lrs, PRETRAIN)
  work.dense = dense
  (work.metrics,) = measure(
    task.programs, task.splits, one_model(dense), task.describe
  ).scores
  run.observer.phase("dense", work.metrics)
  run.observer.save(work)


def fresh_model(run: Run) -> Model:
  """Before any training."""
  key = jax.random.fold_in(run.key, INIT)
  return Model(*init_variables(run.task.module, key, run.task.image_shape))


def train_dense(run: Run, method: str, learning_rates: np.ndarray, stream: int) -> Model:
  """Trains a new model without pruning, a step for each learning rate."""
  task, fresh = run.task, fresh_model(run)
  state = take_state(run)
  trained = train_copies(
    task.programs,
    task.splits.train,
    jax.tree.map(lambda x: jnp.ones(x.shape, bool), fresh.params),
    jax.random.fold_in(run.key, stream),
    *fresh,
    ingredients(1, run.settings.weight_decay, len(learning_rates)),
    learning_rates[None],
    chunk_steps=chunk_steps(run.settings),
    on_chunk=functools.partial(run.observer.chunk, method, 0),
    state=state,
    saving=saving(run),
  )
  return model_at(Model(*trained), 0)


def take_state(run: Run) -> TrainState | None:
  """That of the training that was under way, for the first one that goes on."""
  if run.work is None:
    return None
  state, run.work.state = run.work.state, None
  return state


def retraining_plan(run: Run, m: int, steps: int) -> Plan:
  """Ingredients and learning rates of m copies, of so many steps unless that varies."""
  settings, task = run.settings, run.task
  chosen = varied(settings, task.method, m, steps, task.steps_per_epoch)

  def plan(record):
    if not np.max(chosen["steps"]):
      return chosen, np.zeros([m, 0], np.float32)
    options = {}
    if settings.retrain_schedule == "ALLR":
      options = {k: record[k] for k in ("relative_norm_drop", "pruned_fraction")}
    if m > 1 and task.method.vary == "learning_rate":
      options["initial_lr"] = np.array(task.method.values, np.float32)
    lrs = retrain_learning_rates(
      settings.retrain_schedule,
      task.pretrain_lrs,
      chosen["steps"],
      pretrain_warmup_steps=task.warmup_steps,
      **options,
    )
    return chosen, lrs

  return plan


def prune_and_retrain(
  run: Run,
  dense: Model,
  method: str,
  m: int,
  steps: int,
  goal_sparsity: float | None = None,
) -> Phases:
  """All phases of one method: m copies of so many steps each; see `run_phases`.

  What the run's work holds of them already is not done again.
  """
  settings, task, work = run.settings, run.task, run.work
  done = None
  if work is not None:
    work.begin(method)
    if work.model is not None:
      done = Phases(work.model, work.masks, work.phases[method])
  return run_phases(
    task.programs,
    task.splits,
    jax.random.fold_in(run.key, RETRAIN),
    dense,
    retraining_plan(run, m, steps),
    goal_sparsity=settings.goal_sparsity if goal_sparsity is None else goal_sparsity,
    phases=settings.phases,
    greedy=settings.merge == "greedy",
    merge_name=settings.merge if settings.merge not in ("uniform", "greedy") else None,
    prior=settings.weight_decay,
    landscapes=landscape_phases(settings, task.method) if method == "sms" else (),
    done=done,
    state=take_state(run),
    saving=saving(run),
    **run.on(method),
  )
