"""Channels by the time that a network takes: masks for a share of its latency."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from jaxsms.channels import compact
from jaxsms.channels.order import Kept, removal_order
from jaxsms.channels.places import masks_with
from jaxsms.checks import check_sparsity
from jaxsms.trees import PyTree

Measure = Callable[[Kept], float]
Call = Callable[[], Any]
Clock = Callable[[], float]

ROUND_SECONDS = 0.01  # of each call, about
SECONDS, MOST_SECONDS, LEAST_ROUNDS = 0.5, 3.0, 5  # of all rounds together
STEADY = 0.02  # how well the median of ratios is to be known
LOOKS = 30  # networks that are measured for one goal


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

  A network's time is no sum over its channels, and some numbers of channels are slower than
  greater ones. So it bisects on how many go, and looks elsewhere where time jumps over the
  goal. Of the networks that it measured, up to 30, it takes the one nearest to the goal. It
  logs a warning where that is further off than `tolerance`.

  Args:
    params: tree of parameters.
    sparsity: share of the seconds to save, in [0, 1): 0.5 asks for half of the time that
      `measure` gives for all channels.
    groups: as `jaxsms.channel_groups` gives.
    measure: seconds of the network that has the channels `kept`, bool [size] for each
      group.
    tolerance: how far from the goal the seconds may be, as a share of it. The search ends
      with a network that is within half of it, since no two measurements are alike.
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
  last, taken = len(order.ends) - 1, {}

  def look(units):
    taken[units] = measure(order.without(units))
    return taken[units]

  if look(0) > goal * (1 + tolerance):
    if look(last) > goal * (1 + tolerance):
      raise ValueError(
        f"sparsity {sparsity:g} of the latency asks for {goal:.3g} s, but it takes "
        f"{taken[last]:.3g} s with as few channels as there can be, at least one in each "
        f"group such as that of {groups[0].places[0][0]}: lower the sparsity"
      )
    while len(taken) < LOOKS:
      off = min(abs(t / goal - 1) for t in taken.values())
      # Half of the tolerance is left for another measurement of the same network.
      enough = tolerance / 2 if _across(taken, goal) else tolerance
      units = _next_look(taken, goal)
      if off <= enough or units is None:
        break
      look(units)
  nearest = min(taken, key=lambda units: abs(taken[units] - goal))
  if taken[nearest] > goal * (1 + tolerance) or (
    nearest and taken[nearest] < goal * (1 - tolerance)
  ):
    logging.warning(
      "sparsity %g of the latency asks for %.3g s, and of %d networks the nearest takes "
      "%.3g s: another round_to gives other numbers of channels",
      sparsity, goal, len(taken), taken[nearest],
    )  # fmt: skip
  return masks_with(params, groups, order.without(nearest), masks)


def _next_look(taken: dict[int, float], goal: float) -> int | None:
  """How many units to remove next, given the seconds of others; None if all are known.

  The middle of two neighbours on either side of the goal, of several such pairs those that
  remove least; where there are none, the middle of the widest gap.
  """
  gaps = _across(taken, goal)[:1] or sorted(_gaps(taken), key=lambda gap: gap[0] - gap[1])
  return sum(gaps[0]) // 2 if gaps else None


def _gaps(taken):
  """Neighbours between which there are others."""
  return [(a, b) for a, b in itertools.pairwise(sorted(taken)) if b - a > 1]


def _across(taken, goal):
  """Those of them of which one is too slow and one fast enough."""
  return [(a, b) for a, b in _gaps(taken) if (taken[a] > goal) != (taken[b] > goal)]


def network_latency(
  apply: Callable[..., Any],
  params: PyTree,
  groups: Sequence,
  *inputs: Any,
  clock: Clock = time.perf_counter,
) -> Measure:
  """A clock for `masks_for_latency`: the cut network's time on this machine.

  Args:
    apply: the network, called with params and the inputs.
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives for these.
    *inputs: arrays, as many at once as are to be fast.
    clock: gives seconds.

  Returns:
    `measure(kept)`, seconds of one call. Each network is compiled, and timed by turns with
    the full one: see `seconds_ratio`.

  Example:
    >>> import jax.numpy as jnp, jaxsms
    >>> params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 2))}}
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 4)))
    >>> measure = network_latency(apply, params, groups, jnp.ones((1, 4)))
    >>> measure([jnp.arange(8) < 4]) > 0
    True
  """
  full = ready(apply, params, *inputs)
  seconds = seconds_of(full, clock)

  def measure(kept):
    if all(np.all(one) for one in kept):
      return seconds
    network = compact(apply, params, masks_with(params, groups, kept), *inputs)
    return seconds * seconds_ratio(
      ready(network.apply, network.params, *inputs), full, clock
    )

  return measure


def ready(function: Callable[..., Any], *inputs: Any) -> Call:
  """A call of a function that is compiled already, and waits for its results.

  Args:
    function: jittable.
    *inputs: arrays, or trees of them.
  """
  compiled = jax.jit(function)
  inputs = jax.block_until_ready(jax.device_put(inputs))

  def call():
    jax.block_until_ready(compiled(*inputs))

  call()
  return call


def seconds_ratio(call: Call, other: Call, clock: Clock = time.perf_counter) -> float:
  """The time of one call as a share of another's, on a machine whose speed wanders.

  Args:
    call: a call that waits for its results, as `ready` gives.
    other: a call to compare it with.
    clock: gives seconds.

  Returns:
    The median over rounds of the ratio of the two times: see `rounds_by_turns`.
  """
  return statistics.median(a / b for a, b in rounds_by_turns([call, other], clock))


def seconds_of(call: Call, clock: Clock = time.perf_counter) -> float:
  """The median time of one call, over rounds.

  Args:
    call: a call that waits for its results, as `ready` gives.
    clock: gives seconds.
  """
  return statistics.median(own for (own,) in rounds_by_turns([call], clock))


def rounds_by_turns(
  calls: Sequence[Call], clock: Clock = time.perf_counter
) -> list[list[float]]:
  """Times calls that take turns, in many short rounds.

  Every second round goes backwards. So what slows the machine for longer than a round
  slows all of them.

  Args:
    calls: each waits for its results, as `ready` gives.
    clock: gives seconds.

  Returns:
    For each round the seconds of one call of each. There are at least 5. They take at least
    half a second, and end when the ratio of the first and the last call is known to 2 %, or
    after 3 seconds.
  """
  once = [max(_seconds(call, 1, clock), 1e-6) for call in calls]
  counts = [math.ceil(ROUND_SECONDS / own) for own in once]
  order, started = list(range(len(calls))), clock()
  rounds: list[list[float]] = []
  while (
    len(rounds) < LEAST_ROUNDS
    or clock() - started < SECONDS
    or (clock() - started < MOST_SECONDS and _unsteady(rounds))
  ):
    times = [0.0] * len(calls)
    for i in order if len(rounds) % 2 == 0 else order[::-1]:
      times[i] = _seconds(calls[i], counts[i], clock)
    rounds.append(times)
  return rounds


def _unsteady(rounds):
  """Whether the median of the ratios may be off: the notch of a box plot is wide."""
  low, middle, high = statistics.quantiles([times[0] / times[-1] for times in rounds], n=4)
  return 1.57 * (high - low) / math.sqrt(len(rounds)) > STEADY * middle


def _seconds(call, count, clock):
  started = clock()
  for _ in range(count):
    call()
  return (clock() - started) / count
