"""Safetensors files, alone and as the shards of a folder in Hugging Face's layout."""

import json
import os
from typing import Any

from jaxsms.disk.safetensors import read_header, reading, unique
from jaxsms.disk.storage import first_sentence
from jaxsms.disk.tensors import InFiles, Range, Spec
from jaxsms.disk.zips import open_pytorch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")
# What a folder may hold, the first that is there, by ending and usual name.
_KINDS = (
  (".safetensors.index.json", INDEX),
  (".safetensors", SINGLE),
  (".bin.index.json", "pytorch_model.bin.index.json"),
  (".bin", "pytorch_model.bin"),
)


def open_file(file: str, path: str | os.PathLike, **more: Any) -> InFiles:
  """Opens one safetensors file.

  Args:
    file: on a disk.
    path: what messages call it.
    **more: see `Tensors`.

  Raises:
    ValueError: there is none, or it is damaged.
  """
  with reading(file, path):
    places, metadata = read_header(file)
  specs = {name: Spec(place.shape, place.dtype) for name, place in places.items()}
  ranges = {name: Range(file, place.begin) for name, place in places.items()}
  return InFiles(path, specs, ranges, metadata=metadata, **more)


def index_of(folder: str) -> str | None:
  """The index of a folder in Hugging Face's layout, or its only file of weights.

  Raises:
    ValueError: there are several of one kind, so that it is unclear which is meant.
  """
  names = sorted(os.listdir(folder))
  for ending, preferred in _KINDS:
    found = [name for name in names if name.endswith(ending)]
    if preferred in found:
      return os.path.join(folder, preferred)
    if len(found) > 1:
      raise ValueError(
        f"{folder} holds {len(found)} files *{ending} ({', '.join(found[:5])}) and no "
        f"{preferred}: give the one that is meant"
      )
    if found:
      return os.path.join(folder, found[0])
  return None


def open_shards(local: str, path: str | os.PathLike) -> InFiles:
  """Opens a folder in Hugging Face's layout: an index.json and its files, or one file.

  Args:
    local: the folder, or its index, on a disk.
    path: what messages call it.

  Raises:
    ValueError: a file is missing or damaged, or index and files do not agree.
  """
  index = index_of(local) if os.path.isdir(local) else local
  assert index is not None  # or it is no folder of a model
  folder = os.path.dirname(index)
  if not index.endswith(INDEX_ENDINGS):
    found = _open_part(index, path)
    found.layout, found.folder = "shards", folder
    return found
  name = os.path.basename(index)
  weight_map = _weight_map(index, path)
  specs: dict[str, Spec] = {}
  ranges: dict[str, Range] = {}
  metadata: dict[str, str] = {}
  for file in sorted(set(weight_map.values())):
    where = os.path.join(folder, file)
    if not os.path.isfile(where):
      raise ValueError(
        f"{file}, which {name} names, is missing in {path}: give a whole folder"
      )
    shard = _open_part(where, where)
    metadata |= shard.metadata
    for tensor, spec in shard.specs.items():
      if tensor in specs:
        first = os.path.basename(ranges[tensor].file)
        raise ValueError(
          f"{tensor!r} lies in {first} and in {file} of {path}: keep one of them"
        )
      specs[tensor], ranges[tensor] = spec, shard.range_of(tensor)
  for tensor, file in weight_map.items():
    found = ranges.get(tensor)
    if found is None or os.path.basename(found.file) != file:
      lies = f"lies in {os.path.basename(found.file)}" if found else "does not lie there"
      raise ValueError(
        f"{name} of {path} says that {tensor!r} is in {file}, but it {lies}: give a folder "
        "whose index and files agree"
      )
  unnamed = [tensor for tensor in specs if tensor not in weight_map]
  if unnamed:
    raise ValueError(
      f"{name} of {path} does not name {unnamed[0]!r}, which lies in "
      f"{os.path.basename(ranges[unnamed[0]].file)}: give a folder whose index and files "
      "agree"
    )
  return InFiles(path, specs, ranges, layout="shards", metadata=metadata, folder=folder)


def _open_part(file, path):
  """One file of weights."""
  if file.endswith(".safetensors"):
    return open_file(file, path)
  found = open_pytorch(file, path)
  if not isinstance(found, InFiles):
    raise ValueError(
      f"{path} cannot be read by part: give a PyTorch checkpoint of tensors alone, or "
      ".safetensors files"
    )
  return found


def _weight_map(index, path):
  """The file of each tensor, as the index has it."""
  name = os.path.basename(index)
  try:
    with open(index, encoding="utf-8") as file:
      document = json.load(file, object_pairs_hook=unique)
    if not isinstance(document, dict) or not isinstance(document["weight_map"], dict):
      raise ValueError("it is no JSON object with a weight_map of files by tensor")
    weight_map = document["weight_map"]
    files = list(weight_map.values())
    if not files or not all(isinstance(f, str) for f in files):
      raise ValueError("its weight_map names no files")
  except KeyError as error:
    raise ValueError(f"{name} of {path} has no {error}: give a whole one") from error
  except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
    reason = first_sentence(error).replace("its header", "it")
    raise ValueError(
      f"{name} of {path} cannot be read ({reason}): give an index with each tensor once"
    ) from error
  for file in files:
    if os.path.basename(file) != file or file in ("", ".", "..") or "\\" in file:
      raise ValueError(
        f"{name} of {path} names {file!r}, which is no file in its own folder: give an "
        "index whose files lie beside it"
      )
  return weight_map
