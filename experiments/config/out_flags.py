"""The --out of the binaries that write a model, and what it may be."""

import dataclasses
import os

from jaxsms.disk import storage

from .fields import define_flags, flag


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
