"""Flags that say where a run computes and how fast, not what; and what they lead to."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from jaxsms import fit_mesh, make_mesh
from jaxsms.convolution import CHOICES, conv_general_dilated
from jaxsms.names import check_name
from jaxsms.training.programs import check_batch

FLAGS = flags.FLAGS
MESHES = ("auto", "none")
PRECISIONS = ("auto", "float32", "bfloat16")
MEASURE = "measure"
MOST_CPU_DEVICES = 8
MOST_GIVEN = 256  # each costs threads and memory before anything runs
CACHED_PARAMETERS = 100_000  # with their momentum and gradients, 1.2 MB


def define_flags(to: flags.FlagValues = FLAGS) -> None:
  """Defines the flags of this file."""
  flags.DEFINE_string(
    "mesh",
    "auto",
    "Devices along the copies and along the batch of one copy, such as 4x2; none for one "
    "device; auto fits the number of copies.",
    flag_values=to,
  )
  flags.DEFINE_integer(
    "cpu_devices",
    None,
    "Devices that a CPU is divided into, for copies, or parts of a batch, side by side. "
    "Default: one for each core, at most 8; one for the mlp.",
    flag_values=to,
  )
  flags.DEFINE_integer(
    "ingredients_at_once",
    None,
    "Copies that one device trains at the same time; groups of so many follow one another. "
    "Default: all; on a CPU 1, but for small networks without convolutions.",
    flag_values=to,
  )
  flags.DEFINE_string(
    "precision",
    "auto",
    "Of activations: float32 or bfloat16 (parameters stay float32). auto: bfloat16 on TPUs "
    "and on GPUs that have it (compute capability 8), else float32.",
    flag_values=to,
  )
  flags.DEFINE_string(
    "convolution",
    "auto",
    f"How convolutions of several copies run: {', '.join(CHOICES)}, or measure, which "
    "tries them and keeps the fastest for the run. auto: loop on CPU, else grouped.",
    flag_values=to,
  )
  flags.DEFINE_boolean(
    "remat",
    False,
    "Works blocks of the network out again for the gradient: less memory, more time.",
    flag_values=to,
  )
  flags.DEFINE_integer(
    "micro_batches",
    1,
    "Parts of a batch whose gradients are accumulated: less memory. Batch normalization "
    "sees one part at a time.",
    flag_values=to,
  )
  flags.DEFINE_boolean(
    "split_params",
    False,
    "Splits each copy's parameters over the data axis of --mesh: for large networks.",
    flag_values=to,
  )
  flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of the first process, in a run of several; 'auto' where the cluster tells "
    "(Cloud TPU, Slurm, Open MPI, Kubernetes).",
    flag_values=to,
  )
  flags.DEFINE_integer(
    "processes", None, "How many processes there are, with --coordinator.", flag_values=to
  )
  flags.DEFINE_integer(
    "process", None, "Which of the --processes this one is, from 0.", flag_values=to
  )


define_flags()


class Hardware(NamedTuple):
  """The flags of this file."""

  mesh: str
  cpu_devices: int | None
  ingredients_at_once: int | None
  precision: str
  convolution: str
  remat: bool
  micro_batches: int
  split_params: bool
  coordinator: str | None
  processes: int | None
  process: int | None


def read_hardware(model: str, copies: int, given: flags.FlagValues = FLAGS) -> Hardware:
  """The parsed flags, checked as far as they can be before a device is touched.

  Args:
    model: name of the network.
    copies: m.
    given: parsed.

  Raises:
    ValueError: a flag is out of range, names something unknown, or does not fit the
      network.
  """
  chosen = Hardware(**{name: given[name].value for name in Hardware._fields})
  if chosen.mesh not in MESHES and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", chosen.mesh):
    raise ValueError(
      f"--mesh is {chosen.mesh}: give devices along copies x devices along the batch, such "
      "as 4x2, or auto, or none"
    )
  check_name("precision", chosen.precision, PRECISIONS)
  check_name("convolution", chosen.convolution, (*CHOICES, MEASURE))
  if model == "mlp":
    for name, nothing in (("convolution", "auto"), ("remat", False)):
      if getattr(chosen, name) != nothing:
        raise ValueError(
          f"--{name} is {getattr(chosen, name)}: the mlp makes no use of it, leave it out"
        )
  for name in ("cpu_devices", "ingredients_at_once", "micro_batches"):
    if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
      raise ValueError(f"--{name} is {getattr(chosen, name)}: it must be at least 1")
  if chosen.cpu_devices is not None and chosen.cpu_devices > MOST_GIVEN:
    raise ValueError(
      f"--cpu_devices is {chosen.cpu_devices}: give at most {MOST_GIVEN}; more than there "
      "are cores gain nothing"
    )
  if chosen.split_params and data_devices(chosen.mesh) == 1:
    raise ValueError(
      "--split_params needs a mesh with a data axis: give one such as --mesh=1x4"
    )
  _check_processes(chosen, copies)
  return chosen


def _check_processes(chosen, copies):
  numbers = (chosen.processes, chosen.process)
  if chosen.coordinator in (None, "auto"):
    if numbers != (None, None):
      raise ValueError("--processes and --process go with --coordinator=host:port")
    return
  if None in numbers or not 0 <= chosen.process < chosen.processes:
    raise ValueError(
      f"--coordinator needs --processes and --process, from 0 to below it: they are "
      f"{chosen.processes} and {chosen.process}"
    )
  check_process_count(chosen.mesh, chosen.processes, copies)


def check_process_count(mesh: str, processes: int, copies: int) -> None:
  """Raises ValueError where there are more processes than shards of the work."""
  shards = copies * data_devices(mesh)
  if processes > shards:
    raise ValueError(
      f"{processes} processes for {copies} copies x {data_devices(mesh)} shards of the "
      f"batch: start at most {shards}, or give a --mesh with a longer data axis"
    )


def data_devices(mesh: str) -> int:
  """Devices along the batch of a copy, as far as --mesh says."""
  return 1 if mesh in MESHES else int(mesh.split("x")[1])


def start(chosen: Hardware, model: str, copies: int) -> None:
  """Divides the CPU and joins the other processes; before any device is touched.

  Raises:
    ValueError: more processes than the work can use.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  # Programs over several devices take twice as long to compile: small networks do not
  # earn that back in a short run.
  n = chosen.cpu_devices or (1 if model == "mlp" else min(cores, MOST_CPU_DEVICES))
  given, before = chosen.cpu_devices, jax.config.jax_num_cpu_devices
  if before in (-1, None) or (given and given != before):
    try:
      jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError as error:  # a notebook that has used a device already
      if chosen.cpu_devices:
        raise ValueError(
          "--cpu_devices comes too late: a device was used before; leave it out"
        ) from error
  if chosen.coordinator is None:
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if chosen.coordinator == "auto":
    jax.distributed.initialize()
    check_process_count(chosen.mesh, jax.process_count(), copies)
  else:
    jax.distributed.initialize(chosen.coordinator, chosen.processes, chosen.process)


