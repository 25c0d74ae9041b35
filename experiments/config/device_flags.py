"""Flags that say where a run computes and how fast, not what."""

import dataclasses
import re
from typing import Any

from jaxsms.convolution import CHOICES

from .fields import at_least, define_flags, ensure, flag, one_of

MESHES = ("auto", "none")
PRECISIONS = ("auto", "float32", "bfloat16")
MEASURE = "measure"
MOST_GIVEN = 256  # each costs threads and memory before anything runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceFlags:
  """Where a run computes."""

  mesh: str = flag(
    "Devices along the copies x devices along the batch of one copy, such as 4x2. none "
    "means one device; auto chooses by the number of copies.",
    ensure(
      lambda value: value in MESHES or re.fullmatch(r"[1-9]\d*x[1-9]\d*", value),
      "give devices along copies x devices along the batch, such as 4x2, or auto, or none",
    ),
    default="auto",
  )
  cpu_devices: int | None = flag(
    "Devices that a CPU is divided into, to run copies or parts of a batch side by "
    "side. Default: one for each core, at most 8; one for the mlp.",
    at_least(1),
    ensure(
      lambda value: value <= MOST_GIVEN,
      f"give at most {MOST_GIVEN}; more than there are cores gain nothing",
    ),
  )
  ingredients_at_once: int | None = flag(
    "Copies that one device trains at the same time; groups of this size follow one "
    "another. Default: all; on a CPU 1, except for small networks without "
    "convolutions.",
    at_least(1),
  )
  precision: str = flag(
    "Precision of activations: float32 or bfloat16 (parameters stay float32). auto: "
    "bfloat16 on TPUs and on GPUs that support it (compute capability 8), else "
    "float32.",
    one_of("precision", PRECISIONS),
    default="auto",
  )
  convolution: str = flag(
    f"How convolutions of several copies run: {', '.join(CHOICES)}, or measure, which "
    "tries them and keeps the fastest for the run. auto: loop on CPU, else grouped.",
    one_of("convolution", (*CHOICES, MEASURE)),
    default="auto",
  )
  remat: bool = flag(
    "Recomputes blocks of the network in the backward pass: less memory, more time.",
    default=False,
  )
  micro_batches: int = flag(
    "Parts of a batch whose gradients are accumulated: less memory. Batch normalization "
    "sees one part at a time.",
    at_least(1),
    default=1,
  )
  split_params: bool = flag(
    "Splits each copy's parameters over the data axis of --mesh: for large networks.",
    default=False,
  )
  coordinator: str | None = flag(
    "host:port of the first process, in a run of several processes; 'auto' where the "
    "cluster provides it (Cloud TPU, Slurm, Open MPI, Kubernetes)."
  )
  processes: int | None = flag("How many processes there are, with --coordinator.")
  process: int | None = flag("Which of the --processes this one is, from 0.")

  @property
  def data_devices(self) -> int:
    """Devices along the batch of a copy, as far as --mesh says."""
    return 1 if self.mesh in MESHES else int(self.mesh.split("x")[1])


define_flags(DeviceFlags)


def check(config: Any, copies: int) -> None:
  """Raises ValueError where devices do not fit one another, the network or the copies.

  Args:
    config: with the `model`.
    copies: m.
  """
  if config.model == "mlp":
    for name, nothing in (("convolution", "auto"), ("remat", False)):
      if getattr(config, name) != nothing:
        raise ValueError(
          f"--{name} is {getattr(config, name)}: the mlp makes no use of it, leave it out"
        )
  if config.split_params and config.data_devices == 1:
    raise ValueError(
      "--split_params needs a mesh with a data axis: give one such as --mesh=1x4"
    )
  processes, process = config.processes, config.process
  if config.coordinator in (None, "auto"):
    if (processes, process) != (None, None):
      raise ValueError("--processes and --process go with --coordinator=host:port")
    return
  if processes is None or process is None or not 0 <= process < processes:
    raise ValueError(
      f"--coordinator needs --processes and --process, from 0 to below it: they are "
      f"{processes} and {process}"
    )
  check_process_count(config, processes, copies)


def check_process_count(config: DeviceFlags, processes: int, copies: int) -> None:
  """Raises ValueError where there are more processes than shards of the work."""
  shards = copies * config.data_devices
  if processes > shards:
    raise ValueError(
      f"{processes} processes for {copies} copies x {config.data_devices} shards of the "
      f"batch: start at most {shards}, or give a --mesh with a longer data axis"
    )
