"""Checkpoints of a run: saves it while it goes on, and takes it up again after a break."""

import operator
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsms.disk import storage
from jaxsms.disk.faults import fault_point
from jaxsms.disk.series import NewestCheckpoint, Series
from jaxsms.disk.storage import first_sentence

from ..config.run_config import Config
from ..methods.seed_state import SeedState, packed, unpacked
from ..setup.task import Task
from . import run_directory
from .environment import check_version, environment, environments_of
from .lock import Busy, Lock, Moved
from .metrics_file import MetricsFile
from .run_costs import RunCosts
from .run_directory import agreed, is_writer
from .signals import Stopped, StopSignals
from .tensorboard import Board

MEANS = ("loss", "accuracy")
# Why the first process cannot take a directory; sent to the others as a number.
PROBLEMS = (type(None), Busy, OSError, ValueError)
COST = 50  # a phase is saved when this many times the time that saving takes has gone by


class Checkpointer:
  """A run in its directory: what it has so far, and how that gets to the disk.

  Attributes:
    workdir: the run directory.
    config: of the run.
    seeds: the entries of the finished seeds.
    seed_state: the seed under way.
    epoch: what the chunks of the epoch under way reported.
    steps_left: as `methods.planned_work` plans them; counted down while they are done.
    environments: versions and devices that the run had, each with where it began (`from`).
    costs: what its phases take.
  """

  def __init__(
    self,
    workdir: storage.epath.Path,
    run: dict[str, Any],
    config: Config,
    signals: StopSignals,
  ):
    """Touches nothing yet.

    Args:
      workdir: the run directory.
      run: what `run_directory.begin` writes.
      config: of the run.
      signals: which ask the run to stop.
    """
    self.workdir, self.config, self._run, self._signals = workdir, config, run, signals
    self._interval = 60 * config.save_minutes
    self._series = Series(workdir / run_directory.CHECKPOINTS, config.keep_checkpoints)
    self._lock = Lock(workdir)
    self._metrics: MetricsFile | None = None
    self._board: Board | None = None
    self._begun = self._last = time.monotonic()
    self._fetching = 0.0
    self._resumed = False
    self.seeds: list[dict[str, Any]] = []
    self.seed_state = SeedState(0)
    self.epoch: dict[str, list] = {"loss": [], "accuracy": [], "taken": []}
    self.steps_left: dict[int, int] = {}
    self.environments: list[dict[str, Any]] = []
    self.costs = RunCosts()

  def open(
    self,
    task: Task,
    plan: dict[int, int],
    first: Callable[[], SeedState | None] = lambda: None,
  ) -> list[str]:
    """Takes the directory, and what an earlier process left there.

    Args:
      task: network and data of the run.
      plan: of the whole run, see `methods.planned_work`.
      first: gives what its first seed begins with, None for nothing; called where there is
        no checkpoint, in a directory that is locked and not changed yet.

    Returns:
      Sentences for the user: what was damaged, and where the run goes on.

    Raises:
      ValueError: another process runs there, the directory cannot be written, or what it
        holds is of another version or another network.
    """
    try:
      found = self._find()
      messages = [f"warning: {sentence}" for sentence in found.damaged]
      self.steps_left = dict(plan)
      if found.number:
        size = self._take_up(found, task)
      else:
        self.seed_state, size = first() or SeedState(self.config.seed), 0
      results = run_directory.read_results(self.workdir) or {}
      finished = results.get("seeds", [])
      if len(finished) > len(self.seeds):  # the checkpoints that held them are lost
        self.seeds, self.seed_state = finished, SeedState(self.config.seed + len(finished))
        self.environments = environments_of(results)
      self._enter_environment(found.number or finished)
      if task.clock is not None:  # both know what is measured from now on
        known = task.clock.known | self.costs.latencies
        task.clock.known = self.costs.latencies = known
      if is_writer():
        metrics = self.workdir / run_directory.METRICS_FILE
        self._metrics = MetricsFile(metrics, size)
        if self.config.tensorboard:
          self._board = Board(self.workdir, metrics.read_bytes())
    except OSError as error:
      self._lock.release()
      raise ValueError(
        f"--workdir {self.workdir} cannot be written ({error.strerror or error}): choose "
        "another folder"
      ) from error
    except ValueError:
      self._lock.release()
      raise
    self._last = time.monotonic()
    if self._resumed:
      where = self.seed_state.position() if found.number or finished else "the start"
      seeds = f"{len(self.seeds)} of {self.config.seeds} seeds finished"
      messages.append(f"resuming {self.workdir}: {where} ({seeds})")
    return messages

  def _enter_environment(self, goes_on):
    """Notes the versions and devices of this process where they are others than before."""
    now = storage.plain(environment())
    if not goes_on:
      self.environments = [{"from": "the start", "environment": now}]
      return
    if not self.config.allow_other_version:
      check_version(self.workdir, self.environments[-1]["environment"], now)
    if now != self.environments[-1]["environment"]:
      self.environments.append({"from": self.seed_state.position(), "environment": now})

  def _find(self):
    """Locks the directory, and walks back to its newest whole checkpoint.

    The first process does so, and the others read what it found.
    """
    found, problem = NewestCheckpoint(None, {}, {}, []), None
    if is_writer():
      try:
        self._resumed = (self.workdir / run_directory.RUN_FILE).exists()
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        run_directory.begin(self.workdir, self._run, self.config.flagfile())
        found = self._series.newest()
      except (OSError, ValueError) as error:
        problem = error
    if jax.process_count() > 1:
      kind = next((i for i, k in enumerate(PROBLEMS) if isinstance(problem, k)), 0)
      state = np.array([kind, found.number or 0], np.int32)
      kind, number = map(int, multihost_utils.broadcast_one_to_all(state))
      if kind and problem is None:
        problem = PROBLEMS[kind](
          "the first process cannot use the run directory: see there"
        )
      elif number and not is_writer():
        found = NewestCheckpoint(number, *self._series.read(number), [])
    if problem is not None:
      raise problem
    return found

  def _take_up(self, found, task):
    """Takes what a checkpoint holds; gives the size that the metrics had.

    Its digests are right: where it makes no sense, something else wrote it.
    """
    meta, what = found.meta, f"checkpoint {found.number} of {self.workdir}"
    try:
      self.seeds = list(meta["seeds"])
      self.epoch = {
        "taken": list(meta["epoch"]["taken"]),
        **{k: [np.array(v, np.float32) for v in meta["epoch"][k]] for k in MEANS},
      }
      self.steps_left = {int(k): n for k, n in meta["steps_left"].items()}
      self._begun -= meta["seconds"]
      self.costs = RunCosts(meta.get("costs"))
      self.environments = environments_of(meta) or environments_of(meta["run"])
      self.seed_state = unpacked(
        found.arrays,
        meta["work"],
        task.shapes,
        task.engine.programs,
        self.config.ingredients,
        what,
        self.config.shrink,
      )
      return operator.index(meta["metrics_bytes"])
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
      if str(error).startswith(what):
        raise
      raise ValueError(
        f"{what} cannot be used ({first_sentence(error)}): another version of jaxsms "
        "wrote it, choose another --workdir"
      ) from error

  def due(self) -> bool:
    """Whether the training under way is to be saved now; the same in all processes."""
    fault_point("chunk")
    self._signals.saves = True
    waited = is_writer() and time.monotonic() - self._last >= self._interval
    return agreed(waited or self._signals.noted is not None)

  def save(self, seed_state: SeedState) -> None:
    """Saves a seed under way.

    Raises:
      Stopped: a signal has asked for it; all is saved.
      OSError: it cannot be saved.
    """
    stopping = agreed(self._signals.noted is not None)
    if seed_state.state is None and not stopping:  # a phase has ended: is it worth it?
      cost = COST * (self._fetching + self._series.seconds)
      too_early = time.monotonic() - self._last < min(cost, self._interval)
      if not agreed(is_writer() and not too_early):
        return
    self._save(seed_state)
    if stopping:
      self._stop()

  def begin(self, seed_state: SeedState) -> None:
    """Saves a seed before something that is done again if it is interrupted."""
    self._signals.saves = False
    self._save(seed_state)
    self.pause()

  def pause(self) -> None:
    """Ends the run where it stands, with what is saved.

    Raises:
      Stopped: a signal has asked for it.
    """
    fault_point("chunk")
    if agreed(self._signals.noted is not None):
      self._stop()

  def _stop(self):
    self._series.wait()
    raise Stopped(self._signals.noted or StopSignals.NUMBERS[0])

  def finish_seed(self, entry: dict[str, Any]) -> None:
    """Takes the results of the seed under way; the next one is under way then."""
    self.seeds.append(entry)
    self.seed_state = SeedState(self.seed_state.seed + 1)
    self._signals.saves = True
    self._save(self.seed_state)
    self._series.wait()

  def forget(self) -> None:
    """Removes the models of a run that is finished and written down.

    Its newest checkpoint stays: after the last seed it holds figures alone.
    """
    if is_writer():
      self._series.keep_newest()

  def _save(self, seed_state):
    started = time.monotonic()
    arrays, rest = packed(seed_state)
    self._fetching = time.monotonic() - started
    if is_writer():
      self._lock.check()
      meta = {
        "run": self._run,
        "seeds": self.seeds,
        "work": rest,
        "epoch": self.epoch,
        "steps_left": self.steps_left,
        "seconds": self.seconds(),
        "metrics_bytes": self._metrics.flush(),
        "environments": self.environments,
        "costs": self.costs.saved(),
      }
      self._series.save(arrays, storage.plain(meta))
    self._last = time.monotonic()

  def count(self, copies: int, done: int) -> None:
    """Counts down steps of so many copies, or models that were measured."""
    self.steps_left[copies] = max(self.steps_left.get(copies, 0) - done, 0)

  def append_metrics(self, line: dict[str, Any]) -> None:
    """Adds a line to the metrics of the run."""
    if self._metrics is not None:
      self._metrics.append(line)
    if self._board is not None:
      self._board.add(line)

  def check(self) -> None:
    """Raises OSError where the directory is not where it was, or not this run's any more.

    Nothing may be written then: folders would be made where it was.
    """
    self._lock.check()

  def moved(self) -> OSError | None:
    """What to say where the directory is not where it was."""
    try:
      self._lock.check()
    except OSError as error:
      return error if isinstance(error, Moved) else None
    return None

  def seconds(self) -> float:
    """How long the run has taken so far, all its processes together."""
    return time.monotonic() - self._begun

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    """Waits for what is being saved, and gives the directory back."""
    try:
      self._series.wait()
      if self._metrics is not None:
        self._metrics.close()
      if self._board is not None:
        self._board.close()
    finally:
      self._lock.release()


def print_once(sentence: str) -> None:
  """Tells the user, once, whatever the number of processes."""
  if is_writer():
    print(sentence, file=sys.stderr)
