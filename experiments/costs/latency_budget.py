"""--budget=latency: how long the network takes with some of its channels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsms import ChannelGroups
from jaxsms.channels.latency import Call, ready, seconds_of, seconds_ratio
from jaxsms.channels.order import removal_order
from jaxsms.channels.places import masks_with
from jaxsms.training import Model
from jaxsms.training.cutting import cut_network

BATCH = 32  # images
TOLERANCE = 0.1  # how far from a goal seconds may be


class NetworkClock:
  """Seconds of an inference of a cut network; each shape is measured once in a run.

  A network is timed by turns with the dense one, since a machine's speed wanders: its
  seconds are its share of the dense network's time, times the seconds that were noted for
  the dense network first.

  One process measures: several would choose different channels.

  A second look gives the first answer, also after a break: pruning chooses by these
  seconds, and a phase that is taken up again has to choose the same channels.

  Attributes:
    known: seconds by how many channels of each group are kept; saved with the run.
  """

  def __init__(
    self,
    module: Any,
    shapes: Model,
    groups: Callable[[], ChannelGroups],
    image_shape: tuple[int, ...],
  ):
    """Measures nothing yet.

    Args:
      module: the network.
      shapes: of its parameters and batch statistics.
      groups: gives the groups of its channels.
      image_shape: [height, width, channels].

    Raises:
      ValueError: there are several processes.
    """
    if jax.process_count() > 1:
      raise ValueError(
        f"--budget=latency is measured by one process, of {jax.process_count()}: "
        "give --budget=multiply_adds"
      )
    self._module, self._shapes = module, shapes
    self._groups, self._image_shape = groups, image_shape
    self._dense: Call | None = None  # compiled once
    self.known: dict[str, float] = {}

  def __call__(self, kept: Sequence[np.ndarray]) -> float:
    """Seconds of a batch.

    Args:
      kept: bool [size] for each group.
    """
    name = ",".join(str(int(one.sum())) for one in kept)
    if name not in self.known:
      self.known[name] = self._seconds(kept)
    return self.known[name]

  def _seconds(self, kept):
    if self._dense is None:
      apply = functools.partial(self._module.apply, train=False)
      self._dense = self._inference(apply, self._shapes._asdict())
    if all(one.all() for one in kept):
      return seconds_of(self._dense)
    masks = masks_with(self._shapes.params, self._groups(), kept)
    network = cut_network(self._module, self._shapes, masks, self._image_shape)
    cut = self._inference(network.apply, network.shrink(self._shapes._asdict()))
    dense = self([np.ones(len(one), bool) for one in kept])
    return dense * seconds_ratio(cut, self._dense)

  def _inference(self, apply, shapes):
    # Time does not depend on the numbers; these stay finite.
    variables = jax.tree.map(lambda x: np.full(x.shape, 1e-3, x.dtype), shapes)
    return ready(apply, variables, np.ones((BATCH, *self._image_shape), np.float32))

  def check(self, goal: float) -> None:
    """Raises ValueError where no choice of channels is fast enough.

    It measures: for a new run alone, as a busy machine should not keep one from going on.

    Args:
      goal: share of the time to save, in [0, 1).
    """
    groups = self._groups()
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), self._shapes.params)
    order = removal_order(ones, groups=groups)
    fewest = order.without(len(order.ends) - 1)
    dense = self([np.ones(group.size, bool) for group in groups])
    least, asked = self(fewest), (1 - goal) * dense
    if least > asked * (1 + TOLERANCE):
      raise ValueError(
        f"--goal_sparsity is {goal:g} of the latency: {BATCH} images would take "
        f"{1000 * asked:.3g} ms, but with the fewest channels they take "
        f"{1000 * least:.3g} of {1000 * dense:.3g} ms, choose a smaller one"
      )
