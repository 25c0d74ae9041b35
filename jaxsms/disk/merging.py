"""m models on disk become one, block by block, under the mask that they share."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxsms.disk.passes import (
  Block,
  Combine,
  as_float,
  blocks_of,
  check_finite,
  in_order,
  read_float,
  scratch,
)
from jaxsms.disk.rules import bytes_of
from jaxsms.disk.selection import Thresholds, smallest
from jaxsms.disk.tensors import Spec, Tensors, key_path, prunable_names
from jaxsms.disk.writing import Writer
from jaxsms.pruning import removal_count
from jaxsms.trees import is_parameter

DENSE = 0.05  # a share of zeros below which nobody pruned: they are accidents


class Job(NamedTuple):
  """What is merged, and how.

  Attributes:
    models: of one network.
    combine: what one entry of the result is made of.
    specs: of the result.
    taken: numbers of the models that are in the result, one at least.
    on_bytes: called with the number of bytes that were read since the last call.
  """

  models: Sequence[Tensors]
  combine: Combine
  specs: dict[str, Spec]
  taken: Sequence[int]
  on_bytes: Callable[[int], None] = lambda count: None


class Found(NamedTuple):
  """What a pass over m models found.

  Attributes:
    weights: how many entries can be pruned.
    zeros: int [m], how many of them are 0 in each model.
    differing: of each model, how many are 0 in it or in the first taken alone, by name.
    shared: how many are 0 in all models that are taken.
    of_result: how many are 0 in the result.
    norms: float [m], of the parameters.
    distances: float [m, m], between the parameters.
    to_result: float [m], between those and the result's.

  Norms and distances of a model that is not taken and not finite are NaN.
  """

  weights: int
  zeros: np.ndarray
  differing: list[dict[str, int]]
  shared: int
  of_result: int
  norms: np.ndarray
  distances: np.ndarray
  to_result: np.ndarray

  @property
  def sparsities(self) -> np.ndarray:
    """float [m], the share of zeros in each model."""
    return self.zeros / max(self.weights, 1)

  @property
  def dense(self) -> np.ndarray:
    """bool [m], whether each model counts as dense."""
    return self.sparsities < DENSE


class Part(NamedTuple):
  """A block of the result, and what was found in it.

  Attributes:
    block: which one.
    values: of the result, in its dtype.
    models: those of the models, in float32 or float64; () where they do not matter.
    zeros: int [m], entries that are 0 in each model; None where nothing can be pruned.
    differing: int [m], entries that are 0 in it or in the first taken alone.
    shared: entries that are 0 in all that are taken.
    gram: float [m + 1, m + 1], products of the models' differences from the result, and
      of the result; None where nothing is trained.
  """

  block: Block
  values: np.ndarray
  models: Sequence[np.ndarray] = ()
  zeros: np.ndarray | None = None
  differing: np.ndarray | None = None
  shared: int = 0
  gram: np.ndarray | None = None


def merge_block(
  job: Job, weights: frozenset[str], thresholds: Thresholds | None, block: Block
) -> Part:
  """One block of the result.

  Args:
    job: what is merged.
    weights: names of what can be pruned.
    thresholds: of what is pruned, but for ties; None prunes nothing.
    block: which part.

  Raises:
    ValueError: values are not finite, or are not in the result's dtype.
  """
  spec = job.specs[block.name]
  if not spec.is_floating:
    return Part(block, job.models[job.taken[0]].read(*block))
  models, values = _combined(job, block)
  if thresholds is not None:
    values = thresholds.below(block, values)
  gram = None
  if is_parameter(key_path(block.name), spec):
    gram = _gram(models, as_float(values, "result"))
  # Sums of squares that are finite are of finite values: most blocks need no other look.
  if gram is None or not np.isfinite(gram).all():
    _check_finite(job, block, models, values)
  if block.name not in weights:
    return Part(block, values, gram=gram)
  zero = [x == 0 for x in models]
  zeros = np.array([np.count_nonzero(z) for z in zero])
  differing, shared = np.zeros_like(zeros), 0
  if zeros.any():
    differing = np.array([np.count_nonzero(z != zero[job.taken[0]]) for z in zero])
    shared = int(np.count_nonzero(np.all([zero[i] for i in job.taken], axis=0)))
  # The models' values are this thread's, to be overwritten.
  held = [x.copy() for x in models] if thresholds else ()
  return Part(block, values, held, zeros, differing, shared, gram)


def _combined(job, block):
  """Values of the models, and of the result in its dtype; they may be anything."""
  models = [read_float(model, block, i) for i, model in enumerate(job.models)]
  with np.errstate(over="ignore", invalid="ignore"):  # `_check_finite` tells
    values = job.combine(block, models)
    return models, values.astype(job.specs[block.name].dtype, copy=False)


def _check_finite(job, block, models, values):
  """Raises ValueError where those taken, or then the result, are not finite."""
  for i in job.taken:
    check_finite(job.models[i], block, models[i])
  if not np.isfinite(as_float(values, "result")).all():
    name = job.specs[block.name].dtype.name
    raise ValueError(
      f"{block.name} of the soup is not finite in {name}: choose a wider dtype"
    )


@np.errstate(over="ignore", invalid="ignore")
def _gram(models, result):
  """Products of the models' differences from the result, and of the result."""
  rows = [scratch(("difference", i), result.size, x.dtype) for i, x in enumerate(models)]
  for x, row in zip(models, rows, strict=True):
    np.subtract(x, result, out=row)
  rows.append(result)
  gram = np.zeros([len(rows), len(rows)])
  for i, row in enumerate(rows):  # quicker than one product of such a wide matrix
    for j in range(i + 1):
      gram[i, j] = gram[j, i] = np.dot(row, rows[j])
  return np.where(np.isfinite(gram), gram, np.nan)  # sums of both infinities would warn


