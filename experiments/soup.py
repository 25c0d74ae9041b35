"""Averages checkpoints that lie on disk into one model: a soup.

python -m experiments.soup A B C --out=soup.safetensors
python -m experiments.soup A B C --out=FOLDER --greedy --dataset=cifar10 --model=resnet20
A, B and C are folders that jaxsms.checkpoint or orbax wrote, .safetensors, .npz or PyTorch
files. With --dataset, models are evaluated, and batch statistics estimated anew; flags of
data and network are those of experiments.sms, so that --flagfile=RUN/flags.txt gives them.
"""

import dataclasses
import sys
from typing import NamedTuple

import jax
import numpy as np
from absl import flags, logging

from experiments import hardware, outputs
from experiments.config import run_config
from experiments.flag_files import run_with_flags
from experiments.soup_checks import (
  Arrays,
  averaged,
  check_masks,
  check_models,
  largest_sparsity,
  pruned,
  removed,
  statistics,
)
from experiments.soup_table import show
from experiments.task import Task, load, make_task, with_data
from experiments.terminal import say, terminal
from jaxsms import checkpoint, pretrained, storage
from jaxsms.export import nested
from jaxsms.names import check_name
from jaxsms.pruning import check_sparsity
from jaxsms.safetensors import by_path, write_safetensors
from jaxsms.soups import greedy_soup, soup_weights
from jaxsms.training.engine import Model, one_model
from jaxsms.training.measurements import measure, recalibrated
from jaxsms.training.phases import on_validation
from jaxsms.trees import model_at

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
FLAGS = flags.FLAGS
for module in (outputs, run_config):
  flags.adopt_module_key_flags(module)


class Choice(NamedTuple):
  """The flags of this file."""

  out: str
  masks: str | None
  sparsity: float | None
  weights: np.ndarray | None
  greedy: bool


def main(argv: list[str]) -> None:
  """Does what the flags say; bad input ends it with one sentence and exit status 2."""
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    paths = argv[1:]
    choice = read_choice(paths)
    models = [pretrained.load_arrays(path) for path in paths]
    task = None
    if FLAGS["dataset"].present:
      task = make_data_task(len(paths))
      models = [as_ours(*pair, task) for pair in zip(paths, models, strict=True)]
    check_models(paths, models)
    soup, weights = make_soup(choice, paths, models, task)
    scores = measured(task, [*models, soup]) if task else None
    write(choice.out, soup, models, weights)
  except (ValueError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except OSError as error:
    print(f"error: --out cannot be written ({error.strerror or error})", file=sys.stderr)
    sys.exit(1)
  console = terminal()
  show(console, paths, models, weights, soup, scores)
  if statistics(soup):
    note = "Batch statistics of the soup were estimated anew on training data."
    if not task:
      note = (
        "Batch statistics were averaged: estimate them anew on training data, as this does "
        "with --dataset and --model."
      )
    say(console, note)
  say(console, f"Soup: {choice.out}")


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
  return Choice(out, FLAGS.masks, FLAGS.sparsity, weights, FLAGS.greedy)


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


def make_data_task(m: int) -> Task:
  """Network, data and programs that the flags describe, for m models.

  Raises:
    ValueError: see `experiments.task.make_task`.
  """
  alone = dict.fromkeys(("coordinator", "processes", "process"))
  config = run_config.read_config()
  config = dataclasses.replace(config, ingredients=m, init=None, ood=(), **alone)
  hardware.start(config, m)
  dataset = load(config)
  return make_task(with_data(config, dataset), dataset)


def as_ours(path: str, arrays: Arrays, task: Task) -> Arrays:
  """A model of any layout as variables of the network, by their names."""
  return by_path(pretrained.fit_model(arrays, task.module, task.image_shape, path))


def make_soup(
  choice: Choice, paths: list[str], models: list[Arrays], task: Task | None
) -> tuple[Arrays, np.ndarray]:
  """The average as the flags want it, its batch statistics anew where there are data.

  Raises:
    ValueError: the models do not share a mask, and no flag says what to do.
  """
  m = len(models)
  if choice.masks is None:
    taken = range(m) if choice.weights is None else np.flatnonzero(choice.weights)
    check_masks([paths[i] for i in taken], [models[i] for i in taken])
  goal = None
  if choice.masks == "prune":
    goal = largest_sparsity(models) if choice.sparsity is None else choice.sparsity

  def finished(average):
    return average if goal is None else pruned(average, goal, FLAGS.scope)

  weights = soup_weights(range(m), m) if choice.weights is None else choice.weights
  key = jax.random.key(FLAGS.seed)
  if choice.greedy:

    def validation_accuracy(arrays):
      model = as_model(finished(jax.device_get(arrays)))
      return on_validation(task.engine, key, model)["validation_accuracy"]

    stacked = {name: np.stack([model[name] for model in models]) for name in models[0]}
    weights = soup_weights(greedy_soup(stacked, validation_accuracy)[1], m)
  soup = finished(averaged(models, weights))
  if task is not None:
    one = one_model(as_model(soup))
    anew = recalibrated(task.engine, key, one)
    soup = by_path(jax.device_get(model_at(anew, 0))._asdict())
  return soup, weights


def as_model(arrays: Arrays) -> Model:
  """Variables by name as parameters and batch statistics."""
  tree = nested(arrays)
  return Model(tree["params"], tree.get("batch_stats", {}))


def measured(task: Task, models: list[Arrays]) -> list[dict[str, float]]:
  """Metrics of each model as it is."""
  trees = [as_model(arrays) for arrays in models]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
  return measure(task.engine, stacked).scores


def write(out: str, soup: Arrays, models: list[Arrays], weights: np.ndarray) -> None:
  """Writes the soup to a file, or with its masks to a folder.

  Raises:
    ValueError: the kind of file does not have a dtype.
    OSError: it cannot be written.
  """
  if out.lower().endswith(".safetensors"):
    write_safetensors(out, soup)
  elif out.lower().endswith(".npz"):
    outputs.write_npz(out, soup)
  else:
    tree = nested(soup)
    if isinstance(tree.get("params"), dict):
      zeros = removed([soup])
      masks = {name: ~zeros.get(name, np.zeros(x.shape, bool)) for name, x in soup.items()}
      tree["masks"] = nested(masks)["params"]
    checkpoint.save(out, tree)


if __name__ == "__main__":
  run_with_flags(main)
