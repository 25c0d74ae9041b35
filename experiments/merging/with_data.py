"""Merging models where there are data: chosen, recalibrated and measured on them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxsms import pretrained
from jaxsms.disk.by_name import by_path
from jaxsms.disk.merging import Job, MergeStatistics, find_thresholds, merge
from jaxsms.disk.other_writers import ToMemory
from jaxsms.disk.passes import Combine, weighted, width
from jaxsms.disk.rules import RULES, Parts
from jaxsms.disk.tensors import InMemory, Spec, Tensors, prunable_names
from jaxsms.export import nested
from jaxsms.merges import MERGES
from jaxsms.phases import Weighted
from jaxsms.pruning import apply_masks, magnitude_masks
from jaxsms.soups import greedy_soup, soup_weights
from jaxsms.training.engine import Model, one_model
from jaxsms.training.measurements import measure, recalibrated
from jaxsms.training.merging import named_merge, on_validation
from jaxsms.trees import model_at

from ..config import run_config
from ..setup import hardware
from ..setup.task import Task, load, make_task, with_data
from .merge_flags import MergeFlags
from .model_checks import check_masks

Arrays = dict[str, np.ndarray]


def make_data_task(m: int) -> Task:
  """Network, data and programs that the flags describe, for m models.

  Raises:
    ValueError: see `experiments.setup.task.make_task`.
  """
  alone = dict.fromkeys(("coordinator", "processes", "process"))
  config = run_config.read_config(merge="uniform")
  config = dataclasses.replace(config, ingredients=m, init=None, ood=(), **alone)
  hardware.start(config, m)
  dataset = load(config)
  return make_task(with_data(config, dataset), dataset)


def as_ours(model: Tensors, task: Task) -> InMemory:
  """A model of any layout as variables of the network, by their names.

  Raises:
    ValueError: see `jaxsms.pretrained.fit_model`.
  """
  arrays = {
    name: model.read(name, 0, spec.size).reshape(spec.shape)
    for name, spec in model.specs.items()
  }
  fitting = pretrained.fit_model(arrays, task.module, task.image_shape, model.path)
  return InMemory(model.path, by_path(fitting))


def as_model(arrays: Arrays) -> Model:
  """Variables by name as parameters and batch statistics."""
  tree = nested(arrays)
  return Model(tree["params"], tree.get("batch_stats", {}))


def stacked_models(models: list[Arrays]) -> Model:
  """Models by name as one, leaves [m, ...]."""
  return jax.tree.map(lambda *x: np.stack(x), *map(as_model, models))


class Others(NamedTuple):
  """What is merged with the models.

  Attributes:
    base: the model that all were trained from, in a list.
    squared_gradients: of each model.
  """

  base: Sequence[Tensors] | None
  squared_gradients: Sequence[Tensors] | None


def parts_of(
  config: MergeFlags,
  models: Sequence[Tensors],
  weights: np.ndarray,
  others: Others,
  on_bytes: Callable[[int], None] = lambda count: None,
) -> Parts:
  """What the rules of merging by part take."""
  return Parts(
    models=models,
    weights=weights,
    base=others.base and others.base[0],
    squared_gradients=others.squared_gradients,
    prior=config.prior,
    scale=config.scale,
    density=config.density,
    on_bytes=on_bytes,
  )


def soup_in_memory(
  config: MergeFlags,
  models: list[InMemory],
  others: Others,
  task: Task,
  goal: float | None,
  specs: dict[str, Spec],
) -> tuple[InMemory, MergeStatistics, np.ndarray, list[dict[str, float]]]:
  """Merges models of the network, and estimates batch statistics anew.

  Args:
    config: flags.
    models: variables of the network, see `as_ours`.
    others: what is merged with them.
    task: the network on its data.
    goal: sparsity to prune to; None prunes nothing.
    specs: shapes and dtypes of the soup.

  Returns:
    The soup, what was found on the way, the weights, and metrics of all models and the
    soup.

  Raises:
    ValueError: the models do not share a mask, and no flag says what to do.
  """
  key = jax.random.key(config.seed)
  arrays = [model.arrays for model in models]
  combine, weights = chosen_rule(config, models, others, task, key, goal)
  taken = np.flatnonzero(weights).tolist()
  job = Job(models, combine, specs, taken)
  thresholds = None if goal is None else find_thresholds(job, goal, config.scope)
  memory = ToMemory(specs)
  found = merge(job, memory, thresholds)
  if config.masks is None:
    check_masks(models, taken, found)
  # The network's programs take its own dtypes; the values are those of the soup's.
  values = {n: x.astype(models[0].specs[n].dtype) for n, x in memory.arrays.items()}
  anew = recalibrated(task.engine, key, one_model(as_model(values)))
  soup = by_path(jax.device_get(model_at(anew, 0))._asdict())
  soup = {name: np.asarray(x, specs[name].dtype) for name, x in soup.items()}
  scores = measure(task.engine, stacked_models([*arrays, soup])).scores
  return InMemory("the soup", soup), found, weights, scores


def chosen_rule(
  config: MergeFlags,
  models: list[InMemory],
  others: Others,
  task: Task,
  key: jax.Array,
  goal: float | None,
) -> tuple[Combine, np.ndarray]:
  """How models are merged, and the weight of each, float [m]."""
  weights = config.weights_of(len(models))
  if config.merge == "greedy":
    weights = greedy_weights(config, [model.arrays for model in models], task, key, goal)
    return weighted(weights), weights
  if config.merge in RULES and (
    not MERGES[config.merge].in_memory or others.squared_gradients
  ):
    return RULES[config.merge](parts_of(config, models, weights, others)), weights
  run = named_merge(config.merge, task.engine, key, None, config.prior, weights)
  merged = run(stacked_models([model.arrays for model in models]))
  if isinstance(merged, Weighted):
    merged, weights = merged.params, np.asarray(merged.weights, float)
  found = by_path(jax.device_get(merged)._asdict())

  def combine(block, values):
    values = found[block.name].reshape(-1)[block.start : block.stop]
    return values.astype(width(values.dtype), copy=False)

  return combine, weights


def greedy_weights(
  config: MergeFlags, arrays: list[Arrays], task: Task, key: jax.Array, goal: float | None
) -> np.ndarray:
  """Equal weights of the models that `greedy_soup` takes, float [m]."""

  def validation_accuracy(average):
    average = jax.device_get(average)
    if goal is not None:
      average = pruned(average, goal, config.scope)
    found = on_validation(task.engine, key, as_model(average))
    return found["validation_accuracy"]

  stacked = {name: np.stack([one[name] for one in arrays]) for name in arrays[0]}
  return soup_weights(greedy_soup(stacked, validation_accuracy)[1], len(arrays))


def pruned(model: Arrays, sparsity: float, scope: str) -> Arrays:
  """A model pruned by magnitude, see `jaxsms.magnitude_masks`."""
  weights = {name: model[name] for name in prunable_names(InMemory("", model).specs)}
  masks = magnitude_masks(weights, sparsity, scope, prunable=lambda path, leaf: True)
  return model | jax.device_get(apply_masks(weights, masks))
