"""Times experiments.soup on models in shards, and takes its memory, beside cat and cp.

python -m experiments.benchmarks.bench_soup_job
python -m experiments.benchmarks.bench_soup_job --dtype=bfloat16 --rounds=1
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from jaxsms.disk.passes import Block
from jaxsms.disk.shards import INDEX
from jaxsms.disk.tensors import Spec
from jaxsms.disk.writing import ToSafetensors, split_shards

from ..config.fields import at_least, define_flags, ensure, flag, one_of, read_fields
from ..costs.timing import Spread, cores, shown, spread
from ..run.flag_files import check_no_arguments, refusals

MODELS, SHARDS, TENSORS, COLUMNS = 5, 4, 4, 1024  # tensors of a shard
COPY = 'out=$1; shift; for model; do cat "$model"/*; done; cp -r "$1" "$out"'
# A process has at least the peak memory of the one that starts it: a small one does here.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.monotonic()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([time.monotonic() - start, cpu, usage.ru_maxrss / 1024]))
sys.exit(status != 0)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The flags of this benchmark."""

  megabytes: int = flag("Of a model in float32.", at_least(1), default=982)
  dtype: str = flag(
    "float32 or bfloat16.", one_of("dtype", ("float32", "bfloat16")), default="float32"
  )
  rounds: int = flag("How often all is run, by turns.", at_least(1), default=3)
  folder: str = flag(
    "Where models are made. Default: where temporary files are.",
    ensure(lambda value: os.access(value, os.W_OK), "it cannot be written, choose another"),
    fill=lambda values: tempfile.gettempdir(),
  )


def main(argv: list[str]) -> None:
  """Times what the flags say; bad input ends it with one sentence and exit status 2."""
  logging.set_verbosity(logging.WARNING)
  with refusals():
    check_no_arguments(argv)
    config = read_fields(Config, flags.FLAGS)
    needed, free = (MODELS + 1) * config.megabytes, shutil.disk_usage(config.folder).free
    if needed * 10**6 > free:
      raise ValueError(
        f"--megabytes is {config.megabytes}: that takes {needed:,} MB, and {config.folder} "
        f"has {free // 10**6:,}, give fewer or another --folder"
      )
  print(
    f"{MODELS} {config.dtype} models, {config.megabytes} MB in float32, {cores()} cores, "
    f"--rounds={config.rounds}: medians, in brackets the least and the greatest"
  )
  for name, (wall, cpu, memory) in measure(config).items():
    print(f"{name}: {shown(wall)} s, {shown(cpu)} CPU s, peak {shown(memory)} MiB")


def write_model(folder: str, seed: int, config: Config) -> None:
  """Normal numbers in Hugging Face's layout."""
  rng, dtype = np.random.default_rng(seed), jnp.dtype(config.dtype)
  shape = (config.megabytes * 10**6 // (4 * COLUMNS * SHARDS * TENSORS), COLUMNS)
  names = [f"layers.{i}.weight" for i in range(SHARDS * TENSORS)]
  specs = {name: Spec(shape, dtype) for name in names}
  os.makedirs(folder)
  files = split_shards(specs, TENSORS * specs[names[0]].nbytes)
  with ToSafetensors(folder, files, {}, INDEX) as writer:
    for name, spec in specs.items():
      values = rng.standard_normal(spec.size, np.float32).astype(dtype)
      writer.write(Block(name, 0, spec.size), values)
    writer.finish()


def measure(config: Config) -> dict[str, tuple[Spread, Spread, Spread]]:
  """Wall seconds, CPU seconds and peak MiB of each command, run by turns."""
  with tempfile.TemporaryDirectory(dir=config.folder) as folder:
    out, models = f"{folder}/out", [f"{folder}/{seed}" for seed in range(MODELS)]
    for seed, model in enumerate(models):
      write_model(model, seed, config)
    size = f"--shard_size={config.megabytes * 300_000}"
    soup = [sys.executable, "-m", "experiments.soup", *models, f"--out={out}", size]
    commands = {
      "cat of all and cp of one": ["sh", "-c", COPY, "sh", out, *models],
      "imports alone": [sys.executable, "-c", "import experiments.soup"],
      "uniform": soup,
      "pruned to 90 %": [*soup, "--masks=prune", "--sparsity=0.9"],
    }
    launch(commands["cat of all and cp of one"])  # the files are in the cache then
    found: dict[str, list[list[float]]] = {name: [] for name in commands}
    for name, command in list(commands.items()) * config.rounds:
      shutil.rmtree(out, ignore_errors=True)
      found[name].append(launch(command))
  return {name: tuple(map(spread, zip(*x, strict=True))) for name, x in found.items()}


def launch(command: list[str]) -> list[float]:
  """Wall seconds, CPU seconds and peak MiB of a command that succeeds."""
  return json.loads(subprocess.check_output([sys.executable, "-c", LAUNCHER, *command]))


if __name__ == "__main__":
  define_flags(Config)  # by the binary alone: others have some of them
  app.run(main)
