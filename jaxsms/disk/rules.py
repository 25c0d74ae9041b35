"""Merges of models on disk by part: one function of blocks for each name."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsms.disk.passes import (
  Block,
  Combine,
  blocks_of,
  in_order,
  read_finite,
  weighted,
)
from jaxsms.disk.selection import Function, Thresholds, smallest
from jaxsms.disk.tensors import Tensors, key_path
from jaxsms.merges.precision import precision_average
from jaxsms.merges.sphere import arc_weights
from jaxsms.merges.task_vectors import agreed
from jaxsms.trees import is_parameter


class Parts(NamedTuple):
  """What is merged, and what merges may need beside it.

  Attributes:
    models: of one network.
    weights: float [m], summing to 1.
    base: the model that all were trained from.
    squared_gradients: of each model.
    prior: of inverse variances, the L2 coefficient of training.
    scale: of what task vectors add.
    density: share of a task vector that TIES keeps.
    on_bytes: called with the number of bytes that were read since the last call.
  """

  models: Sequence[Tensors]
  weights: np.ndarray
  base: Tensors | None = None
  squared_gradients: Sequence[Tensors] | None = None
  prior: float = 1e-4
  scale: float = 1.0
  density: float = 0.2
  on_bytes: Callable[[int], None] = lambda count: None


def mean(parts: Parts) -> Combine:
  """See `jaxsms.uniform_soup`."""
  return weighted(parts.weights)


def fisher(parts: Parts, prior: float = 0.0) -> Combine:
  """See `jaxsms.merges.fisher_soup`."""
  average = weighted(parts.weights)
  taken = np.flatnonzero(parts.weights)

  def combine(block, values):
    if not _is_trained(parts, block.name):
      return average(block, values)
    assert parts.squared_gradients is not None
    squares = parts.squared_gradients
    stacked = np.stack([values[i] for i in taken])
    precision = np.stack(
      [read_finite(squares[int(i)], block, ("squares", i)) for i in taken]
    )
    if (precision < 0).any():
      raise ValueError(
        f"a squared gradient of {block.name} is below 0: give means of squares"
      )
    weight = parts.weights[taken].astype(stacked.dtype)[:, None]
    precision = (precision + stacked.dtype.type(prior)) * weight
    return precision_average(np, stacked, precision, weight)

  return combine


def inverse_variance(parts: Parts) -> Combine:
  """See `jaxsms.merges.fisher_soup` with a prior."""
  return fisher(parts, parts.prior)


def task_arithmetic(parts: Parts) -> Combine:
  """See `jaxsms.merges.task_arithmetic`."""
  average = weighted(parts.weights)

  def combine(block, values):
    target = average(block, values)
    if not _is_trained(parts, block.name):
      return target
    assert parts.base is not None
    base = read_finite(parts.base, block, "base")
    moved = base + target.dtype.type(parts.scale) * (target - base)
    return np.where(_kept(parts, values), moved, 0)

  return combine


def ties(parts: Parts) -> Combine:
  """See `jaxsms.merges.ties`; of equal differences at the threshold all are kept."""
  average = weighted(parts.weights)
  trimmed = _task_thresholds(parts)

  def combine(block, values):
    if not _is_trained(parts, block.name):
      return average(block, values)
    kept, differences = _differences(parts, block, values)
    differences = [
      trimmed.below(block._replace(name=f"{i}:{block.name}"), x)
      for i, x in enumerate(differences)
    ]
    move = agreed(np, np.stack(differences))
    assert parts.base is not None
    base = read_finite(parts.base, block, "base")
    return np.where(kept, base + move.dtype.type(parts.scale) * move, 0)

  return combine


def _task_thresholds(parts: Parts) -> Thresholds:
  """What is trimmed of each model's differences, whose names begin with its number."""
  taken = np.flatnonzero(parts.weights)
  base = parts.base
  assert base is not None
  specs = base.specs
  names = [name for name in sorted(specs) if _is_trained(parts, name)]
  total = sum(specs[name].size for name in names)
  goal = total - round(parts.density * total)
  groups = [([f"{i}:{name}" for name in names], goal) for i in range(len(taken))]
  wide = any(specs[name].dtype == np.float64 for name in names)

  def values(function: Function) -> Iterator[tuple[Block, Any]]:
    def work(block):
      models = [read_finite(model, block, i) for i, model in enumerate(parts.models)]
      differences = _differences(parts, block, models)[1]
      blocks = [block._replace(name=f"{i}:{block.name}") for i in range(len(taken))]
      return block, list(zip(blocks, map(function, blocks, differences), strict=True))

    for block, found in in_order(work, blocks_of(specs, names)):
      parts.on_bytes(bytes_of([*parts.models, base], block))
      yield from found

  return smallest(values, groups, wide)


def _differences(parts, block, values):
  """Where any model is not 0, and what each taken one has beyond the base there."""
  base = read_finite(parts.base, block, "base")
  kept = _kept(parts, values)
  taken = np.flatnonzero(parts.weights)
  return kept, [np.where(kept, values[i] - base, 0) for i in taken]


def _kept(parts, values):
  """bool [n], where any of the taken models is not 0."""
  return np.any([values[i] != 0 for i in np.flatnonzero(parts.weights)], axis=0)


def slerp(parts: Parts) -> Combine:
  """See `jaxsms.merges.slerp`, from the first model to the second."""
  specs, t = parts.models[0].specs, float(parts.weights[1])
  if t in (0, 1):
    return weighted(parts.weights)  # the other may be anything
  names = [name for name in sorted(specs) if _is_trained(parts, name)]
  products = {name: np.zeros(3) for name in names}

  def work(block):
    a, b = (read_finite(model, block, i) for i, model in enumerate(parts.models))
    return block, np.array([np.dot(a, a), np.dot(a, b), np.dot(b, b)], np.float64)

  for block, found in in_order(work, blocks_of(specs, names)):
    parts.on_bytes(bytes_of(parts.models, block))
    products[block.name] += found
  weights = {
    name: arc_weights(np, found[0], found[1], found[2], t)
    for name, found in products.items()
  }

  def combine(block, values):
    return weighted(weights.get(block.name, (1 - t, t)))(block, values)

  return combine


RULES: dict[str, Callable[[Parts], Combine]] = {
  "uniform": mean,
  "weighted": mean,
  "fisher": fisher,
  "inverse_variance": inverse_variance,
  "task_arithmetic": task_arithmetic,
  "ties": ties,
  "slerp": slerp,
}


def passes_of(name: str) -> int:
  """How many times a merge goes through all models before the result is written."""
  return {"ties": 2, "slerp": 1}.get(name, 0)


def bytes_of(models: Sequence[Tensors], block: Block) -> int:
  """Of all models, for one block."""
  sizes = (model.specs[block.name].dtype.itemsize for model in models)
  return (block.stop - block.start) * sum(sizes)


def _is_trained(parts, name):
  return is_parameter(key_path(name), parts.models[0].specs[name])
