"""The flags of the binaries, and what they mean for each data set."""

import math
import re
from typing import Any, NamedTuple

from absl import flags

from experiments.methods.registry import baselines
from experiments.pretraining_flags import check_pretraining
from jaxsms import models
from jaxsms.data import AUGMENTATIONS, Dataset, StreamedDataset
from jaxsms.merges import MERGES as ALL_MERGES
from jaxsms.names import check_name
from jaxsms.pruning import SCOPES, check_sparsity, removal_count
from jaxsms.schedules import RETRAIN_SCHEDULES
from jaxsms.training.merging import NAMES as MERGES

FLAGS = flags.FLAGS
WITH_DROPOUT = ("mlp", "wide_resnet28_10", "wide_resnet22_10", "vit_tiny")
# What a flag means where it is not given. Chosen on validation data: BUILD_NOTES.md.
DEFAULTS: dict[str, dict[str, Any]] = {
  "digits": {
    "model": "mlp",
    "hidden": ["256", "256"],
    "dropout": 0.0,
    "phases": 5,
    "epochs": 30,
    "retrain_epochs": 2,
    "batch_size": 20,
    "weight_decay": 1e-4,
  },
  "other": {
    "model": "resnet20",
    "hidden": ["512"],
    "dropout": 0.2,
    "phases": 3,
    "epochs": 30,
    "retrain_epochs": 5,
    "batch_size": 128,
    "weight_decay": 5e-4,
  },
}

flags.DEFINE_string(
  "workdir",
  None,
  "Run directory: flags, metrics, results.json, the soup and the figure. It must hold no "
  "other run. Default: a new folder in runs/, named by date and time.",
)
flags.DEFINE_string(
  "dataset",
  "digits",
  "'digits' (8x8 images that come with scikit-learn), the name of a TFDS image "
  "classification set such as 'cifar10', or the path of an .npz with train_images uint8 "
  "[n, height, width, channels], train_labels int [n], test_images and test_labels.",
)
flags.DEFINE_string(
  "data_dir", None, "Where TFDS finds prepared data. Default: TFDS's own folder."
)
flags.DEFINE_string(
  "cache_dir", None, "Where decoded TFDS images are kept. Default: ~/.cache/jaxsms."
)
flags.DEFINE_string(
  "model",
  None,
  f"Network: {', '.join(models.MODELS)}. Default: mlp for digits, else resnet20.",
)
flags.DEFINE_list(
  "hidden",
  None,
  "Widths of the MLP's hidden layers. Default: 256,256 for digits, else 512.",
)
flags.DEFINE_float(
  "dropout",
  None,
  "Dropout rate of the mlp (default: 0 for digits, else 0.2), of wide residual networks "
  "(0.3) and of the ViT (0).",
  0.0,
  0.99,
)
flags.DEFINE_integer(
  "ingredients", 5, "m: how many copies are retrained and averaged in each phase."
)
flags.DEFINE_integer(
  "phases", None, "Number of prune-retrain-merge cycles. Default: 5 for digits, else 3."
)
flags.DEFINE_float("goal_sparsity", 0.95, "Sparsity after the last phase, in [0, 1).")
flags.DEFINE_integer("epochs", None, "Epochs of dense training. Default: 30.")
flags.DEFINE_integer(
  "retrain_epochs",
  None,
  "Epochs of each phase; 0 only prunes. Default: 2 for digits, else 5.",
)
flags.DEFINE_integer(
  "batch_size", None, "Examples of one copy in a step. Default: 20 for digits, else 128."
)
flags.DEFINE_integer("seed", 0, "The first seed; it decides everything random in a run.")
flags.DEFINE_integer(
  "seeds", 1, "How many seeds to run, one after another, from --seed on."
)
flags.DEFINE_float("learning_rate", 0.1, "Largest learning rate of dense training.")
flags.DEFINE_float("momentum", 0.9, "Momentum of SGD, in [0, 1).")
flags.DEFINE_float(
  "weight_decay",
  None,
  "L2 coefficient, on all parameters. Nesterov momentum where it is above 0. Default: 1e-4 "
  "for digits, else 5e-4.",
)
flags.DEFINE_string(
  "retrain_schedule",
  "LLR",
  "Learning rate of each phase: FT (constant, the smallest of dense training), LRW (its "
  "last steps again), SLR (all of it, compressed), CLR (cosine from its largest to its "
  "smallest), LLR (linear from its largest to 0), ALLR (LLR, lower where pruning did "
  "little harm).",
)
flags.DEFINE_string(
  "scope",
  "global",
  "Which weights compete: global (all of them) or uniform (those of each layer).",
)
flags.DEFINE_string(
  "augmentation",
  None,
  "How training images are augmented: none, crop_flip (padded by 4 pixels), "
  "crop_flip_rotate (up to 15 degrees), noise (Gaussian), shift_noise (by a pixel). "
  "Default: set by the data set, noise for digits.",
)
flags.DEFINE_string(
  "merge",
  "uniform",
  "How candidates become one model: uniform (their mean), greedy (from the best one on, "
  "each that does not lower the validation accuracy of the average), learned or "
  "learned_by_layer (weights learned on validation data), fisher or inverse_variance "
  "(weights of each entry, from squared gradients), ties (what most agree on beyond the "
  "pruned model), slerp (of two copies).",
)
flags.DEFINE_boolean(
  "stream",
  None,
  "Decode training images while the device trains, with random resized crops: for data "
  "that do not fit on it. Default: on for imagenet2012.",
)
flags.DEFINE_integer("image_size", 224, "Height and width of streamed images.")
flags.DEFINE_list(
  "baselines",
  ["imp", "imp_mx"],
  "What the soup is compared with. At the same sparsities: imp (one copy, the same "
  "epochs), imp_mx (one copy, m times the epochs), imp_reprune (m runs of imp, averaged "
  "and pruned again), dense_soup (nothing pruned), swamp (rewinding, averages over copies "
  "and time); at the goal alone, trained from scratch: gmp, dpf, bimp, and gmp_soup, "
  "dpf_soup, bimp_soup of m copies. all for all of these, --baselines= for none.",
)
flags.DEFINE_integer(
  "chunk_steps",
  None,
  "Most training steps between two looks of the progress bar. Default: 50 on a CPU, else a "
  "whole epoch; 50 where data are streamed.",
)


