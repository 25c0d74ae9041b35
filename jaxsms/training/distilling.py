"""From the ensemble to the soup: its training on the candidates' mean prediction."""

from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.ingredients import repeat_model
from jaxsms.training.engine import Engine, Model, Plan, Record, trained
from jaxsms.training.failures import merged_copies
from jaxsms.training.loop import train_copies
from jaxsms.training.measurements import measure, recalibrated
from jaxsms.training.state import Teacher, TrainState
from jaxsms.trees import PyTree, model_at

STREAM = 2**32 - 2  # of the key that `distil` takes: no seed uses it


class Distillation(NamedTuple):
  """How a soup is trained on its candidates' mean prediction.

  Attributes:
    plan: of one copy, see `jaxsms.training.phases.training_phases`.
    temperature: above 0; 1 takes the predictions as they are.
  """

  plan: Plan
  temperature: float = 1.0


def check_temperature(temperature: float) -> None:
  """Raises ValueError unless a temperature is a number above 0."""
  if not 0 < temperature < np.inf:
    raise ValueError(
      f"temperature is {temperature}: it must be a number above 0, where 1 takes "
      "predictions as they are"
    )


def teacher_weights(record: Record) -> np.ndarray:
  """What each candidate counts in the mean prediction.

  Args:
    record: of the phase, see `jaxsms.training.candidates.merge_candidates`.

  Returns:
    float32 [m], equal for all that are in the soup, 0 for the others.

  Example:
    >>> jaxsms.training.distilling.teacher_weights(
    ...   {"weights": [0.7, 0.0, 0.3], "diverged": [1], "collapsed": []}
    ... ).tolist()
    [0.5, 0.0, 0.5]
  """
  weights = record["weights"]
  merged = merged_copies(record)
  teachers = [i for i in merged if weights[i]] or merged
  found = np.zeros([len(weights)], np.float32)
  found[teachers] = 1 / len(teachers)
  return found


def distil(
  engine: Engine,
  key: jax.Array,
  soup: Model,
  masks: PyTree,
  candidates: Model,
  record: Record,
  distillation: Distillation,
  state: TrainState | None = None,
) -> Generator[Any, None, tuple[Model, Record]]:
  """Trains a soup within its masks on the mean prediction of its candidates.

  The candidates see the same augmented images in the same program. They go with the state,
  so that a training that is taken up again has them.

  Args:
    engine: the network and its data.
    key: of what the phase measures, the stream RECALIBRATION of its key.
    soup: leaves [...].
    masks: of its parameters.
    candidates: leaves [m, ...], their batch statistics their own.
    record: of the phase, see `jaxsms.training.candidates.merge_candidates`. Candidates
      that it leaves out teach nothing.
    distillation: how.
    state: of this training, to go on from; None begins it.

  Yields:
    What `train_copies` yields.

  Returns:
    The model, and a record: its metrics as `soup`, and those of the soup that it was as
    `merged`.

  Raises:
    FloatingPointError: it diverged.

  References:
    Hinton et al., 2015, https://arxiv.org/abs/1503.02531
  """
  if state is None:
    temperature = jnp.asarray(distillation.temperature, jnp.float32)
    teacher = repeat_model(
      Teacher(*candidates, jnp.asarray(teacher_weights(record)), temperature), 1
    )
    state = engine.start(soup, 1)._replace(teacher=teacher)
  chosen, learning_rates = distillation.plan(record)
  end = yield from train_copies(
    engine,
    masks,
    jax.random.fold_in(key, STREAM),
    state,
    chosen,
    learning_rates,
    phase=record["phase"],
  )
  model = recalibrated(engine, key, trained(end))
  (scores,) = measure(engine, model).scores
  return model_at(model, 0), {"soup": scores, "merged": record["soup"]}
