"""What training carries from step to step, and the optimizer of the paper."""

from collections.abc import Callable
from typing import NamedTuple, NotRequired, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsms.devices.ingredients import repeat_model
from jaxsms.devices.meshes import params_sharding, place
from jaxsms.trees import PyTree, wait_on_cpu

Scalar = float | np.ndarray | jax.Array


class Teacher(NamedTuple):
  """The models whose mean prediction a copy learns from.

  Attributes:
    params: parameters, leaves [k, ...] of k models.
    batch_stats: batch statistics, leaves [k, ...].
    weights: float [k], summing to 1; 0 for a model that is left out.
    temperature: float [], that divides the logits of teacher and student.
  """

  params: PyTree
  batch_stats: PyTree
  weights: jax.Array
  temperature: jax.Array


class TrainState(NamedTuple):
  """One copy in training; with a leading axis m on every leaf, all of them.

  Attributes:
    params: parameters.
    batch_stats: running batch statistics, an empty dict where the network has none.
    opt_state: state of the optimizer.
    step: int32 [], steps taken in this phase.
    average: of the parameters over these steps; an empty tuple where there is none.
    teacher: whose predictions are the labels; an empty tuple where there is none.
  """

  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  step: jax.Array
  average: PyTree = ()
  teacher: Teacher | tuple[()] = ()


class Ingredients(TypedDict):
  """What the copies of a phase differ in, each [m].

  Attributes:
    seed: int, of batch order, augmentation and dropout.
    weight_decay: float.
    steps: int, how many a copy takes.
    average_decay: float, of the average over its steps that a copy ends as, see
      `jaxsms.training.averaged_ingredients`. Without it a copy ends as its last step.
    average_after: int, steps before it.
    average_every: int, steps from one to the next.
    average_steps: int, steps in all; the last one always enters.
    examples: int [m, most], of copies that train on a share of the data each, its indices
      in the training split.
    size: int, how many of them count.
    log_prior: float [m, classes], added to the logits in the loss of copies that train on
      classes of unequal size, see `jaxsms.training.classifier.log_prior`. Where a teacher
      gives the labels it has no effect.
    frozen: bool [m] for each leaf of the parameters, those that stay as they are.
  """

  seed: np.ndarray | jax.Array
  weight_decay: np.ndarray | jax.Array
  steps: np.ndarray | jax.Array
  average_decay: NotRequired[np.ndarray | jax.Array]
  average_after: NotRequired[np.ndarray | jax.Array]
  average_every: NotRequired[np.ndarray | jax.Array]
  average_steps: NotRequired[np.ndarray | jax.Array]
  examples: NotRequired[np.ndarray | jax.Array]
  size: NotRequired[np.ndarray | jax.Array]
  log_prior: NotRequired[np.ndarray | jax.Array]
  frozen: NotRequired[PyTree]


def seed_ingredients(m: int, weight_decay: float = 0.0, steps: int = 0) -> Ingredients:
  """Those of m copies that differ in their seeds alone, which are 0 to m - 1."""
  return {
    "seed": np.arange(m, dtype=np.int32),
    "weight_decay": np.full([m], weight_decay, np.float32),
    "steps": np.full([m], steps, np.int32),
  }


class Data(NamedTuple):
  """Examples resident on the device.

  Attributes:
    images: uint8 [n, height, width, channels].
    labels: int32 [n].
  """

  images: jax.Array
  labels: jax.Array

  @property
  def size(self) -> int:
    """The number of examples."""
    return len(self.labels)


def sgd(
  learning_rate: Scalar,
  weight_decay: Scalar = 0.0,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
) -> optax.GradientTransformation:
  """SGD as PyTorch has it: L2 decay joins the gradient before the momentum.

  Learning rate and weight decay may be traced. Momentum may not: it decides whether there
  is a buffer.

  Args:
    learning_rate: step size.
    weight_decay: coefficient of the parameters in the gradient, biases included.
    momentum: of the buffer, in [0, 1); 0 means no buffer.
    nesterov: whether to look ahead.

  Returns:
    An optax transformation.

  Example:
    >>> params, gradients = {"w": jnp.array([4.0])}, {"w": jnp.array([1.0])}
    >>> optimizer = jaxsms.training.sgd(0.5, weight_decay=0.25)
    >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    >>> updates["w"].tolist()  # -0.5 * (1 + 0.25 * 4)
    [-1.0]
  """
  parts = [optax.add_decayed_weights(weight_decay)]
  if momentum:
    parts.append(optax.trace(momentum, nesterov))
  return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def init_variables(
  module: nn.Module,
  key: jax.Array,
  image_shape: tuple[int, ...],
  split_over: Mesh | None = None,
) -> tuple[PyTree, PyTree]:
  """Fresh parameters and batch statistics of a network.

  Args:
    module: called as `module.apply(variables, images, train=False)`.
    key: typed key.
    image_shape: height, width and channels of an image.
    split_over: a mesh as `jaxsms.make_mesh` gives, over whose data axis each leaf is made
      in parts, so that no device ever holds the whole model. The values are the same.

  Returns:
    Two trees, parameters and batch statistics; the latter empty where there are none.

  Example:
    >>> mlp = jaxsms.models.create("mlp", num_classes=2, hidden=(3,))
    >>> init = lambda key: jaxsms.training.init_variables(mlp, key, image_shape=(2, 2, 1))
    >>> params, batch_stats = jax.eval_shape(init, jax.random.key(0))  # shapes alone
    >>> params["Dense_0"]["kernel"].shape, batch_stats
    ((4, 3), {})
  """

  def init(key):
    variables = module.init(key, jnp.zeros((1, *image_shape), jnp.float32))
    return variables["params"], variables.get("batch_stats", {})

  return init(key) if split_over is None else make_in_parts(init, split_over, False, key)


def make_in_parts(function: Callable, mesh: Mesh, stacked: bool, *arguments) -> PyTree:
  """What a function gives, each leaf in parts from the start.

  Args:
    function: jittable.
    mesh: over whose data axis each leaf is split, see `jaxsms.devices.meshes.split_params`.
    stacked: whether leaves are [m, ...], spread over the axis "ingredient" where m divides
      evenly.
    *arguments: of the function.

  Returns:
    The function's result.
  """
  shapes = jax.eval_shape(function, *arguments)
  shared = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
    lambda x: x if _lies_on(mesh, x) else place(x, shared), arguments
  )
  shardings = jax.tree.map(lambda x: params_sharding(mesh, x.shape, stacked), shapes)
  return wait_on_cpu(jax.jit(function, out_shardings=shardings)(*arguments))


def _lies_on(mesh, x):
  return isinstance(x, jax.Array) and x.sharding.device_set == set(mesh.devices.flat)


def start(
  params: PyTree,
  batch_stats: PyTree,
  optimizer: optax.GradientTransformation,
  m: int,
) -> TrainState:
  """Equal copies of a model at step 0, their momentum empty.

  Args:
    params: one model's parameters, leaves [...].
    batch_stats: its batch statistics.
    optimizer: whose fresh state the copies get.
    m: number of copies.

  Returns:
    State with leaves [m, ...].

  Example:
    >>> params = {"kernel": jnp.zeros((4, 3))}
    >>> state = jaxsms.training.start(params, {}, jaxsms.training.sgd(0.1), m=5)
    >>> state.params["kernel"].shape, state.step.tolist()
    ((5, 4, 3), [0, 0, 0, 0, 0])
  """
  step = jnp.zeros((), jnp.int32)
  return repeat_model(TrainState(params, batch_stats, optimizer.init(params), step), m)
