"""Single files on disks and object stores, for code that reads only disks."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO

from jaxsms.disk import storage


@contextlib.contextmanager
def output_file(path: storage.Path) -> Iterator[IO[bytes]]:
  """A `storage.whole_file` in a folder that need not be there yet.

  Args:
    path: the file, on a disk or (gs://...) an object store; its folder is made where it is
      missing, and an older file replaced.
  """
  target = storage.as_path(path)
  if not storage.is_remote(target):
    os.makedirs(target.parent, exist_ok=True)
  with storage.whole_file(target) as file:
    yield file


def on_disk(path: storage.Path) -> contextlib.AbstractContextManager[str]:
  """The name of a file on a disk: itself, or a copy for as long as it is read.

  What is mapped of the copy stays readable: its bytes go when nobody has them open.

  Raises:
    OSError: it cannot be read.
  """
  source = storage.as_path(path)
  if storage.is_remote(source):
    return storage.local_copy(source)
  return contextlib.nullcontext(os.fspath(source))
