"""Averages checkpoints that lie on disk into one model: a soup.

python -m experiments.soup A B C --out=soup.safetensors
python -m experiments.soup A B C --out=FOLDER --greedy --dataset=cifar10 --model=resnet20
A, B and C are .safetensors, .npz or PyTorch files, or folders: in Hugging Face's layout, or
that jaxsms.checkpoint or orbax wrote. They are read by part, and may be larger than memory.
With --dataset, models are evaluated, and batch statistics estimated anew; flags of data and
network are those of experiments.sms, so that --flagfile=RUN/flags.txt gives them.
"""

import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console

from jaxsms.disk.merging import (
  Job,
  MergeStatistics,
  copy,
  find_thresholds,
  largest_sparsity,
  merge,
)
from jaxsms.disk.opening import open_tensors
from jaxsms.disk.rules import RULES, passes_of
from jaxsms.disk.storage import first_sentence
from jaxsms.disk.tensors import Spec, Tensors, prunable_names
from jaxsms.merges import MERGES

from .config import out_flags, run_config
from .merging import merge_flags
from .merging.barrier import print_barrier
from .merging.bytes_progress import bytes_progress
from .merging.merge_flags import MergeFlags, read_flags
from .merging.model_checks import (
  check_masks,
  check_models,
  check_others,
  have_same_arrays,
  result_specs,
  statistics,
)
from .merging.model_table import show
from .merging.output import Output, copy_others, read_size, write_card, writing
from .merging.with_data import Others, as_ours, make_data_task, parts_of, soup_in_memory
from .run.flag_files import fail, refusals, run_with_flags, set_log_level
from .run.terminal import print_line, terminal

FLAGS = flags.FLAGS
for module in (merge_flags, out_flags, run_config):
  flags.adopt_module_key_flags(module)


class Soup(NamedTuple):
  """What was made.

  Attributes:
    weights: float [m], of the models.
    found: what merging them found.
    scores: metrics of the models and of the soup; None where there are no data.
  """

  weights: np.ndarray
  found: MergeStatistics
  scores: list[dict[str, float]] | None


def main(argv: list[str]) -> None:
  """Does what the flags say; bad input ends it with one sentence and exit status 2."""
  set_log_level()
  paths = argv[1:]
  command = shlex.join(["python", "-m", f"{__package__}.soup", *sys.argv[1:]])
  console = terminal()
  try:
    with refusals(), contextlib.ExitStack() as stack:
      with_data = FLAGS["dataset"].present
      config = read_flags(paths, with_data)
      models = [open_tensors(path, stack) for path in paths]
      given = config.base and [config.base], config.squared_gradients
      others = Others(*(x and [open_tensors(path, stack) for path in x] for x in given))
      if with_data:
        soup = soup_with_data(config, models, others, command, console)
      else:
        soup = soup_on_disk(config, models, others, command)
  except OSError as error:
    reason = error.strerror or first_sentence(error)
    fail(f"--out cannot be written ({reason})", 1)
  show(console, paths, soup.weights, soup.found, soup.scores)
  if statistics(models[0].specs):
    note = "Batch statistics of the soup were estimated anew on training data."
    if soup.scores is None:
      note = (
        "Batch statistics were averaged: estimate them anew on training data, as this does "
        "with --dataset and --model."
      )
    print_line(console, note)
  if soup.scores is None:
    print_line(
      console,
      "No barrier was measured: whether the models share a basin is only seen on data, "
      "with --dataset and --model.",
    )
  print_line(console, f"Soup: {config.out}")


def soup_with_data(
  config: MergeFlags, models: list[Tensors], others: Others, command: str, console: Console
) -> Soup:
  """Merges models of a network in memory, with data, and writes the soup.

  It takes layout, dtypes, metadata and other files of the first model, as without data.
  Where that has other names than ours, such as PyTorch's, they would not describe the
  soup, which has our names: it is then written as one of this library.

  Raises:
    ValueError: models do not fit the network, or do not share a mask.
    OSError: it cannot be written.
  """
  task = make_data_task(len(models))
  ours = [as_ours(model, task) for model in models]
  check_models(ours)
  others = Others(
    *(None if x is None else [as_ours(one, task) for one in x] for x in others)
  )
  goal = goal_of(config, ours) if config.masks == "prune" else None
  first = models[0] if have_same_arrays(models[0], ours[0]) else ours[0]
  specs = result_specs(first, config.dtype)
  print_barrier(console, ours, task, jax.random.key(config.seed))
  soup, found, weights, scores = soup_in_memory(config, ours, others, task, goal, specs)
  with writing(output_of(config, first, specs)) as (writer, folder):
    copy(soup, writer)
    write_beside(folder, config, models, first, weights, command)
  return Soup(weights, found, scores)


def soup_on_disk(
  config: MergeFlags, models: list[Tensors], others: Others, command: str
) -> Soup:
  """Merges models by part, without data.

  Raises:
    ValueError: the models do not share a mask and no flag says what to do, or values are
      not finite.
    OSError: it cannot be written.
  """
  check_models(models)
  check_others(models[0], others)
  weights = config.weights_of(len(models))
  specs = result_specs(models[0], config.dtype)
  passes = 1 + passes_of(config.merge)
  if config.masks == "prune":
    passes += 2 if config.sparsity is not None else 3
  size = sum(spec.nbytes for model in models for spec in model.specs.values())
  with bytes_progress(passes * size) as add:
    parts = parts_of(config, models, weights, others, add)
    taken = np.flatnonzero(weights).tolist()
    job = Job(models, RULES[config.merge](parts), specs, taken, add)
    thresholds = None
    if config.masks == "prune":
      goal = goal_of(config, models, add)
      thresholds = find_thresholds(job, goal, config.scope)
    with writing(output_of(config, models[0], specs)) as (writer, folder):
      found = merge(job, writer, thresholds)
      if config.masks is None:
        check_masks(models, taken, found)
      write_beside(folder, config, models, models[0], weights, command)
  return Soup(weights, found, None)


def write_beside(
  folder: str | None,
  config: MergeFlags,
  models: list[Tensors],
  first: Tensors,
  weights: np.ndarray,
  command: str,
) -> None:
  """Writes the card, and copies configuration and tokenizer, beside the soup's weights.

  Args:
    folder: in Hugging Face's layout; None writes nothing.
    config: flags.
    models: as they were opened.
    first: the model whose other files are copied.
    weights: float [m].
    command: that makes the soup.
  """
  if folder is None:
    return
  paths = [model.path for model in models]
  words = f"Of {len(models)} models: {MERGES[config.merge].title}."
  write_card(folder, paths, weights, words, command)
  if first.folder is not None:
    copy_others(first.folder, folder, config.dtype)


def goal_of(
  config: MergeFlags,
  models: Sequence[Tensors],
  on_bytes: Callable[[int], None] = lambda count: None,
) -> float:
  """What --masks=prune prunes to; a model of weight 0 does not count."""
  if config.sparsity is not None:
    return config.sparsity
  if config.weights is not None:
    models = [models[i] for i in np.flatnonzero(config.weights)]
  return largest_sparsity(models, prunable_names(models[0].specs), on_bytes)


def output_of(config: MergeFlags, first: Tensors, specs: dict[str, Spec]) -> Output:
  """What is written, in the first model's layout."""
  sharded = first.layout == "shards" or config.shard_size is not None
  return Output(config.out, specs, first, read_size(config.shard_size or "5GB"), sharded)


if __name__ == "__main__":
  run_with_flags(main)
