"""Trains a dense model, makes a sparse soup of it, and compares that with IMP.

python -m experiments.sms
python -m experiments.sms --dataset=cifar10 --data_dir=DIR --model=resnet20

The flags by subject; below each in full, by name. Without any, a small network is trained
on handwritten digits, in about a minute.

The run       workdir, seed, seeds; save_minutes, keep_checkpoints, chunk_steps,
              tensorboard, allow_other_version
The data      dataset, data_dir, cache_dir, augmentation; stream, image_size
The network   model, init; hidden, dropout, width, widening, stem
Dense model   epochs, batch_size, learning_rate, pretrain_schedule, warmup_epochs, end_lr,
              decay, step_epochs, milestones, momentum, weight_decay
The soup      ingredients, phases, goal_sparsity, retrain_epochs, retrain_schedule,
              merge; vary, values
Pruning       criterion, scope, budget, shrink, n_m_group
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

from jaxsms.disk import storage

from . import methods, reporting
from .config import keeping_flags, run_config
from .report import write_report
from .run import keeping, run_directory, running, tuning
from .run.environment import environment
from .run.flag_files import refusals, run_with_flags
from .run.latency import inference
from .run.progress import RunProgress, clock
from .run.signals import Stopped, StopSignals
from .run.task import Task, make_task
from .run.terminal import say, terminal

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
        keeping.tell(f"{workdir} holds this run, finished: nothing is left to do")
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
      keeping.tell(sentence)

  with early_end(task, keeper):
    shown = RunProgress(
      dict(keeper.steps_left),
      quiet=not run_directory.is_writer(),
      model_steps=methods.model_steps(task),
    )
    with keeper, signals, shown as progress:
      listener = running.Listener(progress, keeper, task.steps_per_epoch)
      results = write_results(task, keeper)
      while len(keeper.seeds) < config.seeds:  # dense model, then method after method
        keeper.finish_seed(running.run_seed(task, names, listener))
        results = write_results(task, keeper)
      if run_directory.is_writer():
        measured = inference(task, workdir, keeper.seeds[-1]["seed"])
        results = write_results(task, keeper, inference=measured)
    show(workdir, results)


def write_results(task: Task, keeper: keeping.Keeper, **more: Any) -> dict[str, Any]:
  """Writes results.json, once a seed is finished; gives what it holds."""
  results = running.results_of(task, keeper) | more
  if keeper.seeds:
    results["summary"] = reporting.summarize(keeper.seeds)
    keeper.check()
    run_directory.write_results(keeper.workdir, results)
  return results


@contextlib.contextmanager
def early_end(task: Task, keeper: keeping.Keeper) -> Iterator[None]:
  """Ends a run that cannot go on: shows what it has, says why, and how it goes on."""
  try:
    yield
    return
  except (FloatingPointError, MemoryError, OSError) as error:
    why, status = f"error: {keeper.moved() or error}", 1
  except Stopped as error:
    why, status = str(error), error.status
  except KeyboardInterrupt:
    why, status = "interrupted", 130
  done, of = len(keeper.seeds), keeper.config.seeds
  where = f"{done} of {of} seeds finished" if done else "no seed finished"
  if done < of:
    where += f"; in {keeper.work.position()}"
  if not keeper.moved():
    if done:
      with contextlib.suppress(OSError):  # such as a full disk
        show(keeper.workdir, running.results_of(task, keeper))
    where += f"; the same flags with --workdir={keeper.workdir} go on from what is saved"
  print(f"{why} ({where})", file=sys.stderr)
  sys.exit(status)


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
