"""Networks cut to the channels that their masks leave."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.channels.arrays import check_left_shape, expanded, masked_leaf, taken
from jaxsms.channels.emptied import (
  Positions,
  emptied,
  left_alone,
  warn_of_whole_channels,
)
from jaxsms.channels.evaluate import Cut, evaluate
from jaxsms.channels.groups import Trace
from jaxsms.channels.inputs import Inputs
from jaxsms.channels.labels import ZERO, Axis, Fixed
from jaxsms.channels.values import Record
from jaxsms.mask_trees import mask_leaves
from jaxsms.trees import PyTree, is_array, is_concrete, path_string


class Compact:
  """A network whose arrays are smaller: what `compact` gives.

  Attributes:
    params: the tree of the full network, with smaller arrays.
    masks: its masks, cut in the same way. Single weights may be removed in what is
      left.
    apply: the network's function on smaller params and any inputs. It works under `jit`,
      `grad` and `vmap`, in training, and with other batch sizes, also symbolic ones of
      `jax.export`. Random numbers inside, such as those of dropout, have the same
      distribution as in the full network, but other values.
    left_alone: where the masks empty positions that stay, and why, by place such as
      "Dense_0/kernel, axis 1".
    layout: what was cut, as lists and strings that JSON can store, for `compact_from`.

  Example:
    >>> params = {"w": jnp.ones((2, 3)), "out": jnp.ones((3, 2))}
    >>> masks = {"w": np.arange(6).reshape(2, 3) % 3 < 2, "out": np.ones((3, 2), bool)}
    >>> small = compact(lambda p, x: x @ p["w"] @ p["out"], params, masks, jnp.ones(2))
    >>> small.params["w"].shape, small.params["out"].shape
    ((2, 2), (2, 2))
    >>> small.layout[1]["path"], small.layout[1]["kept"]  # positions by axis
    ('w', {'1': [0, 1]})
  """

  def __init__(self, apply, paths, leaves, zeros, kept, params, convolution=None):
    self._paths, self._leaves, self._zeros, self._kept = paths, leaves, zeros, kept
    self.params, self.masks, self._convolution = params, None, convolution
    self.left_alone: dict[str, str] = {}
    self.apply = self.cut(apply)

  @property
  def layout(self) -> list[dict[str, Any]]:
    """For each array its path, full shape, dtype, and by axis which positions stay."""
    rows = zip(self._paths, self._leaves, self._kept, self._zeros, strict=True)
    return [
      {
        "path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype),
        "kept": _listed(kept), "empty": _listed(zeros),
      }
      for path, leaf, kept, zeros in rows
    ]  # fmt: skip

  def cut(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a function of full-size params into one of the cut params.

    Args:
      function: a function such as a loss, or another way to call the network. Its first
        argument is params in the full shapes. It is traced once for each set of
        argument shapes and each mesh.

    Returns:
      The function on smaller params. It raises ValueError if `function` uses the
      channels that were cut in a way that changes other values.

    Example:
      >>> params = {"w": jnp.ones((2, 3)), "out": jnp.ones((3, 2))}
      >>> masks = {"w": np.arange(6).reshape(2, 3) % 3 < 2, "out": np.ones((3, 2), bool)}
      >>> apply = lambda p, x: x @ p["w"] @ p["out"]
      >>> small = compact(apply, params, masks, jnp.ones((1, 2)))
      >>> loss = small.cut(lambda p, x: apply(p, x).sum())
      >>> loss(small.params, jnp.ones((1, 2))).item()
      8.0
    """
    traces: dict[Any, tuple[Trace, Cut]] = {}

    def smaller(params, *args, **kwargs):
      leaves, full = self._leaves_and_full(params)
      inputs = Inputs(args, kwargs)
      # A trace belongs to the mesh that it is made under, such as that of a shard_map.
      key = jax.tree.structure(params), inputs.key, jax.sharding.get_abstract_mesh()
      if key not in traces:
        # In training mode a function does not use the batch statistics that are cut.
        trace = Trace(
          inputs.bound(function), full, inputs.arrays, self._zeros, unused_stay=False
        )
        entry = trace, Cut(trace.walk, self._gone(trace), self._convolution)
        if is_concrete(trace.record.consts):  # else they live as long as this call
          traces[key] = entry
      trace, cut = traces.get(key) or entry
      outs = evaluate(cut, trace.record, [*leaves, *inputs.arrays])
      return jax.tree.unflatten(trace.out_tree, outs)

    return smaller

  def _leaves_and_full(self, params):
    """The arrays of cut params, and the tree of the shapes that they had."""
    flat, structure = jax.tree.flatten_with_path(params)
    self._check(flat)
    full = iter(self._leaves)
    every = [next(full) if is_array(x) else x for _, x in flat]
    return [x for _, x in flat if is_array(x)], jax.tree.unflatten(structure, every)

  def _check(self, flat):
    flat = [(path, x) for path, x in flat if is_array(x)]
    if [path_string(path) for path, _ in flat] != self._paths:
      raise ValueError(
        "params does not have the leaves of the cut network: pass a tree like its params"
      )
    for (path, x), leaf, masks in zip(flat, self._leaves, self._kept, strict=True):
      check_left_shape(path, x, leaf, masks)

  def _gone(self, trace: Trace) -> np.ndarray:
    """Which labels of another trace go, so that these positions of the leaves do."""
    labels = trace.walk.labels
    normal = [[labels.normal(axis) for axis in axes] for axes in trace.axes]
    seen, stays = (np.zeros(labels.number, bool) for _ in range(2))
    for axes, masks in zip(normal, self._kept, strict=True):
      for axis, mask in zip(axes, masks, strict=True):
        if isinstance(axis, Axis):
          seen[axis.labels] = True
          stays[axis.labels if mask is None else axis.labels[:, mask]] = True
    gone = seen & ~stays & labels.may_go(np.arange(labels.number))
    gone[0] = False
    for path, axes, masks in zip(trace.paths, normal, self._kept, strict=True):
      for axis, mask in zip(axes, masks, strict=True):
        if mask is None:
          continue
        if isinstance(axis, Fixed) or not np.array_equal(~gone[axis.labels].any(0), mask):
          raise ValueError(
            f"this function cannot have the channels of {path_string(path)} cut that "
            f"the network has not: {labels.why(axis)}"
          )
    return gone

  def shrink(self, tree: PyTree) -> PyTree:
    """Cuts another tree in the same way, such as masks or the state of an optimizer.

    Args:
      tree: tree with the structure of the network's params, in the full shapes.

    Returns:
      The tree with its arrays cut.

    Example:
      >>> params = {"w": jnp.ones((2, 3)), "out": jnp.ones((3, 2))}
      >>> masks = {"w": np.arange(6).reshape(2, 3) % 3 < 2, "out": np.ones((3, 2), bool)}
      >>> small = compact(lambda p, x: x @ p["w"] @ p["out"], params, masks, jnp.ones(2))
      >>> small.shrink({"w": np.arange(6).reshape(2, 3)})["w"].tolist()
      [[0, 1], [3, 4]]
    """
    return self._each(tree, lambda path, x, leaf, masks: taken(x, masks))

  def expand(self, tree: PyTree) -> PyTree:
    """Restores the full shapes of a cut tree.

    Args:
      tree: tree with the structure and shapes of `params`, or a part of it.

    Returns:
      The tree in the full shapes, with zeros where it was cut.

    Raises:
      ValueError: a cut array has another shape than in `params`, or none of them is there.

    Example:
      >>> params = {"w": jnp.ones((2, 3)), "out": jnp.ones((3, 2))}
      >>> masks = {"w": np.arange(6).reshape(2, 3) % 3 < 2, "out": np.ones((3, 2), bool)}
      >>> small = compact(lambda p, x: x @ p["w"] @ p["out"], params, masks, jnp.ones(2))
      >>> small.expand(small.params)["w"].tolist()
      [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """
    found = []

    def one(path, x, leaf, masks):
      if any(mask is not None for mask in masks):
        check_left_shape(path, x, leaf, masks)
      found.append(path)
      return expanded(x, masks)

    full = self._each(tree, one)
    if self._paths and not found:
      raise ValueError(
        f"tree has no leaf of the cut network, such as {self._paths[0]}: pass a tree like "
        "its params"
      )
    return full

  def _each(self, tree, function):
    rows = zip(self._leaves, self._kept, strict=True)
    places = dict(zip(self._paths, rows, strict=True))

    def one(path, x):
      place = places.get(path_string(path))
      return x if place is None or not is_array(x) else function(path, x, *place)

    return jax.tree.map_with_path(one, tree)


