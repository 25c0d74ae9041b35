"""What training and measuring on a data set need, in one place."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.ingredients import repeat_model
from jaxsms.sms import Record
from jaxsms.training.programs import Programs
from jaxsms.training.state import (
  Data,
  Ingredients,
  TrainState,
  init_variables,
  make_in_parts,
  start,
)
from jaxsms.training.streamed import StreamedData
from jaxsms.trees import PyTree, number_of_models

# From a phase's pruning record: ingredients of m copies, and learning rates [m, steps]. A
# search adds the values that its copies are to have, [m] by variable.
Plan = Callable[..., tuple[Ingredients, np.ndarray]]


class Splits(NamedTuple):
  """The parts of a data set, resident on the device or streamed from the host.

  Attributes:
    train: to train on.
    validation: to choose by.
    test: to report.
    corrupted: by the name of a corruption, functions that give the test data with it, one
      for each severity; called anew for each measurement.
    also_measured: names of splits that are measured beside validation and test.
  """

  train: Data | StreamedData
  validation: Data | StreamedData
  test: Data | StreamedData
  corrupted: Mapping[str, Sequence[Callable[[], Data]]] = {}
  also_measured: tuple[str, ...] = ()


class Model(NamedTuple):
  """The parameters and batch statistics of one model, or (leaves [m, ...]) of several.

  Attributes:
    params: parameters.
    batch_stats: batch statistics, an empty dict where there are none.
  """

  params: PyTree
  batch_stats: PyTree


class Engine(NamedTuple):
  """A network on a data set: what all its phases train and are measured with.

  Attributes:
    programs: of the network, see `make_programs`.
    splits: training, validation and test data.
    describe: gives what to record of one model's weights, NumPy leaves [...], beside its
      metrics.
    chunk_steps: most steps between two interventions of the host; an epoch is cut into
      equal chunks of at most this length.
    wants_state: asked after every chunk whether the state of the training is wanted. Where
      there are several processes, all must give the same answer.
  """

  programs: Programs
  splits: Splits
  describe: Callable[[PyTree], Record] = lambda params: {}
  chunk_steps: int = 50
  wants_state: Callable[[], bool] = lambda: False

  @property
  def steps_per_epoch(self) -> int:
    """Training steps that see each example once."""
    return self.splits.train.size // self.programs.batch_size

  def init(self, module: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> Model:
    """A new model; in parts where the programs split parameters.

    Args:
      module: called as `module.apply(variables, images, train=False)`.
      key: typed key.
      image_shape: height, width and channels of an image.

    Returns:
      The model, leaves [...], see `init_variables`.

    Example:
      >>> network = jaxsms.models.create("mlp", num_classes=2, hidden=(3,))
      >>> programs = jaxsms.training.make_programs(
      ...   network, jaxsms.training.sgd, training_images=lambda key, x: x / 255,
      ...   evaluation_images=lambda x: x / 255, batch_size=20)
      >>> engine = jaxsms.training.Engine(programs, splits=None)
      >>> model = engine.init(network, jax.random.key(0), (2, 2, 1))
      >>> model.params["Dense_0"]["kernel"].shape
      (4, 3)
    """
    mesh = self.programs.mesh_of(1) if self.programs.split_params else None
    return Model(*init_variables(module, key, image_shape, mesh))

  def start(self, model: Model, copies: int) -> TrainState:
    """Equal copies of a model at step 0; in parts where the programs split parameters.

    Args:
      model: leaves [...].
      copies: m.

    Returns:
      A state with leaves [m, ...], see `jaxsms.training.start`.

    Example:
      >>> programs = jaxsms.training.make_programs(
      ...   jaxsms.models.create("mlp", num_classes=2), jaxsms.training.sgd, batch_size=20,
      ...   training_images=lambda key, x: x / 255, evaluation_images=lambda x: x / 255)
      >>> engine = jaxsms.training.Engine(programs, splits=None)
      >>> model = jaxsms.training.Model({"kernel": jnp.array([1.0, 2.0])}, batch_stats={})
      >>> engine.start(model, copies=2).params["kernel"].tolist()
      [[1.0, 2.0], [1.0, 2.0]]
    """
    optimizer, mesh = self.programs.optimizer(0.0, 0.0), self.programs.mesh_of(copies)
    if mesh is None or not self.programs.split_params:
      return start(*model, optimizer, copies)
    first = functools.partial(start, optimizer=optimizer, m=copies)
    return make_in_parts(first, mesh, True, *model)


def start_each(engine: Engine, models: Model) -> TrainState:
  """As `Engine.start`, from m models that differ, leaves [m, ...]."""
  optimizer = engine.programs.optimizer(0.0, 0.0)
  step = jnp.zeros([number_of_models(models.params)], jnp.int32)
  return TrainState(*models, jax.vmap(optimizer.init)(models.params), step)


def trained(state: TrainState) -> Model:
  """What the copies of a state are: their averages over its steps, where they have one.

  Args:
    state: leaves [m, ...], or of one copy.

  Returns:
    The models. Batch statistics are those of the training: of an average they have to be
    estimated anew.
  """
  averaged = jax.tree.leaves(state.average)
  return Model(state.average if averaged else state.params, state.batch_stats)


def one_model(model: Model) -> Model:
  """Adds the leading axis of length 1."""
  return repeat_model(model, 1)
