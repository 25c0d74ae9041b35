"""Compares methods over sparsities, numbers of copies and seeds, with what they can share.

python -m experiments.compare --sparsities=0.9,0.98 --copies=3,5 --seeds=5 --workdir=DIR
python -m experiments.compare --flagfile=experiments/presets/digits.txt --workdir=DIR

Each method with each seed is a run of its own in DIR/parts; dense training is shared. What
is there already is not done again: the same command goes on after a break, and one with
more methods, sparsities, copies or seeds adds to what there is. Started several times on
one DIR, on one machine or many, each process takes parts that no other one works on.

What is compared: sparsities, copies, baselines, seed, seeds. All other flags mean what they
mean in `python -m experiments.sms --helpshort`, where they are listed by subject.
"""

import collections
import dataclasses
import sys
import time
from typing import Any

from absl import flags

from jaxsms.disk import storage

from . import methods
from .comparison import parts as comparison
from .comparison.part_runs import Comparison, planned, run_part, write
from .comparison.parts import DENSE, Part, is_finished
from .config import grid_flags, keeping_flags, run_config
from .report import write_report
from .reporting import tables
from .run import checkpointing, run_directory, running
from .run.environment import check_version, environment
from .run.flag_files import refusals, run_with_flags
from .run.lock import Busy
from .run.progress import RunProgress, clock
from .run.signals import Stopped, StopSignals
from .run.terminal import print_line, terminal
from .setup import tuning
from .setup.hardware import in_flags
from .setup.task import make_task

for module in (run_config, keeping_flags, grid_flags):
  flags.adopt_module_key_flags(module)

WAIT = 5.0  # seconds between two looks at parts that other processes work on


def main(argv: list[str]) -> None:
  """Compares what the flags say; bad input ends it with one sentence and exit status 2."""
  with refusals():
    shared = prepare(argv)
  started, before = time.monotonic(), comparison.finished_parts(shared.workdir)
  before = before.keys() & set(shared.parts)
  stopped, status, failed = None, 0, {}
  try:
    failed = work_through(shared)
  except (ValueError, MemoryError, OSError) as error:
    stopped, status = f"error: {in_flags(error)}", 1
  except Stopped as error:
    stopped, status = str(error), error.status
  except KeyboardInterrupt:
    stopped, status = "interrupted", 130
  if run_directory.is_writer():
    try:
      show(shared, write(shared, failed))
    except (ValueError, OSError) as error:  # such as a full disk
      stopped, status = stopped or f"error: {error}", status or 1
  for part, reason in failed.items():
    print(f"error: {part.name} failed: {reason}", file=sys.stderr)
  if stopped:
    done = len(comparison.finished_parts(shared.workdir).keys() & set(shared.parts))
    print(
      f"{stopped} ({done} of {len(shared.parts)} parts finished; the same flags with "
      f"--workdir={shared.workdir} go on from what is saved)",
      file=sys.stderr,
    )
  elif not failed:
    checkpointing.print_once(
      f"All {len(shared.parts)} parts finished, {len(before)} of them before; this time it "
      f"took {clock(time.monotonic() - started)}."
    )
  sys.exit(status or bool(failed))


def prepare(argv: list[str]) -> Comparison:
  """Reads the flags, checks every cell, takes the folder, and makes what parts share.

  Raises:
    ValueError: something does not fit, or the folder holds another comparison.
    ImportError: a package is missing.
  """
  if flags.FLAGS.budget == "latency":
    raise ValueError(
      "--budget=latency is measured anew in each part, so methods would lose different "
      "channels: give --budget=multiply_adds"
    )
  # What is checked alone, and prepared for, is the cell that takes most.
  goals, copies, most = grid_flags.read_grid()
  config, dataset = running.start(argv, **most)
  for goal in goals:
    for m in copies:
      cell = dataclasses.replace(config, goal_sparsity=goal, ingredients=m)
      run_config.check(cell)
  workdir = running.workdir(config, "compare-")
  defining = run_directory.defining(config, dataset)
  common = comparison.common_of(defining)
  run = comparison.read_run(workdir)
  if run:
    run_directory.check_same(workdir, run, common)
    if not config.allow_other_version:
      check_version(workdir, run["environment"], environment())
  before = run["flags"].get("convolution") if run else None
  config = tuning.with_fastest_lowering(config, dataset, before)
  task = make_task(config, dataset)
  run = run or {"flags": config.flags(), "defining": common, "environment": environment()}
  seeds = range(config.seed, config.seed + config.seeds)
  parts = comparison.parts_of(config.baselines, goals, copies, seeds)
  begin(workdir, run, config.flagfile())
  return Comparison(config, task, workdir, run, defining, parts)


