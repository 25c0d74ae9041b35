"""What --criterion can do, and which flags belong to one."""

from typing import Any

from ..methods.pruning_criteria import CRITERIA
from .baseline_flags import refuse_baselines


def check_criterion(config: Any) -> None:
  """Checks --criterion with the flags that belong to one, and the sparsities.

  Args:
    config: a run's.

  Raises:
    ValueError: they do not fit.
  """
  for name, usual in (("budget", "weights"), ("round_to", 1)):
    value = getattr(config, name)
    if value != usual and config.criterion != "channels":
      raise ValueError(
        f"--{name}={value} belongs to --criterion=channels: leave it out with "
        f"--criterion={config.criterion}"
      )
  if config.budget == "latency":
    _check_latency(config)
  if config.shrink:
    if not CRITERIA[config.criterion].whole_channels:
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
  if config.scope != "global" and not CRITERIA[config.criterion].scope:
    with_scope = ", ".join(name for name, one in CRITERIA.items() if one.scope)
    raise ValueError(
      f"--scope={config.scope} belongs to {with_scope}: "
      f"--criterion={config.criterion} shares the sparsity out itself, leave it out"
    )
  if config.criterion != "n_m":
    return
  m = config.n_m_group
  for phase, sparsity in config.sparsity_of_phases().items():
    removed = m * sparsity
    if abs(removed - round(removed)) > 1e-6:
      raise ValueError(
        f"--criterion=n_m would remove {removed:.3g} of {m} weights in phase {phase}: "
        "choose --goal_sparsity, --phases and --n_m_group that make it whole, such as "
        "0.75, 2 and 4"
      )
  why = ", whose sparsity rises smoothly: leave it out with --criterion=n_m"
  refuse_baselines(config, "ramp", why)


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