def mesh_of(
  chosen: Hardware, model: str, batch_size: int
) -> Callable[[int], jax.sharding.Mesh | None]:
  """What a number of copies is spread over.

  Raises:
    ValueError: the mesh does not fit the devices, or the batch not its data axis.
  """
  if chosen.mesh == "none":
    if jax.process_count() > 1:
      raise ValueError("--mesh is none: several processes need a mesh, give auto or 2x1")
    return lambda copies: None
  part = batch_size // chosen.micro_batches
  if chosen.mesh == "auto":
    sharing = 0.85 if jax.default_backend() == "cpu" else 0.5
    if model == "mlp":
      sharing = 0.0  # its steps are too short to wait for one another
    return functools.cache(lambda copies: fit_mesh(copies, part, sharing=sharing))
  mesh = make_mesh(*map(int, chosen.mesh.split("x")))
  check_batch(batch_size, chosen.micro_batches, mesh)
  if jax.process_count() > 1 and mesh.size != jax.device_count():
    raise ValueError(
      f"--mesh={chosen.mesh} leaves some of the {jax.device_count()} devices out: in a run "
      "of several processes it has to take all of them"
    )
  return lambda copies: mesh


def copies_at_once(chosen: Hardware, model: str, parameters: int) -> int | None:
  """How many copies one device trains at the same time; None for all.

  On a CPU one, unless the states of all copies fit its second-level cache together.

  Args:
    chosen: the flags.
    model: name of the network.
    parameters: of all copies.
  """
  if chosen.ingredients_at_once or jax.default_backend() != "cpu":
    return chosen.ingredients_at_once
  return None if model == "mlp" and parameters <= CACHED_PARAMETERS else 1


def network_options(chosen: Hardware, model: str) -> dict[str, Any]:
  """Options of `jaxsms.models.create`."""
  options: dict[str, Any] = {}
  if bfloat16(chosen.precision):
    options["dtype"] = jnp.bfloat16
  if model != "mlp":
    options["remat"] = chosen.remat
    options["convolution"] = lowered(chosen.convolution)
  return options


@functools.cache
def lowered(convolution: str) -> Callable[..., jax.Array]:
  """The convolution of that name; the same object each time, as jit wants it."""
  if convolution == "auto":
    return conv_general_dilated
  return functools.partial(conv_general_dilated, lowering=convolution)


def bfloat16(precision: str) -> bool:
  """Whether activations are bfloat16."""
  if precision != "auto":
    return precision == "bfloat16"
  device = jax.devices()[0]
  if device.platform == "gpu":
    return float(getattr(device, "compute_capability", 0)) >= 8
  return device.platform == "tpu"
