"""The flags of experiments.soup, and what they mean."""

from typing import NamedTuple

import numpy as np
from absl import flags

from experiments import outputs
from experiments.soup_checks import DTYPES
from experiments.soup_output import read_size
from jaxsms import storage
from jaxsms.names import check_name
from jaxsms.pruning import check_sparsity

flags.DEFINE_string(
  "masks",
  None,
  "Where the models do not share their zeros: prune (the average, by magnitude, to "
  "--sparsity; --scope says how), or keep (all weights that any of them has).",
)
flags.DEFINE_float(
  "sparsity",
  None,
  "That --masks=prune prunes to, in [0, 1). Default: the largest of the models.",
)
flags.DEFINE_list("weights", None, "Of the models in the average; they sum to 1.")
flags.DEFINE_boolean(
  "greedy",
  False,
  "Takes models, the best first, as long as the validation accuracy of the average does "
  "not fall. Needs --dataset.",
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
  greedy: bool
  dtype: str | None
  shard_size: int | None


def read_choice(paths: list[str]) -> Choice:
  """The parsed flags, checked as far as they can be before anything is read.

  Raises:
    ValueError: too few models, a path that does not exist, or a flag that does not fit.
  """
  if len(paths) < 2:
    raise ValueError(
      f"{len(paths)} checkpoints are given: a soup takes two or more, and flags are "
      "written --name=value"
    )
  for path in paths:
    if not storage.as_path(path).exists():
      raise ValueError(f"there is no {path}: give folders or files of checkpoints")
  out = outputs.check_out(("", ".safetensors", ".npz"), "soup.safetensors")
  if FLAGS.masks is not None:
    check_name("choice of --masks", FLAGS.masks, ("prune", "keep"))
  if FLAGS.sparsity is not None:
    if FLAGS.masks != "prune":
      raise ValueError("--sparsity goes with --masks=prune, which prunes the average to it")
    check_sparsity(FLAGS.sparsity, "--sparsity")
  weights = None
  if FLAGS.weights is not None:
    if FLAGS.greedy:
      raise ValueError("--greedy chooses the weights itself: leave --weights out")
    weights = read_weights(FLAGS.weights, len(paths))
  if not FLAGS["dataset"].present:
    for name in ("greedy", "model"):
      if FLAGS[name].present and FLAGS[name].value:
        raise ValueError(f"--{name} needs the images to evaluate on: give --dataset")
  if FLAGS.dtype is not None:
    check_name("dtype", FLAGS.dtype, DTYPES)
  size = None if FLAGS.shard_size is None else read_size(FLAGS.shard_size)
  return Choice(out, FLAGS.masks, FLAGS.sparsity, weights, FLAGS.greedy, FLAGS.dtype, size)


def read_weights(words: list[str], m: int) -> np.ndarray:
  """--weights as numbers, one for each of m models.

  Raises:
    ValueError: they are no numbers, or too many or few, or do not sum to 1.
  """
  given = f"--weights is {','.join(words)}"
  try:
    weights = np.array([float(word) for word in words])
  except ValueError as error:
    raise ValueError(f"{given}: give numbers, such as 0.5,0.25,0.25") from error
  if len(weights) != m:
    raise ValueError(f"{given} for {m} models: give one for each")
  if not (weights >= 0).all() or not abs(weights.sum() - 1) < 1e-3:
    raise ValueError(f"{given}: give numbers, 0 or above, that sum to 1")
  return weights
