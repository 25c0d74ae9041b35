"""Flags of what varies, criteria, baselines, measurements and networks' options."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from experiments.methods.registry import bimp_epochs, having
from experiments.settings import Settings
from jaxsms.data import CORRUPTIONS
from jaxsms.names import check_name
from jaxsms.pruning import phase_sparsity

FLAGS = flags.FLAGS
# What may differ between the copies, and the type of its values.
VARIABLES = {"seed": int, "weight_decay": float, "epochs": int, "learning_rate": float}
CRITERIA = ("magnitude", "random", "erk", "lamp", "n_m", "filters")
WITH_SCOPE = ("magnitude", "random", "filters")
LANDSCAPES = ("last", "all", "none")
LEAST = {
  "n_m_group": 2, "width": 1, "widening": 1, "budget_epochs": 1, "mask_steps": 1,
  "rewind_epochs": 0,
}  # fmt: skip
# Options of `jaxsms.models.create` that are flags, and the networks that have them.
MODEL_OPTIONS = {
  "width": ("resnet8", "resnet20", "resnet56", "resnet18", "resnet50", "vgg16", "vit_tiny"),
  "widening": ("wide_resnet28_10", "wide_resnet22_10"),
  "stem": ("resnet18", "resnet50"),
}

flags.DEFINE_string(
  "vary",
  "seed",
  "What differs between the copies: seed (batch order, augmentation, dropout) or, with the "
  "same seed, weight_decay, epochs (of each phase) or learning_rate (the first of LLR).",
)
flags.DEFINE_list(
  "values", None, "Values of --vary, one for each copy. Default: the seeds 0 to m - 1."
)
flags.DEFINE_string(
  "criterion",
  "magnitude",
  "Which weights go: magnitude or random (among those of --scope), erk or lamp (magnitude, "
  "other shares for each layer), n_m (n of every m inputs stay), filters (whole outputs of "
  "all layers but the classifier; the share counts filters).",
)
flags.DEFINE_integer("n_m_group", 4, "m of --criterion=n_m; n follows from the sparsity.")
flags.DEFINE_string(
  "init",
  None,
  "Trained weights to start from instead of training densely: a folder that a run or "
  "jaxsms.checkpoint wrote, .safetensors, .npz, or a PyTorch file. Schedules read the "
  "learning rates that --epochs and the like would have given.",
)
flags.DEFINE_integer(
  "width",
  None,
  "Channels of the first stage of a residual network or VGG; of the ViT its width. "
  "Default: the network's own.",
)
flags.DEFINE_integer(
  "widening",
  None,
  "Factor of the widths of a wide residual network. Default: that in its name.",
  1,
)
flags.DEFINE_string(
  "stem",
  None,
  "First layers of resnet18 and resnet50: cifar (3x3, for small images) or imagenet (7x7 "
  "and pooling). Default: cifar for resnet18, imagenet for resnet50.",
)
flags.DEFINE_list(
  "ood",
  [],
  "Corruptions of the test images that every model is measured on: names, all, or none. "
  "Prepared TFDS sets (cifar10_corrupted) come first, then our own on the device; streamed "
  "data have the former alone.",
)
flags.DEFINE_list(
  "ood_severities", ["1", "2", "3", "4", "5"], "Severities of --ood, 1 to 5."
)
flags.DEFINE_string(
  "landscape",
  "last",
  "Phases in which the validation loss between the copies (on lines, and on the plane "
  "through three) goes into results.json: last, all, or none. Not where data are streamed.",
)
flags.DEFINE_boolean("train_metrics", False, "Measures every model on training data too.")
flags.DEFINE_integer(
  "budget_epochs",
  None,
  "Epochs of the baselines gmp, dpf and bimp, and of each round of swamp. Default: "
  "--epochs.",
)
flags.DEFINE_float(
  "fixed_after",
  0.5,
  "Share of --budget_epochs after which the masks of gmp and dpf are fixed (the copies of "
  "their soups branch there), and after which bimp begins to prune.",
)
flags.DEFINE_integer(
  "mask_steps",
  None,
  "Most steps between two masks of gmp and dpf. Default: 100 for gmp and 16 for dpf, as "
  "published.",
)
flags.DEFINE_integer(
  "rewind_epochs", 2, "Epochs of training that swamp's rounds rewind to."
)


class MethodFlags(NamedTuple):
  """The flags of this file."""

  vary: str
  values: tuple[float, ...] | None
  criterion: str
  n_m_group: int
  init: str | None
  width: int | None
  widening: int | None
  stem: str | None
  ood: tuple[str, ...]
  ood_severities: tuple[int, ...]
  landscape: str
  train_metrics: bool
  budget_epochs: int
  fixed_after: float
  mask_steps: int | None
  rewind_epochs: int


def read_method(s: Settings) -> MethodFlags:
  """The parsed flags, checked as far as they can be without the data.

  Raises:
    ValueError: a flag is out of range, names something unknown, or does not fit others.
  """
  values = {name: FLAGS[name].value for name in MethodFlags._fields}
  check_name("variable", values["vary"], VARIABLES)
  check_name("landscape", values["landscape"], LANDSCAPES)
  for name, least in LEAST.items():
    if values[name] is not None and values[name] < least:
      raise ValueError(f"--{name} is {values[name]}: it must be at least {least}")
  if values["stem"] is not None:
    check_name("stem", values["stem"], ("cifar", "imagenet"))
  if values["budget_epochs"] is None:
    values["budget_epochs"] = s.epochs
  values["ood_severities"] = _numbers("ood_severities", int, values["ood_severities"])
  values["ood"] = tuple(dict.fromkeys(n for n in values["ood"] if n and n != "none"))
  if values["values"] is not None:
    values["values"] = _numbers("values", VARIABLES[values["vary"]], values["values"])
  method = MethodFlags(**values)
  check(s, method)
  return method


def check(s: Settings, method: MethodFlags) -> None:
  """Raises ValueError where flags do not fit one another."""
  _check_values(s, method)
  _check_criterion(s, method)
  _check_budget(s, method)
  _check_ood(s, method)
  for name, models in MODEL_OPTIONS.items():
    if getattr(method, name) is not None and s.model not in models:
      raise ValueError(f"--{name} is of {', '.join(models)}: leave it out with {s.model}")


def _numbers(
  flag: str, kind: Callable[[Any], float], words: list[str]
) -> tuple[float, ...]:
  try:
    return tuple(kind(word) for word in words)
  except ValueError as error:
    what = "whole numbers" if kind is int else "numbers"
    raise ValueError(f"--{flag} is {','.join(words)}: give {what}, such as 1,2") from error


def _check_values(s, method):
  """--vary and --values."""
  vary, values = method.vary, method.values
  if values is None:
    if vary != "seed":
      raise ValueError(
        f"--vary={vary} needs --values, one for each of {s.ingredients} copies"
      )
    return
  if vary != "seed" and s.ingredients == 1:
    raise ValueError(
      f"--vary={vary} with --ingredients=1: nothing differs between one copy"
    )
  if len(values) != s.ingredients:
    raise ValueError(
      f"--values gives {len(values)} values for --ingredients={s.ingredients}: give one "
      "for each copy"
    )
  given = ",".join(f"{value:g}" for value in values)
  above = {"epochs": 0, "learning_rate": 0}.get(vary, -1e-9)
  below = 2**31 if vary in ("seed", "epochs") else math.inf
  if any(not above < value < below for value in values):
    raise ValueError(
      f"--values is {given}: {vary} is a number, "
      + ("above 0" if above == 0 else "0 or above")
    )
  if len(set(values)) < len(values):
    raise ValueError(
      f"--values is {given}: copies that are equal add nothing, give each another value"
    )
  if vary == "learning_rate" and s.retrain_schedule != "LLR":
    raise ValueError(
      f"--vary=learning_rate sets the first rate of LLR: {s.retrain_schedule} has its own"
    )
  if vary in ("epochs", "learning_rate"):
    for name in s.baselines:
      if name in having("one_schedule"):
        raise ValueError(
          f"--baselines has {name}, whose copies share one schedule: leave it out with "
          f"--vary={vary}"
        )


def _check_criterion(s, method):
  """--criterion, with --scope, --n_m_group and the sparsities."""
  check_name("criterion", method.criterion, CRITERIA)
  if s.scope != "global" and method.criterion not in WITH_SCOPE:
    raise ValueError(
      f"--scope={s.scope} is of {', '.join(WITH_SCOPE)}: --criterion={method.criterion} "
      "shares the sparsity out itself, leave it out"
    )
  if method.criterion != "n_m":
    return
  m = method.n_m_group
  for phase in range(1, s.phases + 1):
    removed = m * phase_sparsity(s.goal_sparsity, phase, s.phases)
    if abs(removed - round(removed)) > 1e-6:
      raise ValueError(
        f"--criterion=n_m would remove {removed:.3g} of {m} weights in phase {phase}: "
        "choose --goal_sparsity, --phases and --n_m_group that make it whole, such as "
        "0.75, 2 and 4"
      )
  for name in s.baselines:
    if name in having("ramp"):
      raise ValueError(
        f"--baselines has {name}, whose sparsity rises smoothly: leave it out with "
        "--criterion=n_m"
      )


def _check_budget(s, method):
  """The flags of training that starts anew."""
  if not 0 < method.fixed_after < 1:
    raise ValueError(
      f"--fixed_after is {method.fixed_after}: it is a share of --budget_epochs, in (0, 1)"
    )
  if any(n.startswith("bimp") for n in s.baselines):
    dense, cycle = bimp_epochs(s, method)
    if not dense or not cycle:
      raise ValueError(
        f"--budget_epochs is {method.budget_epochs}: bimp needs an epoch of dense training "
        f"and one for each of {s.phases} cycles, give more, or another --fixed_after"
      )
  if "swamp" in s.baselines and method.rewind_epochs >= method.budget_epochs:
    raise ValueError(
      f"--rewind_epochs is {method.rewind_epochs} of --budget_epochs "
      f"{method.budget_epochs}: rounds of swamp rewind to an earlier epoch"
    )


def _check_ood(s, method):
  """The corruptions; whether they fit the images is seen with the data."""
  severities = method.ood_severities
  if any(not 1 <= n <= 5 for n in severities) or len(set(severities)) < len(severities):
    raise ValueError(
      f"--ood_severities is {','.join(map(str, severities))}: give some of 1,2,3,4,5"
    )
  if method.ood and not severities:
    raise ValueError("--ood_severities is empty: give some of 1,2,3,4,5")
  if len(method.ood) > 1 and "all" in method.ood:
    raise ValueError(f"--ood is {','.join(method.ood)}: give names, or all alone")
  if s.dataset == "digits" or s.dataset.lower().endswith(".npz"):
    for name in method.ood:  # TFDS may have others
      check_name("corruption", name, ("all", *CORRUPTIONS))


def model_options(s: Settings, method: MethodFlags) -> dict[str, Any]:
  """Options of `jaxsms.models.create`."""
  options = {name: getattr(method, name) for name in MODEL_OPTIONS}
  options |= {"hidden": s.hidden, "dropout": s.dropout}
  return {name: value for name, value in options.items() if value is not None}