class Settings(NamedTuple):
  """Every flag of a run with its value for the data set filled in."""

  dataset: str
  data_dir: str | None
  cache_dir: str | None
  model: str
  hidden: tuple[int, ...] | None
  dropout: float | None
  ingredients: int
  phases: int
  goal_sparsity: float
  epochs: int
  retrain_epochs: int
  batch_size: int
  seed: int
  seeds: int
  learning_rate: float
  momentum: float
  weight_decay: float
  pretrain_schedule: str
  warmup_epochs: float
  end_lr: float
  decay: float | None
  step_epochs: int | None
  milestones: tuple[int, ...] | None
  retrain_schedule: str
  scope: str
  augmentation: str | None
  merge: str
  stream: bool
  image_size: int
  baselines: tuple[str, ...]
  chunk_steps: int | None


def read_settings(**instead: Any) -> Settings:
  """The parsed flags, checked as far as they can be without the data.

  Args:
    **instead: values of fields, whatever the flags say.

  Raises:
    ValueError: a flag is out of range or names something unknown.
  """
  defaults = DEFAULTS.get(FLAGS.dataset, DEFAULTS["other"])
  values = {name: FLAGS[name].value for name in Settings._fields} | instead
  values |= {name: value for name, value in defaults.items() if values[name] is None}
  if values["model"] != "mlp":  # those defaults are the mlp's
    values |= {name: FLAGS[name].value for name in ("hidden", "dropout")}
  for name, example in (("hidden", "256,256"), ("milestones", "60,80")):
    if values[name] is None:
      continue
    if any(not re.fullmatch(r"\s*[0-9]{1,9}\s*", str(n)) for n in values[name]):
      raise ValueError(
        f"--{name} is {','.join(values[name])}: give whole numbers, such as {example}"
      )
    values[name] = tuple(int(number) for number in values[name])
  if values["stream"] is None:
    values["stream"] = values["dataset"].startswith("imagenet2012")
  values["baselines"] = tuple(dict.fromkeys(b for b in values["baselines"] if b))
  if values["baselines"] == ("all",):
    values["baselines"] = baselines()
  settings = Settings(**values)
  check(settings)
  return settings


