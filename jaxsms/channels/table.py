"""What each group of channels costs, and what the network loses without some of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxsms.channels.budgets import Cost
from jaxsms.channels.order import removal_order
from jaxsms.channels.places import EntryCount, channel_leaves, masks_of_channels
from jaxsms.channels.scores import Score
from jaxsms.pruning import apply_masks
from jaxsms.trees import Prunable, PyTree


class GroupSensitivity(NamedTuple):
  """What one group of channels costs, and what the network loses without some of it.

  Attributes:
    name: path of the first leaf that has these channels.
    channels: how many there are.
    weights: prunable entries in all their places.
    multiply_adds: of these channels in one inference; None where they are not known.
    bytes: of all entries in their places, biases and normalization included.
    removed: how many of the channels the loss is for.
    loss: how much less `evaluate` gives without them.
  """

  name: str
  channels: int
  weights: int
  multiply_adds: int | None
  bytes: int
  removed: int
  loss: float


def sensitivity(
  evaluate: Callable[[PyTree], float],
  params: PyTree,
  groups: Sequence,
  share: float = 0.25,
  score: str | Score = "l2",
  prunable: Prunable | None = None,
  key: jax.Array | None = None,
) -> list[GroupSensitivity]:
  """Measures what each group of channels costs, and what is lost without a share of it.

  The weakest channels of one group are removed and all others stay. This helps to choose a
  budget.

  Args:
    evaluate: `evaluate(params) -> float` of a model of full shapes, higher is better, such
      as its accuracy on held-out data. Called once for each group and once for all.
    params: tree of parameters.
    groups: as `jaxsms.channel_groups` gives.
    share: of the channels of a group, in (0, 1); at least one goes, and at least one stays.
    score: which go first, as in `channel_masks`.
    prunable: which leaves count as weights; None means `jaxsms.prunable`. Groups of other
      layers are evaluated too.
    key: for random scores.

  Returns:
    One entry for each group, in their order.

  Raises:
    ValueError: share outside (0, 1), groups of other params, an unknown score, or values
      that are not finite, in `params` or of `evaluate`.

  Example:
    >>> import jax.numpy as jnp, jaxsms
    >>> params = {"a": {"kernel": jnp.array([[3.0, 1.0]])},
    ...           "b": {"kernel": jnp.array([[3.0], [1.0]])}}
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 1)))
    >>> evaluate = lambda p: apply(p, jnp.ones((1, 1))).sum()
    >>> first = jaxsms.sensitivity(evaluate, params, groups)[0]
    >>> first.channels, first.weights, first.removed, round(first.loss, 3)
    (2, 4, 1, 0.762)
  """
  if not 0 < share < 1:
    raise ValueError(f"share is {share:g}: give a share of a group's channels, in (0, 1)")
  order = removal_order(
    params, groups=groups, score=score, key=key, prunable=lambda path, leaf: True
  )
  whole, table = order.start, []
  may_go = [True] * len(groups)
  weights = Cost(params, groups, "weights", may_go, prunable=prunable)
  products = None
  if getattr(groups, "multiply_adds", None) is not None:
    products = Cost(params, groups, "multiply_adds", may_go)
  entries = [EntryCount(place) for place in channel_leaves(params, groups)]
  owner = np.repeat(np.arange(len(groups)), [group.size for group in groups])
  dense = _measured(evaluate, params, "the whole model")
  for number, group in enumerate(groups):
    weakest = order.channels[owner[order.channels] == number]
    gone = weakest[: max(round(share * group.size), 1)]
    kept, without = list(whole), list(whole)
    kept[number] = ~np.isin(np.flatnonzero(owner == number), gone)
    without[number] = np.zeros(group.size, bool)
    loss = 0.0
    if len(gone):
      pruned = apply_masks(params, masks_of_channels(params, groups, kept))
      what = f"the model without {len(gone)} channels of {group.places[0][0]}"
      loss = dense - _measured(evaluate, pruned, what)
    table.append(
      GroupSensitivity(
        name=group.places[0][0],
        channels=group.size,
        weights=int(weights.removed(without)),
        multiply_adds=None if products is None else round(products.removed(without)),
        bytes=sum(
          (count(whole) - count(without)) * count.place.leaf.dtype.itemsize
          for count in entries
        ),
        removed=len(gone),
        loss=loss,
      )
    )
  return table


def _measured(evaluate, params, what: str) -> float:
  value = float(evaluate(params))
  if not np.isfinite(value):
    raise ValueError(
      f"evaluate gives {value} of {what}: give a measure that is finite, such as accuracy"
    )
  return value
