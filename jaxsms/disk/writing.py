"""Writing a model by part, so that it has its name when it is whole and not before."""

import contextlib
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from jaxsms.disk import storage
from jaxsms.disk.passes import Block, blocks_of, in_order, scratch
from jaxsms.disk.safetensors import as_bytes, check_dtypes, make_header
from jaxsms.disk.shards import SINGLE
from jaxsms.disk.tensors import Range, Spec, Tensors

_SYNCED_AT_ONCE = 2**26  # bytes


class Writer(Protocol):
  """What takes a model block by block: arrays by sorted names, each from its start on."""

  def write(self, block: Block, values: np.ndarray) -> None:
    """Takes the entries of a block, in row-major order."""

  def finish(self) -> None:
    """Makes what was written whole, and waits until it is on the disk."""


class ToSafetensors:
  """Writes one safetensors file, or several with an index.

  Files get their first bytes last: one that is not whole does not look so. What is written
  goes to the disk meanwhile, in a thread, so that little is left to wait for.

  Args:
    folder: where they go; it exists.
    files: the specs in each, by the file's name.
    metadata: text to lie in each.
    index: name of the index; None writes none.
  """

  def __init__(
    self,
    folder: str,
    files: Mapping[str, Mapping[str, Spec]],
    metadata: Mapping[str, str],
    index: str | None = None,
  ):
    self._ranges: dict[str, Range] = {}
    self._handles: dict[str, int] = {}
    self._headers: dict[str, bytes] = {}
    self._index = None if index is None else os.path.join(folder, index)
    for name, specs in files.items():
      check_dtypes(specs)
      file = os.path.join(folder, name)
      self._headers[file], places = make_header(specs, metadata)
      self._ranges |= {n: Range(file, place.begin) for n, place in places.items()}
    self._total = sum(spec.nbytes for specs in files.values() for spec in specs.values())

  def __enter__(self):
    for file in self._headers:
      self._handles[file] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    self._syncing, self._unsynced = ThreadPoolExecutor(1), 0
    self._synced: Future | None = None
    return self

  def __exit__(self, *exception):
    self._syncing.shutdown()
    for handle in self._handles.values():
      os.close(handle)

  def write(self, block: Block, values: np.ndarray) -> None:
    file, begin = self._ranges[block.name]
    at = begin + block.start * values.itemsize
    _write_all(self._handles[file], as_bytes(values), at)
    self._unsynced += values.nbytes
    if self._unsynced > _SYNCED_AT_ONCE and (self._synced is None or self._synced.done()):
      self._raise_from_sync()
      self._synced = self._syncing.submit(os.fsync, self._handles[file])
      self._unsynced = 0

  def _raise_from_sync(self):
    """Raises what the last sync in the thread has raised; waits for it."""
    if self._synced is not None:
      self._synced.result()

  def finish(self) -> None:
    self._raise_from_sync()
    for file, handle in self._handles.items():
      os.fsync(handle)
      _write_all(handle, self._headers[file], 0)
      os.fsync(handle)
    if self._index is not None:
      weight_map = {n: os.path.basename(r.file) for n, r in sorted(self._ranges.items())}
      document = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
      with open(self._index, "x", encoding="utf-8") as index:
        json.dump(document, index, indent=2)
        index.write("\n")
        index.flush()
        os.fsync(index.fileno())


class ToZip:
  """Writes a zip archive with a member for each leaf; what a format adds is its own.

  Args:
    file: it does not exist yet.
    specs: of the model.
  """

  def __init__(self, file: str, specs: Mapping[str, Spec]):
    self._file, self._specs = file, specs

  def __enter__(self):
    self._archive = zipfile.ZipFile(self._file, "x")
    self._member: Any = None
    return self

  def __exit__(self, *exception):
    # What cannot be written fails again where its rest is: one error is enough.
    again = () if exception[0] is None else (OSError, ValueError)
    with contextlib.suppress(*again):
      if self._member is not None:
        self._member.close()
    with contextlib.suppress(*again):
      self._archive.close()

  def begin(self, name: str) -> Any:
    """Opens the member of a leaf, its header written."""
    raise NotImplementedError

  def write(self, block: Block, values: np.ndarray) -> None:
    if block.start == 0:
      self._member = self.begin(block.name)
    self._member.write(as_bytes(values))
    if block.stop == self._specs[block.name].size:
      self._member.close()
      self._member = None

  def finish(self) -> None:
    self._archive.close()
    with open(self._file, "rb") as file:
      os.fsync(file.fileno())


def _write_all(handle, data, at):
  view = memoryview(data)
  while view:
    count = os.pwrite(handle, view, at)
    view, at = view[count:], at + count


def split_shards(specs: Mapping[str, Spec], size: int) -> dict[str, dict[str, Spec]]:
  """The files of a model in Hugging Face's layout.

  Args:
    specs: of the model.
    size: most bytes of a file; an array that is larger has one to itself.

  Returns:
    The specs in each file, by its name.
  """
  shards: list[dict[str, Spec]] = [{}]
  left = size
  for name, spec in sorted(specs.items()):
    if spec.nbytes > left and shards[-1]:
      shards.append({})
      left = size
    shards[-1][name] = spec
    left -= spec.nbytes
  if len(shards) == 1:
    return {SINGLE: shards[0]}
  n = len(shards)
  return {f"model-{i:05d}-of-{n:05d}.safetensors": s for i, s in enumerate(shards, 1)}


class Digests:
  """Passes a model on to a writer, and keeps a digest of each array."""

  def __init__(self, writer: Writer):
    self._writer = writer
    self._digests: dict[str, int] = {}

  def write(self, block: Block, values: np.ndarray) -> None:
    before = self._digests.get(block.name, 0)
    self._digests[block.name] = zlib.crc32(as_bytes(values).data, before)
    self._writer.write(block, values)

  def finish(self) -> None:
    self._writer.finish()

  def by_name(self) -> dict[str, int]:
    """CRC-32 of each array: against accidents, and several times as fast as SHA-256."""
    return self._digests


def check_digests(written: Tensors, digests: Mapping[str, int]) -> None:
  """Reads a model again.

  Raises:
    OSError: an array is not what was written.
  """

  def digest(name):
    found = 0
    for block in blocks_of(written.specs, [name]):
      into = scratch("read", block.stop - block.start, written.specs[name].dtype)
      found = zlib.crc32(as_bytes(written.read(*block, into=into)).data, found)
    return name, found

  if written.specs.keys() != digests.keys():
    raise OSError("what was written has other arrays")
  for name, found in in_order(digest, sorted(written.specs)):
    if found != digests[name]:
      raise OSError(f"{name} is not what was written")


@contextlib.contextmanager
def partial(out: str) -> Iterator[str]:
  """A name beside `out` to write to, a file or a folder; it gets its own when all is well.

  Args:
    out: an absolute path, on a disk or (gs://...) in an object store; its folder is made.

  Raises:
    OSError: it cannot be written, or exists by then.
  """
  path = storage.as_path(out)
  if storage.is_remote(path):
    with storage.written_to(path) as local:
      yield local
    return
  os.makedirs(path.parent, exist_ok=True)
  temporary = f"{path}.{secrets.token_hex(4)}.partial"
  try:
    yield temporary
    storage.sync_tree(temporary)
    if os.path.lexists(path):
      raise FileExistsError(17, f"{path} exists by now")
    os.rename(temporary, path)
    storage.sync(path.parent)
  finally:
    if os.path.isdir(temporary):
      shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
      os.remove(temporary)
