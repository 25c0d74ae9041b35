"""m models on disk become one, block by block, under the mask that they share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsms.disk.passes import (
  Block,
  Combine,
  blocks_of,
  check_finite,
  has_finite_norm,
  in_order,
  read_stacked,
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


class MergeStatistics(NamedTuple):
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


class MergedBlock(NamedTuple):
  """A block of the result, and what was found in it.

  Attributes:
    block: which one.
    values: of the result, in its dtype.
    zeros: int [m], entries that are 0 in each model; None where nothing can be pruned.
    differing: int [m], entries that are 0 in it or in the first taken alone.
    shared: entries that are 0 in all that are taken.
    gram: float [m + 1, m + 1], products of the models' differences from the result, and
      of the result; None where nothing is trained.
    tied: int [k], the entries of the result that are equal to its threshold.
    before: float64 [m, k], what the models have there.
  """

  block: Block
  values: np.ndarray
  zeros: np.ndarray | None = None
  differing: np.ndarray | None = None
  shared: int = 0
  gram: np.ndarray | None = None
  tied: np.ndarray | None = None
  before: np.ndarray | None = None


def merge_block(
  job: Job, weights: frozenset[str], thresholds: Thresholds | None, block: Block
) -> MergedBlock:
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
    return MergedBlock(block, job.models[job.taken[0]].read(*block))
  rows, values = _combined(job, block)
  found: dict[str, Any] = {}
  if thresholds is not None:
    values, tied = thresholds.below(block, values), thresholds.equal(block, values)
    found |= {"tied": tied, "before": rows[:-1, tied].astype(np.float64)}
  if block.name in weights:
    found |= _zeros(rows[:-1], job.taken)
  if is_parameter(key_path(block.name), spec):
    gram = found["gram"] = _gram(rows, values)
    if not np.isfinite(gram).all():  # sums of squares that are finite are of finite values
      _check_finite(job, block, *_combined(job, block))
  else:
    _check_finite(job, block, rows, values)
  return MergedBlock(block, values, **found)


def _combined(job, block):
  """Values of the models [m + 1, n], and of the result in its dtype; maybe not finite."""
  rows = read_stacked(job.models, block)
  with np.errstate(over="ignore", invalid="ignore"):  # `_check_finite` tells
    return rows, job.combine(block, rows[:-1]).astype(job.specs[block.name].dtype)


def _check_finite(job, block, rows, values):
  """Raises ValueError where models that are taken, or then the result, are not finite."""
  for i in job.taken:
    check_finite(job.models[i], block, rows[i])
  if not np.isfinite(values).all():
    name = job.specs[block.name].dtype.name
    raise ValueError(
      f"{block.name} of the soup is not finite in {name}: choose a wider dtype"
    )


def _zeros(models, taken):
  """Counts of entries [m, n] that are 0, see `MergedBlock`."""
  zero = scratch("zero", models.size, np.dtype(bool)).reshape(models.shape)
  np.equal(models, 0, out=zero)
  zeros = np.array([np.count_nonzero(z) for z in zero])
  if not zeros.any():
    return {"zeros": zeros, "differing": np.zeros_like(zeros)}
  differing = [np.count_nonzero(z != zero[taken[0]]) for z in zero]
  shared = int(np.count_nonzero(zero[taken].all(axis=0)))
  return {"zeros": zeros, "differing": np.array(differing), "shared": shared}


@np.errstate(over="ignore", invalid="ignore")
def _gram(rows, result):
  """Products of the models' differences from the result, and of it; overwrites them all."""
  rows[-1] = result
  rows[:-1] -= rows[-1]
  gram = np.zeros([len(rows), len(rows)])
  for i, row in enumerate(rows):  # products with a matrix take threads of their own
    for j in range(i + 1):
      gram[i, j] = gram[j, i] = np.dot(row, rows[j])
  return np.where(np.isfinite(gram), gram, np.nan)  # sums of both infinities would warn


def merge(
  job: Job, writer: Writer, thresholds: Thresholds | None = None
) -> MergeStatistics:
  """Writes the result of merging models, and gives statistics of them.

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
      if thresholds is not None and part.tied is not None:
        goes = thresholds.ties(block, part.tied)
        before, was = part.before[:, : len(goes)], values[goes].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # see `MergeStatistics`
          moved += np.sum(before**2 - (before - was) ** 2, axis=1)
        values[goes] = 0
      of_result += values.size - np.count_nonzero(values)
    if part.gram is not None:
      gram += part.gram
    writer.write(block, values)
    job.on_bytes(bytes_of(job.models, block))
  norms, distances = _distances(gram)
  return MergeStatistics(
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
  """Writes a model without a change."""
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

  def values(function):
    def work(block):
      rows, found = _combined(job, block)
      if not has_finite_norm(found.astype(rows.dtype, copy=False)):
        _check_finite(job, block, rows, found)
      return block, function(block, found)

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
