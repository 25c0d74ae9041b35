"""The flags of experiments.soup, and what they mean."""

import math
import os
import pathlib
from typing import NamedTuple

import numpy as np
from absl import flags

from jaxsms.checks import check_sparsity
from jaxsms.disk import storage
from jaxsms.disk.rules import RULES
from jaxsms.disk.shards import INDEX_ENDINGS
from jaxsms.merges import MERGES
from jaxsms.names import check_name

from ..config.fields import numbers
from ..run import outputs
from .model_checks import DTYPES
from .output import TO_PYTORCH, read_size

flags.DEFINE_string(
  "masks",
  None,
  "Where the models do not share their zeros: prune (the average, by magnitude, to "
  "--sparsity; --scope says how), or keep (all weights that any of them has).",
)
flags.DEFINE_float(
  "sparsity",
  None,
  "That --masks=prune prunes to, in [0, 1). Default: the largest of the models in the "
  "average.",
)
flags.DEFINE_list("weights", None, "Of the models in the average; they sum to 1.")
flags.DEFINE_boolean(
  "greedy",
  False,
  "Takes models, the best first, as long as the validation accuracy of the average does "
  "not fall. Needs --dataset.",
)
flags.DEFINE_string(
  "base",
  None,
  "That all were trained from, for --merge=ties and task_arithmetic.",
)
flags.DEFINE_list(
  "squared_gradients",
  None,
  "One checkpoint for each model, of its weights' mean squared gradients, for "
  "--merge=fisher and inverse_variance. With --dataset they are worked out.",
)
flags.DEFINE_float(
  "prior",
  1e-4,
  "Of --merge=inverse_variance: the L2 coefficient that the models were trained with.",
  0.0,
)
flags.DEFINE_float(
  "scale", 1.0, "Of what --merge=task_arithmetic or ties adds to the base model."
)
flags.DEFINE_float(
  "density", 0.2, "Share of a model's differences from the base that --merge=ties keeps."
)
flags.DEFINE_string(
  "dtype",
  None,
  "Of the floating arrays in the soup: float32, bfloat16, float16 or float64. Default: "
  "those of the first model. Averages are worked out in float32 or wider.",
)
flags.DEFINE_string(
  "shard_size",
  None,
  "Most bytes of a file where --out is a folder, such as 5GB; the folder is then in "
  "Hugging Face's layout. Default: 5GB where the first model is in that layout.",
)
FLAGS = flags.FLAGS


class Choice(NamedTuple):
  """The flags of this file."""

  out: str
  masks: str | None
  sparsity: float | None
  weights: np.ndarray | None
  merge: str
  base: str | None
  squared_gradients: list[str] | None
  prior: float
  scale: float
  density: float
  dtype: str | None
  shard_size: int | None


def read_choice(paths: list[str]) -> Choice:
  """The parsed flags, checked as far as they can be before anything is read.

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
  out = outputs.check_out(("", ".safetensors", ".npz", *TO_PYTORCH), "soup.safetensors")
  check_outside(
    out, [*paths, *filter(None, [FLAGS.base]), *(FLAGS.squared_gradients or ())]
  )
  if FLAGS.masks is not None:
    check_name("choice of --masks", FLAGS.masks, ("prune", "keep"))
  if FLAGS.sparsity is not None:
    if FLAGS.masks != "prune":
      raise ValueError("--sparsity goes with --masks=prune, which prunes the average to it")
    check_sparsity(FLAGS.sparsity, "--sparsity")
  merge = check_merge(len(paths))
  weights = None
  if FLAGS.weights is not None:
    weights = read_weights(FLAGS.weights, len(paths))
  if not FLAGS["dataset"].present and FLAGS["model"].present and FLAGS["model"].value:
    raise ValueError("--model needs the images to evaluate on: give --dataset")
  if FLAGS.dtype is not None:
    check_name("dtype", FLAGS.dtype, DTYPES)
  size = None if FLAGS.shard_size is None else read_size(FLAGS.shard_size)
  return Choice(
    out=out,
    masks=FLAGS.masks,
    sparsity=FLAGS.sparsity,
    weights=weights,
    merge=merge,
    base=FLAGS.base,
    squared_gradients=FLAGS.squared_gradients,
    prior=FLAGS.prior,
    scale=FLAGS.scale,
    density=FLAGS.density,
    dtype=FLAGS.dtype,
    shard_size=size,
  )


def check_outside(out: str, inputs: list[str]) -> None:
  """Raises ValueError where the result would lie in a folder that is read."""
  for given in inputs:
    path = _resolved(given)
    folder = path.parent if path.name.endswith(INDEX_ENDINGS) else path
    if folder in _resolved(out).parents:
      raise ValueError(
        f"--out {FLAGS.out} lies in {given}, which is read and stays as it is: choose a "
        "place outside it"
      )


def _resolved(path):
  """An absolute path without links, or an address."""
  path = storage.as_path(path)
  return path if storage.is_remote(path) else pathlib.Path(os.path.realpath(path))


def check_merge(m: int) -> str:
  """The name of the merge, once it is certain that it has what it needs.

  Raises:
    ValueError: an unknown name, something is missing, or left over.
  """
  name = "greedy" if FLAGS.greedy else FLAGS.merge
  check_name("merge", name, [known for known in MERGES if known != "weighted"])
  flag = "--greedy" if FLAGS.greedy else f"--merge={name}"
  needs = MERGES[name].needs
  if FLAGS.weights is not None and not MERGES[name].weighted:
    raise ValueError(f"{flag} chooses the weights itself: leave --weights out")
  if MERGES[name].two and m != 2:
    raise ValueError(f"{flag} goes from one model to another, and {m} are given: give two")
  if not FLAGS["dataset"].present and name not in RULES:
    raise ValueError(f"{flag} needs the images to evaluate on: give --dataset")
  if ("base" in needs) != bool(FLAGS.base):
    problem = "needs the model that all were trained from: give"
    if FLAGS.base:
      problem = "takes no other model: leave out"
    raise ValueError(f"{flag} {problem} --base")
  if FLAGS.base and not storage.as_path(FLAGS.base).exists():
    raise ValueError(f"there is no {FLAGS.base}: let --base be a checkpoint")
  squares = FLAGS.squared_gradients
  if "squared_gradients" not in needs and squares:
    raise ValueError(f"{flag} takes no squared gradients: leave out --squared_gradients")
  if "squared_gradients" in needs and not squares and not FLAGS["dataset"].present:
    raise ValueError(
      f"{flag} needs squared gradients: give --squared_gradients, a checkpoint for each "
      "model, or --dataset to work them out"
    )
  if squares and len(squares) != m:
    raise ValueError(
      f"{len(squares)} --squared_gradients for {m} models: give one for each"
    )
  if not math.isfinite(FLAGS.scale):
    raise ValueError(f"--scale is {FLAGS.scale}: it must be finite")
  if not 0 < FLAGS.density <= 1:
    raise ValueError(
      f"--density is {FLAGS.density}: it is the share that is kept, in (0, 1]"
    )
  return name


def read_weights(words: list[str], m: int) -> np.ndarray:
  """--weights as numbers, one for each of m models.

  Raises:
    ValueError: they are no numbers, or too many or few, or do not sum to 1.
  """
  given = f"--weights is {','.join(words)}"
  weights = np.array(numbers(words, "weights", example="0.5,0.25,0.25"))
  if len(weights) != m:
    raise ValueError(f"{given} for {m} models: give one for each")
  if not (weights >= 0).all() or not abs(weights.sum() - 1) < 1e-3:
    raise ValueError(f"{given}: give numbers, 0 or above, that sum to 1")
  return weights
