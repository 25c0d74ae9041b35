"""One seed of a run: dense training, Sparse Model Soups, and what they compare with."""

import jax

from experiments.baselines import BASELINES, longest
from experiments.method_flags import MethodFlags
from experiments.retraining import Observer, Run, first_model, prune_and_retrain
from experiments.settings import Settings
from experiments.task import Task
from jaxsms.training.measurements import Record


def planned_steps(
  settings: Settings, method: MethodFlags, steps_per_epoch: int
) -> dict[int, int]:
  """Steps of a whole run, by the number of copies that a step trains."""
  plans = [{1: 0 if method.init else settings.epochs}]
  plans += [{settings.ingredients: settings.phases * longest(settings, method)}]
  plans += [BASELINES[name].epochs(settings, method) for name in settings.baselines]
  total: dict[int, float] = {}
  for plan in plans:
    for copies, epochs in plan.items():
      total[copies] = total.get(copies, 0) + epochs
  return {m: round(settings.seeds * steps_per_epoch * n) for m, n in total.items()}


def run_seed(settings: Settings, task: Task, seed: int, observer: Observer) -> Record:
  """Everything that one seed decides.

  Args:
    settings: of the run.
    task: shared by all seeds.
    seed: decides initialisation, batch orders, augmentation and dropout.
    observer: told of everything on the way.

  Returns:
    The entry of results.json.
  """
  run = Run(settings, task, jax.random.key(seed), observer)
  dense, metrics = first_model(run)
  steps = settings.retrain_epochs * task.steps_per_epoch
  model, masks, phases = prune_and_retrain(run, dense, "sms", settings.ingredients, steps)
  observer.soup({"params": model.params, "batch_stats": model.batch_stats, "masks": masks})
  for name in settings.baselines:
    by_phase = BASELINES[name].run(run, dense)
    for phase in phases:
      if phase["phase"] in by_phase:
        phase[name] = by_phase[phase["phase"]]
  return {"seed": seed, "dense": metrics, "phases": phases}
