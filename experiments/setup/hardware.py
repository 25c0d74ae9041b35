"""What the flags of the devices lead to: processes, meshes, options of the network."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxsms import fit_mesh, make_mesh
from jaxsms.convolution import conv_general_dilated
from jaxsms.training.memory import OutOfMemory
from jaxsms.training.programs import check_batch

from ..config.device_flags import check_process_count

MOST_CPU_DEVICES = 8
CACHED_PARAMETERS = 100_000  # with their momentum and gradients, 1.2 MB


def in_flags(error: Exception) -> str:
  """The message of an error; that of a device without memory names the flag."""
  if isinstance(error, OutOfMemory):
    return error.advice("--ingredients_at_once")
  return str(error)


def start(config: Any, copies: int) -> None:
  """Divides the CPU and joins the other processes; before any device is touched.

  Raises:
    ValueError: more processes than the work can use.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
  # Programs over several devices take twice as long to compile: small networks do not
  # earn that back in a short run.
  n = config.cpu_devices or (1 if config.model == "mlp" else min(cores, MOST_CPU_DEVICES))
  given, before = config.cpu_devices, jax.config.jax_num_cpu_devices
  if before in (-1, None) or (given and given != before):
    try:
      jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError as error:  # a notebook that has used a device already
      if config.cpu_devices:
        raise ValueError(
          "--cpu_devices comes too late: a device was used before; leave it out"
        ) from error
  if config.coordinator is None:
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if config.coordinator == "auto":
    jax.distributed.initialize()
    check_process_count(config, jax.process_count(), copies)
  else:
    jax.distributed.initialize(config.coordinator, config.processes, config.process)


def mesh_of(config: Any) -> Callable[[int], jax.sharding.Mesh | None]:
  """What a number of copies is spread over.

  Raises:
    ValueError: the mesh does not fit the devices, or the batch not its data axis.
  """
  if config.mesh == "none":
    if jax.process_count() > 1:
      raise ValueError("--mesh is none: several processes need a mesh, give auto or 2x1")
    return lambda copies: None
  part = config.batch_size // config.micro_batches
  if config.mesh == "auto":
    sharing = 0.85 if jax.default_backend() == "cpu" else 0.5
    if config.model == "mlp":
      sharing = 0.0  # its steps are too short to wait for one another
    return functools.cache(lambda copies: fit_mesh(copies, part, sharing=sharing))
  mesh = make_mesh(*map(int, config.mesh.split("x")))
  check_batch(config.batch_size, config.micro_batches, mesh)
  if jax.process_count() > 1 and mesh.size != jax.device_count():
    raise ValueError(
      f"--mesh={config.mesh} leaves some of the {jax.device_count()} devices out: in a run "
      "of several processes it has to take all of them"
    )
  return lambda copies: mesh


def copies_at_once(config: Any, parameters: int) -> int | None:
  """How many copies one device trains at the same time; None for all.

  On a CPU one, unless the states of all copies fit its second-level cache together.

  Args:
    config: `model`, and the flags of the devices.
    parameters: of all copies.
  """
  if config.ingredients_at_once or jax.default_backend() != "cpu":
    return config.ingredients_at_once
  return None if config.model == "mlp" and parameters <= CACHED_PARAMETERS else 1


def network_options(config: Any) -> dict[str, Any]:
  """Options of `jaxsms.models.create`."""
  options: dict[str, Any] = {}
  if bfloat16(config.precision):
    options["dtype"] = jnp.bfloat16
  if config.model != "mlp":
    options["remat"] = config.remat
    options["convolution"] = lowered(config.convolution)
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
