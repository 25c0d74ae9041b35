"""Times training steps of m copies of a network at once, beside PyTorch where it is.

python -m experiments.bench
python -m experiments.bench --dataset=cifar10 --model=resnet20 --copies=1,2,4,8
"""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from absl import flags

from .benchmarks import bench_jax, bench_settings, bench_tables, usual_networks
from .benchmarks.bench_figures import write_figures
from .benchmarks.bench_settings import TORCH_MODELS, Config, read_config
from .config import device_flags
from .config.fields import define_flags
from .costs.timing import (
  ROUND_SECONDS,
  Contender,
  Spread,
  alternate,
  calls_for,
  cores,
  ratio,
  scaled,
  seconds,
)
from .run.environment import environment
from .run.flag_files import check_no_arguments, refusals, run_with_flags, set_log_level
from .run.terminal import terminal
from .setup import hardware


def main(argv: list[str], given: flags.FlagValues = flags.FLAGS) -> None:
  """Times what the flags say; bad input ends it with one sentence and exit status 2."""
  set_log_level()
  with refusals():
    check_no_arguments(argv)
    config = read_config(given)
    if config.torch != "none":  # both frameworks need memory of a GPU
      os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    hardware.start(config, max(config.copies))
    kinds, note = torch_kinds(config)
    with bench_jax.fresh_compilation():
      task = make_task(config)
      results = measure(config, task, kinds, [note] if note else [])
  write_figures(config.json, results)
  bench_tables.show(terminal(), results)


def make_task(config: Config) -> bench_jax.Task:
  """Network, data and programs that the flags describe.

  Raises:
    ValueError: network, images and devices do not fit one another.
  """
  if config.convolution == device_flags.MEASURE:
    raise ValueError(
      "--convolution=measure belongs to the main job: give one lowering at a time here"
    )
  task = usual_networks.make_task(
    config,
    usual_networks.make_network(config, config.hidden),
    config.image,
    max(config.copies),
    examples=config.examples,
    augmentation=config.augmentation,
  )
  for m in config.copies:  # refused here where a batch does not split over the mesh
    task.programs.train.on(task.programs.mesh_of(m), m)
  return task


def torch_kinds(config: Config) -> tuple[tuple[str, ...], str | None]:
  """What of PyTorch takes part, and why nothing does where it was not forbidden.

  Raises:
    ImportError: it was asked for and is not installed.
    ValueError: it was asked for and cannot do this work.
  """
  if config.torch == "none":
    return (), None
  obstacle: Exception | None = None
  if not importlib.util.find_spec("torch"):
    obstacle = ImportError(
      "PyTorch is not installed: run `pip install -e '.[bench]'` to compare with it"
    )
  elif config.model not in TORCH_MODELS:
    obstacle = ValueError(
      f"--model={config.model} is not there in PyTorch: give {', '.join(TORCH_MODELS)} to "
      "compare with it"
    )
  elif jax.default_backend() != "cpu":
    import torch

    if not torch.cuda.is_available():
      kind = jax.devices()[0].device_kind
      obstacle = ValueError(f"PyTorch finds no {kind}: --torch=none leaves it out")
  if obstacle is None:
    return (
      ("sequential", "ensemble") if config.torch in (None, "both") else (config.torch,)
    ), None
  if config.torch is not None:
    raise obstacle
  return (), str(obstacle)


