"""Trains a dense model, makes a sparse soup of it, and compares that with IMP.

python -m experiments.sms
python -m experiments.sms --dataset=cifar10 --data_dir=DIR --model=resnet20

The flags by subject; below each in full, by name. Without any, a small network is trained
on handwritten digits, in about a minute.

The run       workdir, seed, seeds; save_minutes, keep_checkpoints, chunk_steps,
              save_candidates, tensorboard, allow_other_version
The data      dataset, data_dir, cache_dir, augmentation, imbalance; stream, image_size
The network   model, init; hidden, dropout, width, widening, stem
Dense model   epochs, batch_size, learning_rate, pretrain_schedule, warmup_epochs, end_lr,
              decay, step_epochs, milestones, momentum, weight_decay
The soup      ingredients, phases, goal_sparsity, phase_sparsities, retrain_epochs,
              retrain_schedule, merge; vary, values, ranges, rungs; average, ema_decay,
              average_from, average_every; subsets, subset_fraction, subset_alpha,
              retained, logit_adjustment
Pruning       criterion, scope, budget, round_to, shrink, n_m_group
Comparison    baselines; budget_epochs, fixed_after, mask_steps, rewind_epochs;
              distill_epochs, temperature
Measuring     ood, ood_severities, train_metrics, landscape
Devices       precision, convolution, mesh, cpu_devices, ingredients_at_once, remat,
              micro_batches, split_params; coordinator, processes, process
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from jaxsms.disk import storage

from . import methods
from .config import keeping_flags, run_config
from .report import write_report
from .reporting import figures, statistics, tables
from .run import checkpointing, run_directory, running
from .run.environment import environment
from .run.flag_files import refusals, run_with_flags
from .run.network_costs import inference
from .run.progress import RunProgress, clock
from .run.signals import Stopped, StopSignals
from .run.terminal import print_line, terminal
from .setup import tuning
from .setup.hardware import in_flags
from .setup.task import Task, make_task

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
        checkpointing.print_once(
          f"{workdir} holds this run, finished: nothing is left to do"
        )
        with contextlib.suppress(OSError):  # a folder that is read-only by now
          show(workdir, finished)
        return
    lowering = run["flags"].get("convolution") if run else None
    config = tuning.with_fastest_lowering(config, dataset, lowering)
    task = make_task(config, dataset)
    if task.clock is not None and not run:
      task.clock.check(config.goal_sparsity)

    names, signals = methods.names_of(config), StopSignals()
    run = run or {
      "flags": config.flags(), "defining": defining, "environment": environment()
    }  # fmt: skip
    checkpointer = checkpointing.Checkpointer(workdir, run, config, signals)
    plan = methods.planned_work(config, task.steps_per_epoch, names)
    for sentence in checkpointer.open(task, plan):
      checkpointing.print_once(sentence)

  with early_end(task, checkpointer):
    shown = RunProgress(
      dict(checkpointer.steps_left),
      quiet=not run_directory.is_writer(),
      model_steps=methods.model_steps(task),
    )
    with checkpointer, signals, shown as progress:
      listener = running.Listener(progress, checkpointer, task.steps_per_epoch)
      results = write_results(task, checkpointer)
      while len(checkpointer.seeds) < config.seeds:  # dense model, then method after method
        checkpointer.finish_seed(running.run_seed(task, names, listener))
        results = write_results(task, checkpointer)
      if run_directory.is_writer():
        measured = inference(task, workdir, checkpointer.seeds[-1]["seed"])
        results = write_results(task, checkpointer, inference=measured)
    show(workdir, results)


def write_results(
  task: Task, checkpointer: checkpointing.Checkpointer, **more: Any
) -> dict[str, Any]:
  """Writes results.json, once a seed is finished; gives what it holds."""
  results = running.results_of(task, checkpointer) | more
  if checkpointer.seeds:
    results["summary"] = statistics.summarize(checkpointer.seeds)
    checkpointer.check()
    run_directory.write_results(checkpointer.workdir, results)
  return results


@contextlib.contextmanager
def early_end(task: Task, checkpointer: checkpointing.Checkpointer) -> Iterator[None]:
  """Ends a run that cannot go on: shows what it has, says why, and how it goes on."""
  try:
    yield
    return
  except (FloatingPointError, MemoryError, OSError) as error:
    why, status = f"error: {checkpointer.moved() or in_flags(error)}", 1
  except Stopped as error:
    why, status = str(error), error.status
  except KeyboardInterrupt:
    why, status = "interrupted", 130
  done, of = len(checkpointer.seeds), checkpointer.config.seeds
  where = f"{done} of {of} seeds finished" if done else "no seed finished"
  if done < of:
    where += f"; in {checkpointer.seed_state.position()}"
  if not checkpointer.moved():
    if done:
      with contextlib.suppress(OSError):  # such as a full disk
        show(checkpointer.workdir, running.results_of(task, checkpointer))
    where += (
      f"; the same flags with --workdir={checkpointer.workdir} go on from what is saved"
    )
  print(f"{why} ({where})", file=sys.stderr)
  sys.exit(status)


def show(workdir: storage.epath.Path, results: dict) -> None:
  """Prints the table, draws figures and report, and says where the rest lies."""
  if not run_directory.is_writer():
    return
  console = terminal()
  summary = statistics.summarize(results["seeds"])
  rows = tables.rows(summary, results["flags"]["ingredients"])
  console.print(tables.console_table(rows, tables.caption(results)))
  for note in tables.notes(results["seeds"]):
    print_line(console, note, "bold red")
  for ending in ("png", "svg"):
    figures.accuracy_figure(results, workdir / f"accuracy.{ending}")
  write_report([workdir])
  print_line(
    console,
    f"Took {clock(results['seconds'])}. Results, soup, metrics and report: {workdir}",
  )


if __name__ == "__main__":
  run_with_flags(main)
