"""What the binaries that train share: their flags and data, and what they show and keep."""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments import (
  hardware,
  keeping,
  method_flags,
  methods,
  pretraining_flags,
  reporting,
  settings,
)
from experiments.hardware import Hardware
from experiments.method_flags import MethodFlags
from experiments.progress import MEASURED, RunProgress
from experiments.run_directory import save_soup
from experiments.settings import Settings
from experiments.task import Task, load
from experiments.work import Work
from jaxsms import Phase, storage
from jaxsms.data import Dataset, StreamedDataset
from jaxsms.training import Chunk, Engine, TrainState

FLAG_MODULES = (settings, pretraining_flags, method_flags, hardware, keeping)


class Job(NamedTuple):
  """What the flags ask for, and the data.

  Attributes:
    settings: of every seed.
    method: the same.
    retention: how the run is kept.
    hardware: what it runs on.
    dataset: in memory, or to be streamed.
  """

  settings: Settings
  method: MethodFlags
  retention: keeping.Retention
  hardware: Hardware
  dataset: Dataset | StreamedDataset

  def flags(self) -> dict[str, Any]:
    """All of them by name, but for those of how the run is kept."""
    parts = (self.settings, self.method, self.hardware)
    return {name: value for part in parts for name, value in part._asdict().items()}


def read_job(argv: list[str]) -> Job:
  """Reads flags and data, and starts the devices.

  Args:
    argv: what was left on the command line, the program's name first.

  Raises:
    ValueError: a flag, or the data, are not as they should be.
    ImportError: a package is missing.
  """
  if not settings.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
  if not importlib.util.find_spec("matplotlib"):  # better missed before training
    raise ImportError(
      "the figure needs matplotlib, which is not installed: run "
      "`pip install 'jaxsms[experiments]'`"
    )
  chosen = settings.read_settings()
  method = method_flags.read_method(chosen)
  retention = keeping.read_retention()
  devices = hardware.read_hardware(chosen.model, chosen.ingredients)
  hardware.start(devices, chosen.model, chosen.ingredients)
  dataset = load(chosen)
  return Job(settings.with_data(chosen, dataset), method, retention, devices, dataset)


def workdir(prefix: str = "") -> storage.epath.Path:
  """--workdir, or a new folder in runs/ named by date and time.

  Raises:
    ValueError: several processes have to agree on one.
  """
  if settings.FLAGS.workdir:
    return storage.as_path(settings.FLAGS.workdir)
  if jax.process_count() > 1:
    raise ValueError(
      "--workdir is missing: the processes of a run share one, give a folder that all see"
    )
  return storage.as_path(os.path.join("runs", time.strftime(f"{prefix}%Y%m%d-%H%M%S")))


class Listener:
  """Shows what a run yields, writes it down, and saves it."""

  def __init__(
    self,
    progress: RunProgress,
    keeper: keeping.Keeper,
    workdir: storage.epath.Path,
    chosen: Settings,
    steps_per_epoch: int,
    prefix: str = "",
  ):
    """Touches nothing yet.

    Args:
      progress: where it is shown.
      keeper: of the run.
      workdir: where its soup goes.
      chosen: its settings.
      steps_per_epoch: in training.
      prefix: of what is shown.
    """
    self._progress, self._keeper, self._workdir = progress, keeper, workdir
    self._chosen, self._steps_per_epoch, self._prefix = chosen, steps_per_epoch, prefix

  def engine(self, engine: Engine) -> Engine:
    """The same engine: it counts the models it measures, and asks when to save.

    Describing a model is the last thing that is done when it is measured.
    """

    def described(params):
      record = engine.describe(params)
      self._progress.measured()
      self._keeper.count(MEASURED, 1)
      return record

    return engine._replace(describe=described, wants_state=self._keeper.due)

  def take(self, method: str, event: Any) -> None:
    """Acts on an event, see `methods.seed_events`.

    Raises:
      Stopped: a signal asked the run to stop, and all is saved.
      OSError: something cannot be written.
    """
    keeper = self._keeper
    resumes = method == methods.DENSE or methods.METHODS[method].resumes
    match event:
      case None:
        if not resumes:  # nothing of it is saved before its end: what is there has to be
          keeper.begin(keeper.work)
      case Chunk():
        self._chunk(method, event)
        if not resumes:
          keeper.pause()
      case TrainState():
        keeper.save(dataclasses.replace(keeper.work, state=event))
      case Phase():
        self._progress.phase()
        line = {"seed": keeper.work.seed, "method": method}
        line["phase"] = event.record.get("phase", 0)
        keeper.append_metrics({**line, "evaluation": event.record})
        if resumes:
          keeper.save(keeper.work)
      case methods.Soup():
        keeper.check()
        save_soup(self._workdir, keeper.work.seed, event._asdict())

  def _chunk(self, method, chunk):
    """Shows a chunk; where it completes an epoch, the epoch's means are written down."""
    keeper, chosen = self._keeper, self._chosen
    epoch, epochs = keeper.epoch, -(-chunk.steps // self._steps_per_epoch)
    titles = {methods.DENSE: "dense", methods.SOUP: "SMS"}
    title = titles.get(method) or reporting.method_title(method, chosen.ingredients)
    title = f"{self._prefix}seed {keeper.work.seed}  {title}"
    title += f" phase {chunk.phase}/{chosen.phases}" if chunk.phase else ""
    self._progress.chunk(title, epochs, chunk)
    keeper.count(chunk.copies, chunk.taken)
    epoch["loss"].append(chunk.loss)
    epoch["accuracy"].append(chunk.accuracy)
    epoch["taken"].append(chunk.taken)
    if chunk.step * epochs != chunk.epoch * chunk.steps:  # the epoch goes on
      return
    loss, accuracy = (
      np.average(epoch[name], axis=0, weights=epoch["taken"])
      for name in ("loss", "accuracy")
    )
    keeper.append_metrics(
      {
        "seed": keeper.work.seed,
        "method": method,
        "phase": chunk.phase,
        "epoch": chunk.epoch,
        "step": chunk.step,
        "loss": loss,
        "accuracy": accuracy,
        "learning_rate": chunk.learning_rate,
      }
    )
    for values in epoch.values():
      values.clear()


def run_seed(task: Task, chosen: Settings, names: Sequence[str], listener: Listener,
             work: Work) -> dict[str, Any]:  # fmt: skip
  """Does what is left of a seed; gives its entry in results.json.

  Args:
    task: shared by all seeds.
    chosen: settings of the run.
    names: of the methods, in order.
    listener: to whom all that happens is told.
    work: what is done of the seed already.
  """
  task = task._replace(engine=listener.engine(task.engine))
  run = methods.Run(chosen, task, jax.random.key(work.seed), work)
  for method, event in methods.seed_events(run, names):
    listener.take(method, event)
  return methods.entry_of(work, names)
