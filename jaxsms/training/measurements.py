"""What a model is measured by: its predictions on each split, and its weights."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.meshes import fetch
from jaxsms.flops import layer_sparsities, sparse_multiply_adds
from jaxsms.geometry import soup_geometry
from jaxsms.phases import norm_and_drop
from jaxsms.pruning import apply_masks, magnitude_masks, prunable_flags
from jaxsms.soups import prediction_ensemble
from jaxsms.training import streamed
from jaxsms.training.engine import Engine, Model, Record
from jaxsms.training.programs import Programs
from jaxsms.training.state import Data
from jaxsms.training.streamed import StreamedData
from jaxsms.training.uncertainty import detection, spread
from jaxsms.trees import PyTree, is_parameter, number_of_models, wait_on_cpu

RECALIBRATION = 2**32 - 1  # a stream of the phase's key that no seed uses


class Predictions(NamedTuple):
  """The predictions of m models for the examples of a split.

  Attributes:
    logits: float [m, n, classes].
    labels: int [n].
  """

  logits: jax.Array
  labels: jax.Array


class SetRecord(TypedDict):
  """What describes a set of models.

  Attributes:
    mean_candidate: the mean of each metric.
    max_candidate: the largest of each metric.
    geometry: how far apart their parameters are, see `jaxsms.soup_geometry`.
  """

  mean_candidate: Record
  max_candidate: Record
  geometry: dict[str, float]


class Measurements(NamedTuple):
  """What m models do.

  Attributes:
    scores: for each model its metrics: `validation_`, `test_`, ... + name; with corrupted
      data `ood_` + name, and `ood`, the same by corruption; and what `Engine.describe`
      gives.
    ensemble: those of the models' prediction ensemble, without the latter.
    predictions: of the models, by split.
    uncertainty: of several models, what their spread tells of `validation` and `test`, see
      `jaxsms.training.uncertainty.spread`, and of data that are `corrupted`, by corruption,
      the mean over severities, see `jaxsms.training.uncertainty.detection`.
  """

  scores: list[Record]
  ensemble: Record
  predictions: dict[str, Predictions]
  uncertainty: Record


def measure(engine: Engine, models: Model) -> Measurements:
  """Measures m models, and their prediction ensemble.

  Args:
    engine: whose splits they are measured on, and how they are described.
    models: leaves [m, ...].

  Returns:
    Metrics of each model and of the ensemble, and predictions.
  """
  programs, splits = engine.programs, engine.splits
  m = number_of_models(models.params)
  names = ("validation", "test", *splits.also_measured)
  predictions = {name: predict(programs, getattr(splits, name), models) for name in names}
  scores = score(programs, with_ensembles(predictions))
  uncertainty: Record = {}
  if m > 1:
    uncertainty = {name: spread(*predictions[name]) for name in ("validation", "test")}
  if splits.corrupted:
    found, detected = _on_corrupted(engine, models, predictions["test"].logits)
    for one, ood in zip(scores, found, strict=True):
      one |= ood
    if m > 1:
      uncertainty["corrupted"] = detected
  ensemble = dict(scores[-1])  # of one model it is that model
  scores = scores[:m]
  params = fetch(models.params)
  for i, one in enumerate(scores):
    one |= engine.describe(jax.tree.map(lambda x, i=i: x[i], params))
  return Measurements(scores, ensemble, predictions, uncertainty)


@jax.jit
def _with_ensemble(logits):
  return jnp.concatenate([logits, prediction_ensemble(logits)[None]])


def with_ensembles(predictions: dict[str, Predictions]) -> dict[str, Predictions]:
  """Predictions of several models, with those of their ensemble as of one more model."""
  return {
    name: Predictions(
      wait_on_cpu(_with_ensemble(logits)) if len(logits) > 1 else logits,
      labels,
    )
    for name, (logits, labels) in predictions.items()
  }


def _on_corrupted(engine, models, clean):
  """Metrics of each model, and the ensemble of several, on corrupted data.

  Also, by corruption, how well their spread tells these from clean data.
  """
  programs = engine.programs
  found: dict[str, list[list[Record]]] = {}
  detected: dict[str, Record] = {}
  for name, severities in engine.splits.corrupted.items():
    found[name], of_severities = [], []
    for data in severities:
      on = predict(programs, data(), models)
      found[name].append(score(programs, with_ensembles({"ood": on})))
      if len(clean) > 1:
        of_severities.append(detection(clean, on.logits))
    if of_severities:
      detected[name] = mean_record(of_severities)
  rows = len(next(iter(found.values()))[0])
  scores = [
    ood_metrics({name: [s[i] for s in scores] for name, scores in found.items()})
    for i in range(rows)
  ]
  return scores, detected


def ood_metrics(scores: Mapping[str, Sequence[Record]]) -> Record:
  """The mean of one model's metrics over corruptions, and of each over its severities.

  Args:
    scores: by corruption, metrics for each severity, their names beginning with "ood_".

  Returns:
    The mean over corruptions by name, and `ood`: by corruption and name, the mean over its
    severities.
  """
  by_corruption = {name: mean_record(severities) for name, severities in scores.items()}
  overall = mean_record(list(by_corruption.values()))
  plain = {
    name: {metric.removeprefix("ood_"): value for metric, value in metrics.items()}
    for name, metrics in by_corruption.items()
  }
  return {**overall, "ood": plain}


def mean_record(records: Sequence[Record]) -> Record:
  """The mean of each number over records of the same names."""
  return jax.tree.map(lambda *values: float(np.mean(values)), *records)


def max_record(records: Sequence[Record]) -> Record:
  """The largest of each number over records of the same names."""
  return jax.tree.map(lambda *values: float(np.max(values)), *records)


def set_record(scores: Sequence[Record], params: PyTree) -> SetRecord:
  """What describes a set of models.

  Args:
    scores: metrics of each model.
    params: leaves [m, ...].

  Returns:
    Means, maxima and geometry.
  """
  return {
    "mean_candidate": mean_record(scores),
    "max_candidate": max_record(scores),
    "geometry": {k: float(v) for k, v in fetch(_geometry(params)).items()},
  }


def best_first(scores: Sequence[Record], copies: Iterable[int]) -> list[int]:
  """Copies by validation accuracy; among equals, by validation loss.

  Args:
    scores: metrics of all copies.
    copies: indices of those to be put in order.

  Returns:
    Their indices, without those that diverged, whose metrics are NaN.
  """

  def order(i):
    loss = scores[i]["validation_loss"]
    return -scores[i]["validation_accuracy"], np.inf if np.isnan(loss) else loss, i

  return sorted(
    (i for i in copies if not np.isnan(scores[i]["validation_accuracy"])), key=order
  )


def best_candidate(scores: Sequence[Record]) -> int:
  """Index of the best of those that did not diverge, see `best_first`."""
  return best_first(scores, range(len(scores)))[0]


def describe_weights(
  params: PyTree, goal_sparsity: float, multiply_adds: Mapping[str, int] | None = None
) -> Record:
  """Counts, sparsities, cost of an inference, and distances of one model.

  Args:
    params: leaves [...].
    goal_sparsity: at which `distance_to_pruned` is taken, in [0, 1).
    multiply_adds: of the dense network, as `jaxsms.multiply_adds` gives; None leaves the
      costs out.

  Returns:
    `sparsity` (of the prunable weights), `overall_sparsity` (of all parameters),
    `layer_sparsities`, `parameters`, `nonzero_parameters`, with costs `multiply_adds`,
    `sparse_multiply_adds` and `theoretical_speedup`, and of the prunable weights
    `distance_to_origin`, `distance_to_pruned` (to the same model pruned globally by
    magnitude to the goal) and `relative_distance_to_pruned` (to the former).
  """
  flags = prunable_flags(params)
  leaves = jax.tree.leaves_with_path(params)
  sizes = [np.size(x) for _, x in leaves]
  nonzero = [int(np.count_nonzero(x)) for _, x in leaves]
  trained = [is_parameter(path, x) for path, x in leaves]
  weights, kept = (sum(itertools.compress(n, flags)) for n in (sizes, nonzero))
  parameters, kept_parameters = (
    sum(itertools.compress(n, trained)) for n in (sizes, nonzero)
  )
  record = {
    "sparsity": 1 - kept / weights,
    "overall_sparsity": 1 - kept_parameters / parameters,
    "layer_sparsities": layer_sparsities(params),
    "parameters": parameters,
    "nonzero_parameters": kept_parameters,
  }
  if multiply_adds is not None:
    dense = sum(multiply_adds.values())
    sparse = sum(sparse_multiply_adds(multiply_adds, params).values())
    record |= {"multiply_adds": dense, "sparse_multiply_adds": sparse}
    record["theoretical_speedup"] = dense / sparse if sparse else np.inf
  return record | distances(params, goal_sparsity)


def distances(params: PyTree, goal_sparsity: float) -> dict[str, float]:
  """How far a model's prunable weights are from 0, and from being pruned to a goal."""
  flags = prunable_flags(params)
  pruned = apply_masks(params, magnitude_masks(params, goal_sparsity))
  leaves = zip(jax.tree.leaves(params), jax.tree.leaves(pruned), strict=True)
  pairs = list(itertools.compress(leaves, flags))
  origin, removed = (float(x) for x in fetch(norm_and_drop(pairs)))
  return {
    "distance_to_origin": origin,
    "distance_to_pruned": removed,
    "relative_distance_to_pruned": removed / origin if origin else 0.0,
  }


