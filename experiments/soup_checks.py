"""Models as arrays by name: whether they can be averaged, and their average."""

import re
from collections.abc import Sequence

import jax
import numpy as np

from jaxsms.compat import enable_x64
from jaxsms.pruning import magnitude_masks
from jaxsms.safetensors import check_fit
from jaxsms.soups import uniform_soup
from jaxsms.trees import check_finite, is_floating, is_parameter, prunable

Arrays = dict[str, np.ndarray]


def path_of(name: str) -> tuple[jax.tree_util.DictKey, ...]:
  """A name of ours, "a/kernel", or of PyTorch's, "a.weight", as a key path."""
  return tuple(jax.tree_util.DictKey(word) for word in re.split(r"[/.]", name))


def weights_of(model: Arrays) -> Arrays:
  """The arrays that can be pruned, as `jaxsms.prunable` sees it."""
  return {name: x for name, x in model.items() if prunable(path_of(name), x)}


def parameters_of(model: Arrays) -> Arrays:
  """The arrays that are trained, without batch statistics."""
  return {name: x for name, x in model.items() if not _is_statistic(name, x)}


def statistics(model: Arrays) -> Arrays:
  """The floating arrays that are batch statistics."""
  return {n: x for n, x in model.items() if is_floating(x) and _is_statistic(n, x)}


def _is_statistic(name, array):
  running = re.search(r"running_(mean|var)$", name)
  return bool(running) or not is_parameter(path_of(name), array)


def check_models(paths: Sequence[str], models: Sequence[Arrays]) -> None:
  """Raises ValueError unless all have the same arrays, some of them weights, all finite."""
  for path, model in zip(paths, models, strict=True):
    check_fit(
      f"{path} is another network than {paths[0]}",
      models[0],
      model,
      "give checkpoints of one network, and --model or --flagfile=RUN/flags.txt where one "
      "has PyTorch's names",
    )
    for name, array in model.items():
      if array.dtype != models[0][name].dtype:
        raise ValueError(
          f"{name} is {array.dtype} in {path} and {models[0][name].dtype} in {paths[0]}: "
          "give checkpoints of one dtype"
        )
    check_finite(model, path)
  if not weights_of(models[0]):
    names = ", ".join(list(models[0])[:4])
    raise ValueError(
      f"no array of {paths[0]} is a weight ({names}): weights are called kernel, w or "
      "weight, rename them"
    )


def removed(models: Sequence[Arrays]) -> dict[str, np.ndarray]:
  """For each weight where all models are 0."""
  zeros = [{name: x == 0 for name, x in weights_of(model).items()} for model in models]
  return {name: np.all([zero[name] for zero in zeros], axis=0) for name in zeros[0]}


def sparsity_of(*models: Arrays) -> float:
  """The share of weights that are 0 in all models."""
  zeros = removed(models).values()
  return sum(int(x.sum()) for x in zeros) / sum(x.size for x in zeros)


def largest_sparsity(models: Sequence[Arrays]) -> float:
  """That of the sparsest model."""
  return max(sparsity_of(model) for model in models)


def check_masks(paths: Sequence[str], models: Sequence[Arrays]) -> None:
  """Raises ValueError, saying what differs, unless all models have the same zeros."""
  first = removed(models[:1])
  for path, model in zip(paths, models, strict=True):
    differing = {
      name: int(np.sum(zero != first[name])) for name, zero in removed([model]).items()
    }
    if not any(differing.values()):
      continue
    most, number = max(differing, key=differing.get), sum(differing.values())
    total = sum(x.size for x in first.values())
    raise ValueError(
      f"{path} and {paths[0]} do not share a mask ({number:,} of {total:,} weights are 0 "
      f"in one of them alone, most in {most}) and the average of all would be "
      f"{sparsity_of(*models):.2%} sparse: give --masks=prune to prune it to "
      f"{largest_sparsity(models):.2%}, or --masks=keep"
    )


def averaged(models: Sequence[Arrays], weights: np.ndarray) -> Arrays:
  """The weighted average; what is not floating comes from the first model."""
  first = int(np.flatnonzero(weights)[0])
  stacked = {
    name: np.stack([model[name] for model in models])
    for name, x in models[0].items()
    if is_floating(x)
  }
  with enable_x64():  # float64 stays float64
    means = jax.device_get(uniform_soup(stacked, weights))
  return {name: means.get(name, x) for name, x in models[first].items()}


def pruned(model: Arrays, sparsity: float, scope: str) -> Arrays:
  """A model pruned by magnitude, see `jaxsms.magnitude_masks`."""
  weights = weights_of(model)
  with enable_x64():
    masks = jax.device_get(
      magnitude_masks(weights, sparsity, scope, prunable=lambda path, leaf: True)
    )
  zero = {
    name: np.where(masks[name], x, np.zeros((), x.dtype)) for name, x in weights.items()
  }
  return {**model, **zero}