def check(s: Settings) -> None:
  """Raises ValueError where settings are out of range or do not fit one another."""
  check_name("model", s.model, models.MODELS)
  if s.model != "mlp" and s.hidden is not None:
    raise ValueError(f"--hidden is of the mlp: leave it out with --model={s.model}")
  if s.model not in WITH_DROPOUT and s.dropout is not None:
    raise ValueError(
      f"--dropout is of {', '.join(WITH_DROPOUT)}: leave it out with --model={s.model}"
    )
  check_name("retraining schedule", s.retrain_schedule, RETRAIN_SCHEDULES)
  check_name("scope", s.scope, SCOPES)
  if s.augmentation is not None:
    check_name("augmentation", s.augmentation, AUGMENTATIONS)
  for name in s.baselines:
    check_name("baseline", name, baselines())
  check_merge(s)
  if s.stream and (s.dataset == "digits" or s.dataset.lower().endswith(".npz")):
    raise ValueError(f"--stream reads TFDS data sets: {s.dataset} fits on the device")
  if s.stream and s.augmentation not in (None, "none"):
    raise ValueError(
      f"--augmentation is {s.augmentation}: streamed images are cropped and flipped on the "
      "host, leave it out"
    )
  if s.seed + s.seeds > 2**32:
    raise ValueError(f"--seed is {s.seed}: seeds are below 2^32, the last one too")
  check_sparsity(s.goal_sparsity, "--goal_sparsity")
  for name in (
    "ingredients",
    "phases",
    "epochs",
    "batch_size",
    "seeds",
    "chunk_steps",
    "image_size",
  ):
    if getattr(s, name) is not None and getattr(s, name) < 1:
      raise ValueError(f"--{name} is {getattr(s, name)}: it must be at least 1")
  for name in ("retrain_epochs", "seed", "weight_decay", "warmup_epochs"):
    if not 0 <= getattr(s, name) < math.inf:
      raise ValueError(f"--{name} is {getattr(s, name)}: it must be a number, 0 or above")
  if not 0 < s.learning_rate < math.inf:
    raise ValueError(f"--learning_rate is {s.learning_rate}: it must be a number above 0")
  if not 0 <= s.momentum < 1:
    raise ValueError(f"--momentum is {s.momentum}: it must be in [0, 1)")
  check_pretraining(s)


def check_merge(s: Settings) -> None:
  """Raises ValueError where a run cannot merge its candidates so."""
  check_name("merge", s.merge, MERGES)
  if ALL_MERGES[s.merge].two and s.ingredients != 2:
    raise ValueError(
      f"--merge={s.merge} is of two copies, and --ingredients is {s.ingredients}: give "
      "--ingredients=2 or another merge"
    )
  if s.stream and ALL_MERGES[s.merge].in_memory:
    raise ValueError(
      f"--merge={s.merge} needs images in memory, and they are streamed: give another merge"
    )


def with_data(settings: Settings, dataset: Dataset | StreamedDataset) -> Settings:
  """Fills in what the data set itself decides: the augmentation."""
  return settings._replace(augmentation=settings.augmentation or dataset.augmentation)


def check_data(settings: Settings, name: str, train_size: int, prunable_size: int) -> None:
  """Raises ValueError where settings do not fit the data and the network."""
  if removal_count(settings.goal_sparsity, prunable_size) == prunable_size:
    raise ValueError(
      f"--goal_sparsity is {settings.goal_sparsity}: that removes all {prunable_size} "
      "weights of the network, choose a smaller one"
    )
  if settings.batch_size > train_size:
    raise ValueError(
      f"--batch_size is {settings.batch_size}, but the training split of {name} "
      f"has {train_size} examples (after 10 % went to validation): choose at most that"
    )


def flagfile(flags: dict[str, Any]) -> str:
  """Flags as a file for --flagfile; the run directory is not among them."""
  lines = []
  for name, value in flags.items():
    if value is None:
      continue
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    lines.append(f"--{name}={text}\n")
  return "".join(lines)
