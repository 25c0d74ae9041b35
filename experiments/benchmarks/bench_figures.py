"""The file that --json of a benchmark names, with all figures."""

import json
import os
from typing import Any

from jaxsms.disk.files import output_file
from jaxsms.disk.storage import plain


def writable(name: str, value: str) -> None:
  """Raises ValueError unless a file of that name can be written."""
  folder = os.path.dirname(value) or "."
  if value and (os.path.isdir(value) or not os.access(folder, os.W_OK)):
    raise ValueError(
      f"--{name} {value} cannot be written: give a file in a folder that can"
    )


def write_figures(path: str | None, figures: dict[str, Any]) -> None:
  """Writes what was measured as JSON, where --json says where to."""
  if path:
    with output_file(path) as file:
      file.write(json.dumps(plain(figures), indent=1, allow_nan=False).encode())
