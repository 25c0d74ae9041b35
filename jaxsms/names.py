"""The error for a name that nobody knows, with the closest known ones."""

import difflib
from collections.abc import Iterable


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
  """Raises ValueError where `name` is not among `known`, naming the closest ones."""
  known = list(known)
  if name in known:
    return
  lower = {k.lower(): k for k in known}
  close = [lower[k] for k in difflib.get_close_matches(str(name).lower(), lower, n=3)]
  hint = f"did you mean {' or '.join(close)}? " if close else ""
  raise ValueError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")
