"""How the binaries read their flags, also those in a file, and refuse what is bad input."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import app, flags, logging


def run_with_flags(main: Callable[[list[str]], None]) -> None:
  """Runs a binary; what is no flag file ends it with one sentence and exit status 2."""
  app.run(main, flags_parser=_parsed)


def _parsed(argv: Sequence[str]) -> list[str]:
  for file in flag_files(argv):
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe may never end
      _refuse(file, "is no file")
  try:
    return app.parse_flags_with_usage(list(argv))
  except UnicodeDecodeError:
    _refuse(" or ".join(flag_files(argv)) or "--flagfile", "is not text")


def flag_files(argv: Sequence[str]) -> list[str]:
  """What --flagfile names on a command line, in one word or two."""
  found = []
  for word, after in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = word.partition("=")
    if name in ("--flagfile", "-flagfile"):
      found.append(os.path.expanduser(value if equals else after))
  return found


def _refuse(file, problem):
  fail(
    f"--flagfile {file} {problem}: give a text file with a flag on each line, such as "
    "--epochs=30"
  )


def fail(sentence: str, status: int = 2) -> NoReturn:
  """Says what is wrong, and ends the binary."""
  print(f"error: {sentence}", file=sys.stderr)
  sys.exit(status)


def set_log_level(level: int = logging.WARNING) -> None:
  """Sets the level of logging, unless --verbosity is given."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(level)


def check_no_arguments(argv: Sequence[str]) -> None:
  """Raises ValueError where a word is no flag.

  Args:
    argv: what absl leaves, the program's name first.
  """
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}: flags are written --name=value")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
  """Ends a binary whose input is bad with one sentence and exit status 2."""
  try:
    yield
  except (ValueError, ImportError) as error:
    fail(str(error))