def predict(programs: Programs, data: Data | StreamedData, models: Model) -> Predictions:
  """Predictions of m models on one split."""
  if isinstance(data, StreamedData):
    return Predictions(*streamed.predict(programs, data, *models))
  return Predictions(programs.predict(data.images, *models), data.labels)


def score(
  programs: Programs, predictions: dict[str, Predictions]
) -> list[dict[str, float]]:
  """A flat dict of metrics for each of m models, from their predictions on some splits."""
  by_name: dict[str, jax.Array] = {}
  for split, on_split in predictions.items():
    metrics = programs.evaluate(*on_split)
    by_name |= {f"{split}_{name}": metric for name, metric in metrics.items()}
  values = fetch(by_name)
  m = len(next(iter(predictions.values())).logits)
  return [{name: float(of[i]) for name, of in values.items()} for i in range(m)]


def recalibrated(engine: Engine, key: jax.Array, models: Model) -> Model:
  """The same models, leaves [m, ...], with batch statistics estimated anew."""
  programs, splits = engine.programs, engine.splits
  if not jax.tree.leaves(models.batch_stats):
    return models
  if isinstance(splits.train, StreamedData):
    statistics = streamed.recalibrate(programs, splits.train, key, *models)
  else:
    statistics = programs.recalibrate(splits.train, key, *models)
  return Model(models.params, statistics)


_geometry = jax.jit(soup_geometry)
