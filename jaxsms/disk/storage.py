"""Files that are whole or not there, on disks and, through etils, on object stores."""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any, TypeAlias

from etils import epath

from jaxsms.disk.faults import fault_point

# Of a name that is not taken, not even by a link to nowhere.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_NEW_FILE |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
Path: TypeAlias = str | os.PathLike  # what `as_path` makes an `epath.Path` of
FORMAT = 1  # of run directories and checkpoints; another one is refused


class Damaged(ValueError):
  """Something on disk is not what was written."""


def as_path(path: Path) -> epath.Path:
  """An absolute path of the kind that its prefix names, such as gs://.

  Raises:
    ValueError: nothing here knows that prefix.
  """
  try:
    expanded = epath.Path(path).expanduser()
  except KeyError as error:  # of etils
    raise ValueError(
      f"{os.fspath(path)} is in no store that is known here: give a local path, or one of "
      "gs:// or s3://"
    ) from error
  return expanded if is_remote(expanded) else epath.Path(os.path.abspath(expanded))


def is_remote(path: epath.Path) -> bool:
  """Whether a path is of an object store: no locks, no appending, no renaming at once."""
  return "://" in str(path)


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Writes a file atomically: it holds the old content or the new.

  An object store does so by itself. A disk has the new content for certain afterwards.
  """
  if is_remote(path):
    fault_point(f"write {path.name}")
    path.write_bytes(data)
    return
  with whole_file(path) as file:
    file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
  """A new file to write to; it gets its name when all of it is on the disk for certain.

  Until then it has a random name in the same folder. Where that is taken, by a link for
  instance, nothing is written.

  Args:
    path: the file, on a disk or (gs://...) an object store; an older file is replaced.
  """
  target = as_path(path)
  if is_remote(target):
    with tempfile.TemporaryFile() as file:
      yield file
      file.seek(0)
      write_bytes(target, file.read())
    return
  unfinished = f"{target.name[:80]}.{secrets.token_hex(8)}.partial"
  partial = os.path.join(target.parent, unfinished)
  handle = os.open(partial, _NEW_FILE, 0o666)
  try:
    with os.fdopen(handle, "wb") as writer:
      yield writer
      writer.flush()
      os.fsync(writer.fileno())
    fault_point(f"write {target.name}")
    os.replace(partial, target)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(partial)
    raise
  sync(target.parent)


def sync(path: Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def sync_tree(path: Path) -> None:
  """Waits until a file, or all that is in a folder, is on the disk."""
  if os.path.isfile(path):
    sync(path)
  for folder, _, files in os.walk(os.fspath(path)):
    for name in files:
      sync(os.path.join(folder, name))
    sync(folder)


def identity(path: Path) -> tuple[int, int]:
  """Device and inode of a folder on a disk; (0, 0) where there is none."""
  try:
    found = os.stat(path)
  except OSError:
    return 0, 0
  return found.st_dev, found.st_ino


@contextlib.contextmanager
def in_its_place(folder: epath.Path) -> Iterator[None]:
  """Guards a folder that may be renamed while it is written to: it is not made again.

  Orbax makes missing parents. What it made at the old place is removed.

  Args:
    folder: exists, on a disk, or in an object store, where nothing is renamed at once.

  Raises:
    FileNotFoundError: it was renamed or removed.
  """
  if is_remote(folder):
    yield
    return
  places = {place: identity(place) for place in (folder, *folder.parents)}
  try:
    yield
  finally:
    anew = [p for p, known in places.items() if identity(p) not in ((0, 0), known)]
    if folder in anew:
      shutil.rmtree(folder, ignore_errors=True)
    for place in anew:  # of those above it, empty ones
      with contextlib.suppress(OSError):
        os.rmdir(place)
  if identity(folder) != places[folder]:
    raise FileNotFoundError(errno.ENOENT, "it was renamed or removed", str(folder))


@contextlib.contextmanager
def written_to(path: epath.Path) -> Iterator[str]:
  """A name on a disk for a folder or file that is made by code that writes only to disks.

  Afterwards it is on the disk for certain, or at `path` in the object store.
  """
  if not is_remote(path):
    with _plainly_named(path.parent) as parent:
      yield os.path.join(parent, path.name)
    sync_tree(path)
    return
  with tempfile.TemporaryDirectory() as temporary:
    local = os.path.join(temporary, path.name)
    yield local
    path.parent.mkdir(parents=True, exist_ok=True)
    copy(epath.Path(local), path)


def read_from(path: epath.Path) -> contextlib.AbstractContextManager[str]:
  """A folder on a disk: itself, or a temporary copy of one in an object store."""
  return local_copy(path) if is_remote(path) else _plainly_named(path)


@contextlib.contextmanager
def local_copy(path: epath.Path) -> Iterator[str]:
  """The name on a disk of a temporary copy of a file, or of a folder with all in it."""
  with tempfile.TemporaryDirectory() as temporary:
    local = os.path.join(temporary, path.name)
    copy(path, epath.Path(local))
    yield local


@contextlib.contextmanager
def _plainly_named(folder: epath.Path) -> Iterator[str]:
  """That folder by a name without brackets: orbax would look for files by them."""
  name = os.fspath(folder)
  if glob.escape(name) == name:
    yield name
    return
  with tempfile.TemporaryDirectory() as temporary:
    link = os.path.join(temporary, "folder")
    os.symlink(name, link)
    yield link


def copy(source: epath.Path, target: epath.Path) -> None:
  """Copies a file, or a folder with all that is in it."""
  if source.is_dir():
    target.mkdir(exist_ok=True)
    for child in source.iterdir():
      copy(child, target / child.name)
    return
  with source.open("rb") as reader, target.open("wb") as writer:
    shutil.copyfileobj(reader, writer)


def set_aside(path: epath.Path) -> epath.Path:
  """Renames something damaged so that it is not found again; gives the new path."""
  number, aside = 1, path.parent / f"{path.name}.damaged"
  while aside.exists():
    number += 1
    aside = path.parent / f"{path.name}.damaged{number}"
  if is_remote(path) and path.is_dir():  # not every store can rename a folder
    copy(path, aside)
    path.rmtree()
    return aside
  return path.rename(aside)


def is_file(path: Path) -> bool:
  """Whether a path is a file, and no pipe, which may never end."""
  place = as_path(path)
  return place.is_file() if is_remote(place) else os.path.isfile(place)


def content_digest(path: Path) -> str:
  """A digest of a file's bytes, or of the names and bytes of all files in a folder.

  Raises:
    OSError: it cannot be read.
  """
  root, digest = as_path(path), hashlib.sha256()
  for file in _files(root):
    if not is_file(file):
      raise OSError(f"{file} is no file")
    digest.update(f"{file.relative_to(root)}\0".encode())
    with file.open("rb") as reader:
      digest.update(hashlib.file_digest(reader, "sha256").digest())
  return digest.hexdigest()


def _files(path: epath.Path) -> list[epath.Path]:
  if not path.is_dir():
    return [path]
  return [file for child in sorted(path.iterdir()) for file in _files(child)]


def write_json(path: epath.Path, document: dict[str, Any]) -> None:
  """Writes a document with its format's version and a digest of it all."""
  document = plain({**document, "format": FORMAT})
  document["digest"] = _digest(document)
  write_bytes(path, json.dumps(document, indent=1, allow_nan=False).encode())


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a document that `write_json` wrote.

  Raises:
    FileNotFoundError: there is none.
    Damaged: it is not what was written.
    ValueError: it has the format of another version.
  """
  data = path.read_bytes()
  try:
    document = json.loads(data)
    digest = document.pop("digest")
    whole = _digest(document) == digest
  except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
    whole = False
  if not whole:
    raise Damaged(f"{path} is damaged: its content does not have its digest")
  if document.pop("format", None) != FORMAT:
    raise ValueError(
      f"{path} was written by another version of jaxsms: go on with that version, or begin "
      "anew in another folder"
    )
  return document


def _digest(document: dict[str, Any]) -> str:
  text = json.dumps(document, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
  """A value in terms of JSON: arrays as lists, NaN and infinities as None."""
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def first_sentence(error: Exception) -> str:
  """The first sentence of another library's error, for use within a sentence."""
  words = str(error).split()
  return " ".join(words).split(". ")[0][:200].rstrip(".") or type(error).__name__
