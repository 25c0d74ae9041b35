"""Versions and devices that a run's numbers depend on."""

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
