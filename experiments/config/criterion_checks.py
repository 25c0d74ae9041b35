"""What --criterion can do, and which flags belong to one."""

from typing import Any

from .baseline_flags import refuse_baselines
from .fields import default_values
from .pruning_criteria import CRITERIA


def check_criterion(config: Any) -> None:
  """Checks --criterion with the flags that belong to one, and the sparsities.

  Args:
    config: a run's.

  Raises:
    ValueError: they do not fit.
  """
  this, defaults = CRITERIA[config.criterion], default_values(type(config))
  for criterion, entry in CRITERIA.items():
    for name in entry.flags:
      value = getattr(config, name)
      if value != defaults[name] and name not in this.flags:
        raise ValueError(
          f"--{name}={value} belongs to --criterion={criterion}: leave it out with "
          f"--criterion={config.criterion}"
        )
  if config.budget == "latency":
    _check_latency(config)
  if config.shrink:
    if not this.whole_channels:
      raise ValueError(
        f"--shrink cuts whole channels, and --criterion={config.criterion} leaves a part "
        "of each: give --criterion=channels, or leave out --shrink"
      )
    refuse_baselines(
      config,
      "own_masks",
      ", whose masks are its own: nothing can be cut for all copies, leave it out with "
      "--shrink",
    )
  if config.scope != "global" and not this.scope:
    with_scope = ", ".join(name for name, one in CRITERIA.items() if one.scope)
    raise ValueError(
      f"--scope={config.scope} belongs to {with_scope}: "
      f"--criterion={config.criterion} shares the sparsity out itself, leave it out"
    )
  if this.check is not None:
    this.check(config)
    why = ", whose sparsity rises smoothly: leave it out with "
    refuse_baselines(config, "ramp", f"{why}--criterion={config.criterion}")


def _check_latency(config):
  """--budget=latency, with the processes and --baselines."""
  if config.processes not in (None, 1):
    raise ValueError(
      "--budget=latency is measured by one process: leave out --processes, or give "
      "--budget=multiply_adds"
    )
  refuse_baselines(
    config,
    "own_masks",
    ", whose masks are its own and would each be measured anew: leave it out with "
    "--budget=latency",
  )
