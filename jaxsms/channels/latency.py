"""Channels by the time that a network takes: masks for a share of its latency."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsms.channels import compact
from jaxsms.channels.order import Kept, removal_order
from jaxsms.channels.places import masks_with
from jaxsms.checks import check_sparsity
from jaxsms.trees import PyTree

Measure = Callable[[Kept], float]


def masks_for_latency(
  params: PyTree,
  sparsity: float,
  *,
  groups: Sequence,
  measure: Measure | None,
  tolerance: float = 0.1,
  masks: PyTree | None = None,
  **options: Any,
) -> PyTree:
  """Removes whole channels until a network takes a share of its time.

  Bisects on the share of channels, since a network's time is no sum over its channels. Of
  what it measured it takes the network nearest to the goal.

  Args:
    params: tree of parameters.
    sparsity: share of the seconds to save, in [0, 1): 0.5 asks for half of the time that
      `measure` gives for all channels.
    groups: as `jaxsms.channel_groups` gives.
    measure: seconds of the network that has the channels `kept`, bool [size] for each
      group.
    tolerance: how far from the goal the seconds may be, as a share of it.
    masks: earlier masks. What they removed stays removed.
    **options: `score`, `scope`, `round_to`, `prunable` and `key` of `channel_masks`.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept.

  Raises:
    ValueError: no `measure`, sparsity outside [0, 1), or a network with one channel left in
      each group that takes longer.
  """
  if measure is None:
    raise ValueError(
      "budget is 'latency' without a clock: pass measure=network_latency(apply, params, "
      "groups, *inputs) of jaxsms.channels.latency, or one of your own"
    )
  check_sparsity(sparsity)
  order = removal_order(params, groups=groups, masks=masks, **options)
  everything = [np.ones(group.size, bool) for group in groups]
  goal = (1 - sparsity) * measure(everything)
  low, high, taken = 0, len(order.ends) - 1, {}

  def seconds(units):
    taken[units] = measure(order.without(units))
    return taken[units]

  if seconds(low) > goal * (1 + tolerance):
    if seconds(high) > goal * (1 + tolerance):
      raise ValueError(
        f"sparsity {sparsity:g} of the latency asks for {goal:.3g} s, but it takes "
        f"{taken[high]:.3g} s with as few channels as there can be, at least one in each "
        f"group such as that of {groups[0].places[0][0]}: lower the sparsity"
      )
    while high - low > 1 and min(abs(t - goal) for t in taken.values()) > tolerance * goal:
      middle = (low + high) // 2
      low, high = (middle, high) if seconds(middle) > goal else (low, middle)
  nearest = min(taken, key=lambda units: abs(taken[units] - goal))
  return masks_with(params, groups, order.without(nearest), masks)


def network_latency(
  apply: Callable[..., Any], params: PyTree, groups: Sequence, *inputs: Any, **timing: Any
) -> Measure:
  """A clock for `masks_for_latency`: the cut network's time on this machine.

  Args:
    apply: the network, called with params and the inputs.
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives for these.
    *inputs: arrays, as many at once as are to be fast.
    **timing: `repeats` and `clock` of `seconds_per_call`.

  Returns:
    `measure(kept)`, seconds of one call; each is compiled.

  Example:
    >>> import jax.numpy as jnp, jaxsms
    >>> params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 2))}}
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 4)))
    >>> measure = network_latency(apply, params, groups, jnp.ones((1, 4)))
    >>> measure([jnp.arange(8) < 4]) > 0
    True
  """

  def measure(kept):
    masks = masks_with(params, groups, kept)
    network = compact(apply, params, masks, *inputs)
    return seconds_per_call(network.apply, network.params, *inputs, **timing)

  return measure


def seconds_per_call(
  function: Callable[..., Any],
  *inputs: Any,
  repeats: int = 20,
  clock: Callable[[], float] = time.perf_counter,
) -> float:
  """The median time of a function, jitted, once it is compiled.

  Args:
    function: jittable.
    *inputs: arrays, or trees of them.
    repeats: how often it is timed, at least 1.
    clock: gives seconds.

  Returns:
    Seconds of one call, until its results are there.
  """
  compiled = jax.jit(function).lower(*inputs).compile()
  inputs = jax.block_until_ready(jax.device_put(inputs))
  jax.block_until_ready(compiled(*inputs))
  times = []
  for _ in range(repeats):
    start = clock()
    jax.block_until_ready(compiled(*inputs))
    times.append(clock() - start)
  return statistics.median(times)
