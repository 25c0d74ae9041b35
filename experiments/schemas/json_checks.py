"""Checks of what JSON holds, put together from small ones.

A check is a function of a value that raises `Unfit` with what the value should be. The one
that holds it puts in front where it stands: a key, or a position in a list.
"""

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], None]
MOST = 1e39  # of a number: beyond float32, and its square is still one
MOST_WHOLE = 2**53


class Unfit(ValueError):
  """A value that is not what it should be."""

  def __init__(self, expected: str, where: str = ""):
    """`expected`: what it should be; `where`: keys and positions that lead to it."""
    super().__init__(expected)
    self.expected, self.where = expected, where


def number(least: float = -MOST, most: float = MOST) -> Check:
  """A finite number within bounds, or null, which stands for one that is not finite."""

  def check(value):
    if value is None:
      return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise Unfit("a number")
    if not least <= value <= most:
      bounds = f" of {least:g} to {most:g}" if most < MOST else ""
      raise Unfit("a number" + (bounds or ", 0 or above" if least == 0 else bounds))

  return check


def not_null(check: Check) -> Check:
  """The same, and not null."""

  def checked(value):
    if value is None:
      raise Unfit("there")
    check(value)

  return checked


def whole(least: int, most: int = MOST_WHOLE) -> Check:
  """A whole number within bounds."""

  def check(value):
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
      raise Unfit(f"a whole number from {least} on")

  return check


def text(value: Any) -> None:
  """Text that can be written again."""
  if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
    raise Unfit("text")


def flag(value: Any) -> None:
  """True or false."""
  if not isinstance(value, bool):
    raise Unfit("true or false")


def scalar(value: Any) -> None:
  """Text, a number, true, false or null."""
  if isinstance(value, str):
    text(value)
  elif not isinstance(value, bool):
    number()(value)


def scalar_or_list(value: Any) -> None:
  """What a flag can be."""
  if isinstance(value, list):
    listing(scalar)(value)
  else:
    scalar(value)


def listing(check: Check, least: int = 0) -> Check:
  """A list of such values, with at least so many."""

  def checked(value):
    if not isinstance(value, list) or len(value) < least:
      raise Unfit("a list" + (f" with at least {least}" if least else ""))
    for i, one in enumerate(value):
      check_at(f"[{i}]", check, one)

  return checked


def mapping(check: Check) -> Check:
  """An object with any names, of such values."""

  def checked(value):
    if not isinstance(value, dict):
      raise Unfit("an object")
    for name, one in value.items():
      text(name)
      check_at(f".{name}", check, one)

  return checked


def record(required: dict[str, Check], **optional: Check) -> Check:
  """An object with these names, and perhaps those; others are not looked at."""

  def checked(value):
    if not isinstance(value, dict):
      raise Unfit("an object")
    for name, check in (required | optional).items():
      if name in value:
        check_at(f".{name}", check, value[name])
      elif name in required:
        raise Unfit("there", f".{name}")

  return checked


def maybe(check: Check) -> Check:
  """Such a value, or null."""
  return lambda value: None if value is None else check(value)


def check_at(step: str, check: Check, value: Any) -> None:
  """Checks a value that stands at a step, such as ".name" or "[3]"."""
  try:
    check(value)
  except Unfit as error:
    raise Unfit(error.expected, step + error.where) from error


def every(*checks: Check) -> Check:
  """All of them."""

  def checked(value):
    for check in checks:
      check(value)

  return checked
