"""Writes the soup of a finished run to one file, to be used elsewhere.

python -m experiments.export RUN --out=soup.safetensors
python -m experiments.export RUN --format=torch --out=soup.pth
python -m experiments.export RUN --format=onnx
python -m experiments.export RUN --phase=2 --out=one_shot.safetensors
Without --seed it takes the first seed that the run has a soup of. With --phase it takes
the one-shot soup with the sparsity of that phase.
"""

import sys
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from jaxsms import checkpoint, export, pretrained, sparsity
from jaxsms.disk import storage
from jaxsms.disk.safetensors import save_safetensors, write_safetensors
from jaxsms.export import save_compact
from jaxsms.names import check_name
from jaxsms.trees import PyTree

from .methods.pruning_criteria import removes_channels
from .run import exporting, outputs, run_directory
from .run.exporting import VARIABLES
from .run.flag_files import refusals, run_with_flags
from .run.inference_times import with_all_kept

FORMATS = {
  "compact": (".safetensors",),
  "safetensors": (".safetensors",),
  "torch": (".pth", ".pt", ".safetensors"),
  "stablehlo": (".stablehlo",),
  "onnx": (".onnx",),
}
PROGRAMS = ("stablehlo", "onnx")
flags.DEFINE_string(
  "format",
  "compact",
  "compact (a bit for each weight and the values of the kept ones; "
  "jaxsms.export.load_compact reads it), safetensors (under names such as "
  "params/Dense_0/kernel), torch (PyTorch's names and layout; of a cut network with a "
  "module that loads it), stablehlo (a program that any JAX runs), or onnx (without "
  "--out it goes to RUN/onnx, where the report times it beside the dense network).",
)
flags.DEFINE_boolean(
  "cut",
  None,
  "Whether the arrays lose what the masks emptied, and have no zeros in its place. "
  "Default: of a run with --criterion=channels, but for --format=compact.",
)
flags.DEFINE_boolean(
  "int8",
  False,
  "Of --format=onnx: also a file with products of int8, and the test accuracy of both.",
)
flags.DEFINE_integer(
  "phase",
  None,
  "The phase whose sparsity the one-shot soup has that is written, of a run with "
  "--baselines=one_shot_soup. Default: the last soup of the phases.",
)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(outputs)
flags.declare_key_flag("seed")
flags.declare_key_flag("data_dir")


def main(argv: list[str]) -> None:
  """Does what the flags say; bad input ends it with one sentence and exit status 2."""
  if not FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  out = FLAGS.out
  try:
    with refusals():
      if len(argv) != 2:
        raise ValueError(
          f"{len(argv) - 1} run directories are given: give one, and flags as --name=value"
        )
      form = FLAGS.format
      check_flags(form)
      endings = FORMATS[form]
      in_run = form == "onnx" and not out
      if not in_run:
        out = outputs.check_out(endings, f"soup{endings[0]}")
      soup = read_soup(argv[1])
      out = exporting.onnx_place(argv[1]) if in_run else out
      lines = write(form, out, argv[1], soup)
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
  for line in lines:
    print(line)


def check_flags(form: str) -> None:
  """Raises ValueError where flags are not of the format."""
  check_name("format", form, FORMATS)
  if FLAGS.cut and form == "compact":
    raise ValueError(
      "--cut is not of --format=compact, which holds full shapes: give --format=safetensors"
    )
  if FLAGS.int8 and form != "onnx":
    raise ValueError(f"--int8 is of --format=onnx, and --format is {form}: leave it out")
  if FLAGS.phase is not None and form == "onnx" and not FLAGS.out:
    raise ValueError(
      f"--phase={FLAGS.phase} with --format=onnx needs --out: RUN/onnx holds the last soup "
      "of the phases"
    )


