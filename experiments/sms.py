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

from absl import flags

from experiments import (
  keeping,
  methods,
  reporting,
  run_directory,
  running,
  settings,
  tuning,
)
from experiments.environment import environment
from experiments.flag_files import run_with_flags
from experiments.inference import inference
from experiments.progress import RunProgress, clock
from experiments.report import write_report
from experiments.signals import Stopped, StopSignals
from experiments.task import make_task
from experiments.terminal import say, terminal
from jaxsms import storage

for module in running.FLAG_MODULES:
  flags.adopt_module_key_flags(module)


def main(argv: list[str]) -> None:
  """Runs what the flags say; bad input ends it with one sentence and exit status 2."""
  try:
    job = running.read_job(argv)
    chosen = job.settings
    workdir = running.workdir()
    wanted = run_directory.defining(chosen, job.hardware, job.method, job.dataset)
    run = run_directory.read_run(workdir)
    if run:
      run_directory.check_same(workdir, run, wanted)
      finished = run_directory.read_results(workdir)
      if finished and finished.get("finished"):
        keeping.say(f"{workdir} holds this run, finished: nothing is left to do")
        with contextlib.suppress(OSError):  # a folder that is read-only by now
          show(workdir, finished)
        return
    measured_before = run["flags"].get("convolution") if run else None
    devices = tuning.measured(
      chosen, job.hardware, job.method, job.dataset, measured_before
    )
    job = job._replace(hardware=devices)
    task = make_task(chosen, job.hardware, job.method, job.dataset)

    names, run_flags = methods.names_of(chosen), job.flags()
    versions = environment()
    run = run or {"flags": run_flags, "defining": wanted, "environment": versions}
    signals = StopSignals()
    keeper = keeping.Keeper(workdir, run, job.retention, signals)
    plan = methods.planned_work(chosen, job.method, task.steps_per_epoch, names)
    for sentence in keeper.open(chosen, task, settings.flagfile(run_flags), plan):
      keeping.say(sentence)
  except (ValueError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

  results = {
    "flags": {**run_flags, "workdir": str(workdir)},
    "environment": versions,
    "environments": keeper.environments,
    "ood_sources": task.ood_sources,
    "seeds": keeper.seeds,
  }

  def write_results():
    if keeper.seeds:
      keeper.check()
      results["summary"] = reporting.summarize(keeper.seeds)
      results["seconds"] = keeper.seconds()
      results["finished"] = len(keeper.seeds) == chosen.seeds
      run_directory.write_results(workdir, results)

  stopped, status = None, 0
  try:
    quiet = not run_directory.is_writer()
    shown = RunProgress(
      dict(keeper.steps_left), quiet=quiet, model_steps=methods.model_steps(task)
    )
    with keeper, signals, shown as progress:
      listener = running.Listener(progress, keeper, workdir, chosen, task.steps_per_epoch)
      write_results()
      while len(keeper.seeds) < chosen.seeds:
        entry = running.run_seed(task, chosen, names, listener, keeper.work)
        keeper.finish_seed(entry)
        write_results()
      if run_directory.is_writer():
        results["inference"] = inference(task, workdir, keeper.seeds[-1]["seed"])
        write_results()
    if keeper.seeds:
      show(workdir, results)
  except (FloatingPointError, MemoryError, OSError) as error:
    stopped, status = f"error: {keeper.moved() or error}", 1
  except Stopped as error:
    stopped, status = str(error), error.status
  except KeyboardInterrupt:
    stopped, status = "interrupted", 130
  if stopped:
    if results.get("summary") and not keeper.moved():
      with contextlib.suppress(OSError):  # such as a full disk
        show(workdir, results)
    print(f"{stopped} ({where_it_stands(keeper, chosen, workdir)})", file=sys.stderr)
    sys.exit(status)


def where_it_stands(
  keeper: keeping.Keeper, chosen: settings.Settings, workdir: storage.epath.Path
) -> str:
  """How far a run has come that ends early, and how it goes on."""
  done = len(keeper.seeds)
  what = f"{done} of {chosen.seeds} seeds finished" if done else "no seed finished"
  if done < chosen.seeds:
    what += f"; in {keeper.work.position()}"
  if keeper.moved():
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
