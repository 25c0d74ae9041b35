"""One process at a time on a run directory.

On a disk an operating system's lock holds as long as the process lives. Where locks do not
hold (object stores, some network disks) a sign of life protects a run: a file that its
process writes every few seconds, and that others watch before they take a directory over.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time

from jaxsms.disk import storage

BEAT = 10.0  # seconds between two signs of life
WATCH = 35.0  # how long one that does not change is watched before it counts as dead
LOCK, HOLDER = "lock", "holder.json"


class Busy(ValueError):
  """Another process runs there."""


class Moved(OSError):
  """The directory is not where it was: nothing may be written there any more."""


class Lock:
  """Held from `acquire` to `release`, or to the end of the process."""

  def __init__(self, path: str | os.PathLike):
    """`path`: the run directory, which must exist."""
    self._path = storage.as_path(path)
    self._token = secrets.token_hex(8)
    self._folder: tuple[int, int] | None = None
    self._handle: int | None = None
    self._released = threading.Event()
    self._beating = threading.Thread(target=self._keep_beating, daemon=True)
    self._lost = False

  def acquire(self) -> None:
    """Takes the directory, or says who has it.

    Raises:
      Busy: another process runs there.
      OSError: the directory cannot be written.
    """
    locked = self._lock_file()
    holder = self._holder()
    # The lock of a process on this machine would be held if it were alive.
    if holder and not (locked and holder.get("host") == socket.gethostname()):
      self._watch(holder)
    self._folder = self._identity()
    self._beat()
    if not locked:
      time.sleep(BEAT / 10)  # another one may have begun at the same moment: the later wins
      if self._holder().get("token") != self._token:
        self._refuse(self._holder())
    self._beating.start()

  def check(self) -> None:
    """Raises OSError where the directory is another process's by now, or another one."""
    if self._folder is not None and self._identity() != self._folder:
      raise Moved(
        f"{self._path} was renamed or removed while this run was in it: go on with the "
        "same flags and its new place as --workdir"
      )
    if self._lost:
      raise OSError(f"another process has taken {self._path} over: this one stops")

  def release(self) -> None:
    """Gives the directory back."""
    self._released.set()
    if self._beating.is_alive():
      self._beating.join()
    with contextlib.suppress(OSError):
      if self._holder().get("token") == self._token:
        (self._path / HOLDER).unlink()
    if self._handle is not None:
      os.close(self._handle)
      self._handle = None

  def _lock_file(self):
    """Whether the operating system gave its lock; False where it has none to give."""
    if storage.is_remote(self._path):
      return False
    try:
      import fcntl
    except ImportError:  # not on Windows
      return False
    handle = os.open(self._path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(handle)
      self._refuse(self._holder())
    except OSError:
      os.close(handle)
      return False
    self._handle = handle
    return True

  def _identity(self):
    """Identifies a folder on a disk, whatever its name; None for a store."""
    return None if storage.is_remote(self._path) else storage.identity(self._path)

  def _watch(self, holder):
    """Waits for the next sign of life of who may be there."""
    print(
      f"{self._path} was last used on {holder.get('host')}: waiting {WATCH:g} s to see "
      "whether it still is",
      file=sys.stderr,
    )
    end = time.monotonic() + WATCH
    while time.monotonic() < end:
      time.sleep(WATCH / 20)
      if self._holder() not in (holder, {}):
        self._refuse(self._holder())

  def _refuse(self, holder):
    who = ""  # it may not have written down yet who it is
    if holder.get("pid") and holder.get("host"):
      who = f"(pid {holder['pid']} on {holder['host']}) "
    raise Busy(
      f"another process {who}runs in {self._path}: wait for it, or choose another --workdir"
    )

  def _holder(self):
    try:
      return storage.read_json(self._path / HOLDER)
    except (OSError, ValueError):  # none, or half of one: no sign of life
      return {}

  def _beat(self):
    here = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
    storage.write_json(self._path / HOLDER, {**here, "time": time.time()})

  def _keep_beating(self):
    while not self._released.wait(BEAT):
      with contextlib.suppress(OSError):
        if self._holder().get("token", self._token) != self._token:
          self._lost = True
          return
        self._beat()
