"""Writes the soup of a finished run to one file, to be used elsewhere.

python -m experiments.export RUN --out=soup.safetensors
python -m experiments.export RUN --format=torch --out=soup.pth
python -m experiments.export RUN --format=onnx
python -m experiments.export RUN --phase=2 --out=one_shot.safetensors
Without --seed it takes the first seed that the run has a soup of. With --phase it takes
the one-shot soup with the sparsity of that phase.
"""

from typing import Any

import jax
import numpy as np
from absl import flags

from jaxsms import checkpoint, export, pretrained, sparsity
from jaxsms.disk import storage
from jaxsms.disk.files import output_file
from jaxsms.disk.safetensors import save_safetensors, write_safetensors
from jaxsms.export import save_compact
from jaxsms.trees import PyTree

from .config import export_flags, out_flags
from .config.export_flags import ExportConfig
from .config.pruning_criteria import removes_channels
from .costs.inference_times import with_all_kept
from .run import exporting, run_directory
from .run.exporting import variables_of
from .run.flag_files import fail, refusals, run_with_flags, set_log_level

PROGRAMS = ("stablehlo", "onnx")
for module in (export_flags, out_flags):
  flags.adopt_module_key_flags(module)
flags.declare_key_flag("seed")
flags.declare_key_flag("data_dir")


def main(argv: list[str]) -> None:
  """Does what the flags say; bad input ends it with one sentence and exit status 2."""
  set_log_level()
  out = flags.FLAGS.out
  try:
    with refusals():
      if len(argv) != 2:
        raise ValueError(
          f"{len(argv) - 1} run directories are given: give one, and flags as --name=value"
        )
      config = export_flags.read_config()
      endings = export_flags.FORMATS[config.format]
      if not config.in_run:
        out = out_flags.check_out(out, endings, f"soup{endings[0]}")
      soup = read_soup(argv[1], config)
      out = exporting.onnx_place(argv[1]) if config.in_run else out
      lines = write(config, out, argv[1], soup)
  except OSError as error:
    fail(f"{out} cannot be written ({error.strerror or error})", 1)
  dense = sum(x.nbytes for x in jax.tree.leaves(variables_of(soup)))
  share = float(sparsity(soup["params"]))
  size = storage.as_path(out).stat().length
  print(
    f"{out}: {size:,} bytes; the arrays have {dense:,}, and {share:.2%} of "
    "the weights are 0"
  )
  for line in lines:
    print(line)


def read_soup(path: str, config: ExportConfig) -> dict[str, PyTree]:
  """`params`, `batch_stats` and `masks` of a run's soup.

  Raises:
    ValueError: the run, or that seed's soup, is not there or damaged.
  """
  phase = config.phase
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
  seed = seeds[0] if config.seed is None else config.seed
  if seed not in seeds:
    raise ValueError(f"--seed is {seed}: {path} has soups of {', '.join(map(str, seeds))}")
  soup = checkpoint.restore(run_directory.soup_folder(path, seed, phase))
  return {"batch_stats": {}, **soup}


def write(config: ExportConfig, out: str, path: str, soup: dict[str, PyTree]) -> list[str]:
  """Writes the soup of a run in a format; gives sentences on what else it did.

  Raises:
    ValueError: the flags of the run are not known, or its data are not there.
    ImportError: a package is not installed.
    OSError: the file cannot be written.
  """
  form, variables = config.format, variables_of(soup)
  if form == "compact":
    save_compact(out, variables, with_all_kept(variables, soup["masks"]))
    return []
  if form == "safetensors" and config.cut is False:  # needs no flags of the run
    save_safetensors(out, variables)
    return []
  of_run = exporting.run_config(path, config.data_dir)
  # Masks of filters leave biases and normalization, so there a cut finds nothing.
  cutting = removes_channels(of_run) if config.cut is None else config.cut
  if form == "safetensors" and not cutting:
    save_safetensors(out, variables)
    return []
  found = exporting.network(of_run)
  if form in PROGRAMS:
    return write_program(config, out, found, soup, cutting)
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
  """Writes arrays as PyTorch's state dict, or as a safetensors file of one.

  Raises:
    ImportError: PyTorch, which writes the former, is not installed.
  """
  arrays = {name: np.array(array, order="C") for name, array in state.items()}
  if out.endswith(".safetensors"):
    write_safetensors(out, arrays, {"format": "pt"})
    return
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{out} is written by PyTorch, which is not installed: run `pip install torch`, or "
      "let --out end in .safetensors"
    ) from error
  tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
  with output_file(out) as file:
    torch.save(tensors, file)


def write_program(
  config: ExportConfig,
  out: str,
  found: exporting.Network,
  soup: dict[str, PyTree],
  cutting: bool,
) -> list[str]:
  """Writes a program of normalized images; the same sentences."""
  apply: Any = found.apply
  variables = variables_of(soup)
  if cutting:
    network = exporting.cut(found, soup)
    apply, variables = network.apply, network.params
  numbers = exporting.normalization(found)
  lines = [
    "its images are [batch, height, width, channels], scaled to [0, 1], minus "
    f"{numbers['mean']}, divided by {numbers['std']}"
  ]
  if config.format == "stablehlo":
    export.save_stablehlo(out, apply, variables, found.images)
    return lines
  if config.int8:
    exporting.check_int8(out, found)
  exporting.save_onnx(out, found, apply, variables)
  if config.in_run:
    lines.append(f"{exporting.save_dense(out, found, soup)}: the dense network, to compare")
  if config.int8:
    path, before, after = exporting.save_int8(out, found)
    size = storage.as_path(path).stat().length
    lines.append(
      f"{path}: {size:,} bytes; test accuracy {before:.2%} becomes {after:.2%}, "
      f"{100 * (after - before):+.2f} points"
    )
  return lines


if __name__ == "__main__":
  run_with_flags(main)
