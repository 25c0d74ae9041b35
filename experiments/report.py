"""Writes the report of a run or a comparison, finished or not, or of several together.

python -m experiments.report RUN_DIR
python -m experiments.report RUN_DIR OTHER_RUN_DIR --out=DIR

It writes report.html, one page that needs nothing else, and report.md with the figures in
figures/, as SVG and PNG; of one directory into that directory unless --out says another.
"""

import argparse
import os
from collections.abc import Sequence

from jaxsms.disk import storage

from .comparison.run_results import read
from .reporting.cases import Case, Origin
from .reporting.page import files
from .reporting.sections import document
from .reporting.statistics import network_on_data
from .run.flag_files import fail, refusals


def write_report(
  run_dirs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None
) -> storage.epath.Path:
  """Writes the report of one or several run or comparison directories.

  Args:
    run_dirs: where they are.
    out: the folder to write to, made where it is missing; None for the directory itself,
      of one alone.

  Returns:
    Path of the page.

  Raises:
    ValueError: there is nothing to report.
    OSError: it cannot be written.
  """
  if not run_dirs:
    raise ValueError("no directory is given: give the --workdir of a run or a comparison")
  if out is None and len(run_dirs) > 1:
    raise ValueError(
      f"--out is missing: {len(run_dirs)} runs share one report, give its folder"
    )
  out = storage.as_path(run_dirs[0] if out is None else out)
  found = [read(path, len(run_dirs) > 1) for path in run_dirs]
  cases = [case for of_one, _ in found for case in of_one]
  origins = [origin for _, origin in found]
  cases = _with_unique_titles(cases)
  written = files(document(*headings(cases, origins), cases, origins))
  (out / "figures").mkdir(parents=True, exist_ok=True)
  for name, data in written.items():
    storage.write_bytes(out / name, data)
  return out / "report.html"


def headings(cases: Sequence[Case], origins: Sequence[Origin]) -> tuple[str, str]:
  """Title and subtitle."""
  what = list(dict.fromkeys(network_on_data(case.flags) for case in cases))
  title = "Sparse Model Soups: " + (
    ", ".join(what) if len(what) < 4 else f"{len(cases)} runs"
  )
  names = ", ".join(origin.title for origin in origins)
  if len(cases) == 1:
    (case,) = cases
    return title, (
      f"{names}: {case.setting}, {100 * case.flags['goal_sparsity']:g} % sparsity in "
      f"{case.flags['phases']} phases"
    )
  return title, f"{names}: {len(cases)} settings side by side"


def _with_unique_titles(cases):
  """Titles that differ: runs in folders of the same name get a number."""
  titles = [case.title for case in cases]
  return [
    case._replace(title=f"{case.title} ({titles[: i + 1].count(case.title)})")
    if titles.count(case.title) > 1
    else case
    for i, case in enumerate(cases)
  ]


def main(argv: Sequence[str] | None = None) -> None:
  """Bad input ends it with one sentence and exit status 2."""
  parser = argparse.ArgumentParser(
    prog=f"python -m {__package__}.report", description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("run_dir", nargs="+", help="--workdir of a run or a comparison")
  parser.add_argument("--out", help="folder of the report; needed for several")
  chosen = parser.parse_args(argv)
  try:
    with refusals():
      print(write_report(chosen.run_dir, chosen.out))
  except OSError as error:
    where = chosen.out or chosen.run_dir[0]
    fail(
      f"{where} cannot be written ({error.strerror or error}): give another folder with "
      "--out"
    )


if __name__ == "__main__":
  main()
