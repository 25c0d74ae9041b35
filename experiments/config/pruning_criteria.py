"""Which weights a run removes: the criteria that --criterion names, one entry each.

A new criterion is an entry of `CRITERIA`, here or from outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax

from jaxsms import (
  ChannelGroups,
  channel_masks,
  erk_masks,
  filter_masks,
  lamp_masks,
  magnitude_masks,
  n_m_masks,
  random_masks,
)
from jaxsms import prunable as default_prunable
from jaxsms.phases import Prune
from jaxsms.trees import path_names

if TYPE_CHECKING:
  from .run_config import Config


Groups = Callable[[], ChannelGroups] | None  # gives the network's groups of channels


class Criterion(NamedTuple):
  """A value of --criterion.

  Attributes:
    prune: `prune(config, key, groups)` giving a function
      `prune(params, sparsity, masks=masks)`; the key is for what is random.
    title: what is removed, for people.
    scope: whether it takes --scope.
    whole_channels: whether --shrink can cut what it removes, biases and all.
    flags: that no other criterion takes, which are then left at their defaults.
    check: `check(config)` raises ValueError where it cannot prune to the sparsities of
      the phases; None where it can prune to any.
  """

  prune: Callable[[Config, jax.Array, Groups], Prune]
  title: str = ""
  scope: bool = False
  whole_channels: bool = False
  flags: tuple[str, ...] = ()
  check: Callable[[Config], None] | None = None


def pruning(config: Config, key: jax.Array, groups: Groups = None) -> Prune:
  """The function `prune(params, sparsity, masks=masks)` of --criterion.

  Args:
    config: of the run.
    key: of the seed; decides what random pruning removes.
    groups: gives the network's groups of channels, for --criterion=channels.
  """
  return CRITERIA[config.criterion].prune(config, key, groups)


def n_m(config: Config, key: jax.Array, groups: Groups) -> Prune:
  """n of every m inputs stay, in the layers that m divides."""
  m = config.n_m_group

  def divisible(path, leaf):
    return default_prunable(path, leaf) and leaf.shape[inputs_axis(path, leaf)] % m == 0

  return functools.partial(n_m_masks, m=m, axis=inputs_axis, prunable=divisible)


def check_n_m(config: Config) -> None:
  """Raises ValueError where a phase would not remove a whole number of every m."""
  m = config.n_m_group
  for phase, sparsity in config.sparsity_of_phases().items():
    removed = m * sparsity
    if abs(removed - round(removed)) > 1e-6:
      raise ValueError(
        f"--criterion=n_m would remove {removed:.3g} of {m} weights in phase {phase}: "
        "choose --goal_sparsity, --phases and --n_m_group that make it whole, such as "
        "0.75, 2 and 4"
      )


def filters(config: Config, key: jax.Array, groups: Groups) -> Prune:
  """Whole outputs go, of all layers but the classifier."""

  def prune(params, sparsity, masks=None):
    last = classifier(params)

    def prunable(path, leaf):
      return default_prunable(path, leaf) and path_names(path)[0] != last

    return filter_masks(params, sparsity, config.scope, outputs_axis, prunable, masks)

  return prune


def channels(config: Config, key: jax.Array, groups: Groups) -> Prune:
  """Whole channels go, in all places that can only go together."""
  return functools.partial(
    channel_masks,
    groups=groups(),
    scope=config.scope,
    budget=config.budget,
    round_to=config.round_to,
  )


def inputs_axis(path: tuple, leaf: jax.Array) -> int:
  """The axis of a Flax kernel along which groups of inputs lie."""
  if path_names(path)[-2] in ("query", "key", "value"):
    return 0  # [inputs, heads, features]
  return -2  # [inputs, outputs], [height, width, inputs, outputs], [heads, features, out]


def outputs_axis(path: tuple, leaf: jax.Array) -> int:
  """The axis of a Flax kernel along which whole outputs lie; heads in attention."""
  attention = path_names(path)[-2] in ("query", "key", "value")
  return 1 if attention else -1


def classifier(params: dict) -> str:
  """The name of the last dense layer at the top of a network of ours."""
  names = [name for name in params if name.startswith("Dense_")]
  return max(names, key=lambda name: int(name.removeprefix("Dense_")))


CRITERIA: dict[str, Criterion] = {
  "magnitude": Criterion(
    lambda config, key, groups: functools.partial(magnitude_masks, scope=config.scope),
    "the smallest weights, compared as --scope says",
    scope=True,
  ),
  "random": Criterion(
    lambda config, key, groups: functools.partial(random_masks, key, scope=config.scope),
    "weights at random, in all layers together or in each, as --scope says",
    scope=True,
  ),
  "erk": Criterion(
    lambda config, key, groups: erk_masks,
    "the smallest weights, with a sparsity for each layer that follows from its shape",
  ),
  "lamp": Criterion(
    lambda config, key, groups: lamp_masks,
    "the smallest weights, with a sparsity for each layer that follows from its weights",
  ),
  "n_m": Criterion(
    n_m, "all but n of every m inputs", flags=("n_m_group",), check=check_n_m
  ),
  "filters": Criterion(
    filters,
    "whole outputs of all layers but the classifier; the sparsity counts filters",
    scope=True,
  ),
  "channels": Criterion(
    channels,
    "whole channels, in all layers that have to lose them together; the sparsity counts "
    "what --budget says",
    scope=True,
    whole_channels=True,
    flags=("budget", "round_to"),
  ),
}


def removes_channels(config: Config) -> bool:
  """Whether --criterion removes whole channels."""
  return CRITERIA[config.criterion].whole_channels