def compact(
  apply: Callable[..., Any],
  params: PyTree,
  masks: PyTree,
  *inputs: Any,
  convolution: Callable[..., jax.Array] | None = None,
) -> Compact:
  """Cuts a network to the channels that its masks leave.

  A channel is cut if the masked network does not depend on it: either all weights that
  read it are removed, or it is always 0 because all weights that compute it are
  removed. The masks may be of channels (`channel_masks`) or of single weights. At least
  one position of every axis stays. `.left_alone` says what else stays and why. A warning
  is logged where masks empty whole channels of a layer and none of them can be cut. If
  `small` is the result, `small.apply(small.params, x)` equals
  `apply(apply_masks(params, masks), x)` up to rounding.

  Args:
    apply: the network, called with `params` and `inputs`.
    params: tree of parameters, arrays or shapes. It may hold other leaves.
    masks: tree of bool arrays with the structure of `params`, True where kept. They
      must be concrete.
    *inputs: arrays, or their `jax.ShapeDtypeStruct`s, such as one batch.
    convolution: replaces the plain convolutions of `apply`. An example is
      `jaxsms.convolution.conv_general_dilated`, which is fast for several copies. None
      leaves them as they are.

  Returns:
    The smaller network: `.params`, `.apply`, `.expand`, `.cut`, `.left_alone`.

  Raises:
    ValueError: `apply` cannot be traced with these arguments, masks are traced, or masks
      and params do not fit.

  Example:
    >>> params = {"w": jnp.ones((4, 8)), "out": jnp.ones((8, 2))}
    >>> apply = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["out"]
    >>> masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
    >>> masks["w"][:, 3:] = False
    >>> small = compact(apply, params, masks, jnp.ones((1, 4)))
    >>> jax.tree.map(jnp.shape, small.params)
    {'out': (3, 2), 'w': (4, 3)}
    >>> small.apply(small.params, jnp.ones((5, 4))).shape
    (5, 2)
  """
  if not is_concrete(masks):
    raise ValueError("masks are traced: call compact outside of jit, with masks of values")
  masks = _full_masks(params, masks)
  zeros = emptied(params, masks)
  trace = Trace(apply, params, inputs, zeros)
  kept = _kept(trace, zeros)
  paths = [path_string(path) for path in trace.paths]
  network = Compact(apply, paths, trace.leaves, zeros, kept, None, convolution)
  network.params = network.shrink(jax.tree.map(masked_leaf, params, masks))
  network.masks = jax.tree.map(np.asarray, masks)
  network.masks = network.shrink(network.masks)
  network.left_alone = left_alone(trace, zeros, kept)
  arrays = jax.tree.map(lambda x, mask: mask if is_array(x) else None, params, masks)
  warn_of_whole_channels(trace, arrays, zeros, kept, network.left_alone)
  return network


