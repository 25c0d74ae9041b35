"""Networks that are cut between phases, in the engine."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.channels import ChannelGroups, Compact, channel_groups, compact
from jaxsms.devices.meshes import gather
from jaxsms.flops import multiply_adds, sparse_multiply_adds
from jaxsms.training.engine import Engine, Model, Record
from jaxsms.training.programs import Programs
from jaxsms.trees import PyTree, is_parameter, shape_of

TRACED = 2  # images that a network is traced with


class CutModule:
  """A network on cut variables: it stands where its linen module does in the programs."""

  def __init__(self, module: nn.Module, network: Compact):
    """Cuts nothing yet.

    Args:
      module: the full network.
      network: made of its variables, `params` and `batch_stats`.
    """
    self._module, self._network = module, network
    self._called = functools.cache(self._called_with)

  def apply(
    self,
    variables: PyTree,
    images: jax.Array,
    train: bool = False,
    rngs: dict[str, jax.Array] | None = None,
    mutable: tuple[str, ...] | list[str] = (),
  ) -> Any:
    """As the module's `apply`, on smaller variables."""
    return self._called(train, tuple(mutable))(variables, images, rngs or {})

  def clone(self, **fields: Any) -> "CutModule":
    """The same on the module with other fields."""
    return CutModule(self._module.clone(**fields), self._network)

  def _called_with(self, train, mutable):
    options: dict[str, Any] = {"mutable": list(mutable)} if mutable else {}

    def full(variables, images, rngs):
      return self._module.apply(variables, images, train=train, rngs=rngs, **options)

    return self._network.cut(full)


class Cut(NamedTuple):
  """The network of one phase.

  Attributes:
    engine: that trains and measures it.
    network: how it was cut; None where it was not.
  """

  engine: Engine
  network: Compact | None = None

  def shrink(self, model: Model) -> Model:
    """A model in the shapes of this phase, leaves [...].

    What lies in parts on the devices of several processes is whole on one of each process
    afterwards.
    """
    if self.network is None:
      return model
    return Model(**self.network.shrink(gather(model._asdict())))

  def masks(self, masks: PyTree) -> PyTree:
    """Masks of parameters in the shapes of this phase."""
    if self.network is None:
      return masks
    return self.network.shrink(gather({"params": masks}))["params"]

  def expand(self, model: Model) -> Model:
    """A model of this phase in the full shapes, zeros where it was cut."""
    if self.network is None:
      return model
    return Model(**self.network.expand(gather(model._asdict())))


def groups_of(
  module: nn.Module, model: Model, image_shape: tuple[int, ...]
) -> ChannelGroups:
  """The channels of a network that can only go together, from shapes alone.

  Args:
    module: called as `module.apply(variables, images, train=False)`.
    model: arrays or shapes [...]; only shapes are used.
    image_shape: height, width and channels of an image.

  Returns:
    Groups of its parameters. Their multiply-adds are of `TRACED` images.

  Raises:
    ValueError: see `jaxsms.channel_groups`.
  """
  shapes = _shapes(model)
  statistics = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["batch_stats"])

  def apply(params, images):
    variables = {"params": params, "batch_stats": statistics}
    return module.apply(variables, images, train=False)

  images = jax.ShapeDtypeStruct((TRACED, *image_shape), jnp.float32)
  return channel_groups(apply, shapes["params"], images)


def cut_network(
  module: nn.Module, model: Model, masks: PyTree, image_shape: tuple[int, ...]
) -> Compact:
  """Cuts out of a network what masks emptied.

  Args:
    module: the full network, called as `module.apply(variables, images, train=False)`.
    model: arrays or shapes [...]; only shapes are used.
    masks: of its parameters, True where kept; concrete.
    image_shape: height, width and channels of an image.

  Returns:
    The smaller network, of its variables `params` and `batch_stats`, without values.

  Raises:
    ValueError: see `jaxsms.compact`.
  """
  shapes = _shapes(model)
  images = jax.ShapeDtypeStruct((TRACED, *image_shape), jnp.float32)
  everything = jax.tree.map(lambda x: np.ones(x.shape, bool), shapes["batch_stats"])

  def apply(variables, images):
    return module.apply(variables, images, train=False)

  return compact(apply, shapes, {"params": masks, "batch_stats": everything}, images)


def cut_multiply_adds(
  network: Compact, model: Model, image_shape: tuple[int, ...]
) -> dict[str, int]:
  """Multiply-adds of each weight of a cut network, for one image.

  Args:
    network: from `cut_network`.
    model: what it was cut out of, arrays or shapes [...].
    image_shape: height, width and channels of an image.

  Returns:
    Counts by the path of the weight, see `jaxsms.multiply_adds`.
  """
  left = _shapes(network.shrink(_shapes(model)))
  return image_multiply_adds(network.apply, left, image_shape)


def image_multiply_adds(
  apply: Callable[..., Any], variables: PyTree, image_shape: tuple[int, ...]
) -> dict[str, int]:
  """Multiply-adds of one image, by the path of each weight within the parameters."""
  one_image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  counts = multiply_adds(apply, variables, one_image)
  return {name.removeprefix("params/"): count for name, count in counts.items()}


def parameter_count(params: PyTree) -> int:
  """How many numbers of a tree are trained, batch statistics and keys left out."""
  leaves = jax.tree.leaves_with_path(params)
  return sum(x.size for path, x in leaves if is_parameter(path, x))


def _shapes(tree):
  """Of a model or its variables: variables without values."""
  return jax.tree.map(shape_of, tree._asdict() if isinstance(tree, Model) else tree)


def cut_engine(
  engine: Engine,
  model: Model,
  masks: PyTree,
  *,
  module: nn.Module,
  programs_of: Callable[[Any], Programs],
  image_shape: tuple[int, ...],
) -> Cut:
  """Cuts out of a network what masks emptied, and makes the programs of what is left.

  Args:
    engine: of the full network.
    model: pruned, leaves [...]; only its shapes are used.
    masks: of its parameters, True where kept; concrete.
    module: the full network.
    programs_of: makes the programs of a network, see `make_programs`.
    image_shape: height, width and channels of an image.

  Returns:
    The network of the phase. What it is described by counts the parameters and
    multiply-adds that are left; shares are those of the full network.

  Raises:
    ValueError: see `jaxsms.compact`.
  """
  network = cut_network(module, model, masks, image_shape)
  costs = cut_multiply_adds(network, model, image_shape)

  def describe(params: PyTree) -> Record:
    expanded = network.expand({"params": params})["params"]
    record = engine.describe(expanded)
    if "parameters" in record:
      record["parameters"] = parameter_count(params)
    if "multiply_adds" in record:
      dense, sparse = record["multiply_adds"], sparse_multiply_adds(costs, params)
      record["multiply_adds"] = sum(costs.values())
      record["sparse_multiply_adds"] = total = sum(sparse.values())
      record["theoretical_speedup"] = dense / total if total else np.inf
    return record

  programs = programs_of(CutModule(module, network))
  return Cut(engine._replace(programs=programs, describe=describe), network)
