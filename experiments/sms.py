"""Trains a dense model, makes a sparse soup of it, and compares that with IMP.

python -m experiments.sms
python -m experiments.sms --dataset=cifar10 --data_dir=... --model=resnet8
"""

import importlib.util
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
from absl import app, flags, logging
from rich.console import Console

from experiments import (
  hardware,
  keeping,
  method_flags,
  methods,
  pretraining_flags,
  run_directory,
  settings,
  tuning,
)
from experiments.environment import environment
from experiments.progress import RunProgress, clock
from experiments.retraining import Observer
from experiments.signals import Stopped, StopSignals
from experiments.task import load, make_task
from jaxsms import report, storage

for module in (settings, pretraining_flags, method_flags, hardware, keeping):
  flags.adopt_module_key_flags(module)


def main(argv: list[str]) -> None:
  """Runs what the flags say; bad input ends it with one sentence and exit status 2."""
  if not settings.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise ValueError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
    if not importlib.util.find_spec("matplotlib"):  # better missed before training
      raise ImportError(
        "the figure needs matplotlib, which is not installed: run "
        "`pip install -e '.[experiments]'`"
      )

    chosen = settings.read_settings()
    method = method_flags.read_method(chosen)
    retention = keeping.read_retention()
    devices = hardware.read_hardware(chosen.model, chosen.ingredients)
    hardware.start(devices, chosen.model, chosen.ingredients)
    dataset = load(chosen)
    chosen = settings.with_data(chosen, dataset)

    workdir = storage.as_path(
      settings.FLAGS.workdir or os.path.join("runs", time.strftime("%Y%m%d-%H%M%S"))
    )
    wanted = run_directory.defining(chosen, devices, method, dataset)
    run = run_directory.read_run(workdir)
    if run:
      run_directory.check_same(workdir, run, wanted)
      finished = run_directory.read_results(workdir)
      if finished and finished.get("finished"):
        keeping.say(f"{workdir} holds this run, finished: nothing is left to do")
        show(workdir, finished)
        return
    measured_before = run["flags"].get("convolution") if run else None
    devices = tuning.measured(chosen, devices, method, dataset, measured_before)
    task = make_task(chosen, devices, method, dataset)

    run_flags = {**chosen._asdict(), **method._asdict(), **devices._asdict()}
    versions = environment()
    run = run or {"flags": run_flags, "defining": wanted, "environment": versions}
    signals = StopSignals()
    keeper = keeping.Keeper(workdir, run, retention, signals)
    for sentence in keeper.open(chosen, task, settings.flagfile(run_flags)):
      keeping.say(sentence)
  except (ValueError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

  results = {
    "flags": {**run_flags, "workdir": str(workdir)},
    "environment": versions,
    "ood_sources": task.ood_sources,
    "seeds": keeper.seeds,
  }

  def write_results():
    if keeper.seeds:
      results["summary"] = report.summarize(keeper.seeds)
      results["seconds"] = keeper.seconds()
      results["finished"] = len(keeper.seeds) == chosen.seeds
      run_directory.write_results(workdir, results)

  stopped, status = None, 0
  try:
    quiet = not run_directory.is_writer()
    with keeper, signals, RunProgress(keeper.steps_left, quiet=quiet) as progress:
      observer = make_observer(progress, keeper, workdir, chosen, task.steps_per_epoch)
      write_results()
      while len(keeper.seeds) < chosen.seeds:
        keeper.finish_seed(methods.run_seed(chosen, task, keeper.work, observer))
        write_results()
    if keeper.seeds:
      show(workdir, results)
  except (FloatingPointError, MemoryError, OSError) as error:
    stopped, status = f"error: {error}", 1
  except Stopped as error:
    stopped, status = str(error), error.status
  except KeyboardInterrupt:
    stopped, status = "interrupted", 130
  if stopped:
    if results.get("summary"):
      show(workdir, results)
    done = len(keeper.seeds)
    what = f"{done} of {chosen.seeds} seeds finished" if done else "no seed finished"
    print(
      f"{stopped} ({what}; in {keeper.work.position()}; the same flags with "
      f"--workdir={workdir} go on from what is saved)",
      file=sys.stderr,
    )
    sys.exit(status)


def make_observer(
  progress: RunProgress,
  keeper: keeping.Keeper,
  workdir: storage.epath.Path,
  chosen: settings.Settings,
  steps_per_epoch: int,
) -> Observer:
  """Shows each chunk of training, writes a line for every epoch and phase, and saves."""
  epoch = keeper.epoch
  titles = {"dense": "dense", "sms": "SMS"} | {
    name: report.method_title(name, chosen.ingredients) for name in settings.BASELINES
  }

  def on_chunk(method, phase, chunk):
    epochs = -(-chunk.steps // steps_per_epoch)
    title = f"seed {keeper.work.seed}  {titles[method]}"
    title += f" phase {phase}/{chosen.phases}" if phase else ""
    progress.chunk(title, epochs, chunk)
    epoch["loss"].append(chunk.loss)
    epoch["accuracy"].append(chunk.accuracy)
    epoch["taken"].append(chunk.taken)
    if chunk.step * epochs == chunk.epoch * chunk.steps:  # the epoch is complete
      loss, accuracy = (
        np.average(epoch[name], axis=0, weights=epoch["taken"])
        for name in ("loss", "accuracy")
      )
      line = {
        "seed": keeper.work.seed,
        "method": method,
        "phase": phase,
        "epoch": chunk.epoch,
      }
      line |= {"step": chunk.step, "loss": loss, "accuracy": accuracy}
      line["learning_rate"] = chunk.learning_rate
      keeper.append_metrics(line)
      for values in epoch.values():
        values.clear()

  def on_phase(method, record):
    line = {"seed": keeper.work.seed, "method": method, "phase": record.get("phase", 0)}
    keeper.append_metrics({**line, "evaluation": record})

  def on_soup(soup):
    run_directory.save_soup(workdir, keeper.work.seed, soup)

  return Observer(
    on_chunk, on_phase, on_soup, keeper.due, keeper.save, keeper.begin, keeper.pause
  )


def show(workdir: storage.epath.Path, results: dict) -> None:
  """Draws the figures, and prints the table and where the rest lies."""
  if not run_directory.is_writer():
    return
  with tempfile.TemporaryDirectory() as folder:
    for ending in ("png", "svg"):
      name = f"accuracy.{ending}"
      report.accuracy_figure(results, os.path.join(folder, name))
      storage.write_bytes(workdir / name, pathlib.Path(folder, name).read_bytes())
  console = Console()
  tables = report.rows(results["summary"], results["flags"]["ingredients"])
  console.print(report.console_table(tables, report.caption(results)))
  for note in report.notes(results["seeds"]):
    console.print(note, style="bold red", highlight=False, soft_wrap=True)
  console.print(
    f"Took {clock(results['seconds'])}. Results, soup, metrics and figure: {workdir}",
    highlight=False,
    soft_wrap=True,
  )


if __name__ == "__main__":
  app.run(main)
