"""What the methods of a run are made of: dense training, and phases of retraining."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.criteria import pruning
from experiments.method_flags import MethodFlags
from experiments.settings import Settings
from experiments.task import Task
from jaxsms.ingredients import ingredient
from jaxsms.training import Chunk, init_variables, retrain_learning_rates, train_copies
from jaxsms.training.measurements import Model, Record, measure, one_model
from jaxsms.training.phases import Plan, run_phases

# Independent streams of a seed's key.
INIT, PRETRAIN, RETRAIN, PRUNE, SCRATCH = 0, 1, 2, 3, 4


class Observer(NamedTuple):
  """What a run tells while it goes on.

  Attributes:
    chunk: called with method, phase (0 in dense training) and each chunk of training.
    phase: called with method and the record of each phase; for dense training, once,
      with its metrics.
    soup: called with the last soup as soon as there is one: `params`, `batch_stats`,
      `masks`.
  """

  chunk: Callable[[str, int, Chunk], None]
  phase: Callable[[str, Record], None]
  soup: Callable[[dict[str, Any]], None]


class Run(NamedTuple):
  """One seed of a run, for its methods.

  Attributes:
    settings: of all seeds.
    task: shared by all seeds.
    key: of the seed.
    observer: told of everything on the way.
  """

  settings: Settings
  task: Task
  key: jax.Array
  observer: Observer

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


def first_model(run: Run) -> tuple[Model, Record]:
  """The dense model of a seed, trained or given, and its metrics."""
  task = run.task
  dense = task.initial
  if dense is None:
    dense = train_dense(run, "dense", task.pretrain_lrs, PRETRAIN)
  metrics = measure(task.programs, task.splits, one_model(dense), task.describe).scores[0]
  run.observer.phase("dense", metrics)
  return dense, metrics


def fresh_model(run: Run) -> Model:
  """Before any training."""
  key = jax.random.fold_in(run.key, INIT)
  return Model(*init_variables(run.task.module, key, run.task.image_shape))


def train_dense(run: Run, method: str, learning_rates: np.ndarray, stream: int) -> Model:
  """Trains a new model without pruning, a step for each learning rate."""
  task, fresh = run.task, fresh_model(run)
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
  )
  return ingredient(Model(*trained), 0)


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
) -> tuple[Model, Any, list[Record]]:
  """All phases of one method: m copies of so many steps each; see `run_phases`."""
  settings, task = run.settings, run.task
  return run_phases(
    task.programs,
    task.splits,
    jax.random.fold_in(run.key, RETRAIN),
    dense,
    retraining_plan(run, m, steps),
    goal_sparsity=settings.goal_sparsity if goal_sparsity is None else goal_sparsity,
    phases=settings.phases,
    greedy=settings.merge == "greedy",
    **run.on(method),
  )
