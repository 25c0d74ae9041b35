"""Which merge is worth it: the same candidates of each phase, merged in every way.

python -m experiments.benchmarks.bench_merges --seed=700 --seeds=10
python -m experiments.benchmarks.bench_merges --dataset=FILE.npz --model=resnet8 --json=OUT
The first and the last phase are measured. Each goes on from the mean, as in
experiments.sms, whose flags of data, network, training and pruning these are.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from jaxsms import Phase, sparsity, stack
from jaxsms.data import Dataset
from jaxsms.devices.ingredients import take_ingredients
from jaxsms.merges import MERGES
from jaxsms.phases import Merge, merge_phase
from jaxsms.training import Engine, Model, last_state
from jaxsms.training.measurements import measure, recalibrated
from jaxsms.training.merging import GIVEN, Merging, candidate_merges, merging_of
from jaxsms.training.phases import PhaseRecipe, Start, training_phases
from jaxsms.trees import number_of_models

from ..config import device_flags, run_config
from ..config.fields import define_flags, flag, numbers, one_of, read_fields
from ..methods.seeds import Run, retraining_plan, train_dense
from ..run.environment import environment
from ..run.flag_files import check_no_arguments, refusals, run_with_flags, set_log_level
from ..run.terminal import print_line, terminal
from ..setup import hardware
from ..setup.seed_streams import PRETRAIN, RETRAIN
from ..setup.task import Task, load, make_task, with_data
from .bench_figures import writable, write_figures
from .bench_merges_tables import OF_TWO, UNIFORM, tables

Results = dict[str, Any]
FAMILIES = ("seed", "weight_decay", "learning_rate")
REFERENCES = ("mean_candidate", "best_candidate", "prediction_ensemble")
# All copies have the same data here: weighted by samples they give the mean.
NAMES = tuple(name for name in candidate_merges() if name not in GIVEN)
# Flags of the main job that mean nothing here.
REFUSED = ("merge", "vary", "values", "baselines", "workdir", "stream", "landscape")


def _spaced(name: str, least: float, most: float) -> Callable[[dict[str, Any]], tuple]:
  """A `fill` with multiples of a flag, one for each copy, in equal ratios."""

  def fill(values):
    factors = np.geomspace(least, most, values["ingredients"])
    return tuple(float(f"{values[name] * x:.3g}") for x in factors)

  return fill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(run_config.Config):
  """The flags of a run, and those of this file."""

  families: tuple[str, ...] = flag(
    f"What differs between the copies, each by itself: {', '.join(FAMILIES)}.",
    one_of("family", FAMILIES),
    default=list(FAMILIES),
    parse=lambda words, name, values: tuple(dict.fromkeys(words)),
  )
  weight_decays: tuple[float, ...] = flag(
    "Of the copies that differ in it. Default: from --weight_decay to 100 times that.",
    parse=numbers,
    fill=_spaced("weight_decay", 1.0, 100.0),
  )
  learning_rates: tuple[float, ...] = flag(
    "Of the copies that differ in it. Default: from 0.03 of --learning_rate to all of it.",
    parse=numbers,
    fill=_spaced("learning_rate", 0.03, 1.0),
  )
  json: str | None = flag("File for all figures.", writable)


def main(argv: list[str], given: flags.FlagValues = flags.FLAGS) -> None:
  """Measures what the flags say; bad input ends it with one sentence and exit status 2."""
  set_log_level(logging.ERROR)  # of copies that are left out the table tells
  with refusals():
    check_no_arguments(argv)
    config = read_config(given)
    hardware.start(config, config.ingredients)
    dataset = load(config)
    assert isinstance(dataset, Dataset)  # --stream is refused
    config = with_data(config, dataset)
    task = make_task(config, dataset)
  results = {"flags": flags_of(config), "environment": environment(), "seeds": []}
  errors = terminal(stderr=True)
  for seed in range(config.seed, config.seed + config.seeds):
    started = time.monotonic()
    results["seeds"].append(measure_seed(config, task, seed))
    print_line(errors, f"seed {seed} took {time.monotonic() - started:.0f} s")
    write_figures(config.json, results)
  print("\n".join(tables(results)))


def flags_of(config: Config) -> Results:
  """All flags by name, those of this file among them."""
  own = ("families", "weight_decays", "learning_rates")
  return config.flags() | {name: getattr(config, name) for name in own}


def read_config(given: flags.FlagValues) -> Config:
  """The parsed flags.

  Raises:
    ValueError: a flag is out of range, means nothing here, or does not fit others.
  """
  for name in REFUSED:
    if given[name].present:
      raise ValueError(f"--{name} is of the main job: leave it out")
  config = read_fields(Config, given, {"baselines": ()})
  run_config.check(config)
  device_flags.check(config, config.ingredients)
  m = config.ingredients
  if m < 2:
    raise ValueError(f"--ingredients is {m}: a merge is of two models at least")
  for name in config.families:
    values = values_of(config, name)
    if values is not None and (
      len(set(values)) < m or len(values) != m or not np.isfinite(values).all()
    ):
      raise ValueError(
        f"--{name}s is {','.join(f'{x:g}' for x in values)}: give {m} numbers, each copy "
        "another one"
      )
    run_config.check(of_family(config, name))
  return config


def values_of(config: Config, family: str) -> tuple[float, ...] | None:
  """What the copies of a family have, one each; None gives each its own seed."""
  return None if family == "seed" else getattr(config, f"{family}s")


def of_family(config: Config, family: str) -> Config:
  """The flags of a run whose copies differ in one thing."""
  return dataclasses.replace(config, vary=family, values=values_of(config, family))


def measure_seed(config: Config, task: Task, seed: int) -> Results:
  """Trains a dense model, and from it the copies of each family, phase after phase."""
  engine = task.engine._replace(
    describe=lambda params: {"sparsity": float(sparsity(params))}
  )
  run = Run(config, task._replace(engine=engine), jax.random.key(seed))
  dense = task.initial
  if dense is None:
    dense = last_state(train_dense(run, task.pretrain_lrs, PRETRAIN))
  families = {
    name: list(measured_phases(run._replace(config=of_family(config, name)), dense))
    for name in config.families
  }
  return {"seed": seed, "families": families}


def measured_phases(run: Run, dense: Model) -> Iterator[Results]:
  """The first and the last phase of the soup of a seed, with all merges of candidates.

  Args:
    run: a seed, and the flags of a family.
    dense: what the first phase prunes.

  Yields:
    `phase`, `sparsity`, `merges`: metrics and weights by name, `candidates`: their metrics,
    `references`: those of `REFERENCES`, and the `geometry` of the candidates.
  """
  config, found = run.config, {}
  numbers_of_phases = iter(run.sparsities)

  def of(engine, key, base):
    def uniform(candidates):
      if (number := next(numbers_of_phases)) in (1, config.phases):
        found[number] = merged_in_every_way(
          engine, key, base, candidates, config.weight_decay
        )
      return merging_of(UNIFORM).of(engine, key, base)(candidates)

    return uniform

  for event in training_phases(
    run.engine,
    run.stream(RETRAIN),
    Start(dense),
    retraining_plan(run, config.ingredients, run.retrain_steps),
    run.sparsities,
    PhaseRecipe(run.prune, Merging(of), shrink=run.task.shrink),
  ):
    if isinstance(event, Phase) and event.record["phase"] in found:
      record = event.record
      copied = ("phase", "sparsity", "candidates", "geometry", "diverged", "collapsed")
      yield {
        **{name: record[name] for name in copied},
        "references": {name: record[name] for name in REFERENCES},
        "merges": found[record["phase"]],
      }


def merged_in_every_way(
  engine: Engine, key: jax.Array, base: Model | None, candidates: Model, prior: float
) -> Results:
  """All merges of the same candidates, each with batch statistics of its own.

  Args:
    engine: the network and its data.
    key: of the phase's batch statistics.
    base: the pruned model that the candidates were trained from.
    candidates: leaves [m, ...].
    prior: the L2 coefficient of training.

  Returns:
    By name metrics, and the `weights` of the candidates.
  """
  merges: dict[str, tuple[Merge, Model]] = {}
  first_two = take_ingredients(candidates, [0, 1][: number_of_models(candidates)])
  for name in NAMES:
    merge = merging_of(name, prior).of(engine, key, base)
    if MERGES[name].two or name == UNIFORM:
      merges[name + OF_TWO] = merge, first_two
    if not MERGES[name].two:
      merges[name] = merge, candidates
  merged = {name: merge_phase(models, merge) for name, (merge, models) in merges.items()}
  soups = recalibrated(engine, key, stack([soup for soup, _ in merged.values()]))
  scores = measure(engine, soups).scores
  return {
    name: score | {"weights": weights.tolist()}
    for (name, (_, weights)), score in zip(merged.items(), scores, strict=True)
  }


if __name__ == "__main__":
  define_flags(Config)  # by the binary alone
  flags.adopt_module_key_flags(run_config)
  run_with_flags(main)
