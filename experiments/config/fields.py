"""Fields of a configuration: each declares its flag, its default and what it may be."""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from absl import flags

from jaxsms.names import check_name

flags.disclaim_key_flags()  # they belong to the module that calls `define_flags`

Check = Callable[[str, Any], None]


class Flag(NamedTuple):
  """The flag that fills a field; the field has its name and type.

  Attributes:
    help: what --help says.
    checks: each raises ValueError for a name and a value that will not do; None is let by.
    default: where the flag is not given.
    bounds: `lower_bound` and `upper_bound` that absl itself checks.
    fill: gives what None stands for, from the values of the fields before.
    parse: makes a value of what was given, the name and the values of the fields before.
    own: False for a flag that another configuration defines, and that is only read.
  """

  help: str
  checks: tuple[Check, ...] = ()
  default: Any = None
  bounds: Mapping[str, float] = types.MappingProxyType({})
  fill: Callable[[dict[str, Any]], Any] | None = None
  parse: Callable[[Any, str, dict[str, Any]], Any] | None = None
  own: bool = True


def flag(help: str, *checks: Check, **options: Any) -> Any:
  """A field that a flag of its name fills, see `Flag`.

  >>> @dataclasses.dataclass(frozen=True, kw_only=True)
  ... class Example:
  ...   rounds: int = flag("Times that all is done.", at_least(1), default=5)
  >>> given = flags.FlagValues()
  >>> define_flags(Example, given)
  >>> _ = given(["example", "--rounds=3"])
  >>> read_fields(Example, given)
  Example(rounds=3)
  """
  return dataclasses.field(metadata={"flag": Flag(help, checks, **options)})


def shared(*checks: Check, **options: Any) -> Any:
  """A field that a flag of another configuration fills, see `Flag`."""
  return dataclasses.field(metadata={"flag": Flag("", checks, own=False, **options)})


def define_flags(part: type, to: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of a class's fields; inherited ones may be there already."""
  define = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
    tuple: flags.DEFINE_list,
  }
  own = inspect.get_annotations(part)
  for field in dataclasses.fields(part):
    this = field.metadata["flag"]
    if not this.own or (field.name in to and field.name not in own):
      continue
    kind = field.type
    if isinstance(kind, types.UnionType):  # this or None
      kind = typing.get_args(kind)[0]
    define[typing.get_origin(kind) or kind](
      field.name, this.default, this.help, flag_values=to, **this.bounds
    )


def default_of(this: Flag, values: dict[str, Any]) -> Any:
  """What a flag stands for where it is not given.

  Args:
    this: the flag.
    values: of the fields before.
  """
  if this.default is None and this.fill:
    return this.fill(values)
  return this.default


def read_fields(
  kind: type, given: flags.FlagValues, instead: Mapping[str, Any] | None = None
) -> Any:
  """A configuration from parsed flags, each field checked by itself.

  Args:
    kind: of the configuration.
    given: the flags.
    instead: values of fields, whatever the flags say.

  Raises:
    ValueError: a flag is out of range or names something unknown.
  """
  values: dict[str, Any] = {}
  for field in dataclasses.fields(kind):
    name, this = field.name, field.metadata["flag"]
    value = (instead or {}).get(name, given[name].value)
    if value is None and this.fill:
      value = this.fill(values)
    elif value is not None and this.parse:
      value = this.parse(value, name, values)
    for check in this.checks if value is not None else ():
      check(name, value)
    values[name] = value
  return kind(**values)


def default_values(kind: type) -> dict[str, Any]:
  """What the flags of a configuration hold where they are not given, by field."""
  return {field.name: field.metadata["flag"].default for field in dataclasses.fields(kind)}


def names(part: type) -> tuple[str, ...]:
  """The fields of a configuration, those that it inherits among them."""
  return tuple(field.name for field in dataclasses.fields(part))


def flag_text(value: object) -> str:
  """The value of a flag as it would be typed; empty for None."""
  if isinstance(value, (list, tuple)):
    return ",".join(map(str, value))
  return "" if value is None else str(value)


def by_dataset(digits: Any, other: Any) -> Callable[[dict[str, Any]], Any]:
  """A `fill` for the digits, and for every other data set."""
  return lambda values: digits if values["dataset"] == "digits" else other


def ensure(holds: Callable[[Any], bool], sentence: str) -> Check:
  """A check with what is said where it does not hold."""

  def check(name, value):
    if not holds(value):
      raise ValueError(f"--{name} is {value}: {sentence}")

  return check


def at_least(least: int) -> Check:
  """For numbers that are counts."""
  return ensure(lambda value: value >= least, f"it must be at least {least}")


from_zero = ensure(lambda value: 0 <= value < math.inf, "it must be a number, 0 or above")
above_zero = ensure(lambda value: 0 < value < math.inf, "it must be a number above 0")


def one_of(kind: str, known: Iterable[str] | Callable[[], Iterable[str]]) -> Check:
  """For a name, or each of several, in a sentence that calls it a `kind`.

  Known names may come from a function, such as of a registry that grows.
  """

  def check(name, value):
    names = known() if callable(known) else known
    for one in value if isinstance(value, tuple) else (value,):
      check_name(kind, one, names)

  return check


def titles(entries: Mapping[str, Any]) -> str:
  """The names of a registry, each with the title of its entry, for a flag's help."""
  return ", ".join(f"{name} ({entry.title})" for name, entry in entries.items())


def whole_numbers(example: str) -> Callable[..., tuple[int, ...]]:
  """A `parse` for whole numbers such as the example."""

  def parse(words, name, values):
    if any(not re.fullmatch(r"\s*[0-9]{1,9}\s*", str(word)) for word in words):
      raise ValueError(
        f"--{name} is {','.join(words)}: give whole numbers, such as {example}"
      )
    return tuple(int(word) for word in words)

  return parse


def numbers(
  words: list[str],
  name: str,
  values: Mapping[str, Any] | None = None,
  kind: type = float,
  example: str = "1,2",
) -> tuple[float, ...]:
  """Words as numbers of a kind; what other flags hold does not matter."""
  try:
    return tuple(kind(word) for word in words)
  except ValueError as error:
    what = "whole numbers" if kind is int else "numbers"
    raise ValueError(
      f"--{name} is {','.join(words)}: give {what}, such as {example}"
    ) from error
