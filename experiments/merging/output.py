"""Where the soup of `experiments.soup` goes: one file, a checkpoint, or shards."""

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jaxsms
from jaxsms.disk import storage
from jaxsms.disk.opening import PYTORCH, open_tensors
from jaxsms.disk.other_writers import ToCheckpoint, ToNpz
from jaxsms.disk.shards import INDEX, open_file
from jaxsms.disk.tensors import Spec, Tensors, prunable_names
from jaxsms.disk.to_pytorch import ToPytorch
from jaxsms.disk.writing import (
  Digests,
  ToSafetensors,
  check_digests,
  partial,
  split_shards,
)
from jaxsms.disk.zips import open_npz, open_pytorch

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)([KMGT]?)B?$", re.IGNORECASE)
_NOT_COPIED = (".safetensors", ".index.json", ".npz", ".h5", ".msgpack", ".onnx", ".gguf")
_CARD = "README.md"
TO_PYTORCH = (".pt", ".pth", ".bin")
CARD = """---
tags:
- merge
- model-soup
---
# Model soup

{words}

| model | weight |
| --- | ---: |
{rows}

Made by jaxsms {version} with

    {command}
"""


class Output(NamedTuple):
  """What is written, and how.

  Attributes:
    out: an absolute path or an address.
    specs: shapes and dtypes.
    first: the model whose layout, metadata and other files the result takes.
    shard_size: most bytes of a file of weights.
    sharded: whether a folder is written in Hugging Face's layout.
  """

  out: str
  specs: Mapping[str, Spec]
  first: Tensors
  shard_size: int
  sharded: bool


def read_size(text: str) -> int:
  """A number of bytes, such as 5GB, 200MB or 1000.

  Raises:
    ValueError: it is none, or 0.
  """
  match = _SIZE.match(text.strip())
  size = (
    round(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
  )
  if not size:
    raise ValueError(
      f"--shard_size is {text}: give a number of bytes, such as 5GB or 200MB"
    )
  return size


def check_space(out: str, specs: Mapping[str, Spec]) -> None:
  """Raises OSError where the disk has no room for the result."""
  path = storage.as_path(out)
  if storage.is_remote(path):
    return
  folder = next(parent for parent in path.parents if parent.exists())
  free, needed = shutil.disk_usage(folder).free, sum(x.nbytes for x in specs.values())
  if needed > free:
    raise OSError(f"it takes {needed:,} bytes, and {folder} has {free:,} left")


@contextlib.contextmanager
def writing(output: Output) -> Iterator[tuple[Digests, str | None]]:
  """A writer, and the folder that it writes where that has Hugging Face's layout.

  The result is checked and gets its name when all is well.

  Raises:
    ValueError: the kind of file does not have a dtype.
    OSError: it cannot be written, or is not what was written.
  """
  check_space(output.out, output.specs)
  with partial(output.out) as temporary, contextlib.ExitStack() as stack:
    writer = Digests(stack.enter_context(_writer(output, temporary)))
    yield writer, temporary if os.path.isdir(temporary) else None
    writer.finish()
    written = _opened(output, temporary, stack)
    written.keep(name for name in written.specs if name in output.specs)
    check_digests(written, writer.by_name())


def _writer(output, temporary):
  out, specs, metadata = output.out.lower(), output.specs, output.first.metadata
  if out.endswith(".safetensors"):
    folder, name = os.path.split(temporary)
    return ToSafetensors(folder, {name: specs}, metadata)
  if out.endswith(".npz"):
    return ToNpz(temporary, specs)
  if out.endswith(TO_PYTORCH):
    return ToPytorch(temporary, specs)
  if not output.sharded:
    return ToCheckpoint(temporary, specs, prunable_names(specs))
  os.mkdir(temporary)
  files = split_shards(specs, output.shard_size)
  return ToSafetensors(temporary, files, metadata, INDEX if len(files) > 1 else None)


def _opened(output, temporary, stack):
  kinds = {".safetensors": open_file, ".npz": open_npz} | dict.fromkeys(
    TO_PYTORCH, open_pytorch
  )
  for ending, opened in kinds.items():
    if output.out.lower().endswith(ending):
      found = opened(temporary, temporary)
      if found is None:
        raise OSError("what was written cannot be read")
      stack.callback(found.close)
      return found
  return open_tensors(temporary, stack)


def copy_others(source: str, folder: str, dtype: str | None) -> None:
  """Copies configuration and tokenizer, whatever lies in a folder beside the weights.

  Args:
    source: the first model's folder.
    folder: of the result.
    dtype: that config.json is to name; None leaves it.
  """
  for name in sorted(os.listdir(source)):
    file = os.path.join(source, name)
    left_out = name.startswith(".") or name == _CARD or name.endswith(_NOT_COPIED + PYTORCH)
    if os.path.isfile(file) and not left_out:
      shutil.copyfile(file, os.path.join(folder, name))
  config = pathlib.Path(folder, "config.json")
  if dtype is None or not config.exists():
    return
  document = json.loads(config.read_text("utf-8"))
  for key in ("torch_dtype", "dtype"):
    if key in document:
      document[key] = dtype
  config.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def write_card(
  folder: str, paths: Sequence[str], weights: Sequence[float], words: str, command: str
) -> None:
  """Writes the README.md of a soup: its models, their weights, and how it was made.

  Args:
    folder: where it goes.
    paths: of the models.
    weights: of each.
    words: what it is.
    command: that made it.
  """
  rows = [f"| `{p}` | {w:.6g} |" for p, w in zip(paths, weights, strict=True)]
  text = CARD.format(
    words=words, rows="\n".join(rows), version=jaxsms.__version__, command=command
  )
  with open(os.path.join(folder, _CARD), "x", encoding="utf-8") as file:
    file.write(text)
