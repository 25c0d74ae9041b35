"""The flags of experiments.soup, and what they mean."""

import dataclasses
import functools
import math
import os
import pathlib

import numpy as np
from absl import flags

from jaxsms.checks import check_sparsity
from jaxsms.disk import storage
from jaxsms.disk.rules import RULES
from jaxsms.disk.shards import INDEX_ENDINGS
from jaxsms.merges import MERGES
from jaxsms.pruning import SCOPES
from jaxsms.soups import soup_weights

from ..config.fields import (
  define_flags,
  ensure,
  flag,
  from_zero,
  numbers,
  one_of,
  read_fields,
  shared,
)
from ..config.out_flags import OutFlags, check_out
from .model_checks import DTYPES
from .output import TO_PYTORCH, read_size


def _needing(what):
  """The names of the merges that need a field of `jaxsms.merges.Means`."""
  return " and ".join(name for name, entry in MERGES.items() if what in entry.needs)


def merges_of_models() -> list[str]:
  """The merges that --merge names; the mean takes --weights without a name of its own."""
  return [name for name, entry in MERGES.items() if "weights" not in entry.needs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFlags(OutFlags):
  """How models are merged: flags of experiments.soup, and three of the main job."""

  masks: str | None = flag(
    "Where the models do not share their zeros: prune (the average, by magnitude, to "
    "--sparsity; --scope says how), or keep (all weights that any of them has).",
    one_of("choice of --masks", ("prune", "keep")),
  )
  sparsity: float | None = flag(
    "That --masks=prune prunes to, in [0, 1). Default: the largest of the models in the "
    "average.",
    lambda name, value: check_sparsity(value, f"--{name}"),
  )
  weights: tuple[float, ...] | None = flag(
    "Of the models in the average; they sum to 1.",
    parse=functools.partial(numbers, example="0.5,0.25,0.25"),
  )
  greedy: bool = flag(
    "Takes models, the best first, as long as the validation accuracy of the average does "
    "not fall. Needs --dataset.",
    default=False,
  )
  base: str | None = flag(f"That all were trained from, for --merge={_needing('base')}.")
  squared_gradients: tuple[str, ...] | None = flag(
    "One checkpoint for each model, of its weights' mean squared gradients, for "
    f"--merge={_needing('squared_gradients')}. With --dataset they are worked out."
  )
  prior: float = flag(
    "Of --merge=inverse_variance: the L2 coefficient that the models were trained with.",
    default=1e-4,
    bounds={"lower_bound": 0.0},
  )
  scale: float = flag(
    f"Of what is added to the base model, for --merge={_needing('base')}.",
    ensure(math.isfinite, "it must be finite"),
    default=1.0,
  )
  density: float = flag(
    "Share of a model's differences from the base that --merge=ties keeps.",
    ensure(lambda value: 0 < value <= 1, "it is the share that is kept, in (0, 1]"),
    default=0.2,
  )
  dtype: str | None = flag(
    "Of the floating arrays in the soup: float32, bfloat16, float16 or float64. Default: "
    "those of the first model. Averages are worked out in float32 or wider.",
    one_of("dtype", DTYPES),
  )
  shard_size: str | None = flag(
    "Most bytes of a file where --out is a folder, such as 5GB; the folder is then in "
    "Hugging Face's layout. Default: 5GB where the first model is in that layout.",
    lambda name, value: read_size(value),
  )
  merge: str = shared(
    one_of("merge", merges_of_models),
    parse=lambda value, name, values: "greedy" if values["greedy"] else value,
  )
  scope: str = shared(one_of("scope", SCOPES))
  seed: int = shared(from_zero)

  def weights_of(self, m: int) -> np.ndarray:
    """float [m], of the models; equal ones where none are given."""
    if self.weights is None:
      return soup_weights(range(m), m)
    return np.array(self.weights)


define_flags(MergeFlags)


def read_flags(paths: list[str], with_data: bool) -> MergeFlags:
  """The parsed flags, checked as far as they can be before anything is read.

  Args:
    paths: of the models.
    with_data: whether there are images to evaluate on.

  Raises:
    ValueError: too few models, a path that does not exist, --out in a folder that is read,
      or a flag that does not fit.
  """
  if len(paths) < 2:
    raise ValueError(
      f"{len(paths)} checkpoints are given: a soup takes two or more, and flags are "
      "written --name=value"
    )
  for path in paths:
    if not storage.as_path(path).exists():
      raise ValueError(f"there is no {path}: give folders or files of checkpoints")
  config = read_fields(MergeFlags, flags.FLAGS)
  endings = ("", ".safetensors", ".npz", *TO_PYTORCH)
  out = check_out(config.out, endings, "soup.safetensors")
  others = filter(None, [config.base, *(config.squared_gradients or ())])
  check_outside(config.out, [*paths, *others])
  if config.sparsity is not None and config.masks != "prune":
    raise ValueError("--sparsity goes with --masks=prune, which prunes the average to it")
  check_merge(config, len(paths), with_data)
  if config.weights is not None:
    check_weights(config.weights, len(paths))
  model = flags.FLAGS["model"]
  if not with_data and model.present and model.value:
    raise ValueError("--model needs the images to evaluate on: give --dataset")
  return dataclasses.replace(config, out=out)


def check_outside(out: str, inputs: list[str]) -> None:
  """Raises ValueError where the result would lie in a folder that is read."""
  for given in inputs:
    path = _resolved(given)
    folder = path.parent if path.name.endswith(INDEX_ENDINGS) else path
    if folder in _resolved(out).parents:
      raise ValueError(
        f"--out {out} lies in {given}, which is read and stays as it is: choose a "
        "place outside it"
      )


def _resolved(path):
  """An absolute path without links, or an address."""
  path = storage.as_path(path)
  return path if storage.is_remote(path) else pathlib.Path(os.path.realpath(path))


def check_merge(config: MergeFlags, m: int, with_data: bool) -> None:
  """Raises ValueError where the merge of m models lacks something, or has too much.

  Args:
    config: flags.
    m: number of models.
    with_data: whether there are images to evaluate on.
  """
  name = config.merge
  flag = "--greedy" if config.greedy else f"--merge={name}"
  needs = MERGES[name].needs
  if config.weights is not None and not MERGES[name].weighted:
    raise ValueError(f"{flag} chooses the weights itself: leave --weights out")
  if MERGES[name].two and m != 2:
    raise ValueError(f"{flag} goes from one model to another, and {m} are given: give two")
  if not with_data and name not in RULES:
    raise ValueError(f"{flag} needs the images to evaluate on: give --dataset")
  if ("base" in needs) != bool(config.base):
    problem = "needs the model that all were trained from: give"
    if config.base:
      problem = "takes no other model: leave out"
    raise ValueError(f"{flag} {problem} --base")
  if config.base and not storage.as_path(config.base).exists():
    raise ValueError(f"there is no {config.base}: let --base be a checkpoint")
  squares = config.squared_gradients
  if "squared_gradients" not in needs and squares:
    raise ValueError(f"{flag} takes no squared gradients: leave out --squared_gradients")
  if "squared_gradients" in needs and not squares and not with_data:
    raise ValueError(
      f"{flag} needs squared gradients: give --squared_gradients, a checkpoint for each "
      "model, or --dataset to work them out"
    )
  if squares and len(squares) != m:
    raise ValueError(
      f"{len(squares)} --squared_gradients for {m} models: give one for each"
    )


def check_weights(weights: tuple[float, ...], m: int) -> None:
  """Raises ValueError unless there is one for each of m models, and they sum to 1."""
  given = f"--weights is {','.join(f'{weight:g}' for weight in weights)}"
  if len(weights) != m:
    raise ValueError(f"{given} for {m} models: give one for each")
  if not all(weight >= 0 for weight in weights) or not abs(sum(weights) - 1) < 1e-3:
    raise ValueError(f"{given}: give numbers, 0 or above, that sum to 1")
