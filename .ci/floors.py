"""Prints the lowest versions that pyproject.toml allows, as constraints for pip."""

import pathlib
import re
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["experiments"], *extras["data"]]:
  found = re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)\s*(;.*)?", line)
  if found:
    name, version, marker = found.groups()
    print(f"{name}=={version}{marker or ''}")
