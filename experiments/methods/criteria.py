"""Which weights a run removes: the criterion that the flags name, as one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

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
  from ..config.run_config import Config


def pruning(
  config: Config, key: jax.Array, groups: Callable[[], ChannelGroups] | None = None
) -> Prune:
  """The function `prune(params, sparsity, masks=masks)` of --criterion.

  Args:
    config: of the run.
    key: of the seed; decides what random pruning removes.
    groups: gives the network's groups of channels, for --criterion=channels.
  """
  if config.criterion == "channels":
    return functools.partial(
      channel_masks, groups=groups(), scope=config.scope, budget=config.budget
    )
  if config.criterion == "magnitude":
    return functools.partial(magnitude_masks, scope=config.scope)
  if config.criterion == "random":
    return functools.partial(random_masks, key, scope=config.scope)
  if config.criterion == "erk":
    return erk_masks
  if config.criterion == "lamp":
    return lamp_masks
  if config.criterion == "n_m":
    m = config.n_m_group

    def divisible(path, leaf):
      return default_prunable(path, leaf) and leaf.shape[inputs_axis(path, leaf)] % m == 0

    return functools.partial(n_m_masks, m=m, axis=inputs_axis, prunable=divisible)

  def filters(params, sparsity, masks=None):
    last = classifier(params)

    def prunable(path, leaf):
      return default_prunable(path, leaf) and path_names(path)[0] != last

    return filter_masks(params, sparsity, config.scope, outputs_axis, prunable, masks)

  return filters


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
