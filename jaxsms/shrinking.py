"""Soups of networks that are cut after each pruning."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxsms.channels import channel_groups, compact
from jaxsms.channels.budgets import channel_masks
from jaxsms.phases import Weighted
from jaxsms.pruning import magnitude_masks
from jaxsms.soups import uniform_soup
from jaxsms.trees import PyTree


def check_takes_cut(retrain: Callable[..., Any]) -> None:
  """Raises ValueError where the caller's training cannot be called with `cut`."""
  try:
    signature = inspect.signature(retrain)
  except (TypeError, ValueError):  # of a function that does not say
    return
  try:
    signature.bind(*["key", "params", "masks", "ingredient", "cut"])
  except TypeError:
    raise ValueError(
      f"retrain takes {signature}: with shrink it is called as "
      "retrain(key, params, masks, ingredient, cut), so give it a fifth argument cut"
    ) from None


class Shrinking:
  """A network that is pruned in its full shapes, and trained in those that are left.

  In every phase `prune` sees the full shapes, with zeros where the network was cut: shares
  stay those of the dense network, and scores and losses are functions of it. What is
  evaluated for a merge is of full shapes too.

  Attributes:
    prune: the pruning, with groups where it takes them.
  """

  def __init__(self, shrink: Any, params: PyTree, prune: Callable[..., PyTree]):
    """Traces the network.

    Args:
      shrink: (apply, *inputs): what `channel_groups` and `compact` take.
      params: the dense network's.
      prune: `prune(params, sparsity, masks=masks, groups=groups)`, or without groups. Of
        the default, single weights, whole channels take the place.

    Raises:
      ValueError: `shrink` is something else, or the network cannot be traced.
    """
    if not isinstance(shrink, tuple) or len(shrink) < 2 or not callable(shrink[0]):
      raise ValueError(
        f"shrink is {type(shrink).__name__}: give a tuple (apply, *inputs), the network "
        "and what it is called with after its params"
      )
    self._trace, self._masks = shrink, None
    self._network: Any = None  # a `Compact`, from the first pruning on
    self.prune = channel_masks if prune is magnitude_masks else prune
    if _takes_groups(self.prune):
      apply, *inputs = shrink
      groups = channel_groups(apply, params, *inputs)
      self.prune = functools.partial(self.prune, groups=groups)

  @property
  def expand(self) -> Callable[[PyTree], PyTree]:
    """Of this phase: a cut tree in full shapes, zeros where it was cut."""
    return self._network.expand

  @property
  def cut(self) -> Callable[[Callable], Callable]:
    """Of this phase: a function of params in full shapes, on the cut ones."""
    return self._network.cut

  def pruning(self, prune_phase: Callable[..., tuple]) -> Callable[..., tuple]:
    """The pruning of one phase, of a cut network, whose result is cut further.

    Args:
      prune_phase: `prune_phase(params, masks, sparsity)` of full shapes gives params, masks
        and a record.
    """
    apply, *inputs = self._trace

    def pruned(params, masks, sparsity):
      if self._network is not None:
        params, masks = self._network.expand(params), self._masks
      params, self._masks, record = prune_phase(params, masks, sparsity)
      self._network = compact(apply, params, self._masks, *inputs)
      return self._network.params, self._network.shrink(self._masks), record

    return pruned

  def retrain(self, retrain: Callable[..., Any]) -> Callable[..., Any]:
    """The caller's training of one copy, of this phase: it gets `cut` as well."""
    cut = self.cut  # this phase's: programs are kept, and the network changes

    def one(key, params, masks, ingredient):
      return retrain(key, params, masks, ingredient, cut)

    return one

  def merge(self, merge: Callable[[PyTree], Any]) -> Callable[[PyTree], Any]:
    """A merge of cut candidates by a merge whose functions are of full shapes."""
    if merge is uniform_soup:
      return merge
    network = self._network

    def merged(candidates):
      soup = merge(jax.vmap(network.expand)(candidates))
      structure: Any = jax.tree.structure(candidates)
      if isinstance(soup, Weighted) and structure == jax.tree.structure(soup.params):
        return soup._replace(params=network.shrink(soup.params))
      if structure == jax.tree.structure(soup):
        return network.shrink(soup)
      if isinstance(soup, tuple) and structure == jax.tree.structure(soup[0]):
        return network.shrink(soup[0]), *soup[1:]
      return soup  # which is no model: `merge_phase` says so

    return merged


def _takes_groups(prune: Callable[..., PyTree]) -> bool:
  parameters = inspect.signature(prune).parameters
  return "groups" in parameters or any(
    p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
  )
