"""Which channels go: the weakest, until a budget of weights or multiply-adds is reached."""

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsms.channels.order import Kept, RemovalOrder, removal_order
from jaxsms.channels.places import (
  EntryCount,
  channel_leaves,
  masks_on_host,
  masks_with,
)
from jaxsms.channels.scores import Score
from jaxsms.checks import check_sparsity
from jaxsms.names import check_name
from jaxsms.pruning import prunable_flags
from jaxsms.trees import Prunable, PyTree, is_concrete, path_string

BUDGETS = ("weights", "channels", "multiply_adds", "latency")


def channel_masks(
  params: PyTree,
  sparsity: float,
  *,
  groups: Sequence,
  score: str | Score = "l2",
  scope: str = "global",
  budget: str = "weights",
  round_to: int = 1,
  masks: PyTree | None = None,
  prunable: Prunable | None = None,
  key: jax.Array | None = None,
  measure: Callable[[Kept], float] | None = None,
) -> PyTree:
  """Removes whole channels, the weakest first, until a share of the network is gone.

  A channel is removed in every leaf that has it: weights, bias, normalization, batch
  statistics, and the weights of the next layers that read it.
  `functools.partial(channel_masks, groups=groups)` is a criterion for
  `sparse_model_soup`. Channels are chosen on the host.

  Args:
    params: tree of parameters.
    sparsity: share of the budget to remove, in [0, 1). At least this share is removed, and
      at most one channel more (or `round_to` channels).
    groups: as `jaxsms.channel_groups` gives.
    score: "l2" (`l2_scores`), "batch_norm", "random", or a function of params and groups
      that gives float [size] for each group, such as one made of `taylor_scores`. Channels
      of infinite score stay.
    scope: "global" compares the scores of all groups; "uniform" takes the same share of
      each.
    budget: what `sparsity` is a share of: "weights" (the prunable entries), "channels" (of
      the groups that may lose some), "multiply_adds" (`groups.multiply_adds`, of each
      weight by its path), or "latency" (see `masks_for_latency`).
    round_to: a group that loses channels keeps a multiple of this; smaller ones stay whole.
    masks: earlier masks. What they removed stays removed and counts.
    prunable: which leaves count as weights; None means `jaxsms.prunable`. A layer for which
      it is False loses no channel of its own outputs.
    key: for random scores.
    measure: for latency, seconds of the network that has the channels `kept`, bool [size]
      for each group.

  Returns:
    Tree of bool arrays with the structure of `params`, True where an entry is kept. Of
    equal scores the earlier channels go first. No group loses its last channel.

  Raises:
    ValueError: sparsity outside [0, 1) or traced, a budget that would empty a group, groups
      of other params, an unknown name, nothing prunable, or values that are not finite.

  References:
    Fang et al., 2023, https://arxiv.org/abs/2301.12900 (groups of channels)

  Example:
    >>> import jax.numpy as jnp, jaxsms
    >>> params = {"a": {"kernel": jnp.array([[3.0, 1.0]])},
    ...           "b": {"kernel": jnp.array([[3.0], [1.0]])}}
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 1)))
    >>> jaxsms.channel_masks(params, 0.5, groups=groups)["a"]["kernel"].tolist()
    [[True, False]]
  """
  check_name("budget", budget, BUDGETS)
  options: dict[str, Any] = {"groups": groups, "score": score, "scope": scope}
  options |= {"round_to": round_to, "masks": masks, "prunable": prunable, "key": key}
  if budget == "latency":
    from jaxsms.channels.latency import masks_for_latency  # which takes shares of channels

    return masks_for_latency(params, sparsity, measure=measure, **options)
  if not is_concrete(sparsity):
    raise ValueError("sparsity is traced: channels are chosen before the program runs")
  check_sparsity(sparsity)
  order = removal_order(params, **options)
  cost = Cost(params, groups, budget, order.may_go, masks, prunable)
  units = len(order.ends) - 1
  goal = (sparsity - 1e-9) * cost.total  # shares are rounded numbers
  if cost.removed(order.without(units)) < goal or (sparsity and not cost.total):
    options |= {"budget": budget, "round_to": 1}
    in_blocks = round_to > 1 and _is_reachable(params, sparsity, **options)
    block = round_to if in_blocks else 0
    raise ValueError(_unreachable(groups, order, cost, sparsity, budget, block))
  fewest = bisect.bisect_left(
    range(units), goal, key=lambda number: cost.removed(order.without(number))
  )
  return masks_with(params, groups, order.without(fewest), masks)


