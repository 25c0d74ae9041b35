"""The checkpoints of a run: saved beside the training, and found again after a break."""

import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from jaxsms import checkpoint
from jaxsms.disk import storage
from jaxsms.disk.storage import Damaged
from jaxsms.trees import PyTree

NUMBER = re.compile("[0-9]+")  # str.isdigit takes superscripts, which int does not


class NewestCheckpoint(NamedTuple):
  """What `Series.newest` gives.

  Attributes:
    number: of the newest checkpoint that is whole; None where there is none.
    arrays: its tree, of NumPy arrays in dicts and lists.
    meta: what was saved beside it.
    damaged: a sentence for each newer one, which was set aside.
  """

  number: int | None
  arrays: PyTree
  meta: dict[str, Any]
  damaged: list[str]


class Series:
  """Numbered checkpoints in one folder, of which the newest few are kept.

  One process at a time may save into it, and one save runs at a time, in a thread.
  """

  def __init__(self, path: storage.Path, keep: int = 2):
    """Looks at nothing yet.

    Args:
      path: their folder, on a disk or an object store; made by the first save.
      keep: how many stay; the next newest is what a damaged newest one falls back to.
    """
    self._path = storage.as_path(path)
    self._keep = keep
    self._thread = ThreadPoolExecutor(1)
    self._running: Future | None = None
    self.seconds = 0.0
    """How long the last finished save of arrays took."""

  def newest(self) -> NewestCheckpoint:
    """Walks back to the newest whole checkpoint.

    Damaged newer ones are renamed, and the remains of killed saves are removed.

    Raises:
      ValueError: a checkpoint is of another version.
    """
    for folder in self._folders():
      if checkpoint.is_unfinished(folder):
        checkpoint.remove(folder)
    damaged: list[str] = []
    for folder in reversed(self._folders()):
      try:
        return NewestCheckpoint(int(folder.name), *self.read(int(folder.name)), damaged)
      except Damaged as error:
        damaged.append(f"{error}, set aside as {storage.set_aside(folder).name}")
    return NewestCheckpoint(None, {}, {}, damaged)

  def read(self, number: int) -> tuple[PyTree, dict[str, Any]]:
    """The arrays of one checkpoint, and what was saved beside them.

    Raises:
      ValueError: see `jaxsms.checkpoint.restore`.
    """
    path = self._folder(number)
    return checkpoint.restore(path), checkpoint.read_manifest(path)["meta"]

  def save(self, arrays: PyTree, meta: dict[str, Any]) -> None:
    """Begins to save; waits for the save before it.

    Args:
      arrays: on the host, and not changed afterwards.
      meta: what JSON can hold.

    Raises:
      OSError: the save before it failed.
    """
    self.wait()
    self._running = self._thread.submit(self._save, arrays, meta)

  def wait(self) -> None:
    """Waits until all is on the disk.

    Raises:
      OSError: the save failed.
    """
    running, self._running = self._running, None
    if running is not None:
      running.result()

  def keep_newest(self) -> None:
    """Removes all checkpoints but the newest one.

    Raises:
      OSError: the last save failed, or they cannot be removed.
    """
    self.wait()
    for folder in self._folders()[:-1]:
      checkpoint.remove(folder)

  def _save(self, arrays: PyTree, meta: dict[str, Any]) -> None:
    started = time.monotonic()
    if not storage.is_remote(self._path):  # alone: a run's folder that is gone stays gone
      self._path.mkdir(exist_ok=True)
    last = max((int(folder.name) for folder in self._folders()), default=0)
    with storage.in_its_place(self._path):
      checkpoint.save(self._folder(last + 1), arrays, meta)
    for folder in self._folders()[: -self._keep]:
      checkpoint.remove(folder)
    if arrays:
      self.seconds = time.monotonic() - started

  def _folder(self, number: int) -> epath.Path:
    return self._path / f"{number:06}"

  def _folders(self) -> list[epath.Path]:
    """The folders of checkpoints, oldest first."""
    if not self._path.exists():
      return []
    children = [child for child in self._path.iterdir() if NUMBER.fullmatch(child.name)]
    return sorted(children, key=lambda child: int(child.name))
