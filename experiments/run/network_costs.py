"""What the networks of a run cost: measured in its first seed, and at its end."""

import os
from typing import Any

import jax
from absl import logging

from jaxsms import Phase, checkpoint
from jaxsms.devices.meshes import fetch

from ..config.pruning_criteria import removes_channels
from ..config.run_config import Config
from ..costs.channel_costs import InferenceTimer, dense_size, sensitivity_record
from ..costs.inference_times import measure_inference
from ..costs.latency_budget import BATCH
from ..methods import SOUP
from ..methods.seed_state import SeedState
from ..setup.task import Task
from .run_costs import RunCosts
from .run_directory import is_writer, soup_folder


class ChannelCosts:
  """Measures, in the first seed of a run that prunes channels, what they cost."""

  def __init__(self, task: Task, config: Config, costs: RunCosts, first_seed: int):
    """Measures nothing yet.

    Args:
      task: of the run.
      config: of it.
      costs: where it is noted.
      first_seed: the seed in which it measures.
    """
    self._task, self._config, self._costs = task, config, costs
    self._first_seed = first_seed
    self._timer = InferenceTimer(task.module, task.image_shape)

  def note(self, seed_state: SeedState, method: str, event: Any) -> None:
    """Measures what an event of the soup gives occasion to, before it is saved.

    All processes have to call it. Where something cannot be measured, the run is no worse.

    Args:
      seed_state: the seed under way.
      method: whose event it is.
      event: see `methods.seed_events`.
    """
    config = self._config
    channels = removes_channels(config)
    begins = event is None and self._costs.sensitivity is None
    if method != SOUP or not channels or seed_state.seed != self._first_seed:
      return
    if not begins and not isinstance(event, Phase):
      return
    try:
      if begins:
        self._sensitivity(seed_state.dense)
      else:
        self._costs.phase(method, event.record["phase"])
        self._phase(event.record["phase"], *fetch((event.params, event.masks)))
    except (ValueError, RuntimeError) as error:
      logging.warning("channels are not timed: %s", error)
    self._costs.skip()

  def _sensitivity(self, dense):
    task = self._task
    if not self._config.split_params:
      self._costs.sensitivity = sensitivity_record(task.engine, task.groups(), dense)

  def _phase(self, number, model, masks):
    if not is_writer():
      return
    found = self._costs.inference or {
      "device": jax.local_devices()[0].device_kind, "batch": BATCH,
      "dense": dense_size(self._task.module, self._task.image_shape, model), "phases": [],
    }  # fmt: skip
    before = [one for one in found["phases"] if one["phase"] < number]
    phase = {"phase": number, **self._timer.phase(model, masks)}
    self._costs.inference = {**found, "phases": [*before, phase]}


def inference(task: Task, workdir: str | os.PathLike, seed: int) -> dict[str, Any] | None:
  """Sizes and times of a run's last soup, for results.json.

  Args:
    task: of the run.
    workdir: its directory.
    seed: whose soup.

  Returns:
    See `measure_inference`; None where that soup cannot be read or used.
  """
  try:
    soup = checkpoint.restore(soup_folder(workdir, seed))
    return measure_inference(task.module, task.image_shape, soup)
  except (ValueError, OSError, RuntimeError) as error:  # the run is no worse for it
    logging.warning("inference is not timed: %s", error)
    return None
