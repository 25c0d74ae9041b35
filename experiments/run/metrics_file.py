"""metrics.jsonl: lines that a resumed run goes on with where it was saved."""

import json
import os
from collections.abc import Iterator
from typing import Any

from jaxsms.disk import storage

from ..schemas.results_check import fits_line


def read_lines(data: bytes) -> Iterator[dict[str, Any]]:
  """Lines of epochs and of evaluations; what is damaged or half written is left out.

  So are lines of an epoch with another number of copies than the one before it had.
  """
  copies: dict[tuple, int] = {}
  for text in data.splitlines():
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):
      continue
    if not fits_line(line):
      continue
    if "evaluation" not in line:
      training = line["seed"], line["method"], line["phase"]
      if copies.setdefault(training, len(line["loss"])) != len(line["loss"]):
        continue
    yield line


class MetricsFile:
  """A file of JSON lines that only grows; on an object store written with each `flush`."""

  def __init__(self, path: str | os.PathLike, size: int = 0):
    """Opens it.

    Args:
      path: the file.
      size: bytes to keep of it; what lies behind was written after the last save.

    Raises:
      OSError: it cannot be written.
    """
    self._path = storage.as_path(path)
    self._file = None
    self._data = b""
    if storage.is_remote(self._path):
      if size and self._path.exists():
        self._data = self._path.read_bytes()[:size]
      self.size = len(self._data)
      return
    self._file = open(self._path, "ab")  # noqa: SIM115 (closed by close)
    self.size = min(size, self._file.tell())
    self._file.truncate(self.size)

  def append(self, line: dict[str, Any]) -> None:
    """Adds a line."""
    data = json.dumps(storage.plain(line), allow_nan=False).encode() + b"\n"
    self.size += len(data)
    if self._file is None:
      self._data += data
    else:
      self._file.write(data)
      self._file.flush()

  def flush(self) -> int:
    """Has all lines on the disk or the store; gives the size in bytes."""
    if self._file is None:
      storage.write_bytes(self._path, self._data)
    else:
      os.fsync(self._file.fileno())
    return self.size

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    if self._file is not None:
      self._file.close()