def check_reachable(
  prune: Callable[..., PyTree],
  params: PyTree,
  goal: float,
  masks: PyTree | None = None,
  prunable: Prunable | None = None,
) -> None:
  """Raises ValueError where `prune` is `channel_masks`, and cannot remove as much."""
  options: dict[str, Any] = {}
  function = prune
  while isinstance(function, functools.partial):
    options = {**function.keywords, **options}
    function = function.func
  if function is channel_masks and options.get("budget") != "latency":
    given = {} if prunable is None else {"prunable": prunable}
    prune(params, goal, masks=masks, **given)


class Cost:
  """What is gone of a network where some of its channels are, in the unit of a budget.

  Attributes:
    total: of the dense network.
  """

  def __init__(
    self,
    params: PyTree,
    groups: Sequence,
    budget: str,
    may_go: Sequence[bool],
    masks: PyTree | None = None,
    prunable: Prunable | None = None,
  ):
    """Counts entries once, with what earlier masks removed."""
    self._counts: list[tuple[float, EntryCount]] = []
    self._left_alone: float = 0
    self._may_go = may_go if budget == "channels" else None
    if budget == "channels":
      pairs = zip(groups, may_go, strict=True)
      self.total = sum(group.size for group, may in pairs if may)
      return
    leaves = jax.tree.leaves(params)
    each = _cost_of_entries(params, groups, budget, prunable)
    sizes = [int(np.prod(np.shape(leaf))) for leaf in leaves]
    self.total = sum(c * size for c, size in zip(each, sizes, strict=True))
    masks = masks_on_host(params, masks)
    places = {place.number: place for place in channel_leaves(params, groups)}
    for i, size in enumerate(sizes):
      if i in places and each[i]:
        self._counts.append((each[i], EntryCount(places[i], masks[i])))
      elif each[i]:
        mask = masks[i]
        left = size if mask is None else int(np.count_nonzero(mask))
        self._left_alone += each[i] * left

  def removed(self, kept: Kept) -> float:
    """What is gone where the channels `kept` are left."""
    if self._may_go is not None:
      pairs = zip(kept, self._may_go, strict=True)
      return self.total - sum(int(k.sum()) for k, may in pairs if may)
    left = sum(each * count(kept) for each, count in self._counts)
    return self.total - self._left_alone - left

  def largest(self, kept: Kept) -> str:
    """The path of the leaf with channels of which most is left."""
    if not self._counts:
      return ""
    costs = [each * count(kept) for each, count in self._counts]
    return path_string(self._counts[int(np.argmax(costs))][1].place.path)


def _cost_of_entries(params, groups, budget, prunable) -> list[float]:
  """For each leaf what one entry of it costs."""
  if budget == "weights":
    return [int(flag) for flag in prunable_flags(params, prunable)]
  counts = getattr(groups, "multiply_adds", None)
  if counts is None:
    raise ValueError(
      "budget is 'multiply_adds', but groups have no multiply_adds: find the groups with "
      "jaxsms.channel_groups, or choose another budget"
    )
  leaves = jax.tree.leaves_with_path(params)
  # Exact: each entry is used equally often.
  return [counts.get(path_string(path), 0) / max(np.size(x), 1) for path, x in leaves]


def _is_reachable(params, sparsity, **options) -> bool:
  try:
    channel_masks(params, sparsity, **options)
  except ValueError:
    return False
  return True


def _unreachable(
  groups, order: RemovalOrder, cost: Cost, sparsity: float, budget: str, block: int
) -> str:
  """Why a budget cannot be reached; `block` is a `round_to` that is too large, or 0."""
  if len(order.ends) == 1 and not block:
    return (
      f"sparsity is {sparsity:g}, but no channel may go: groups are empty, or each has "
      "its last channels, or a layer that prunable leaves out"
    )
  problem = "would empty a group of channels"
  advice = "lower the sparsity or let more layers be pruned"
  if block:
    problem = (
      f"cannot be reached with round_to={block}, as a group that loses channels keeps at "
      "least so many"
    )
    advice = "give a smaller round_to or a lower sparsity"
  kept = order.without(len(order.ends) - 1)
  most = cost.removed(kept) / cost.total if cost.total else 0.0
  layer = cost.largest(kept)
  if not layer and kept:
    layer = groups[int(np.argmax([k.sum() for k in kept]))].places[0][0]
  return (
    f"sparsity {sparsity:g} of the {budget.replace('_', '-')} {problem}: at most "
    f"{most:.4g} can go, and most of what is left is in {layer}, so {advice}"
  )
