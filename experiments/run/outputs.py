"""The --out of the binaries that write a model: what it may be, and its formats."""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from jaxsms.disk import storage
from jaxsms.disk.files import output_file

from ..config.fields import define_flags, flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutFlags:
  """Where a model goes."""

  out: str | None = flag("What to write; it must not exist yet.")


define_flags(OutFlags)


def check_out(out: str | None, endings: tuple[str, ...], example: str) -> str:
  """The place of --out, once it is certain that it can be written.

  Args:
    out: its value.
    endings: that it may have; "" among them means a folder, whose name has none.
    example: of a value.

  Returns:
    An absolute path, or an address in an object store.

  Raises:
    ValueError: it is missing, exists, ends otherwise, or lies in a file.
  """
  if not out:
    raise ValueError(f"--out is missing: say what to write, such as --out={example}")
  ending = os.path.splitext(out.rstrip("/"))[1].lower()
  if ending not in endings:
    known = [e or "nothing (a folder)" for e in endings]
    raise ValueError(
      f"--out is {out}: it must end in {' or '.join(known)}, such as --out={example}"
    )
  path = storage.as_path(out)
  if path.exists():
    raise ValueError(f"--out {out} exists already: choose another name, or remove it")
  if not storage.is_remote(path):
    above = next(parent for parent in path.parents if parent.exists())
    if not above.is_dir():
      raise ValueError(f"--out {out} lies in {above}, which is no folder: choose another")
  return str(path)


def write_torch(path: str, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays as PyTorch's state dict.

  Raises:
    ImportError: PyTorch is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path} is written by PyTorch, which is not installed: run `pip install torch`, or "
      "let --out end in .safetensors"
    ) from error
  state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
  with output_file(path) as file:
    torch.save(state, file)
