"""What the binaries that train share: their flags and data, and what they show and keep."""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxsms import Phase
from jaxsms.data import Dataset, StreamedDataset
from jaxsms.disk import storage
from jaxsms.training import Chunk, Engine, TrainState
from jaxsms.trees import model_at, number_of_models

from .. import methods
from ..config.run_config import Config, read_config
from ..methods.planning import MEASURED
from ..reporting.statistics import method_title
from ..setup import hardware
from ..setup.task import Task, load, with_data
from . import checkpointing
from .environment import environment
from .flag_files import check_no_arguments, set_log_level
from .network_costs import ChannelCosts
from .progress import RunProgress
from .run_directory import candidate_folder, save_model, soup_folder


def start(argv: list[str], **instead: Any) -> tuple[Config, Dataset | StreamedDataset]:
  """Reads the flags, starts the devices and loads the data.

  Args:
    argv: what was left on the command line, the program's name first.
    **instead: values of flags, whatever was given.

  Returns:
    The flags, with what the data set decides, and the data set.

  Raises:
    ValueError: a flag, or the data, are not as they should be.
    ImportError: a package is missing.
  """
  set_log_level()
  check_no_arguments(argv)
  if not importlib.util.find_spec("matplotlib"):  # better missed before training
    raise ImportError(
      "the figure needs matplotlib, which is not installed: run "
      "`pip install 'jaxsms[experiments]'`"
    )
  config = read_config(**instead)
  hardware.start(config, config.ingredients)
  dataset = load(config)
  return with_data(config, dataset), dataset


def workdir(config: Config, prefix: str = "") -> storage.epath.Path:
  """--workdir, or a new folder in runs/ named by date and time.

  Raises:
    ValueError: several processes have to agree on one.
  """
  if config.workdir:
    return storage.as_path(config.workdir)
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
    checkpointer: checkpointing.Checkpointer,
    steps_per_epoch: int,
    prefix: str = "",
  ):
    """Touches nothing yet.

    Args:
      progress: where it is shown.
      checkpointer: of the run.
      steps_per_epoch: in training.
      prefix: of what is shown.
    """
    self._progress, self.checkpointer = progress, checkpointer
    self._steps_per_epoch, self._prefix = steps_per_epoch, prefix

  def engine(self, engine: Engine) -> Engine:
    """The same engine: it counts the models it measures, and asks when to save.

    Describing a model is the last thing that is done when it is measured.
    """

    def described(params):
      record = engine.describe(params)
      self._progress.model_measured()
      self.checkpointer.count(MEASURED, 1)
      self.checkpointer.costs.mark()
      return record

    return engine._replace(describe=described, wants_state=self.checkpointer.due)

  def take(self, method: str, event: Any) -> None:
    """Acts on an event, see `methods.seed_events`.

    Raises:
      Stopped: a signal asked the run to stop, and all is saved.
      OSError: something cannot be written.
      TypeError: it is no event.
    """
    checkpointer = self.checkpointer
    resumes = method == methods.DENSE or methods.METHODS[method].resumes
    match event:
      case None:
        checkpointer.costs.skip()
        if not resumes:  # nothing of it is saved before its end: what is there has to be
          checkpointer.begin(checkpointer.seed_state)
      case Chunk():
        self._chunk(method, event)
        if not resumes:
          checkpointer.pause()
      case TrainState():
        checkpointer.save(dataclasses.replace(checkpointer.seed_state, state=event))
        checkpointer.costs.resume()
      case Phase():
        checkpointer.costs.phase(method, event.record.get("phase", 0))
        self._progress.phase()
        line = {"seed": checkpointer.seed_state.seed, "method": method}
        line["phase"] = event.record.get("phase", 0)
        checkpointer.append_metrics({**line, "evaluation": event.record})
        last = method == methods.SOUP and line["phase"] == checkpointer.config.phases
        if last and checkpointer.config.save_candidates:
          self._save_candidates(event)
        if resumes:
          checkpointer.save(checkpointer.seed_state)
      case methods.Soup():
        checkpointer.check()
        model = event._asdict()
        place = (checkpointer.seed_state.seed, model.pop("phase"))
        save_model(soup_folder(checkpointer.workdir, *place), model)
      case _:
        raise TypeError(f"nothing is known of an event that is a {type(event).__name__}")

  def _save_candidates(self, phase):
    """Writes the copies of a phase, each with the masks that they share."""
    workdir, seed = self.checkpointer.workdir, self.checkpointer.seed_state.seed
    self.checkpointer.check()
    for i in range(number_of_models(phase.candidates)):
      model = model_at(phase.candidates, i)._asdict()
      save_model(candidate_folder(workdir, seed, i), model | {"masks": phase.masks})

  def _chunk(self, method, chunk):
    """Shows a chunk; where it completes an epoch, the epoch's means are written down."""
    checkpointer, config = self.checkpointer, self.checkpointer.config
    epoch, epochs = checkpointer.epoch, -(-chunk.steps // self._steps_per_epoch)
    titles = {methods.DENSE: "dense", methods.SOUP: "SMS"}
    title = titles.get(method) or method_title(method, config.ingredients)
    title = f"{self._prefix}seed {checkpointer.seed_state.seed}  {title}"
    title += f" phase {chunk.phase}/{config.phases}" if chunk.phase else ""
    self._progress.chunk(title, epochs, chunk)
    checkpointer.count(chunk.copies, chunk.taken)
    checkpointer.costs.chunk(method, chunk.phase, chunk.copies, chunk.taken)
    epoch["loss"].append(chunk.loss)
    epoch["accuracy"].append(chunk.accuracy)
    epoch["taken"].append(chunk.taken)
    if chunk.step % self._steps_per_epoch and chunk.step < chunk.steps:
      return  # the epoch goes on
    loss, accuracy = (
      np.average(epoch[name], axis=0, weights=epoch["taken"])
      for name in ("loss", "accuracy")
    )
    checkpointer.append_metrics(
      {
        "seed": checkpointer.seed_state.seed,
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


def run_seed(
  task: Task, names: Sequence[str], listener: Listener, first_seed: int | None = None
) -> dict[str, Any]:
  """Does what is left of the seed under way; gives its entry in results.json.

  Args:
    task: shared by all seeds.
    names: of the methods, in order.
    listener: it gets every event; its checkpointer has what is done already.
    first_seed: where costs of channels are measured; None means the first of the run.
  """
  seed_state, config = listener.checkpointer.seed_state, listener.checkpointer.config
  task = task._replace(engine=listener.engine(task.engine))
  run = methods.Run(config, task, jax.random.key(seed_state.seed), seed_state)
  first_seed = config.seed if first_seed is None else first_seed
  channels = ChannelCosts(task, config, listener.checkpointer.costs, first_seed)
  for method, event in methods.seed_events(run, names):
    channels.note(seed_state, method, event)
    listener.take(method, event)
  return methods.entry_of(seed_state, names)


def results_of(task: Task, checkpointer: checkpointing.Checkpointer) -> dict[str, Any]:
  """What results.json holds of a run, as far as it has come."""
  costs = checkpointer.costs
  return {
    "flags": {**checkpointer.config.flags(), "workdir": str(checkpointer.workdir)},
    "environment": environment(),
    "environments": checkpointer.environments,
    "ood_sources": task.ood_sources,
    "seeds": checkpointer.seeds,
    "seconds": checkpointer.seconds(),
    "costs": costs.record(task.steps_per_epoch) | {"inference": costs.inference},
    "sensitivity": costs.sensitivity,
    "finished": len(checkpointer.seeds) == checkpointer.config.seeds,
  }