def begin(workdir: storage.epath.Path, run: dict[str, Any], flagfile: str) -> None:
  """Writes down whose comparison it is.

  Raises:
    ValueError: the folder cannot be written.
  """
  if not run_directory.is_writer():
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    run_directory.begin(workdir, run, flagfile)
  except OSError as error:
    raise ValueError(
      f"--workdir {workdir} cannot be written ({error.strerror or error}): choose another "
      "folder"
    ) from error


def work_through(shared: Comparison) -> dict[Part, str]:
  """Does all parts that are not done; those of other processes are waited for.

  Returns:
    Why parts failed: all of their copies diverged.
  """
  failed: dict[Part, str] = {}
  waiting = [part for part in shared.parts if not is_finished(shared.workdir, part)]
  done = len(shared.parts) - len(waiting)
  if done:
    checkpointing.print_once(
      f"{shared.workdir}: {done} of {len(shared.parts)} parts are finished"
    )
  plan: collections.Counter = collections.Counter()
  for part in waiting:
    plan.update(planned(shared, part))
  signals, quiet = StopSignals(), not run_directory.is_writer()
  model_steps = methods.model_steps(shared.task)
  with signals, RunProgress(plan, quiet=quiet, model_steps=model_steps) as progress:
    while waiting:
      left = []
      for part in waiting:
        if is_finished(shared.workdir, part):  # by another process
          plan.subtract(planned(shared, part))
          continue
        dense = Part(DENSE, part.seed)
        if dense in failed:
          failed[part] = "its dense training failed"
        elif part != dense and not is_finished(shared.workdir, dense):
          left.append(part)
        else:
          try:
            run_part(shared, part, progress, plan, signals)
            if run_directory.is_writer():
              write(shared, failed)
          except Busy:
            left.append(part)
          except FloatingPointError as error:
            failed[part] = str(error)
          except storage.Damaged as error:
            checkpointing.print_once(f"{error}: set aside, and done again")
            left += [dense, part]
      if left == waiting:
        wait(len(left), shared.workdir, signals)
      waiting = left
  return failed


_printed: set[str] = set()


def wait(parts: int, workdir: storage.epath.Path, signals: StopSignals) -> None:
  """Gives other processes time; obeys a signal.

  Raises:
    Stopped: one came.
  """
  sentence = f"waiting for other processes in {workdir}"
  if sentence not in _printed:
    _printed.add(sentence)
    checkpointing.print_once(f"{sentence}, which work on the last parts ({parts} left)")
  time.sleep(WAIT)
  if signals.noted is not None:
    raise Stopped(signals.noted)


def show(shared: Comparison, results: dict[str, Any]) -> None:
  """Prints the table of the last phases, writes the report, and says where all lies."""
  cells = results["cells"]
  if not cells:
    return
  header = comparison.HEADER
  if comparison.has_ood(cells):
    header += comparison.OOD_HEADER
  console = terminal()
  console.print(
    tables.console_table(comparison.table(cells), comparison.caption(results), header)
  )
  for cell in cells:
    where = f"{100 * cell['goal_sparsity']:g} %, m = {cell['ingredients']}"
    for note in tables.notes(cell["seeds"]):
      print_line(console, f"{where}: {note}", "bold red")
  write_report([shared.workdir])
  print_line(
    console,
    f"Took {clock(results['seconds'])}, all parts together. Results, report, parts "
    f"and their soups: {shared.workdir}",
  )


if __name__ == "__main__":
  run_with_flags(main)
