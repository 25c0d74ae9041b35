"""Flags of what the soup is compared with."""

import dataclasses
from typing import Any

from ..methods.epochs import bimp_epochs
from ..methods.registry import METHODS, baselines, having
from .fields import above_zero, at_least, define_flags, ensure, flag, from_zero, one_of

TEMPERATURE = 3.0


def _unique(words, name, values):
  given = tuple(dict.fromkeys(word for word in words if word))
  if given != ("all",):
    return given
  left_out = having("labels") if values["stream"] else ()
  return tuple(name for name in baselines() if name not in left_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaselineFlags:
  """What the soup is compared with."""

  baselines: tuple[str, ...] = flag(
    "What the soup is compared with: "
    + ", ".join(f"{name} ({METHODS[name].help})" for name in baselines())
    + f". all means all of these (with --stream all but {', '.join(having('labels'))}); "
    "--baselines= means none.",
    one_of("baseline", baselines),
    default=["imp", "imp_mx"],
    parse=_unique,
  )
  budget_epochs: int = flag(
    "Epochs of the baselines gmp, dpf and bimp, and of each round of swamp. Default: "
    "--epochs.",
    at_least(1),
    fill=lambda values: values["epochs"],
  )
  fixed_after: float = flag(
    "Share of --budget_epochs after which the masks of gmp and dpf are fixed (the copies "
    "of their soups branch there), and after which bimp begins to prune.",
    ensure(lambda value: 0 < value < 1, "it is a share of --budget_epochs, in (0, 1)"),
    default=0.5,
  )
  mask_steps: int | None = flag(
    "Most steps between two masks of gmp and dpf. Default: 100 for gmp and 16 for dpf, as "
    "published.",
    at_least(1),
  )
  rewind_epochs: int = flag(
    "The epoch of training that each round of swamp rewinds to.", at_least(0), default=2
  )
  distill_epochs: int = flag(
    "Epochs of soup_distilled's training after the last merge, with "
    "--retrain_schedule. Default: --retrain_epochs.",
    from_zero,
    fill=lambda values: values["retrain_epochs"],
  )
  temperature: float = flag(
    "Divides the logits of soup_distilled and of its candidates during distillation.",
    above_zero,
    default=TEMPERATURE,
  )


define_flags(BaselineFlags)


def refuse_baselines(config: Any, trait: str, why: str) -> None:
  """Refuses baselines with a trait of the registry; `why` follows on their name."""
  for name in config.baselines:
    if name in having(trait):
      raise ValueError(f"--baselines has {name}{why}")


def check(config: Any) -> None:
  """Raises ValueError where a baseline does not fit in its budget, or none has a flag.

  Args:
    config: with the phases of the soup.
  """
  _check_distilled(config)
  for name in config.baselines:
    if name in having("cycles") and not all(bimp_epochs(config)):
      raise ValueError(
        f"--budget_epochs is {config.budget_epochs}: {name} needs an epoch of dense "
        f"training and one for each of {config.phases} cycles, give more, or another "
        "--fixed_after"
      )
    if name in having("distilled") and not config.distill_epochs:
      raise ValueError(
        f"--distill_epochs is 0: {name} learns from its candidates for at least one epoch"
      )
    if name in having("rewinds") and config.rewind_epochs >= config.budget_epochs:
      raise ValueError(
        f"--rewind_epochs is {config.rewind_epochs} of --budget_epochs "
        f"{config.budget_epochs}: rounds of {name} rewind to an earlier epoch"
      )
  if config.ingredients == 1:
    why = " with --ingredients=1: it learns from the mean prediction of several copies"
    refuse_baselines(config, "distilled", why)
  if config.stream:
    why = ", which counts the labels of images in memory, and these are streamed"
    refuse_baselines(config, "labels", f"{why}: leave it out")
  if not config.retrain_epochs:
    why = " with --retrain_epochs=0: its classifier trains for at least one epoch"
    refuse_baselines(config, "labels", why)


def _check_distilled(config):
  """That a baseline learns as --distill_epochs and --temperature say."""
  if any(name in having("distilled") for name in config.baselines):
    return
  for name, default in (
    ("distill_epochs", config.retrain_epochs),
    ("temperature", TEMPERATURE),
  ):
    value = getattr(config, name)
    if value != default:
      raise ValueError(
        f"--{name}={value:g} is of {', '.join(having('distilled'))}: give it among "
        "--baselines, or leave the flag out"
      )
