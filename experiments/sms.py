"""Trains a dense model, makes a sparse soup of it, and compares that with IMP.

python -m experiments.sms
python -m experiments.sms --dataset=cifar10 --data_dir=DIR --model=resnet20

The flags by subject; below each in full, by name. Without any, a small network is trained
on handwritten digits, in about a minute.

The run       workdir, seed, seeds; save_minutes, keep_checkpoints, chunk_steps, tensorboard
The data      dataset, data_dir, cache_dir, augmentation; stream, image_size
The network   model, init; hidden, dropout, width, widening, stem
Dense model   epochs, batch_size, learning_rate, pretrain_schedule, warmup_epochs, end_lr,
              decay, step_epochs, milestones, momentum, weight_decay
The soup      ingredients, phases, goal_sparsity, retrain_epochs, retrain_schedule,
              merge; vary, values
Pruning       criterion, scope, n_m_group
Comparison    baselines; budget_epochs, fixed_after, mask_steps, rewind_epochs
Measuring     ood, ood_severities, train_metrics, landscape
Devices       precision, convolution, mesh, cpu_devices, ingredients_at_once, remat,
              micro_batches, split_params; coordinator, processes, process
"""

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments import keeping, methods, reporting, run_directory, running, tuning
from experiments.config import keeping_flags, run_config
from experiments.environment import environment
from experiments.flag_files import refusals, run_with_flags
from experiments.inference import inference
from experiments.progress import RunProgress, clock
from experiments.report import write_report
from experiments.signals import Stopped, StopSignals
from experiments.task import Task, make_task
from experiments.terminal import say, terminal
from jaxsms import storage

for module in (run_config, keeping_flags):
  flags.adopt_module_key_flags(module)


def main(argv: list[str]) -> None:
  """Runs what the flags say; bad input ends it with one sentence and exit status 2."""
  with refusals():
    config, dataset = running.start(argv)
    workdir = running.workdir(config)
    run = run_directory.read_run(workdir)
    defining = run_directory.defining(config, dataset)
    if run:
      run_directory.check_same(workdir, run, defining)
      finished = run_directory.read_results(workdir)
      if finished and finished.get("finished"):
        keeping.say(f"{workdir} holds this run, finished: nothing is left to do")
        with contextlib.suppress(OSError):  # a folder that is read-only by now
          show(workdir, finished)
        return
    lowering = run["flags"].get("convolution") if run else None
    config = tuning.measured(config, dataset, lowering)
    task = make_task(config, dataset)

    names, signals = methods.names_of(config), StopSignals()
    run = run or {
      "flags": config.flags(), "defining": defining, "environment": environment()
    }  # fmt: skip
    keeper = keeping.Keeper(workdir, run, config, signals)
    plan = methods.planned_work(config, task.steps_per_epoch, names)
    for sentence in keeper.open(task, plan):
      keeping.say(sentence)

  with early_end(config, task, keeper, workdir):
    shown = RunProgress(
      dict(keeper.steps_left),
      quiet=not run_directory.is_writer(),
      model_steps=methods.model_steps(task),
    )
    with keeper, signals, shown as progress:
      listener = running.Listener(progress, keeper, workdir, config, task.steps_per_epoch)
      write_results(config, task, keeper, workdir)
      while len(keeper.seeds) < config.seeds:  # dense model, then method after method
        entry = running.run_seed(task, config, names, listener, keeper.work)
        keeper.finish_seed(entry)
        write_results(config, task, keeper, workdir)
      results = results_of(config, task, keeper, workdir)
      if run_directory.is_writer():
        results["inference"] = inference(task, workdir, keeper.seeds[-1]["seed"])
        run_directory.write_results(workdir, results)
    show(workdir, results)


def results_of(
  config: run_config.Config, task: Task, keeper: keeping.Keeper, workdir: storage.epath.Path
) -> dict[str, Any]:
  """What results.json holds of the seeds that are finished."""
  return {
    "flags": {**config.flags(), "workdir": str(workdir)},
    "environment": environment(),
    "environments": keeper.environments,
    "ood_sources": task.ood_sources,
    "seeds": keeper.seeds,
    "summary": reporting.summarize(keeper.seeds),
    "seconds": keeper.seconds(),
    "finished": len(keeper.seeds) == config.seeds,
  }


def write_results(
  config: run_config.Config, task: Task, keeper: keeping.Keeper, workdir: storage.epath.Path
) -> None:
  """Writes results.json, once a seed is finished."""
  if keeper.seeds:
    keeper.check()
    run_directory.write_results(workdir, results_of(config, task, keeper, workdir))


@contextlib.contextmanager
def early_end(
  config: run_config.Config, task: Task, keeper: keeping.Keeper, workdir: storage.epath.Path
) -> Iterator[None]:
  """Ends a run that cannot go on: shows what it has, says why, and how it goes on."""
  try:
    yield
    return
  except (FloatingPointError, MemoryError, OSError) as error:
    why, status = f"error: {error}", 1
  except Stopped as error:
    why, status = str(error), error.status
  except KeyboardInterrupt:
    why, status = "interrupted", 130
  if keeper.seeds and keeper.is_there():
    with contextlib.suppress(OSError):  # such as a full disk
      show(workdir, results_of(config, task, keeper, workdir))
  print(f"{why} ({where_it_stands(config, keeper, workdir)})", file=sys.stderr)
  sys.exit(status)


def where_it_stands(
  config: run_config.Config, keeper: keeping.Keeper, workdir: storage.epath.Path
) -> str:
  """How far a run has come that ends early, and how it goes on."""
  done = len(keeper.seeds)
  what = f"{done} of {config.seeds} seeds finished" if done else "no seed finished"
  if done < config.seeds:
    what += f"; in {keeper.work.position()}"
  if not keeper.is_there():
    return what
  return f"{what}; the same flags with --workdir={workdir} go on from what is saved"


def show(workdir: storage.epath.Path, results: dict) -> None:
  """Prints the table, draws figures and report, and says where the rest lies."""
  if not run_directory.is_writer():
    return
  console = terminal()
  summary = reporting.summarize(results["seeds"])
  tables = reporting.rows(summary, results["flags"]["ingredients"])
  console.print(reporting.console_table(tables, reporting.caption(results)))
  for note in reporting.notes(results["seeds"]):
    say(console, note, "bold red")
  with tempfile.TemporaryDirectory() as folder:
    for ending in ("png", "svg"):
      name = f"accuracy.{ending}"
      reporting.accuracy_figure(results, os.path.join(folder, name))
      storage.write_bytes(workdir / name, pathlib.Path(folder, name).read_bytes())
  write_report([workdir])
  say(
    console,
    f"Took {clock(results['seconds'])}. Results, soup, metrics and report: {workdir}",
  )


if __name__ == "__main__":
  run_with_flags(main)
