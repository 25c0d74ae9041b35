"""Writes the soup of a finished run to one file, to be used elsewhere.

python -m experiments.export RUN --out=soup.safetensors
python -m experiments.export RUN --format=torch --out=soup.pth
Without --seed it takes the first seed that the run has a soup of.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from jaxsms import checkpoint, models, pretrained, sparsity
from jaxsms.data import StreamedDataset
from jaxsms.disk import storage
from jaxsms.disk.safetensors import save_safetensors, write_safetensors
from jaxsms.export import save_compact
from jaxsms.names import check_name
from jaxsms.trees import PyTree

from .config.run_config import config_of
from .run import outputs, run_directory
from .run.flag_files import refusals, run_with_flags
from .run.latency import with_all_kept
from .run.task import load

FORMATS = {
  "compact": (".safetensors",),
  "safetensors": (".safetensors",),
  "torch": (".pth", ".pt", ".safetensors"),
}
flags.DEFINE_string(
  "format",
  "compact",
  "compact (a bit for each weight and the values of the kept ones; "
  "jaxsms.export.load_compact reads it), safetensors (with zeros, under names such as "
  "params/Dense_0/kernel), or torch (with zeros, PyTorch's names and layout).",
)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(outputs)
flags.declare_key_flag("seed")
flags.declare_key_flag("data_dir")


def main(argv: list[str]) -> None:
  """Does what the flags say; bad input ends it with one sentence and exit status 2."""
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    with refusals():
      if len(argv) != 2:
        raise ValueError(
          f"{len(argv) - 1} run directories are given: give one, and flags as --name=value"
        )
      check_name("format", FLAGS.format, FORMATS)
      endings = FORMATS[FLAGS.format]
      out = outputs.check_out(endings, f"soup{endings[0]}")
      soup = read_soup(argv[1])
      write(FLAGS.format, out, argv[1], soup)
  except OSError as error:
    print(f"error: {out} cannot be written ({error.strerror or error})", file=sys.stderr)
    sys.exit(1)
  dense = sum(x.nbytes for name in VARIABLES for x in jax.tree.leaves(soup[name]))
  share = float(sparsity(soup["params"]))
  size = storage.as_path(out).stat().length
  print(
    f"{out}: {size:,} bytes; the arrays have {dense:,}, and {share:.2%} of "
    "the weights are 0"
  )


VARIABLES = ("params", "batch_stats")


def read_soup(path: str) -> dict[str, PyTree]:
  """`params`, `batch_stats` and `masks` of a run's soup.

  Raises:
    ValueError: the run, or that seed's soup, is not there or damaged.
  """
  folder = storage.as_path(path) / "soup"
  seeds = [child.name for child in folder.iterdir()] if folder.is_dir() else []
  seeds = [name.removeprefix("seed_") for name in seeds]
  seeds = sorted(int(name) for name in seeds if name.isascii() and name.isdigit())
  if not seeds:
    raise ValueError(
      f"{path} holds no soup: give the --workdir of a run of experiments.sms that has "
      "finished a seed"
    )
  seed = FLAGS.seed if FLAGS["seed"].present else seeds[0]
  if seed not in seeds:
    raise ValueError(f"--seed is {seed}: {path} has soups of {', '.join(map(str, seeds))}")
  soup = checkpoint.restore(run_directory.soup_folder(path, seed))
  return {"batch_stats": {}, **soup}


def write(form: str, out: str, path: str, soup: dict[str, PyTree]) -> None:
  """Writes the soup of a run in one of the `FORMATS`.

  Raises:
    ValueError: the run does not tell its network, or its data are not there.
    ImportError: PyTorch is not installed.
    OSError: the file cannot be written.
  """
  variables = {name: soup[name] for name in VARIABLES}
  if form == "compact":
    save_compact(out, variables, with_all_kept(variables, soup["masks"]))
  elif form == "safetensors":
    save_safetensors(out, variables)
  else:
    state = pretrained.to_torch(variables, *network(path))
    state = {name: np.ascontiguousarray(array) for name, array in state.items()}
    if out.endswith(".safetensors"):
      write_safetensors(out, state, {"format": "pt"})
    else:
      outputs.write_torch(out, state)


def network(path: str) -> tuple[Any, tuple[int, ...]]:
  """The module of a run, and the shape of its images, from its flags and its data."""
  run = run_directory.read_run(path)
  try:
    config = config_of(run["flags"])
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{path} does not tell the flags of its run, or was written by another version: "
      "--format=torch needs them"
    ) from error
  if FLAGS["data_dir"].present:
    config = dataclasses.replace(config, data_dir=FLAGS.data_dir)
  dataset = load(config)
  module = models.create(config.model, dataset.num_classes, **config.model_options())
  if isinstance(dataset, StreamedDataset):
    return module, (config.image_size, config.image_size, len(dataset.mean))
  return module, dataset.train_images.shape[1:]


if __name__ == "__main__":
  run_with_flags(main)
