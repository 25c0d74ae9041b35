"""How fast ONNX files answer in ONNX Runtime, for the report of a run and the benchmark."""

import functools
import importlib.util
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from jaxsms.disk import storage
from jaxsms.disk.onnx_files import start_session

from ..benchmarks.bench_statistics import milliseconds
from ..schemas.results_check import LATENCY

FOLDER = "onnx"  # in a run
LATENCY_FILE = "latency.json"
BATCHES = (1, 32)
ROUND_SECONDS = 0.1  # of each file


def run_latency(path: str | os.PathLike) -> dict[str, Any] | None:
  """Bytes and times of the ONNX files of a run, measured where that has not been done.

  Args:
    path: of the run; `experiments.export RUN --format=onnx` writes its files.

  Returns:
    See `times_of`, with the `digest` of each file; None where there are no files, or they
    cannot be timed here.
  """
  folder = storage.as_path(path) / FOLDER
  if storage.is_remote(folder) or not folder.is_dir():
    return None
  files = {f.name: os.fspath(f) for f in folder.iterdir() if f.name.endswith(".onnx")}
  try:
    digests = {n: storage.content_digest(storage.as_path(f)) for n, f in files.items()}
  except OSError as error:
    logging.warning("ONNX files are not timed: %s", error)
    return None
  try:
    found = storage.read_json(folder / LATENCY_FILE)
    LATENCY(found)
    if {name: one.get("digest") for name, one in found["files"].items()} == digests:
      return found
  except (OSError, ValueError):
    pass
  if not files or not importlib.util.find_spec("onnxruntime"):
    return None
  try:
    found = times_of(files)
    for name, digest in digests.items():
      found["files"][name]["digest"] = digest
    storage.write_json(folder / LATENCY_FILE, found)
  except Exception as error:  # a file of another make; the report is no worse for it
    logging.warning("ONNX files are not timed: %s", error)
    return None
  return found


def times_of(files: Mapping[str, str], batches: Sequence[int] = BATCHES) -> dict[str, Any]:
  """Times ONNX files of one input, in alternating rounds.

  Args:
    files: path of each, by name.
    batches: examples at once.

  Returns:
    `runtime`, `device`, and `files`: by name `bytes`, and `milliseconds` by batch, each
    with `median`, `min` and `max` over rounds.
  """
  import onnxruntime

  sessions = {name: start_session(file) for name, file in files.items()}
  times: dict[str, dict[str, Any]] = {name: {} for name in files}
  for batch in batches:
    calls = {}
    for name, session in sessions.items():
      (given,) = session.get_inputs()
      x = np.random.default_rng(0).standard_normal((batch, *given.shape[1:]), np.float32)
      calls[name] = functools.partial(session.run, None, {given.name: x})
    for name, found in milliseconds(calls, ROUND_SECONDS, slow=1.0).items():
      times[name][str(batch)] = found
  return {
    "runtime": f"ONNX Runtime {onnxruntime.__version__}",
    "device": platform.processor() or platform.machine(),
    "files": {
      name: {"bytes": os.path.getsize(file), "milliseconds": times[name]}
      for name, file in files.items()
    },
  }