def merge(job: Job, writer: Writer, thresholds: Thresholds | None = None) -> Found:
  """Writes the result of merging models, and says what was found on the way.

  Args:
    job: what is merged.
    writer: takes the result.
    thresholds: of what is pruned in it; None prunes nothing.

  Raises:
    ValueError: values are not finite, or are not in the result's dtype.
    OSError: the result cannot be written.
  """
  m = len(job.models)
  names = prunable_names(job.specs)
  zeros, shared, of_result = np.zeros(m, np.int64), 0, 0
  differing: list[dict[str, int]] = [{} for _ in range(m)]
  gram, moved = np.zeros([m + 1, m + 1]), np.zeros(m)
  work = functools.partial(merge_block, job, frozenset(names), thresholds)
  for part in in_order(work, blocks_of(job.specs, sorted(job.specs))):
    block, values = part.block, part.values
    if part.zeros is not None:
      zeros += part.zeros
      shared += part.shared
      for i in np.flatnonzero(part.differing):
        counts = differing[i]
        counts[block.name] = counts.get(block.name, 0) + int(part.differing[i])
      tied = thresholds.ties(block, values) if thresholds else ()
      if len(tied):
        was = as_float(values[tied]).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # see `Found`
          moved += [np.sum(x[tied] ** 2 - (x[tied] - was) ** 2) for x in part.models]
        values = values.copy()
        values[tied] = 0
      of_result += values.size - np.count_nonzero(values)
    if part.gram is not None:
      gram += part.gram
    writer.write(block, values)
    job.on_bytes(bytes_of(job.models, block))
  norms, distances = _distances(gram)
  return Found(
    weights=sum(job.specs[name].size for name in names),
    zeros=zeros,
    differing=differing,
    shared=shared,
    of_result=of_result,
    norms=norms,
    distances=distances,
    to_result=np.sqrt(np.maximum(np.diag(gram)[:m] + moved, 0)),
  )


def copy(model: Tensors, writer: Writer) -> None:
  """Writes a model as it is."""
  for block in blocks_of(model.specs, sorted(model.specs)):
    writer.write(block, model.read(*block))


def largest_sparsity(
  models: Sequence[Tensors],
  names: Sequence[str],
  on_bytes: Callable[[int], None] = lambda count: None,
) -> float:
  """The share of zeros of the sparsest model, among arrays of these names.

  Args:
    models: of one network.
    names: of the arrays.
    on_bytes: see `Job`.
  """

  def count(work):
    i, block = work
    values = models[i].read(*block)
    return i, values.size - np.count_nonzero(values), values.nbytes

  specs, zeros = models[0].specs, np.zeros(len(models), np.int64)
  items = ((i, block) for i in range(len(models)) for block in blocks_of(specs, names))
  for i, found, size in in_order(count, items):
    zeros[i] += found
    on_bytes(size)
  return float(zeros.max()) / sum(specs[name].size for name in names)


def find_thresholds(job: Job, sparsity: float, scope: str) -> Thresholds:
  """What pruning removes from the result, see `jaxsms.magnitude_masks`.

  Args:
    job: what is merged.
    sparsity: share of the weights to remove.
    scope: "global" or "uniform".

  Raises:
    ValueError: see `merge_block`.
  """
  names = prunable_names(job.specs)
  wide = any(job.specs[name].dtype == np.float64 for name in names)
  chosen = [names] if scope == "global" else [[name] for name in names]
  groups = [
    (group, int(removal_count(sparsity, sum(job.specs[name].size for name in group))))
    for group in chosen
  ]

  def work(block):
    models, found = _combined(job, block)
    _check_finite(job, block, models, found)
    return block, found

  def values():
    for block, found in in_order(work, blocks_of(job.specs, names)):
      job.on_bytes(bytes_of(job.models, block))
      yield block, found

  return smallest(values, groups, wide)


def _distances(gram):
  """Norms [m], and distances [m, m], from products of differences to one point."""
  own, across = gram[:-1, :-1], gram[:-1, -1]
  squares = np.diag(own)
  norms = np.sqrt(np.maximum(squares + 2 * across + gram[-1, -1], 0))
  apart = squares[:, None] + squares[None, :] - 2 * own
  return norms, np.sqrt(np.maximum(apart, 0))
