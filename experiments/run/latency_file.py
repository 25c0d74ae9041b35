"""latency.json: how fast the ONNX files of a run answer."""

import importlib.util
import os
from typing import Any

from absl import logging

from jaxsms.disk import storage

from ..costs.onnx_latency import times_of
from ..schemas.results_check import LATENCY

FOLDER = "onnx"  # in a run
LATENCY_FILE = "latency.json"


def run_latency(path: str | os.PathLike) -> dict[str, Any] | None:
  """Bytes and times of the ONNX files of a run, measured where that has not been done.

  Args:
    path: of the run; `experiments.export RUN --format=onnx` writes its files.

  Returns:
    See `onnx_latency.times_of`, with the `digest` of each file; None where there are no
    files, or they cannot be timed here.
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