def compact_from(
  apply: Callable[..., Any],
  params: PyTree,
  layout: Sequence[dict[str, Any]],
  convolution: Callable[..., jax.Array] | None = None,
) -> Compact:
  """Rebuilds a cut network from its saved params and layout.

  Args:
    apply: the network's function, of params in the full shapes.
    params: tree of smaller arrays: the `params` of a `Compact`, or trained from them.
    layout: the `layout` of that `Compact`.
    convolution: as in `compact`.

  Returns:
    The cut network. Its `masks` is None.

  Raises:
    ValueError: params and layout do not fit.

  Example:
    >>> params, masks = {"w": jnp.ones((4, 2))}, {"w": np.ones((4, 2), bool)}
    >>> small = compact(lambda p, x: x @ p["w"], params, masks, jnp.ones((1, 4)))
    >>> again = compact_from(lambda p, x: x @ p["w"], small.params, small.layout)
    >>> again.apply(small.params, jnp.ones((1, 4)))
    Array([[4., 4.]], dtype=float32)
  """
  paths = [row["path"] for row in layout]
  leaves = [
    jax.ShapeDtypeStruct(tuple(row["shape"]), _dtype(row["dtype"])) for row in layout
  ]
  kept, zeros = ([masks_of_row(row, name) for row in layout] for name in ("kept", "empty"))
  network = Compact(apply, paths, leaves, zeros, kept, params, convolution)
  network._leaves_and_full(params)
  return network


def _listed(masks):
  """By axis, the positions where a mask is True, as JSON holds them."""
  return {str(i): np.flatnonzero(m).tolist() for i, m in enumerate(masks) if m is not None}


def masks_of_row(row: Mapping[str, Any], name: str) -> list[np.ndarray | None]:
  """By axis, which positions a row of a layout lists under a name; None without a list."""
  masks: list[np.ndarray | None] = [None] * len(row["shape"])
  for axis, positions in row[name].items():
    masks[int(axis)] = np.isin(np.arange(row["shape"][int(axis)]), positions)
  return masks


def _dtype(name):
  if name.startswith("key<"):
    return jax.random.key(0, impl=name[4:-1]).dtype
  return jnp.dtype(name)


def _full_masks(params, masks):
  """The masks in the structure of `params`; True where a leaf is no array."""
  own = [True if mask is None else mask for mask in mask_leaves(params, masks)]
  return jax.tree.unflatten(jax.tree.structure(params), own)


def _kept(trace: Trace, zeros: Positions) -> Positions:
  """Which positions of the leaves stay, where a label goes that nothing depends on."""
  labels = trace.walk.labels
  gone = np.zeros(labels.number, bool)
  normal = [[labels.normal(axis) for axis in axes] for axes in trace.axes]
  for axes in normal:
    for axis in axes:
      if isinstance(axis, Axis):
        gone[axis.labels[axis.values == ZERO]] = True
  gone &= labels.may_go(np.arange(labels.number))
  gone[0] = False
  _leave_some(trace, gone)
  cut = Cut(trace.walk, gone)
  return [[cut.kept(axis) for axis in axes] for axes in normal]


def _leave_some(trace, gone):
  """No axis of any value is left without positions: of each, the first stays."""
  labels, seen = trace.walk.labels, set()

  def visit(record: Record):
    for value in record.values.values():
      for axis in value.axes:
        if isinstance(axis, Axis) and id(axis) not in seen:
          seen.add(id(axis))
          normal = labels.normal(axis)
          if isinstance(normal, Axis) and gone[normal.labels].any(0).all():
            gone[normal.labels[:, 0]] = False
    for inner in record.inner.values():
      for one in inner:
        for record in getattr(one, "records", (one,)):
          visit(record)

  visit(trace.record)
