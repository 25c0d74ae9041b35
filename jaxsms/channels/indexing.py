"""Rules for operations that take or replace positions by index, such as embeddings."""

from typing import Any

from jaxsms.channels.labels import Axis, Fixed
from jaxsms.channels.shapes import joined
from jaxsms.channels.values import Value, Walk, reason


def dynamic_slice(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Axes taken whole pass; of others it is not known which positions are taken."""
  value, shape = ins[0], equation.invars[0].aval.shape
  axes = list(value.axes)
  for i, size in enumerate(equation.params["slice_sizes"]):
    if size != shape[i]:
      walk.freeze(value, i, "positions are taken from it by index")
      axes[i] = walk.labels.fixed(reason("positions are taken from it by index", value))
  return [Value(tuple(axes), value.known)]


def dynamic_update_slice(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Axes replaced whole are tied; of others it is not known which positions are."""
  value, update = ins[:2]
  shapes = [v.aval.shape for v in equation.invars[:2]]
  axes = []
  for i, (n, size) in enumerate(zip(*shapes, strict=True)):
    if n == size:
      axes.append(joined(walk, [value.axes[i], update.axes[i]]))
      continue
    for one in (value, update):
      walk.freeze(one, i, "positions of it are replaced by index")
    axes.append(walk.labels.normal(value.axes[i]))
  return [Value(tuple(axes), value.known if value.known == update.known else None)]


def gather(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Axes that are taken whole, such as the width of an embedding, pass."""
  value, indices = ins
  d, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
  shape = equation.invars[0].aval.shape
  batching = d.operand_batching_dims
  text = "positions are taken from it by index"
  kept = [i for i in range(len(shape)) if i not in (*d.collapsed_slice_dims, *batching)]
  for i in range(len(shape)):
    if i not in kept or sizes[i] != shape[i] or i in d.start_index_map:
      walk.freeze(value, i, text)
  axes: list[Axis | Fixed | None] = [None] * len(equation.outvars[0].aval.shape)
  for i, j in zip(kept, d.offset_dims, strict=True):
    axes[j] = value.axes[i] if sizes[i] == shape[i] else walk.labels.fixed(text)
  walk.freeze(indices, len(indices.axes) - 1, text)
  rest = iter(indices.axes[:-1])
  for i in d.start_indices_batching_dims:
    walk.freeze(indices, i, text)
  return [Value(tuple(next(rest) if a is None else a for a in axes))]


def scatter(walk: Walk, equation: Any, ins: list[Value]) -> list[Value]:
  """Axes that are replaced whole are tied with those of the updates."""
  value, indices, update = ins
  d = equation.params["dimension_numbers"]
  shapes = [v.aval.shape for v in equation.invars]
  batching = d.operand_batching_dims
  text = "positions of it are replaced by index"
  window = [
    i for i in range(len(shapes[0])) if i not in (*d.inserted_window_dims, *batching)
  ]
  of = dict(zip(window, d.update_window_dims, strict=True))
  axes = list(value.axes)
  for i, n in enumerate(shapes[0]):
    whole = i in of and shapes[2][of[i]] == n and i not in d.scatter_dims_to_operand_dims
    if whole:
      axes[i] = joined(walk, [value.axes[i], update.axes[of[i]]])
    else:
      walk.freeze(value, i, text)
      if i in of:
        walk.freeze(update, of[i], text)
  for i in range(len(indices.axes)):
    walk.freeze(indices, i, text)
  for i in range(len(update.axes)):
    if i not in of.values():
      walk.freeze(update, i, text)
  return [Value(tuple(map(walk.labels.normal, axes)))]


RULES = {
  "dynamic_slice": dynamic_slice,
  "dynamic_update_slice": dynamic_update_slice,
  "gather": gather,
  **{
    name: scatter
    for name in ("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul",
                 "scatter-min", "scatter_min", "scatter-max", "scatter_max",
                 "scatter-sub", "scatter_sub")
  },
}  # fmt: skip
