"""Flags of how a run is kept: they change none of its numbers."""

import dataclasses
import math
from importlib import util
from typing import Any

from jaxsms.disk import storage

from .fields import at_least, define_flags, ensure, flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepingFlags:
  """How a run is kept."""

  workdir: str | None = flag(
    "Run directory: flags, metrics, results.json, the soup and the figure. It must hold no "
    "other run. Default: a new folder in runs/, named by date and time."
  )
  save_minutes: float = flag(
    "Minutes of training between two checkpoints in --workdir; 0 saves after every "
    "chunk. A run also saves after each phase, unless saving takes more than 2 % of "
    "the time since the last checkpoint.",
    ensure(lambda value: 0 <= value < math.inf, "give a number, 0 or above"),
    default=5.0,
  )
  keep_checkpoints: int = flag(
    "How many checkpoints are kept. If the newest is damaged, the one before is used.",
    at_least(1),
    default=2,
  )
  save_candidates: bool = flag(
    "Also saves the copies of the sparse soup's last phase, as they were merged, to "
    "--workdir/candidates/seed_S, one folder each, for experiments.soup.",
    default=False,
  )
  tensorboard: bool = flag(
    "Also writes event files for TensorBoard, in --workdir/tensorboard: loss, accuracy and "
    "learning rate of every copy by epoch, metrics of candidates and soup by phase.",
    default=False,
  )
  allow_other_version: bool = flag(
    "Resumes a run that another version of jaxsms or jax began. In results.json, "
    "`environments` then says which version did what.",
    default=False,
  )


define_flags(KeepingFlags)


def check(config: Any) -> None:
  """Raises ValueError where TensorBoard's files cannot be written, or copies are cut."""
  if config.save_candidates and config.shrink:
    raise ValueError(
      "--save_candidates saves copies in full shapes, and --shrink cuts them: leave one out"
    )
  if config.tensorboard:
    _check_tensorboard(config.workdir)


def _check_tensorboard(workdir):
  """Raises ValueError where no event files can be written."""
  if not util.find_spec("tensorboardX"):
    raise ValueError(
      "--tensorboard needs tensorboardX, which is not installed: run "
      "`pip install tensorboardX`"
    )
  if workdir is not None and storage.is_remote(storage.as_path(workdir)):
    raise ValueError(
      f"--tensorboard writes into --workdir, and {workdir} is an object store: give a "
      "folder of this machine, or leave it out"
    )
