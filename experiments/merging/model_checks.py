"""Whether models on disk can be merged, and what the result looks like."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxsms.disk.by_name import check_fit
from jaxsms.disk.merging import DENSE, MergeStatistics
from jaxsms.disk.tensors import Spec, Tensors, key_path, prunable_names
from jaxsms.trees import is_parameter

DTYPES = ("float32", "bfloat16", "float16", "float64")


def statistics(specs: dict[str, Spec]) -> list[str]:
  """The names of floating arrays that are batch statistics."""
  return [n for n, x in specs.items() if x.is_floating and not is_trained(n, x)]


def is_trained(name: str, spec: Spec) -> bool:
  """Whether an array is a parameter, in our names or in PyTorch's."""
  running = re.search(r"running_(mean|var)$", name)
  return not running and is_parameter(key_path(name), spec)


def check_models(models: Sequence[Tensors]) -> None:
  """Raises ValueError unless all have the same arrays, some of them weights."""
  first = models[0]
  for model in models:
    check_fit(
      f"{model.path} is another network than {first.path}",
      first.specs,
      model.specs,
      "give checkpoints of one network, and --dataset with --model or "
      "--flagfile=RUN/flags.txt where one has PyTorch's names",
    )
    for name, spec in model.specs.items():
      if spec.is_floating != first.specs[name].is_floating:
        raise ValueError(
          f"{name} is {spec.dtype} in {model.path} and {first.specs[name].dtype} in "
          f"{first.path}: only floating dtypes may differ"
        )
  if not prunable_names(first.specs):
    names = ", ".join(list(first.specs)[:4])
    raise ValueError(
      f"no array of {first.path} is a weight ({names}): weights are called kernel, w or "
      "weight, rename them"
    )


def check_others(first: Tensors, others: Sequence[Sequence[Tensors] | None]) -> None:
  """Raises ValueError unless what is merged with models has their arrays as well."""
  for other in [one for some in others if some is not None for one in some]:
    check_fit(
      f"{other.path} is of another network than {first.path}",
      first.specs,
      other.specs,
      "give one with the same arrays",
    )


def have_same_arrays(one: Tensors, other: Tensors) -> bool:
  """Whether names and shapes agree, and which arrays are floating."""
  first, second = (
    {name: (x.shape, x.is_floating) for name, x in model.specs.items()}
    for model in (one, other)
  )
  return first == second


def result_specs(first: Tensors, dtype: str | None) -> dict[str, Spec]:
  """Shapes and dtypes of the result: those of the first model, or another dtype."""
  if dtype is None:
    return first.specs
  return {
    name: Spec(spec.shape, jnp.dtype(dtype)) if spec.is_floating else spec
    for name, spec in first.specs.items()
  }


def check_masks(
  models: Sequence[Tensors], taken: Sequence[int], found: MergeStatistics
) -> None:
  """Raises ValueError, saying what differs, unless sparse models have the same zeros.

  Args:
    models: all of them.
    taken: numbers of those in the average.
    found: what merging them found.
  """
  if found.dense[taken].all():
    return
  for i in taken:
    differing = found.differing[i]
    if not differing:
      continue
    most, number = max(differing, key=differing.get), sum(differing.values())
    raise ValueError(
      f"{models[i].path} and {models[taken[0]].path} do not share a mask ({number:,} of "
      f"{found.weights:,} weights are 0 in one of them alone, most in {most}) and the "
      f"average of all would be {found.shared / found.weights:.2%} sparse: give "
      f"--masks=prune to prune it to {found.sparsities[taken].max():.2%}, or --masks=keep"
    )


def dense_note(paths: Sequence[str], found: MergeStatistics) -> str | None:
  """What is said where some models have zeros, and too few to be pruned."""
  few = [
    f"{count:,} of {path}"
    for path, count, dense in zip(paths, found.zeros, found.dense, strict=True)
    if dense and count
  ]
  if not few:
    return None
  return (
    f"Below {DENSE:.0%} zeros a model counts as dense: of {found.weights:,} weights "
    f"{', '.join(few)} are 0."
  )


def angles(found: MergeStatistics) -> np.ndarray:
  """Degrees between each two models, [pairs]."""
  m = len(found.norms)
  first, second = np.triu_indices(m, 1)
  a, b = found.norms[first], found.norms[second]
  squares = found.distances[first, second] ** 2
  # 1 - cos, without the cancellation of a product of vectors that are almost alike.
  apart = (squares - (a - b) ** 2) / np.maximum(2 * a * b, np.finfo(float).tiny)
  return np.degrees(2 * np.arcsin(np.sqrt(np.clip(apart / 2, 0, 1))))
