"""A path type of our own that behaves like an object store: fake://bucket/name."""

import os
import pathlib
import shutil

from etils import epath
from etils.epath import stat_utils

_ROOTS: dict[str, str] = {}


@epath.register_path_cls("fake://")
class StorePath(pathlib.PurePosixPath):
  """Names in a bucket, whose content lies in a folder given to `bucket`."""

  def __str__(self):
    return "fake://" + "/".join(self.parts[1:])

  def __fspath__(self):
    return os.path.join(_ROOTS[self.parts[1]], *self.parts[2:])

  def _real(self):
    return pathlib.Path(os.fspath(self))

  def expanduser(self):
    return self

  def exists(self):
    return self._real().exists()

  def is_dir(self):
    return self._real().is_dir()

  def is_file(self):
    return self._real().is_file()

  def stat(self):
    found = self._real().stat()
    return stat_utils.StatResult(
      is_directory=self._real().is_dir(),
      length=found.st_size,
      mtime=int(found.st_mtime),  # whole seconds, as stores tell it
    )

  def iterdir(self):
    return iter([self / name for name in os.listdir(self)])

  def read_bytes(self):
    return self._real().read_bytes()

  def write_bytes(self, data):
    self._real().parent.mkdir(parents=True, exist_ok=True)  # a store needs no folders
    return self._real().write_bytes(data)

  def open(self, mode="r", **options):
    assert "a" not in mode and "+" not in mode, "an object store cannot append"
    return open(self, mode, **options)

  def mkdir(self, mode=0o777, parents=False, exist_ok=False):
    self._real().mkdir(parents=parents, exist_ok=exist_ok)

  def rmdir(self):
    self._real().rmdir()

  def rmtree(self, missing_ok=False):
    shutil.rmtree(self, ignore_errors=missing_ok)

  def unlink(self, missing_ok=False):
    self._real().unlink(missing_ok)

  def rename(self, target):
    os.rename(self, target)
    return type(self)(target)


def bucket(name: str, folder) -> str:
  """Makes a bucket that lies in a folder; gives its address."""
  _ROOTS[name] = os.fspath(folder)
  return f"fake://{name}"
