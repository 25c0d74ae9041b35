"""Which reader a path needs."""

import contextlib
import os

from jaxsms import export, pretrained
from jaxsms.disk import cut_files, storage
from jaxsms.disk.files import on_disk
from jaxsms.disk.orbax_folders import open_checkpoint
from jaxsms.disk.shards import INDEX_ENDINGS, index_of, open_file, open_shards
from jaxsms.disk.tensors import InMemory, Tensors
from jaxsms.disk.zips import open_npz, open_pytorch

PYTORCH = (".pt", ".pth", ".bin", ".pth.tar")
_COLLECTIONS = ("params", "batch_stats")


def open_tensors(path: str | os.PathLike, stack: contextlib.ExitStack) -> Tensors:
  """Opens a model of any of the formats, to be read by part.

  Args:
    path: a .safetensors, .npz or PyTorch file; a folder in Hugging Face's layout (or its
      index.json); a folder that `jaxsms.checkpoint.save` or orbax wrote, or that of a
      CheckpointManager, whose newest step is read. In an object store (gs://...) it is
      copied first.
    stack: closes what is opened and removes what is copied.

  Returns:
    The arrays; those of a cut network in their full shapes, in memory. Where some have
    names under "params", only those and "batch_stats" are opened.

  Raises:
    ValueError: there is no such model, or it cannot be read.
    ImportError: a PyTorch checkpoint of the old kind without PyTorch.
  """
  found = _opened(path, stack)
  stack.callback(found.close)
  if not found.specs:
    raise ValueError(f"{path} holds no array: give a checkpoint of a model")
  if any(name.startswith("params/") for name in found.specs):
    found.keep(name for name in found.specs if name.split("/")[0] in _COLLECTIONS)
  return found


def _opened(path, stack):
  address = storage.as_path(path)
  if address.is_dir():
    local = stack.enter_context(storage.read_from(address))
    if index_of(local):
      return open_shards(local, path)
    return open_checkpoint(local, path)
  if storage.is_remote(address):
    if not address.exists():
      raise ValueError(f"there is no file {path}: give a checkpoint")
    local = stack.enter_context(on_disk(address))
  else:
    local = os.fspath(address)
  lower = os.fspath(path).lower()
  if lower.endswith(INDEX_ENDINGS):
    return open_shards(local, path)
  if lower.endswith(".safetensors"):
    found = open_file(local, path)
    if found.metadata.get("format") not in (export.FORMAT, cut_files.FORMAT):
      return found
    found.close()
  elif lower.endswith(".npz"):
    return open_npz(local, path)
  elif lower.endswith(PYTORCH) and (tensors := open_pytorch(local, path)):
    return tensors
  return InMemory(path, pretrained.load_weights(local))
