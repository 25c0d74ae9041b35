"""Flags of a search: ranges of what varies, and when copies are evaluated."""

import dataclasses
from typing import Any

from jaxsms.names import check_name
from jaxsms.training.search import LEAST_COPIES, Search
from jaxsms.training.search_values import check_range

from ..methods.registry import having
from .fields import at_least, define_flags, flag

SEARCHED = ("learning_rate", "weight_decay")  # of VARIABLES, the continuous ones
EXAMPLE = "learning_rate:0.01:0.3,weight_decay:1e-5:1e-2"


def parse_ranges(words: list[str], name: str, values: dict[str, Any]) -> tuple[str, ...]:
  """Ranges such as learning_rate:0.01:0.3, each checked by itself."""
  found = {}
  for word in words:
    variable, *ends = (part.strip() for part in word.split(":"))
    try:
      low, high = map(float, ends)
    except ValueError as error:
      raise ValueError(
        f"--{name} has {word!r}: give a variable, its least and its greatest value, such "
        f"as {EXAMPLE}"
      ) from error
    check_name(f"variable of --{name}", variable, SEARCHED)
    check_range(f"--{name}: {variable}", low, high)
    if variable in found:
      raise ValueError(f"--{name} has {variable} twice: give one range for each variable")
    found[variable] = f"{variable}:{low!r}:{high!r}"
  if not found:
    raise ValueError(f"--{name} is empty: give a range for each variable, as in {EXAMPLE}")
  return tuple(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFlags:
  """The search."""

  ranges: tuple[str, ...] | None = flag(
    "A search, instead of --values. Gives the least and the greatest value for each "
    f"variable of --vary, such as {EXAMPLE}. Values are drawn uniformly in their "
    "logarithm, copies are evaluated on validation data, and the better half is merged.",
    parse=parse_ranges,
  )
  rungs: int | None = flag(
    "With --ranges, how often the copies of a phase are evaluated, the last time at its "
    "end. Each time but the last, the worse half starts again from the average of the "
    "better half, with values near theirs. Default: 2, or 1 where a phase has one "
    "epoch.",
    at_least(1),
    fill=lambda values: values["ranges"] and min(2, max(1, values["retrain_epochs"])),
  )

  @property
  def searched(self) -> dict[str, tuple[float, float]]:
    """The least and the greatest value of each variable that is searched."""
    parts = [word.split(":") for word in self.ranges or ()]
    return {name: (float(low), float(high)) for name, low, high in parts}

  def search(self, steps: int, steps_per_epoch: int) -> Search | None:
    """The search in a phase of so many steps, with rungs at the ends of epochs.

    None where nothing is searched.
    """
    if not self.searched:
      return None
    epochs, rungs = steps // steps_per_epoch, range(1, self.rungs + 1)
    ends = tuple(epochs * rung // self.rungs * steps_per_epoch for rung in rungs)
    return Search(self.searched, ends)


define_flags(SearchFlags)


def check(config: Any) -> None:
  """Raises ValueError where the flags of a search do not fit the others.

  Args:
    config: with those of the soup and its baselines.
  """
  if config.ranges is None:
    if config.rungs is not None:
      raise ValueError(
        f"--rungs={config.rungs} is of a search: give --ranges, or leave it out"
      )
    return
  variables = [name for name in config.vary.split(",") if name != "seed"]
  if sorted(config.searched) != sorted(variables):
    raise ValueError(
      f"--ranges has {', '.join(config.searched)} for --vary={config.vary}: give a range "
      "for each variable but seed, and for no other"
    )
  if config.values is not None:
    raise ValueError("--values and --ranges are both given: leave one of them out")
  if config.ingredients < LEAST_COPIES:
    raise ValueError(
      f"--ranges with --ingredients={config.ingredients}: half of the copies are merged, "
      f"give at least {LEAST_COPIES}"
    )
  if not config.retrain_epochs:
    raise ValueError(
      "--ranges with --retrain_epochs=0: copies that are not trained do not differ, give "
      "at least one epoch"
    )
  if config.rungs > config.retrain_epochs:
    raise ValueError(
      f"--rungs={config.rungs} with --retrain_epochs={config.retrain_epochs}: at least one "
      "epoch lies between two rungs, give fewer rungs or more epochs"
    )
  for name in config.baselines:
    own = name in having("own_masks") or name in having("one_schedule")
    if own and name not in having("one_copy"):
      raise ValueError(
        f"--baselines has {name}, whose copies are not evaluated on the way: leave it out "
        "with --ranges"
      )
