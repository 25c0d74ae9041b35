"""One seed of a run: dense training, Sparse Model Soups, and what they compare with."""

from collections.abc import Sequence

import jax

from experiments.baselines import BASELINES, ByPhase, longest
from experiments.method_flags import GRADUAL, MethodFlags
from experiments.progress import MEASURED
from experiments.retraining import Observer, Run, first_model, in_one_go, prune_and_retrain
from experiments.settings import Settings
from experiments.task import Task
from experiments.work import Work
from jaxsms.training.measurements import Record

STATISTICS = 0.2  # share of the training images that batch statistics come from
PASSES = 3  # forward passes that a training step is worth
SOUP = "sms"  # the method's name among those of a run


def names_of(settings: Settings) -> tuple[str, ...]:
  """The methods of a run: the soup, and what it is compared with."""
  return (SOUP, *settings.baselines)


def planned_steps(
  settings: Settings, method: MethodFlags, steps_per_epoch: int, names: Sequence[str]
) -> dict[int, int]:
  """Steps of a whole run, by the number of copies that a step trains.

  Args:
    settings: of the run.
    method: the same.
    steps_per_epoch: in training.
    names: of its methods.
  """
  plans = [{1: 0 if method.init else settings.epochs}]
  for name in names:
    if name == SOUP:
      plans.append({settings.ingredients: settings.phases * longest(settings, method)})
    else:
      plans.append(BASELINES[name].epochs(settings, method))
  total: dict[int, float] = {}
  for plan in plans:
    for copies, epochs in plan.items():
      total[copies] = total.get(copies, 0) + epochs
  return {m: round(settings.seeds * steps_per_epoch * n) for m, n in total.items()}


def planned_work(
  settings: Settings, method: MethodFlags, steps_per_epoch: int, names: Sequence[str]
) -> dict[int, int]:
  """Those steps, and under `MEASURED` how many models are measured."""
  models = 1
  for name in names:
    copies = settings.ingredients
    if name != SOUP:
      copies = max(BASELINES[name].epochs(settings, method))
    models += _models(copies, 1 if name in GRADUAL else settings.phases)
  steps = planned_steps(settings, method, steps_per_epoch, names)
  return {**steps, MEASURED: settings.seeds * models}


def _models(copies, phases):
  """How many are measured in so many phases: pruned, candidates and, of several, a soup."""
  return phases * (2 if copies == 1 else copies + 2)


def model_steps(task: Task) -> float:
  """Steps of one copy that measuring one model is worth, roughly: by images it sees."""
  splits = task.splits
  images = sum(getattr(splits, name).size for name in (
    "validation", "test", *splits.also_measured))  # fmt: skip
  images += splits.test.size * sum(map(len, splits.corrupted.values()))
  if jax.tree.leaves(task.shapes.batch_stats):
    images += STATISTICS * splits.train.size
  return images / task.programs.batch_size / PASSES


def run_seed(
  settings: Settings, task: Task, work: Work, observer: Observer, names: Sequence[str]
) -> Record:
  """Everything that one seed decides.

  Args:
    settings: of the run.
    task: shared by all seeds.
    work: the seed, and what is done of it already; grows until all is done.
    observer: told of everything on the way.
    names: of the methods, in the order in which they run.

  Returns:
    The entry of results.json. Its phases are those of the soup, with the metrics of each
    baseline; without a soup they hold those alone.
  """
  run = Run(settings, task, jax.random.key(work.seed), observer, work)
  if work.dense is None:
    first_model(run)
  for name in names:
    if name == SOUP:
      if len(work.phases.get(SOUP, [])) < settings.phases or work.method == SOUP:
        make_soup(run)
    elif name not in work.baselines:
      work.baselines[name] = list(run_baseline(run, name).items())
  phases = {record["phase"]: dict(record) for record in work.phases.get(SOUP, [])}
  for name in names:
    for phase, metrics in work.baselines.get(name, ()):
      record = phases.setdefault(phase, {"phase": phase, "sparsity": metrics["sparsity"]})
      record[name] = metrics
  return {"seed": work.seed, "dense": work.metrics, "phases": list(phases.values())}


def make_soup(run: Run) -> None:
  """Sparse Model Soups; the last one goes to the observer."""
  steps = run.settings.retrain_epochs * run.task.steps_per_epoch
  try:
    prune_and_retrain(run, run.work.dense, SOUP, run.settings.ingredients, steps)
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
