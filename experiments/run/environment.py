"""Versions and devices that a run's numbers depend on."""

import os
import platform
import sys
from typing import Any

import jax


def environment() -> dict[str, Any]:
  """Versions and devices that a run's numbers depend on."""
  import flax
  import optax
  import orbax.checkpoint

  import jaxsms

  return {
    "jaxsms": jaxsms.__version__,
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": optax.__version__,
    "orbax": orbax.checkpoint.__version__,
    "python": platform.python_version(),
    "platform": sys.platform,
    "device": jax.devices()[0].device_kind,
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
  }


def environments_of(document: dict[str, Any]) -> list[dict[str, Any]]:
  """What a checkpoint, results.json or run.json says of them; older ones say but one."""
  if document.get("environments"):
    return list(document["environments"])
  known = document.get("environment")
  return [{"from": "the start", "environment": dict(known)}] if known else []


def check_version(
  workdir: str | os.PathLike, before: dict[str, Any], now: dict[str, Any]
) -> None:
  """Raises ValueError where another version of jaxsms or jax did what there is."""
  others = [name for name in ("jaxsms", "jax") if before.get(name) != now.get(name)]
  if others:
    was, here = (
      " and ".join(f"{name} {known.get(name)}" for name in others)
      for known in (before, now)
    )
    raise ValueError(
      f"{workdir} holds a run of {was}, and this is {here}: go on with that version, "
      "choose another --workdir, or give --allow_other_version"
    )
