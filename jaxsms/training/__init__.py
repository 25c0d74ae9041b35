"""Training of m copies at once: state and step, jitted programs, the host's loop.

`METRICS`: what every model is measured by, functions of logits and labels by name.
"""

from jaxsms.training.averaging import averaged_ingredients
from jaxsms.training.engine import Engine, Model, Splits
from jaxsms.training.learning_rates import retrain_learning_rates
from jaxsms.training.loop import (
  Chunk,
  fetched,
  last_state,
  train_chunks,
  train_copies,
)
from jaxsms.training.programs import METRICS, Programs, make_programs
from jaxsms.training.state import Data, Ingredients, TrainState, init_variables, sgd, start
from jaxsms.training.streamed import StreamedData

__all__ = [
  "METRICS",
  "Chunk",
  "Data",
  "Engine",
  "Ingredients",
  "Model",
  "Programs",
  "Splits",
  "StreamedData",
  "TrainState",
  "averaged_ingredients",
  "fetched",
  "init_variables",
  "last_state",
  "make_programs",
  "retrain_learning_rates",
  "sgd",
  "start",
  "train_chunks",
  "train_copies",
]
