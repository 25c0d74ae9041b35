"""Trains a dense model, makes a sparse soup of it, and compares that with IMP.

python -m experiments.sms
python -m experiments.sms --dataset=cifar10 --data_dir=... --model=resnet8
"""

import os
import sys
import time

import numpy as np
from absl import app, flags, logging
from rich.console import Console

from experiments import methods, run_directory, settings
from experiments.progress import RunProgress, clock
from jaxsms import data, report

flags.adopt_module_key_flags(settings)

TITLES = {"dense": "dense", "sms": "SMS", "imp": "IMP", "imp_mx": "IMP mx"}


def main(argv: list[str]) -> None:
  """Runs what the flags say; bad input ends it with one sentence and exit status 2."""
  if not settings.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  console = Console()
  started = time.monotonic()
  try:
    if len(argv) > 1:
      raise ValueError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
    chosen = settings.read_settings()
    dataset = data.load(chosen.dataset, chosen.data_dir, chosen.cache_dir)
    task = methods.make_task(chosen, dataset)
    workdir = settings.FLAGS.workdir or os.path.join("runs", time.strftime("%Y%m%d-%H%M%S"))
    run_directory.create(workdir, settings.flagfile(chosen))
  except (ValueError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

  results = {
    "flags": {**chosen._asdict(), "workdir": workdir},
    "environment": run_directory.environment(),
    "seeds": [],
  }
  plan = methods.planned_steps(chosen, task.steps_per_epoch)
  try:
    with RunProgress(plan) as progress:
      for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        on_chunk = make_on_chunk(progress, workdir, chosen, seed)
        entry, soup = methods.run_seed(chosen, task, seed, on_chunk)
        results["seeds"].append(entry)
        run_directory.save_soup(workdir, seed, soup)
        results["summary"] = report.summarize(results["seeds"])
        results["seconds"] = time.monotonic() - started
        run_directory.write_results(workdir, results)
  except FloatingPointError as error:
    print(f"error: {error} (seeds that finished are in {workdir})", file=sys.stderr)
    sys.exit(1)

  for ending in ("png", "svg"):
    report.accuracy_figure(results, os.path.join(workdir, f"accuracy.{ending}"))
  show(console, results)


def make_on_chunk(
  progress: RunProgress, workdir: str, chosen: settings.Settings, seed: int
):
  """A function that shows each chunk of training, and writes one line per epoch."""
  epoch: dict[str, list] = {"loss": [], "accuracy": [], "taken": []}

  def on_chunk(method, phase, chunk):
    epochs = chosen.retrain_epochs if phase else chosen.epochs
    epochs *= chosen.ingredients if method == "imp_mx" else 1
    title = f"seed {seed}  {TITLES[method]}" + (
      f" phase {phase}/{chosen.phases}" if phase else ""
    )
    progress.chunk(title, epochs, chunk)
    epoch["loss"].append(chunk.loss)
    epoch["accuracy"].append(chunk.accuracy)
    epoch["taken"].append(chunk.taken)
    if chunk.step * epochs == chunk.epoch * chunk.steps:  # the epoch is complete
      loss, accuracy = (
        np.average(epoch[name], axis=0, weights=epoch["taken"])
        for name in ("loss", "accuracy")
      )
      run_directory.append_metrics(
        workdir,
        {
          "seed": seed,
          "method": method,
          "phase": phase,
          "epoch": chunk.epoch,
          "step": chunk.step,
          "loss": loss,
          "accuracy": accuracy,
          "learning_rate": chunk.learning_rate,
        },
      )
      for values in epoch.values():
        values.clear()

  return on_chunk


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
