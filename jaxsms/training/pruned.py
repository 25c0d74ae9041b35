"""Pruning a model, with what that does to its predictions."""

from jaxsms.phases import Prune, prune_phase
from jaxsms.training.engine import Engine, Model, Record, one_model
from jaxsms.training.measurements import measure, predict, score
from jaxsms.trees import PyTree


def prune_and_measure(
  engine: Engine,
  prune: Prune,
  model: Model,
  masks: PyTree | None,
  sparsity: float,
  before: float | None = None,
) -> tuple[Model, PyTree, Record]:
  """Prunes a model further, and measures what that does to it.

  Args:
    engine: the network and its data.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    model: leaves [...].
    masks: what was removed so far; None means nothing.
    sparsity: of the prunable weights afterwards, in [0, 1).
    before: the model's test accuracy; None measures it.

  Returns:
    The pruned model, its masks, and the record of `jaxsms.prune_phase` with the metrics of
    `pruned` and the `pruning_instability`.
  """
  if before is None:
    before = accuracy_on_test(engine, model)
  params, masks, record = prune_phase(model.params, masks, sparsity, prune)
  pruned = Model(params, model.batch_stats)
  (scores,) = measure(engine, one_model(pruned)).scores
  lost = instability(before, scores["test_accuracy"])
  return pruned, masks, {**record, "pruned": scores, "pruning_instability": lost}


def accuracy_on_test(engine: Engine, model: Model) -> float:
  """That of one model, leaves [...]."""
  predictions = predict(engine.programs, engine.splits.test, one_model(model))
  return score(engine.programs, {"test": predictions})[0]["test_accuracy"]


def instability(before: float, after: float) -> float:
  """The share of an accuracy that is lost; NaN where there was none.

  References:
    Bartoldson et al., 2020, https://arxiv.org/abs/1906.03728 (pruning instability)
  """
  return (before - after) / before if before else float("nan")
