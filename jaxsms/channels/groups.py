"""Groups of channels that can only go together, read from the traced function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsms.channels import calls, elementwise, indexing, products, reductions, shapes
from jaxsms.channels.labels import FINITE, ZERO, Axis, Fixed
from jaxsms.channels.values import Value, Walk
from jaxsms.trace import WeightUse, uses_in
from jaxsms.trees import (
  PyTree,
  is_array,
  is_floating,
  is_parameter,
  path_names,
  path_string,
  shape_of,
  split_leaves,
)

RULES = {
  name: rule
  for room in (elementwise, shapes, indexing, products, reductions, calls)
  for name, rule in room.RULES.items()
}


class ChannelGroup(NamedTuple):
  """Channels with positions in the same leaves, each of which can be removed alone.

  Attributes:
    size: number of channels.
    places: (path of the leaf, axis) of all that the channels have positions in.
    indices: for each place int [size], the position of each channel, or [size, k] where
      each has several.
  """

  size: int
  places: tuple[tuple[str, int], ...]
  indices: tuple[np.ndarray, ...]


class ChannelGroups(Sequence):
  """Groups of channels, and what is left alone.

  Attributes:
    multiply_adds: of each leaf that is in a product, by its path, for these inputs.
    outputs: which axes of such a leaf (or of a table of rows) are its layer's outputs.
    left_alone: (place, reason) for each axis that has positions in no group; a place is
      written "Dense_0/kernel, axis 1".

  Example:
    >>> params = {"w": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
    >>> groups = channel_groups(lambda p, x: x @ p["w"] @ p["out"], params, np.ones((1, 4)))
    >>> len(groups), groups[0].size, groups.multiply_adds
    (1, 8, {'w': 32, 'out': 16})
  """

  def __init__(
    self,
    groups: Sequence[ChannelGroup],
    left_alone: Sequence[tuple[str, str]],
    uses: Mapping[str, WeightUse],
  ):
    self._groups, self.left_alone = tuple(groups), tuple(left_alone)
    self.multiply_adds = {name: use.multiply_adds for name, use in uses.items()}
    self.outputs = {name: use.outputs for name, use in uses.items()}

  def __len__(self) -> int:
    return len(self._groups)

  def __getitem__(self, index):
    return self._groups[index]

  def __iter__(self) -> Iterator[ChannelGroup]:
    return iter(self._groups)

  def __repr__(self) -> str:
    return f"ChannelGroups({list(self._groups)}, left_alone={list(self.left_alone)})"


def channel_groups(
  apply: Callable[..., Any], params: PyTree, *inputs: Any
) -> ChannelGroups:
  """Finds the channels of a network that can only be removed together.

  `apply` is traced and nothing is computed, so a network of any framework will do.
  Operations tie positions of one leaf to positions of another. Positions that are tied
  together are one channel: a neuron, a filter with its bias, its normalization and the
  weights that read it, a head of an attention, or a column that all heads share. Axes of
  length 1 are not cut.

  Args:
    apply: the network, called with `params` and `inputs`. In training it may return new
      batch statistics too.
    params: tree of parameters; shapes are enough (`jax.eval_shape`). May hold other leaves,
      such as batch statistics.
    *inputs: arrays, or their `jax.ShapeDtypeStruct`s.

  Returns:
    The groups, each of channels that have positions in the same places. Whatever reaches an
    input, an output or a place where other values would change is in none, and
    `.left_alone` says why.

  Raises:
    ValueError: `apply` cannot be traced with these arguments.

  Example:
    >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8), "out": jnp.ones((8, 2))}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["out"]
    >>> groups = channel_groups(apply, params, jnp.ones((1, 4)))
    >>> [(group.size, group.places) for group in groups]
    [(8, (('b', 0), ('out', 0), ('w', 1)))]
    >>> groups.left_alone[0]
    ('out, axis 1', 'it is an output of the function')
  """
  return Trace(apply, params, inputs).groups()


class Trace:
  """A function, traced and walked.

  Attributes:
    paths: of the leaves of params that are arrays.
    leaves: their shapes and dtypes.
    axes: their labels, as the walk began.
    walk: the walk, with its labels.
    record: of the function.
  """

  def __init__(
    self,
    apply: Callable[..., Any],
    params: PyTree,
    inputs: Sequence[Any],
    zeros: Sequence[Sequence[np.ndarray | None]] | None = None,
    unused_stay: bool = True,
  ):
    arrays, filled = split_leaves(params, lambda path, leaf: is_array(leaf))
    with_paths = jax.tree.leaves_with_path(params)
    self.paths = [path for path, leaf in with_paths if is_array(leaf)]
    self.leaves = list(map(shape_of, arrays))

    def function(leaves, *inputs):
      return apply(filled(leaves), *inputs)

    inputs = jax.tree.map(lambda x: shape_of(x) if is_array(x) else x, tuple(inputs))
    try:
      closed, outs = jax.make_jaxpr(function, return_shape=True)(self.leaves, *inputs)
    except Exception as error:
      line = str(error).split("\n")[0].split(". ")[0].rstrip(".")
      raise ValueError(
        "apply cannot be traced with these params and inputs, called as apply(params, "
        f"*inputs): {type(error).__name__}: {line}"
      ) from error
    self.closed, self.out_tree = closed, jax.tree.structure(outs)
    self.walk = Walk(RULES, derivatives=zeros is not None)
    labels = self.walk.labels
    self.axes: list[tuple[Axis | Fixed, ...]] = []
    for i, (path, leaf) in enumerate(zip(self.paths, self.leaves, strict=True)):
      axes: list[Axis | Fixed] = []
      for axis, n in enumerate(leaf.shape):
        if not is_floating(leaf):
          axes.append(labels.fixed("it holds no floating numbers"))
          continue
        one = labels.fresh(n, ZERO if is_parameter(path, leaf) else FINITE)
        if zeros is not None and isinstance(one, Axis) and is_parameter(path, leaf):
          zero = zeros[i][axis]
          one.values[:] = FINITE if zero is None else np.where(zero, ZERO, FINITE)
        axes.append(one)
      self.axes.append(tuple(axes))
    own = [
      Value(axes, layer=path_string(path))
      for path, axes in zip(self.paths, self.axes, strict=True)
    ]
    jaxpr = closed.jaxpr
    rest = [
      self.walk.stays(v.aval.shape, "it is an input of the function")
      for v in jaxpr.invars[len(own) :]
    ]
    self.record = self.walk.run(jaxpr, closed.consts, [*own, *rest])
    self._outputs(outs)
    if unused_stay:
      self._unused(calls.used(jaxpr)[: len(own)])

  def _unused(self, used):
    """Leaves that nothing reads stay, unless an output is their new value."""
    labels, tied = self.walk.labels, set()
    for axes in (axes for axes, flag in zip(self.axes, used, strict=True) if flag):
      for axis in map(labels.normal, axes):
        if isinstance(axis, Axis):
          tied |= set(axis.labels.ravel().tolist())
    for axes in (axes for axes, flag in zip(self.axes, used, strict=True) if not flag):
      for axis in map(labels.normal, axes):
        if isinstance(axis, Axis):
          alone = ~np.isin(axis.labels, list(tied))
          labels.freeze(axis, "the function does not use it", alone)

  def _outputs(self, outs):
    """Outputs stay, but for those that are new values of a leaf of params."""
    flat = jax.tree.leaves_with_path(outs)
    for (path, out), value in zip(flat, self.record.outs, strict=True):
      leaf = self._same_leaf(path, out, value)
      for i, axis in enumerate(value.axes):
        if leaf is None:
          self.walk.labels.freeze(axis, "it is an output of the function")
        else:
          self.walk.labels.tie(axis, self.axes[leaf][i])

  def _same_leaf(self, path, out, value):
    """The leaf of params that an output has the path (or most of it) and shape of."""
    names, best = path_names(path), []
    for i, (own, leaf) in enumerate(zip(self.paths, self.leaves, strict=True)):
      if leaf.shape != out.shape or not leaf.shape:
        continue
      mine, common = path_names(own), 0
      while common < min(len(mine), len(names)) and mine[-1 - common] == names[-1 - common]:
        common += 1
      if common >= max(len(mine) - 1, 1):  # all of the path but its root
        best.append((common, i))
    best.sort(reverse=True)
    if not best or (len(best) > 1 and best[0][0] == best[1][0]):
      return None
    common, number = best[0]
    whole = common == len(path_names(self.paths[number])) > 1
    return number if whole or self._is_state(number, value) else None

  def _is_state(self, leaf, value):
    """Whether an output is a batch statistic, or made from the leaf of its name."""
    if not is_parameter(self.paths[leaf], self.leaves[leaf]):
      return True
    normal = self.walk.labels.normal
    for own, axis in zip(self.axes[leaf], value.axes, strict=True):
      own, axis = normal(own), normal(axis)
      if isinstance(own, Axis) and not (
        isinstance(axis, Axis) and np.array_equal(own.labels, axis.labels)
      ):
        return False
    return True

  def channels(self) -> list[tuple[np.ndarray, list, list[np.ndarray]]]:
    """Labels that may go, by their places: (labels [n], places, positions [n, k] in each).

    A place is (leaf, axis, layer of labels, k).
    """
    labels, parts = self.walk.labels, []
    places: list[tuple[int, int, int]] = []
    for leaf, axes in enumerate(self.axes):
      for axis, one in enumerate(axes):
        normal = labels.normal(one)
        rows = normal.labels if isinstance(normal, Axis) else np.zeros([0, 0], int)
        for layer, row in enumerate(rows):
          where = np.flatnonzero(labels.may_go(row))
          parts.append((row[where], np.full(len(where), len(places)), where))
          places.append((leaf, axis, layer))
    if not parts:
      return []
    roots, place, where = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.lexsort((where, place, roots))
    roots, place, where = roots[order], place[order], where[order]
    # Runs of positions of one label in one place, and of runs of one label.
    new = np.append(True, (np.diff(roots) != 0) | (np.diff(place) != 0))
    run = np.flatnonzero(new)
    length = np.diff(np.append(run, len(roots)))
    first = np.flatnonzero(np.append(True, np.diff(roots[run]) != 0))
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 2**63, (2, len(places)), dtype=np.uint64)
    number = length.astype(np.uint64)
    # Sums modulo 2^64 that tell sets of places with their numbers of positions apart.
    marks = (weights[:, place[run]] * number + number * number).astype(np.uint64)
    marks = np.add.reduceat(marks, first, axis=1)
    runs = np.diff(np.append(first, len(run)))
    _, kind = np.unique(
      np.stack([*marks, runs.astype(np.uint64)]), axis=1, return_inverse=True
    )
    kind, found = kind.ravel(), []
    by_kind = np.argsort(kind, kind="stable")
    for members in np.split(by_kind, np.flatnonzero(np.diff(kind[by_kind])) + 1):
      one, own, positions = members[0], [], []
      for i in range(first[one], first[one] + runs[one]):
        k, shift = length[i], i - first[one]
        starts = run[first[members] + shift]
        own.append((*places[place[run[i]]], int(k)))
        positions.append(where[starts[:, None] + np.arange(k)])
      sort = np.argsort(positions[0][:, 0])
      found.append((roots[run[first[members]]][sort], own, [p[sort] for p in positions]))
    return sorted(found, key=lambda entry: (entry[1], entry[2][0][0, 0]))

  def groups(self) -> ChannelGroups:
    """Channels with the same places, together."""
    groups, gone = [], list[tuple[str, int]]()
    for channels, places, positions in self.channels():
      names = tuple((path_string(self.paths[leaf]), axis) for leaf, axis, *_ in places)
      whole = any(k == self.leaves[leaf].shape[axis] for leaf, axis, _, k in places)
      if len(channels) == 1 and whole:
        gone += names
      else:
        indices = tuple(p[:, 0] if p.shape[1] == 1 else p for p in positions)
        groups.append(ChannelGroup(len(channels), names, indices))
    uses = uses_in(self.closed.jaxpr, [path_string(path) for path in self.paths])
    return ChannelGroups(groups, self._left_alone(gone), uses)

  def _left_alone(self, gone):
    labels, left = self.walk.labels, []
    for path, leaf, axes in zip(self.paths, self.leaves, self.axes, strict=True):
      for i, one in enumerate(axes):
        axis, name = labels.normal(one), path_string(path)
        if leaf.shape[i] == 1 or not is_floating(leaf):
          continue
        if (name, i) in gone:
          left.append((f"{name}, axis {i}", "all of its positions go together"))
        elif isinstance(axis, Fixed) or not labels.may_go(axis.labels).any(0).all():
          left.append((f"{name}, axis {i}", labels.why(axis)))
    return left
