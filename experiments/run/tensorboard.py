"""metrics.jsonl as TensorBoard sees it: event files, a folder for each model.

Folders are runs to TensorBoard, which draws equal names of several runs in one chart:
WORKDIR/tensorboard/seed_0/sms/copy_0, .../copy_1, .../soup, .../dense and so on.
"""

import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from .metrics_file import read_lines

FOLDER = "tensorboard"
SERIES = ("loss", "accuracy", "learning_rate")  # by epoch, of every copy
MODELS = ("soup", "prediction_ensemble")  # of a phase, beside its candidates
Line = dict[str, Any]


class Board:
  """Event files that say what metrics.jsonl says.

  They are written anew from it when a run goes on: what was written after its last save is
  gone from both, and nothing is there twice.
  """

  def __init__(self, workdir: str | os.PathLike, metrics: bytes = b""):
    """Replaces the event files of a run directory.

    Args:
      workdir: the run directory.
      metrics: what metrics.jsonl holds already.

    Raises:
      OSError: they cannot be written.
    """
    self._folder = pathlib.Path(workdir) / FOLDER
    shutil.rmtree(self._folder, ignore_errors=True)
    self._folder.mkdir(parents=True)
    self._writers: dict[str, Any] = {}  # of the method under way
    self._method: str | None = None
    self._epochs = 0  # of it
    for line in read_lines(metrics):
      self.add(line)

  def add(self, line: Line) -> None:
    """Adds a line of metrics.jsonl: an epoch, or the evaluation of a phase."""
    method = f"seed_{line['seed']}/{line['method']}"
    if method != self._method:
      self.close()
      self._method, self._epochs = method, 0
    if "evaluation" in line:
      step, scalars = line["phase"], evaluation_scalars(line["evaluation"])
    else:
      self._epochs += 1
      step, scalars = self._epochs, epoch_scalars(line)
    for model, name, value in scalars:
      if math.isfinite(value):  # a copy that diverged has no values, only NaN
        self._writer(f"{method}/{model}").add_scalar(name, value, step)

  def _writer(self, name):
    if name not in self._writers:
      from tensorboardX import SummaryWriter

      self._writers[name] = SummaryWriter(str(self._folder / name), flush_secs=10)
    return self._writers[name]

  def close(self) -> None:
    """Writes all there is."""
    for writer in self._writers.values():
      writer.close()
    self._writers.clear()


def epoch_scalars(line: Line) -> Iterator[tuple[str, str, float]]:
  """Model, name and value of what a line says of each copy's epoch."""
  for name in SERIES:
    for copy, value in enumerate(np.array(line[name], float).reshape(-1)):
      yield f"copy_{copy}", f"training/{name}", float(value)


def evaluation_scalars(evaluation: Line) -> Iterator[tuple[str, str, float]]:
  """Model, name and value of the metrics of a phase's models, or of the dense one."""
  models = {name: evaluation[name] for name in MODELS if name in evaluation}
  models |= {f"copy_{i}": m for i, m in enumerate(evaluation.get("candidates", []))}
  for model, metrics in (models or {"copy_0": evaluation}).items():
    for name, value in metrics.items():
      if isinstance(value, int | float):
        yield model, f"evaluation/{name}", float(value)
