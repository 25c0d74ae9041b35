"""Trains a dense model, makes a sparse soup of it, and compares that with IMP.

python -m experiments.sms
python -m experiments.sms --dataset=cifar10 --data_dir=... --model=resnet8
"""

import importlib.util
import os
import sys
import time

import numpy as np
from absl import app, flags, logging
from rich.console import Console

from experiments import (
  hardware,
  method_flags,
  methods,
  pretraining_flags,
  run_directory,
  settings,
  tuning,
)
from experiments.progress import RunProgress, clock
from experiments.retraining import Observer
from experiments.task import load, make_task
from jaxsms import report

for module in (settings, pretraining_flags, method_flags, hardware):
  flags.adopt_module_key_flags(module)


def main(argv: list[str]) -> None:
  """Runs what the flags say; bad input ends it with one sentence and exit status 2."""
  if not settings.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  started = time.monotonic()
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
    devices = hardware.read_hardware(chosen.model, chosen.ingredients)
    hardware.start(devices, chosen.model, chosen.ingredients)
    dataset = load(chosen)
    chosen = settings.with_data(chosen, dataset)
    devices = tuning.measured(chosen, devices, method, dataset)
    task = make_task(chosen, devices, method, dataset)
    run_flags = {**chosen._asdict(), **method._asdict(), **devices._asdict()}
    workdir = run_directory.create(
      settings.FLAGS.workdir or os.path.join("runs", time.strftime("%Y%m%d-%H%M%S")),
      settings.flagfile(run_flags),
    )
  except (ValueError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

  results = {
    "flags": {**run_flags, "workdir": workdir},
    "environment": run_directory.environment(),
    "ood_sources": task.ood_sources,
    "seeds": [],
  }
  stopped, status = None, 0
  plan = methods.planned_steps(chosen, method, task.steps_per_epoch)
  try:
    with RunProgress(plan, quiet=not run_directory.is_writer()) as progress:
      for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        observer = make_observer(progress, workdir, chosen, task.steps_per_epoch, seed)
        results["seeds"].append(methods.run_seed(chosen, task, seed, observer))
        results["summary"] = report.summarize(results["seeds"])
        results["seconds"] = time.monotonic() - started
        run_directory.write_results(workdir, results)
  except (FloatingPointError, MemoryError) as error:
    stopped, status = f"error: {error}", 1
  except KeyboardInterrupt:
    stopped, status = "interrupted", 130

  if results["seeds"] and run_directory.is_writer():
    for ending in ("png", "svg"):
      report.accuracy_figure(results, os.path.join(workdir, f"accuracy.{ending}"))
    show(Console(), results)
  if stopped:
    done = len(results["seeds"])
    what = f"{done} of {chosen.seeds} seeds finished" if done else "no seed finished"
    print(f"{stopped} ({what}; {workdir} holds what there is)", file=sys.stderr)
    sys.exit(status)


def make_observer(
  progress: RunProgress,
  workdir: str,
  chosen: settings.Settings,
  steps_per_epoch: int,
  seed: int,
) -> Observer:
  """Shows each chunk of training, and writes a line for every epoch and every phase."""
  epoch: dict[str, list] = {"loss": [], "accuracy": [], "taken": []}
  titles = {"dense": "dense", "sms": "SMS"} | {
    name: report.method_title(name, chosen.ingredients) for name in settings.BASELINES
  }

  def on_chunk(method, phase, chunk):
    epochs = -(-chunk.steps // steps_per_epoch)
    title = f"seed {seed}  {titles[method]}"
    title += f" phase {phase}/{chosen.phases}" if phase else ""
    progress.chunk(title, epochs, chunk)
    epoch["loss"].append(chunk.loss)
    epoch["accuracy"].append(chunk.accuracy)
    epoch["taken"].append(chunk.taken)
    if chunk.step % steps_per_epoch == 0 or chunk.step == chunk.steps:
      loss, accuracy = (
        np.average(epoch[name], axis=0, weights=epoch["taken"])
        for name in ("loss", "accuracy")
      )
      line = {"seed": seed, "method": method, "phase": phase, "epoch": chunk.epoch}
      line |= {"step": chunk.step, "loss": loss, "accuracy": accuracy}
      line["learning_rate"] = chunk.learning_rate
      run_directory.append_metrics(workdir, line)
      for values in epoch.values():
        values.clear()

  def on_phase(method, record):
    line = {"seed": seed, "method": method, "phase": record.get("phase", 0)}
    run_directory.append_metrics(workdir, {**line, "evaluation": record})

  def on_soup(soup):
    run_directory.save_soup(workdir, seed, soup)

  return Observer(on_chunk, on_phase, on_soup)


def show(console: Console, results: dict) -> None:
  """Prints the table and where the rest lies."""
  m = results["flags"]["ingredients"]
  tables = report.rows(results["summary"], m)
  console.print(report.console_table(tables, report.caption(results)))
  workdir = results["flags"]["workdir"]
  console.print(
    f"Took {clock(results['seconds'])}. Results, soup, metrics and figure: {workdir}",
    highlight=False,
    soft_wrap=True,
  )


if __name__ == "__main__":
  app.run(main)
