"""What the binaries that train share: their flags and data, and what they show and keep."""

import importlib.util
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments import hardware, keeping, method_flags, pretraining_flags, settings
from experiments.hardware import Hardware
from experiments.method_flags import MethodFlags
from experiments.progress import MEASURED, RunProgress
from experiments.retraining import Observer
from experiments.run_directory import save_soup
from experiments.settings import Settings
from experiments.task import Task, load
from jaxsms import report, storage
from jaxsms.data import Dataset, StreamedDataset

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
      "`pip install -e '.[experiments]'`"
    )
  chosen = settings.read_settings()
  method = method_flags.read_method(chosen)
  retention = keeping.read_retention()
  devices = hardware.read_hardware(chosen.model, chosen.ingredients)
  hardware.start(devices, chosen.model, chosen.ingredients)
  dataset = load(chosen)
  return Job(settings.with_data(chosen, dataset), method, retention, devices, dataset)


def counted(task: Task, progress: RunProgress, keeper: keeping.Keeper) -> Task:
  """The same task: whenever a model of it was measured, both are told.

  Describing it is the last thing that is done to a model that is measured.
  """

  def described(params):
    record = task.describe(params)
    progress.measured()
    keeper.count(MEASURED, 1)
    return record

  return task._replace(describe=described)


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


def make_observer(
  progress: RunProgress,
  keeper: keeping.Keeper,
  workdir: storage.epath.Path,
  chosen: Settings,
  steps_per_epoch: int,
  prefix: str = "",
) -> Observer:
  """Shows each chunk of training, writes a line for every epoch and phase, and saves.

  Args:
    progress: where it is shown.
    keeper: of the run.
    workdir: where its soup goes.
    chosen: its settings.
    steps_per_epoch: in training.
    prefix: of what is shown.
  """
  epoch = keeper.epoch
  titles = {"dense": "dense", "sms": "SMS"} | {
    name: report.method_title(name, chosen.ingredients) for name in settings.BASELINES
  }

  def on_chunk(method, phase, chunk):
    epochs = -(-chunk.steps // steps_per_epoch)
    title = f"{prefix}seed {keeper.work.seed}  {titles[method]}"
    title += f" phase {phase}/{chosen.phases}" if phase else ""
    progress.chunk(title, epochs, chunk)
    keeper.count(chunk.copies, chunk.taken)
    epoch["loss"].append(chunk.loss)
    epoch["accuracy"].append(chunk.accuracy)
    epoch["taken"].append(chunk.taken)
    if chunk.step * epochs == chunk.epoch * chunk.steps:  # the epoch is complete
      loss, accuracy = (
        np.average(epoch[name], axis=0, weights=epoch["taken"])
        for name in ("loss", "accuracy")
      )
      line = {
        "seed": keeper.work.seed,
        "method": method,
        "phase": phase,
        "epoch": chunk.epoch,
      }
      line |= {"step": chunk.step, "loss": loss, "accuracy": accuracy}
      line["learning_rate"] = chunk.learning_rate
      keeper.append_metrics(line)
      for values in epoch.values():
        values.clear()

  def on_phase(method, record):
    progress.phase()
    line = {"seed": keeper.work.seed, "method": method, "phase": record.get("phase", 0)}
    keeper.append_metrics({**line, "evaluation": record})

  def on_soup(soup):
    keeper.check()
    save_soup(workdir, keeper.work.seed, soup)

  return Observer(
    on_chunk, on_phase, on_soup, keeper.due, keeper.save, keeper.begin, keeper.pause
  )
