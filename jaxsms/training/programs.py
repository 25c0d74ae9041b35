"""The jitted programs: one copy's work mapped over all copies and devices."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh

from jaxsms.devices.ingredients import map_ingredients
from jaxsms.devices.meshes import DATA_AXIS, INGREDIENT_AXIS, place_on, whole
from jaxsms.devices.meshes import split_params as split_over_data
from jaxsms.metrics import (
  accuracy,
  balanced_accuracy,
  calibration_error,
  cross_entropy,
  worst_class_accuracy,
)
from jaxsms.training import inference, step
from jaxsms.trees import number_of_models, wait_on_cpu

MeshOf = Callable[[int], Mesh | None]

Metric = Callable[[jax.Array, jax.Array], jax.Array]
METRICS: dict[str, Metric] = {
  "loss": cross_entropy,
  "accuracy": accuracy,
  "balanced_accuracy": balanced_accuracy,
  "worst_class_accuracy": worst_class_accuracy,
  "expected_calibration_error": calibration_error,
  "maximum_calibration_error": functools.partial(calibration_error, norm="max"),
}


class Program(NamedTuple):
  """A function of m copies, jitted once for each mesh.

  Attributes:
    on: gives the jitted function for a mesh and a number of copies.
    mesh_of: gives the mesh for a number of copies.
    in_axes: 0 for each argument that is stacked, None for one that the copies share.
  """

  on: Callable[[Mesh | None, int], jax.stages.Wrapped]
  mesh_of: MeshOf
  in_axes: tuple[int | None, ...]

  def __call__(self, *arguments):
    """Runs it where so many copies belong."""
    mesh, copies = self._where(arguments)
    if mesh is not None:
      arguments = tuple(
        place_on(mesh, argument, axis == 0)
        for argument, axis in zip(arguments, self.in_axes, strict=True)
      )
    return wait_on_cpu(self.on(mesh, copies)(*arguments))

  def lower(self, *arguments):
    """Lowers it for such arguments, as `jax.jit(...).lower` does."""
    return self.on(*self._where(arguments)).lower(*arguments)

  def _where(self, arguments):
    stacked = [a for a, axis in zip(arguments, self.in_axes, strict=True) if axis == 0]
    copies = number_of_models(stacked)
    return self.mesh_of(copies), copies


class Programs(NamedTuple):
  """Compiled once per number of copies; everything that differs between phases is traced.

  Attributes:
    train: `train(data, masks, key, state, ingredients, learning_rates [m, chunk])` giving
      the state after a chunk of steps and its metrics [m]. The state is donated.
    train_batches: `train_batches(images, labels, taken, masks, key, state, ingredients,
      learning_rates)`: the same, on batches [m, chunk, batch, ...] from the host.
    recalibrate: `recalibrate(data, key, params, batch_stats)` giving batch statistics.
    batch_statistics: `batch_statistics(key, index, images, params, total)` adding those of
      one batch.
    predict: `predict(images, params, batch_stats)` giving logits [m, n, classes].
    evaluate: `evaluate(logits [m, n, classes], labels)` giving metrics [m].
    optimizer: gives the optimizer for a learning rate and a weight decay.
    batch_size: examples in a training step.
    eval_batch_size: examples in an evaluation step.
    own_masks: whether `train` takes masks [m, ...], one for each copy.
    mesh_of: gives the mesh for a number of copies; None for one device.
    split_params: whether each copy's parameters are split over the data axis.
  """

  train: Program
  train_batches: Program
  recalibrate: Program
  batch_statistics: Program
  predict: Program
  evaluate: Callable[[jax.Array, jax.Array], dict[str, jax.Array]]
  optimizer: step.Optimizer
  batch_size: int
  eval_batch_size: int
  own_masks: bool
  mesh_of: MeshOf
  split_params: bool


def make_programs(
  module: nn.Module,
  optimizer: step.Optimizer,
  *,
  training_images: Callable[[jax.Array, jax.Array], jax.Array],
  evaluation_images: Callable[[jax.Array], jax.Array],
  batch_size: int,
  eval_batch_size: int = 500,
  own_masks: bool = False,
  feedback: bool = False,
  mesh: Mesh | MeshOf | None = None,
  at_once: int | None = None,
  micro_batches: int = 1,
  split_params: bool = False,
  metrics: Mapping[str, Metric] = METRICS,
) -> Programs:
  """Makes the programs of one network on one data set.

  Args:
    module: Flax linen network.
    optimizer: gives the optimizer for a learning rate and a weight decay, both traced.
    training_images: augments and normalizes, `f(key, uint8 images) -> float images`.
    evaluation_images: normalizes, `f(uint8 images) -> float images`.
    batch_size: examples of one copy in a step.
    eval_batch_size: examples of one copy in an evaluation step; results do not depend
      on it.
    own_masks: whether each copy has masks of its own.
    feedback: whether removed entries go on being trained, see `Recipe`.
    mesh: None for one device, else as `jaxsms.make_mesh` gives; or a function of the number
      of copies that gives one of these, all over the same devices.
    at_once: copies that one device trains at the same time, see `jaxsms.map_ingredients`;
      None means all.
    micro_batches: parts of a batch whose gradients are accumulated, see `Recipe`.
    split_params: whether each copy's parameters and optimizer state are split over the
      mesh's data axis, for models that do not fit on one device.
    metrics: what models are measured by, functions of logits [n, classes] and labels [n]
      by name.

  Returns:
    The programs.

  Raises:
    ValueError: the batch does not split into micro-batches, or these not over the mesh.

  Example:
    >>> programs = jaxsms.training.make_programs(
    ...   jaxsms.models.create("mlp", num_classes=2), jaxsms.training.sgd,
    ...   training_images=lambda key, images: images / 255,
    ...   evaluation_images=lambda images: images / 255, batch_size=20)
    >>> logits = jnp.array([[[2.0, 0.0], [0.0, 2.0]]])  # of one model, two examples
    >>> programs.evaluate(logits, jnp.array([0, 0]))["accuracy"].tolist()
    [0.5]
  """
  mesh_of = (lambda copies: mesh) if mesh is None or isinstance(mesh, Mesh) else mesh
  if micro_batches < 1 or batch_size % micro_batches:
    raise ValueError(
      f"a batch of {batch_size} does not split into {micro_batches} micro-batches: give a "
      "number that divides it"
    )
  of_params = split_over_data if split_params else whole

  def split(state_and_metrics):
    state, metrics = state_and_metrics
    return of_params(state), whole(metrics)

  def recipe(alone):
    # Skipping is a condition: free on a CPU, a wait for the host in every step on a GPU.
    skip_inactive = alone and jax.default_backend() == "cpu"
    return step.Recipe(
      module, optimizer, training_images, micro_batches, feedback, skip_inactive
    )

  def train(alone, data, *copy):
    return split(step.train_chunk(recipe(alone), batch_size, data, step.Copy(*copy)))

  def train_batches(alone, images, labels, taken, *copy):
    copy = step.Copy(*copy)
    return split(step.train_batches(recipe(alone), images, labels, taken, copy))

  def recalibrate(alone, data, key, params, batch_stats):
    return of_params(
      inference.recalibrate(
        module, training_images, batch_size, data, key, params, batch_stats
      )
    )

  def batch_statistics(alone, *arguments):
    return of_params(inference.batch_statistics(module, training_images, *arguments))

  def predict(alone, images, params, batch_stats):
    return whole(
      inference.predict(
        module, evaluation_images, eval_batch_size, images, params, batch_stats
      )
    )

  def evaluate(logits, labels):
    return {name: metric(logits, labels) for name, metric in metrics.items()}

  def program(function, in_axes, **options):
    @functools.cache
    def jitted(mesh, alone):
      if mesh is not None:
        check_batch(batch_size, micro_batches, mesh)
      one = functools.partial(function, alone)
      return jax.jit(
        map_ingredients(one, in_axes, mesh, 1 if alone else at_once), **options
      )

    def on(mesh, copies):
      devices = 1 if mesh is None else mesh.shape[INGREDIENT_AXIS]
      return jitted(mesh, at_once == 1 or copies <= devices)

    return Program(on, mesh_of, in_axes)

  evaluate_all = jax.jit(jax.vmap(evaluate, in_axes=(0, None)))
  of_copies = (0 if own_masks else None, None, 0, 0, 0)
  return Programs(
    train=program(train, (None, *of_copies), donate_argnums=3),
    train_batches=program(train_batches, (0, 0, None, *of_copies), donate_argnums=5),
    recalibrate=program(recalibrate, (None, None, 0, 0)),
    batch_statistics=program(batch_statistics, (None, None, None, 0, 0)),
    predict=program(predict, (None, 0, 0)),
    evaluate=lambda *arguments: wait_on_cpu(evaluate_all(*arguments)),
    optimizer=optimizer,
    batch_size=batch_size,
    eval_batch_size=eval_batch_size,
    own_masks=own_masks,
    mesh_of=mesh_of,
    split_params=split_params,
  )


def check_batch(batch_size: int, micro_batches: int, mesh: Mesh) -> None:
  """Raises ValueError where the mesh's data axis cannot split a (micro-)batch."""
  size = mesh.shape.get(DATA_AXIS, 1)
  if batch_size // micro_batches % size:
    parts = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    raise ValueError(
      f"a batch of {batch_size}{parts} does not split over {size} devices: choose a batch "
      "size or a mesh whose data axis divides it"
    )
