"""The folder of one run: flags, metrics as JSON lines, results, the soup, the figure."""

import json
import math
import os
import platform
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsms import checkpoint
from jaxsms.meshes import fetch

FLAGS_FILE = "flags.txt"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"


def create(path: str, flagfile: str) -> str:
  """Makes a run directory and writes the flags of the run into it.

  Of several processes the first does so, and all of them learn how it went.

  Args:
    path: the folder; made where it is missing, else it must hold no run.
    flagfile: all flags, one to a line, to be given to `--flagfile`.

  Returns:
    The path, with ~ expanded.

  Raises:
    ValueError: it holds a run already, or cannot be written.
  """
  path = os.path.expanduser(path)
  message = _create(path, flagfile) if is_writer() else ""
  if jax.process_count() > 1:
    failed = multihost_utils.broadcast_one_to_all(np.int32(bool(message)))
    if failed and not message:
      message = "the first process could not make the run directory: see its output"
  if message:
    raise ValueError(message)
  return path


def is_writer() -> bool:
  """Whether this process is the one that writes and shows."""
  return jax.process_index() == 0


def _create(path, flagfile):
  """Does it; gives what went wrong, or nothing."""
  try:
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, FLAGS_FILE), "x", encoding="utf-8") as file:
      file.write(flagfile)
  except FileExistsError:
    if os.path.isdir(path):
      return f"{path} already holds a run: choose another --workdir, or delete it"
    return f"--workdir {path} is a file: give a folder"
  except OSError as error:
    return f"--workdir {path} cannot be written ({error.strerror}): choose another folder"
  return ""


def append_metrics(path: str, record: dict[str, Any]) -> None:
  """Adds one line to the metrics of a run."""
  if not is_writer():
    return
  with open(os.path.join(path, METRICS_FILE), "a", encoding="utf-8") as file:
    file.write(json.dumps(plain(record), allow_nan=False) + "\n")


def write_results(path: str, results: dict[str, Any]) -> None:
  """Writes results.json: the old file stays whole until the new one is."""
  if not is_writer():
    return
  name = os.path.join(path, RESULTS_FILE)
  with open(name + ".tmp", "w", encoding="utf-8") as file:
    json.dump(plain(results), file, indent=1, allow_nan=False)
  os.replace(name + ".tmp", name)


def save_soup(path: str, seed: int, model: dict[str, Any]) -> None:
  """Saves the last soup of one seed: `params`, `batch_stats` and `masks`."""
  model = fetch(model)
  if not is_writer():
    return
  checkpoint.save(os.path.join(path, "soup", f"seed_{seed}"), model)


def environment() -> dict[str, Any]:
  """Versions and devices that a run's numbers depend on."""
  import flax
  import optax
  import orbax.checkpoint

  import jaxsms

  return {
    "jaxsms": jaxsms.__version__,
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "orbax": orbax.checkpoint.__version__,
    "python": platform.python_version(),
    "platform": sys.platform,
    "device": jax.devices()[0].device_kind,
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
  }


def plain(value: Any) -> Any:
  """The same in what JSON has: arrays as lists, NaN and infinities as None."""
  if isinstance(value, dict):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if hasattr(value, "tolist"):
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
