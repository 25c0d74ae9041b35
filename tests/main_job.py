"""The main job inside the process of the tests, or as a command, and what it leaves."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from absl import flags as absl_flags

from experiments import sms
from experiments.config.fields import define_flags, names
from experiments.config.run_config import Config, read_config
from jaxsms import checkpoint
from jaxsms.disk import faults

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = names(Config)


def unparse(*flags):
  """Forgets what earlier tests gave, also for these flags of other binaries."""
  for name in (*FLAGS, *flags):
    absl_flags.FLAGS[name].unparse()


def parse(*flags):
  """Parses flags anew."""
  unparse()
  return absl_flags.FLAGS(["sms", *flags])


def flag_values(kind, *words):
  """What absl parses of words, with the flags of a configuration alone."""
  values = absl_flags.FlagValues()
  define_flags(kind, values)
  values(["binary", *words])
  return values


def config_of(*flags):
  """What the main job makes of flags."""
  parse(*flags)
  return read_config()


def exit_status(main, argv):
  """Of a binary's main function: 0 if it returned."""
  try:
    main(argv)
  except SystemExit as stop:
    return stop.code
  return 0


def run(*flags):
  """Runs the main job: exit status."""
  return exit_status(sms.main, parse(*flags))


SMALL = (
  "--hidden=16", "--epochs=2", "--retrain_epochs=1", "--phases=2", "--ingredients=2",
  "--batch_size=64", "--goal_sparsity=0.75", "--chunk_steps=8", "--save_minutes=0",
  "--mesh=none", "--baselines=",
)  # fmt: skip
TWO = ("--seeds=2", "--baselines=imp")


def results(workdir):
  return json.loads((workdir / "results.json").read_text())


def assert_same_run(workdir, other):
  """Bit by bit the same, but for times and where it lies."""
  a, b = results(workdir), results(other)
  for name in ("seeds", "summary", "finished", "environment"):
    assert a[name] == b[name], name
  metrics = (workdir / "metrics.jsonl").read_bytes()
  assert metrics == (other / "metrics.jsonl").read_bytes()
  for seed in a["seeds"]:
    soups = [
      checkpoint.restore(w / "soup" / f"seed_{seed['seed']}") for w in (workdir, other)
    ]
    assert jax.tree.structure(soups[0]) == jax.tree.structure(soups[1])
    for x, y in zip(*map(jax.tree.leaves, soups), strict=True):
      np.testing.assert_array_equal(
        np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)
      )


def start(workdir, *flags, fault="", **environment):
  """The main job as a command, on its way."""
  command = [sys.executable, "-m", "experiments.sms", *SMALL, *flags]
  return subprocess.Popen(
    [*command, f"--workdir={workdir}"], cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    env={**os.environ, faults.VARIABLE: fault, **environment},
  )  # fmt: skip


def assert_no_traceback(process):
  _, errors = process.communicate()
  assert "Traceback" not in errors, errors
  return errors