def measure(
  config: Config,
  task: bench_jax.Task,
  kinds: tuple[str, ...],
  notes: list[str],
) -> dict[str, Any]:
  """Compiles, warms up and times everything; gives what is written as JSON."""
  bfloat16 = hardware.bfloat16(config.precision)
  precision = "bfloat16" if bfloat16 else "float32"
  peak, peak_source = bench_jax.peak_flops(precision, config.peak_tflops)
  most = bench_jax.most_chunk_steps(task.flops(max(config.copies)), peak, config.steps)
  trainings = {m: bench_jax.Training(task, m, most) for m in config.copies}
  contenders = {("jaxsms", m): our_contender(t, config.steps) for m, t in trainings.items()}
  versions = environment() | {"cores": cores()}
  if kinds:
    from .benchmarks import bench_torch

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    versions |= bench_torch.prepare(device)
    theirs, failures = bench_torch.make_contenders(
      task,
      kinds,
      config.copies,
      augmentation=config.augmentation,
      bfloat16=bfloat16,
      device=device,
      steps=config.steps,
    )
    contenders |= theirs
    notes = notes + failures
  for training in trainings.values():
    training.run(1)  # its state is made anew
  times = alternate(contenders, config.rounds)
  if config.profile:
    with jax.profiler.trace(config.profile):
      trainings[max(config.copies)].run(1)
  return {
    "flags": dataclasses.asdict(config) | {"precision": precision},
    "environment": versions,
    "work": {
      "parameters": sum(x.size for x in jax.tree.leaves(task.params)),
      "multiply_adds": task.multiply_adds,
      "steps_per_epoch": task.steps_per_epoch,
      "peak_flops": peak,
      "peak_source": peak_source,
    },
    "copies": [
      row(task, training, contenders, times, peak) for training in trainings.values()
    ],
    "notes": notes,
  }


def our_contender(training: bench_jax.Training, steps: int | None) -> Contender:
  """Compiles and warms a training up, and chooses how long a round is."""
  training.run(1)
  memory, memory_source = training.memory()
  chunk_seconds = seconds(lambda: training.run(1))
  training.stop()
  chunks = calls_for(ROUND_SECONDS, chunk_seconds)
  if steps:
    chunks = -(-steps // training.chunk_steps)
  facts = {
    "devices": training.devices,
    "mesh": dict(training.mesh.shape) if training.mesh else None,
    "chunk_steps": training.chunk_steps,
    "steps_per_round": chunks * training.chunk_steps,
    "trace_seconds": training.train.trace_seconds,
    "compile_seconds": training.train.compile_seconds,
    "peak_bytes": memory,
    "peak_bytes_source": memory_source,
  }
  return Contender(lambda: training.run(chunks), chunks * training.steps_per_chunk, facts)


def row(
  task: bench_jax.Task,
  training: bench_jax.Training,
  contenders: dict[tuple[str, int], Contender],
  times: dict[tuple[str, int], Spread],
  peak: float | None,
) -> dict[str, Any]:
  """What is reported of one number of copies."""
  m, ours = training.copies, times["jaxsms", training.copies]
  flops, images = task.flops(m), m * task.programs.batch_size
  alone = times.get(("jaxsms", 1))
  # On CPU the peak is that of all cores, whatever devices are made of them.
  devices = 1 if jax.default_backend() == "cpu" else training.devices
  peers = {}
  for kind, at_once in (("eager", 1), ("compiled", 1), ("ensemble", m)):
    theirs = times.get((kind, at_once))
    if theirs is None:
      continue
    step = scaled(theirs, m // at_once)  # those that are one copy take m turns
    peers[kind] = {
      **contenders[kind, at_once].facts,
      "step_seconds": step._asdict(),
      "speed_of_jaxsms": ratio(step, ours)._asdict(),
    }
  return {
    "copies": m,
    **contenders["jaxsms", m].facts,
    "step_seconds": ours._asdict(),
    "epoch_seconds": scaled(ours, task.steps_per_epoch)._asdict(),
    "together_over_one_after_another": alone and ratio(ours, alone, 1 / m)._asdict(),
    "images_per_second": images / ours.median,
    "flops_per_step": flops,
    "utilisation": peak and flops / ours.median / (peak * devices),
    "torch": peers,
  }


if __name__ == "__main__":
  define_flags(bench_settings.Config)  # by the binary alone: others have some of them
  flags.adopt_module_key_flags(device_flags)
  run_with_flags(main)
