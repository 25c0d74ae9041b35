"""The runs of a comparison's parts, each in its own folder, and what they add up to."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxsms import checkpoint
from jaxsms.devices.meshes import fetch
from jaxsms.disk import storage
from jaxsms.training import Model

from .. import methods
from ..config.run_config import Config
from ..methods import DENSE
from ..methods.planning import MEASURED
from ..methods.seed_state import SeedState
from ..run import checkpointing, run_directory, running
from ..run.lock import Busy, Lock
from ..run.network_costs import inference
from ..run.progress import RunProgress
from ..run.run_directory import agreed, is_writer
from ..run.signals import StopSignals
from ..setup.task import Task
from . import parts as comparison
from .parts import Part, folder_of, is_finished

MODEL = "model"  # in the folder of a dense part


class Finished(ValueError):
  """There is nothing left to do in a part."""


class Comparison(NamedTuple):
  """What all parts share.

  Attributes:
    config: its number of copies is the largest.
    task: data, network and programs.
    workdir: of the comparison.
    run: what its `run.json` holds.
    defining: what the numbers of every part depend on.
    parts: all, in the order in which they are done.
  """

  config: Config
  task: Task
  workdir: storage.epath.Path
  run: dict[str, Any]
  defining: dict[str, Any]
  parts: list[Part]


def planned(shared: Comparison, part: Part) -> dict[int, int]:
  """What a part has to do, see `methods.planned_work`."""
  config = part.config(shared.config)
  steps = methods.planned_work(config, shared.task.steps_per_epoch, part.methods)
  if part.method != DENSE:
    steps[MEASURED] -= config.seeds
  if part.method != DENSE and config.init is None:
    steps[1] -= config.epochs * shared.task.steps_per_epoch
  return steps


def run_part(
  shared: Comparison,
  part: Part,
  progress: RunProgress,
  plan: collections.Counter,
  signals: StopSignals,
) -> None:
  """Does one part in its own run directory, or what is left of it.

  Raises:
    Busy: another process is at it.
    Damaged: the dense model that it begins with.
    FloatingPointError: all copies diverged.
    OSError: something cannot be read or written.
    Stopped: a signal asked for it.
  """
  task, config = shared.task, part.config(shared.config)
  describe = functools.partial(task.engine.describe, goal_sparsity=config.goal_sparsity)
  task = task._replace(engine=task.engine._replace(describe=describe))
  folder = folder_of(shared.workdir, part)
  own = {name: getattr(config, name) for name in comparison.GROWS}
  wanted = {**shared.defining, **own}
  run = {**shared.run, "flags": config.flags(), "defining": storage.plain(wanted)}
  before = run_directory.read_run(folder)
  if before:
    run_directory.check_same(folder, before, run["defining"])
  steps, first_seed = planned(shared, part), shared.parts[0].seed
  checkpointer = checkpointing.Checkpointer(folder, run, config, signals)
  first = functools.partial(first_work, shared, part, describe)
  try:
    messages = checkpointer.open(task, steps, first)
  except Finished:
    return
  for sentence in messages:
    checkpointing.print_once(sentence)
  with checkpointer:
    plan.subtract({m: n - checkpointer.steps_left.get(m, n) for m, n in steps.items()})
    goal = "" if part.goal_sparsity is None else f"{100 * part.goal_sparsity:g} %  "
    listener = running.Listener(progress, checkpointer, task.steps_per_epoch, goal)
    if not checkpointer.seeds:
      entry = running.run_seed(task, part.methods, listener, first_seed)
      if part.method == DENSE:
        run_directory.save_model(folder / MODEL, checkpointer.seed_state.dense._asdict())
      checkpointer.finish_seed(entry)
    results = {"part": part._asdict()} | running.results_of(task, checkpointer)
    run_directory.write_results(folder, results)
    if part.method == methods.SOUP and part.seed == first_seed and is_writer():
      results["inference"] = inference(task, folder, part.seed)
      run_directory.write_results(folder, results)
    checkpointer.forget()


def first_work(shared: Comparison, part: Part, describe: Callable) -> SeedState | None:
  """What a part begins with: the dense model of its seed, and its metrics.

  What `describe` gives of it depends on the part's goal sparsity.

  Raises:
    Finished: the part is, by now.
    Damaged: that model is; the part that made it is set aside.
  """
  if is_finished(shared.workdir, part):
    raise Finished("another process has finished it by now")
  if part.method == DENSE:
    return None
  folder = folder_of(shared.workdir, Part(DENSE, part.seed))
  model, problem = None, None
  try:
    metrics = run_directory.read_results(folder)["seeds"][0]["dense"]
    model = checkpoint.restore(folder / MODEL, shared.task.shapes._asdict())
  except (ValueError, TypeError) as error:
    problem = error
  if agreed(problem is not None):
    if is_writer():
      set_aside(folder, shared.task.shapes._asdict())
    agreed(True)  # the others wait
    raise storage.Damaged(f"the dense model in {folder} is damaged or gone")
  model = Model(**model)
  return SeedState(part.seed, dense=model, metrics=metrics | describe(fetch(model.params)))


def set_aside(folder: storage.epath.Path, like: dict[str, Any]) -> None:
  """Gives the folder of a damaged dense model another name, unless it is in use."""
  lock = Lock(folder)
  try:
    lock.acquire()
  except Busy:  # another process makes it anew
    return
  try:
    checkpoint.restore(folder / MODEL, like)
  except ValueError:
    storage.set_aside(folder)
  finally:
    lock.release()


def write(shared: Comparison, failed: dict[Part, str]) -> dict[str, Any]:
  """Adds up what is finished, into results.json; gives its content.

  Args:
    shared: the comparison.
    failed: why parts failed.
  """
  parts = comparison.finished_parts(shared.workdir)
  cells = comparison.cells_of(parts)
  results = {
    "kind": "comparison",
    "flags": {**shared.run["flags"], "workdir": str(shared.workdir)},
    "environment": shared.run["environment"],
    "environments": comparison.environments(parts),
    "ood_sources": shared.task.ood_sources,
    "methods": sorted({part.method for part in parts} - {DENSE}),
    "cells": cells,
    "dense": {
      str(p.seed): r["seeds"][0]["dense"] for p, r in parts.items() if p.method == DENSE
    },
    "inference": next((r["inference"] for r in parts.values() if "inference" in r), None),
    "seconds": math.fsum(r["seconds"] for r in parts.values()),
    "failed": {part.name: reason for part, reason in failed.items()},
    "finished": set(shared.parts) <= set(parts),
  }
  if run_directory.is_writer():
    storage.write_json(shared.workdir / run_directory.RESULTS_FILE, storage.plain(results))
  return results
