"""How fast ONNX files answer in ONNX Runtime."""

import functools
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxsms.disk.onnx_files import start_session

from .timing import milliseconds

BATCHES = (1, 32)
ROUND_SECONDS = 0.1  # of each file


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