def read_soup(path: str) -> dict[str, PyTree]:
  """`params`, `batch_stats` and `masks` of a run's soup.

  Raises:
    ValueError: the run, or that seed's soup, is not there or damaged.
  """
  phase = FLAGS.phase
  folder = run_directory.soups_folder(path, phase)
  seeds = [child.name for child in folder.iterdir()] if folder.is_dir() else []
  seeds = [name.removeprefix("seed_") for name in seeds]
  seeds = sorted(int(name) for name in seeds if name.isascii() and name.isdigit())
  if not seeds and phase is not None:
    raise ValueError(
      f"{path} holds no one-shot soup of phase {phase}: give a phase of a run with "
      "--baselines=one_shot_soup that has finished a seed"
    )
  if not seeds:
    raise ValueError(
      f"{path} holds no soup: give the --workdir of a run of experiments.sms that has "
      "finished a seed"
    )
  seed = FLAGS.seed if FLAGS["seed"].present else seeds[0]
  if seed not in seeds:
    raise ValueError(f"--seed is {seed}: {path} has soups of {', '.join(map(str, seeds))}")
  soup = checkpoint.restore(run_directory.soup_folder(path, seed, phase))
  return {"batch_stats": {}, **soup}


def write(form: str, out: str, path: str, soup: dict[str, PyTree]) -> list[str]:
  """Writes the soup of a run in one of the `FORMATS`; gives sentences on what else it did.

  Raises:
    ValueError: the run does not tell its network, or its data are not there.
    ImportError: a package is not installed.
    OSError: the file cannot be written.
  """
  variables = {name: soup[name] for name in VARIABLES}
  if form == "compact":
    save_compact(out, variables, with_all_kept(variables, soup["masks"]))
    return []
  data_dir = FLAGS.data_dir if FLAGS["data_dir"].present else None
  if form == "safetensors" and FLAGS.cut is False:  # needs no flags of the run
    save_safetensors(out, variables)
    return []
  config = exporting.run_config(path, data_dir)
  # Masks of filters leave biases and normalization, so there a cut finds nothing.
  cutting = removes_channels(config) if FLAGS.cut is None else FLAGS.cut
  if form == "safetensors" and not cutting:
    save_safetensors(out, variables)
    return []
  found = exporting.network(config)
  if form in PROGRAMS:
    return write_program(form, out, found, soup, cutting)
  if not cutting:
    write_torch(out, pretrained.to_torch(variables, found.module, found.image_shape))
    return []
  network = exporting.cut(found, soup)
  if form == "safetensors":
    export.save_cut(out, network)
    return ["jaxsms.export.load_cut reads the cut network"]
  module = exporting.write_cut_torch(out, network, found, write_torch)
  return [f"{module} loads it: load({out!r})"]


def write_torch(out: str, state: dict[str, np.ndarray]) -> None:
  """Writes arrays as PyTorch's state dict, or as a safetensors file of one."""
  state = {name: np.array(array, order="C") for name, array in state.items()}
  if out.endswith(".safetensors"):
    write_safetensors(out, state, {"format": "pt"})
  else:
    outputs.write_torch(out, state)


def write_program(
  form: str, out: str, found: exporting.Network, soup: dict[str, PyTree], cutting: bool
) -> list[str]:
  """Writes a program of normalized images; the same sentences."""
  apply: Any = found.apply
  variables = {name: soup[name] for name in VARIABLES}
  if cutting:
    network = exporting.cut(found, soup)
    apply, variables = network.apply, network.params
  numbers = exporting.normalization(found)
  lines = [
    "its images are [batch, height, width, channels], scaled to [0, 1], minus "
    f"{numbers['mean']}, divided by {numbers['std']}"
  ]
  if form == "stablehlo":
    export.save_stablehlo(out, apply, variables, found.images)
    return lines
  if FLAGS.int8:
    exporting.check_int8(out, found)
  exporting.save_onnx(out, found, apply, variables)
  if not FLAGS.out:
    lines.append(f"{exporting.save_dense(out, found, soup)}: the dense network, to compare")
  if FLAGS.int8:
    path, before, after = exporting.save_int8(out, found)
    size = storage.as_path(path).stat().length
    lines.append(
      f"{path}: {size:,} bytes; test accuracy {before:.2%} becomes {after:.2%}, "
      f"{100 * (after - before):+.2f} points"
    )
  return lines


if __name__ == "__main__":
  run_with_flags(main)
