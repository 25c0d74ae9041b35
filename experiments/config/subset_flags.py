"""Flags of copies that train on a share of the data each, and of unequal classes."""

import dataclasses
from typing import Any

from jaxsms.data.subsets import check_fraction
from jaxsms.training.merging import BY_RATIOS, BY_SAMPLES

from .fields import above_zero, define_flags, ensure, flag, one_of

SUBSETS = ("random", "balanced", "oversampled", "imbalance", "dirichlet", "groups")
RETAINED = 0.3  # of the paper's two values that for CIFAR-100, in its authors' scripts
# Of the subsets that have a size, the default of --subset_fraction.
FRACTIONS = {"random": 0.5, "balanced": 1.0, "imbalance": 1.0}


def _check_fraction(name, value):
  try:
    check_fraction(value)
  except ValueError as error:
    raise ValueError(f"--{name}: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsetFlags:
  """What share of the training data each copy has, and how its classes count."""

  subsets: str | None = flag(
    "The shares of --vary=subset: random (of size --subset_fraction, with as little "
    "overlap as possible), balanced (as many examples of each class as of the "
    "smallest), oversampled (all data, each class repeated to the size of the "
    "largest), imbalance (long-tailed, with the ratios in --values), dirichlet (all "
    "data, divided with skewed labels), groups (all data, divided by train_groups of "
    "the .npz). Default: random.",
    one_of("kind of subsets", SUBSETS),
    fill=lambda values: "random" if values["vary"] == "subset" else None,
  )
  subset_fraction: float | None = flag(
    "Size of a share: with --subsets=random a fraction of the training data, with "
    "balanced and imbalance a fraction of the largest possible share. Default: 0.5 for "
    "random, else 1.",
    _check_fraction,
    fill=lambda values: FRACTIONS.get(values["subsets"]),
  )
  subset_alpha: float | None = flag(
    "Concentration of --subsets=dirichlet: small values give each copy few classes. "
    "Default: 0.5.",
    above_zero,
    fill=lambda values: 0.5 if values["subsets"] == "dirichlet" else None,
  )
  retained: float | None = flag(
    "With --merge=by_ratios, the share of the average so far that stays when the copy of "
    "the next larger ratio is added, in (0, 1). Default: 0.3.",
    ensure(lambda value: 0 < value < 1, "it is a share of the average, in (0, 1)"),
    fill=lambda values: RETAINED if values["merge"] == BY_RATIOS else None,
  )
  logit_adjustment: bool = flag(
    "Adds the logarithm of each class's share of the training data to the logits in the "
    "loss of all retraining, so that rare classes count as much as frequent ones. With "
    "--vary=subset the shares of the classes are those of each copy's own data. Dense "
    "training, distillation and measuring do without it.",
    default=False,
  )


define_flags(SubsetFlags)


def check(config: Any) -> None:
  """Raises ValueError where flags of the shares do not fit one another or the soup.

  Args:
    config: with the flags of the soup and of the data.
  """
  subsets, varies = config.subsets, config.vary == "subset"
  if subsets is not None and not varies:
    raise ValueError(
      f"--subsets={subsets} is of --vary=subset: leave it out with --vary={config.vary}"
    )
  if config.subset_fraction is not None and subsets not in FRACTIONS:
    raise ValueError(
      f"--subset_fraction is of {', '.join(FRACTIONS)}: leave it out"
      + (f" with --subsets={subsets}" if varies else f" with --vary={config.vary}")
    )
  if config.subset_alpha is not None and subsets != "dirichlet":
    raise ValueError(
      "--subset_alpha is of --subsets=dirichlet: leave it out"
      + (f" with --subsets={subsets}" if varies else f" with --vary={config.vary}")
    )
  if config.merge == BY_SAMPLES and not varies:
    raise ValueError(
      "--merge=by_samples weights copies by their shares of the data: give it with "
      "--vary=subset"
    )
  if config.merge == BY_RATIOS and subsets != "imbalance":
    raise ValueError(
      "--merge=by_ratios weights copies by the imbalance of their shares: give it with "
      "--vary=subset --subsets=imbalance"
    )
  if config.retained is not None and config.merge != BY_RATIOS:
    raise ValueError(
      f"--retained={config.retained:g} is of --merge=by_ratios: leave it out with "
      f"--merge={config.merge}"
    )
  if config.logit_adjustment and config.stream:
    raise ValueError(
      "--logit_adjustment counts the labels of images in memory, and these are streamed: "
      "leave it out"
    )
  if config.logit_adjustment and not config.retrain_epochs:
    raise ValueError(
      "--logit_adjustment is of the loss of retraining, and --retrain_epochs is 0: leave "
      "it out"
    )
  if varies and config.stream:
    raise ValueError(
      "--vary=subset takes shares of images in memory, and these are streamed: give "
      "another --vary"
    )
  if varies and config.ingredients == 1:
    raise ValueError(
      "--vary=subset with --ingredients=1: one copy has all the data, give several"
    )
