"""Networks cut to the channels that their masks leave."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.channels.evaluate import Cut, evaluate, take
from jaxsms.channels.groups import Trace, shaped
from jaxsms.channels.labels import ZERO, Axis, Fixed
from jaxsms.channels.values import Record
from jaxsms.trees import PyTree, is_array, is_concrete, match_masks, path_string

Kept = list[list[np.ndarray | None]]  # of each leaf, for each axis bool [n], or None


class Compact:
  """A network whose arrays are smaller.

  Attributes:
    params: the tree of the full network, with smaller arrays.
    apply: the network's function, on these.
  """

  def __init__(self, apply, leaves, zeros, kept):
    self._leaves, self._zeros, self._kept = leaves, zeros, kept
    self.params: PyTree = None
    self.apply = self.cut(apply)

  def cut(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of full-size params, on the cut ones."""
    traces: dict[Any, tuple[Trace, Cut]] = {}

    def smaller(params, *args, **kwargs):
      flat, structure = jax.tree_util.tree_flatten_with_path(params)
      self._check(flat)
      full = list(x for _, x in flat)
      arrays = [i for i, x in enumerate(full) if is_array(x)]
      leaves = [full[i] for i in arrays]
      for i, leaf in zip(arrays, self._leaves, strict=True):
        full[i] = leaf
      inputs, of_inputs = jax.tree.flatten((args, kwargs))
      moving = [i for i, x in enumerate(inputs) if is_array(x) or isinstance(x, float)]
      key = (structure, of_inputs, *(
        (np.shape(x), str(jnp.result_type(x)), isinstance(x, float)) if i in moving else x
        for i, x in enumerate(inputs)
      ))  # fmt: skip
      if key not in traces:

        def rebuilt(params, *some):
          every = list(inputs)
          for i, x in zip(moving, some, strict=True):
            every[i] = x
          args, kwargs = jax.tree.unflatten(of_inputs, every)
          return function(params, *args, **kwargs)

        trace = Trace(
          rebuilt, jax.tree.unflatten(structure, full), [inputs[i] for i in moving],
          self._zeros,
        )  # fmt: skip
        traces[key] = trace, Cut(trace.walk, self._gone(trace))
      trace, cut = traces[key]
      outs = evaluate(cut, trace.record, [*leaves, *(inputs[i] for i in moving)])
      return jax.tree.unflatten(trace.out_tree, outs)

    return smaller

  def _check(self, flat):
    flat = [(path, x) for path, x in flat if is_array(x)]
    if len(flat) != len(self._leaves):
      raise ValueError(
        f"params has {len(flat)} arrays and the cut network {len(self._leaves)}: pass "
        "the tree of its params"
      )
    for (path, x), leaf, masks in zip(flat, self._leaves, self._kept, strict=True):
      shape = _shape(leaf, masks)
      if x.shape != shape:
        raise ValueError(
          f"{path_string(path)} has shape {list(x.shape)} and the cut network "
          f"{list(shape)}: pass its params, not the full ones"
        )

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
    """Of a tree of full-size arrays, such as masks, what stays; leaves [...]."""
    return self._each(tree, lambda x, leaf, masks: _taken(x, masks))

  def expand(self, tree: PyTree) -> PyTree:
    """A cut tree in the full shapes, zeros where it was cut."""
    return self._each(tree, lambda x, leaf, masks: _expanded(x, masks))

  def _each(self, tree, function):
    flat, structure = jax.tree.flatten(tree)
    places = iter(zip(self._leaves, self._kept, strict=True))
    return jax.tree.unflatten(
      structure, [function(x, *next(places)) if is_array(x) else x for x in flat]
    )


def compact(
  apply: Callable[..., Any], params: PyTree, masks: PyTree, *inputs: Any
) -> Compact:
  """Cuts what the masks emptied out of a network."""
  masks = match_masks(params, masks)
  zeros = _zeros(params, masks)
  trace = Trace(apply, params, inputs, zeros)
  kept = _kept(trace, zeros)
  network = Compact(apply, trace.leaves, zeros, kept)
  network.params = network.shrink(jax.tree.map(_masked, params, masks))
  return network


def _zeros(params, masks) -> Kept:
  """For each leaf and axis, bool [n]: at which positions the masks leave nothing."""
  zeros = []
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True)
  for leaf, mask in pairs:
    if not is_array(leaf):
      continue
    mask = np.asarray(mask)
    rank = len(leaf.shape)
    if mask.shape != leaf.shape or mask.all():
      zeros.append([None] * rank)
      continue
    zeros.append(
      [~mask.any(tuple(j for j in range(rank) if j != i)) for i in range(rank)]
    )
  return zeros


def _kept(trace: Trace, zeros: Kept) -> Kept:
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


def _taken(x, masks):
  if all(mask is None for mask in masks):
    return x
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(_shape(x, masks), x.dtype)
  alone = is_concrete(x) and isinstance(x, jax.Array) and len(x.devices()) == 1
  if not alone:
    return take(x, masks)
  return jax.device_put(take(np.asarray(x), masks), x.sharding)  # no program to compile


def _masked(x, mask):
  """What is left of a leaf, on the host where that takes no program."""
  if not is_array(x) or isinstance(x, jax.ShapeDtypeStruct) or np.all(mask):
    return x
  if isinstance(x, jax.Array) and is_concrete(x) and len(x.devices()) == 1:
    return jax.device_put(np.where(mask, x, np.zeros((), x.dtype)), x.sharding)
  return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _shape(leaf, masks: Sequence[np.ndarray | None]) -> tuple[int, ...]:
  pairs = zip(leaf.shape, masks, strict=True)
  return tuple(n if mask is None else int(mask.sum()) for n, mask in pairs)


def _expanded(x, masks):
  for axis, mask in enumerate(masks):
    if mask is not None:
      zero = jnp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)
      where = np.where(mask, np.cumsum(mask) - 1, x.shape[axis])
      x = jnp.take(jnp.concatenate([x, zero], axis), where, axis=axis)
  return x
