"""One seed of a run: dense training, Sparse Model Soups, and what they compare with."""

import jax

from experiments.baselines import BASELINES, ByPhase, longest
from experiments.method_flags import MethodFlags
from experiments.retraining import Observer, Run, first_model, in_one_go, prune_and_retrain
from experiments.settings import Settings
from experiments.task import Task
from experiments.work import Work
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


def run_seed(settings: Settings, task: Task, work: Work, observer: Observer) -> Record:
  """Everything that one seed decides.

  Args:
    settings: of the run.
    task: shared by all seeds.
    work: the seed, and what is done of it already; grows until all is done.
    observer: told of everything on the way.

  Returns:
    The entry of results.json.
  """
  run = Run(settings, task, jax.random.key(work.seed), observer, work)
  if work.dense is None:
    first_model(run)
  if len(work.phases.get("sms", [])) < settings.phases or work.method == "sms":
    make_soup(run)
  for name in settings.baselines:
    if name not in work.baselines:
      work.baselines[name] = list(run_baseline(run, name).items())
  phases = [dict(record) for record in work.phases["sms"]]
  for name in settings.baselines:
    by_phase = dict(work.baselines[name])
    for phase in phases:
      if phase["phase"] in by_phase:
        phase[name] = by_phase[phase["phase"]]
  return {"seed": work.seed, "dense": work.metrics, "phases": phases}


def make_soup(run: Run) -> None:
  """Sparse Model Soups; the last one goes to the observer."""
  steps = run.settings.retrain_epochs * run.task.steps_per_epoch
  try:
    prune_and_retrain(run, run.work.dense, "sms", run.settings.ingredients, steps)
  except FloatingPointError:  # the soup of the phase before is still good
    give_soup(run)
    raise
  give_soup(run)


def give_soup(run: Run) -> None:
  """Hands the last soup to the observer, if there is one."""
  model, masks = run.work.model, run.work.masks
  if model is not None:
    params, batch_stats = model
    run.observer.soup({"params": params, "batch_stats": batch_stats, "masks": masks})


def run_baseline(run: Run, name: str) -> ByPhase:
  """A baseline: goes on where it was, or is done in one go."""
  baseline, work = BASELINES[name], run.work
  if not baseline.resumes:
    work.begin(name)
    run.observer.begin(work)
    run = in_one_go(run)
  return baseline.run(run, work.dense)
