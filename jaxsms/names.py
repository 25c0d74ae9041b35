"""Words of messages: unknown names, and counts of things."""

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


def quantity(number: int, noun: str) -> str:
  """A number of things, such as 1 example or 3 examples.

  >>> quantity(1, "example"), quantity(0, "copy")
  ('1 example', '0 copies')
  """
  if number == 1:
    return f"1 {noun}"
  return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"
