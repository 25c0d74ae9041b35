"""What PyTorch calls the weights of the paper's networks, and how it orders their axes."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.models.mlp import MLP
from jaxsms.models.resnet import ResNet
from jaxsms.models.resnet_cifar import CifarResNet
from jaxsms.models.vgg import VGG
from jaxsms.models.vit import ViT
from jaxsms.models.wide_resnet import WideResNet
from jaxsms.trees import PyTree, path_names

# Names that mean the same layer; both sides are compared after these replacements.
_ALIASES = (
  (re.compile(r"^(fc|linear|classifier|head)\."), "head."),
  (re.compile(r"\.(shortcut|downsample)\."), ".shortcut."),
  (re.compile(r"^linear(\d+)\."), r"fc\1."),
)
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
  "class_token": "cls_token",
  "position_embedding": "pos_embed",
}
# The first convolution of a ResNet.
_FIRST = re.compile(r"^(conv1\.weight|params/Conv_0/kernel)$")


class Tensor(NamedTuple):
  """A leaf of ours in PyTorch.

  Attributes:
    name: of the tensor in a state dict.
    shape: of the tensor.
    split: our shape, with the axes joined or split that are so in PyTorch.
    axes: where each axis of PyTorch's is in `split`.
  """

  name: str
  shape: tuple[int, ...]
  split: tuple[int, ...]
  axes: tuple[int, ...]


def to_flax_axes(array: np.ndarray, tensor: Tensor, leaf: jax.Array) -> np.ndarray:
  """An array of PyTorch's shape in the shape and dtype of our leaf; a copy."""
  array = array.reshape([tensor.split[axis] for axis in tensor.axes])
  array = array.transpose(np.argsort(tensor.axes)).reshape(leaf.shape)
  return np.array(array, leaf.dtype, order="C")


def state_dict_of(
  tensors: Sequence[Tensor], leaves: Iterable[Any]
) -> dict[str, np.ndarray]:
  """The leaves of a network by the names of their tensors: undoes `to_flax_axes`."""
  state = {}
  for tensor, leaf in zip(tensors, leaves, strict=True):
    array = np.asarray(leaf).reshape(tensor.split).transpose(tensor.axes)
    state[tensor.name] = np.array(array.reshape(tensor.shape), order="C")
  return state


def layout(
  module: nn.Module, image_shape: Sequence[int]
) -> tuple[PyTree, list[Tensor], str]:
  """Our variables, where PyTorch has each leaf, and what its last bias is called.

  Args:
    module: one of the paper's networks.
    image_shape: [height, width, channels] of one image.

  Returns:
    A tree of `jax.ShapeDtypeStruct`, a list in the order of its leaves, and the name of
    the bias of the logits.

  Raises:
    ValueError: the network is another one, or the images do not suit it.
  """
  layers = _layers(module)
  image_shape = tuple(image_shape)
  if len(image_shape) != 3 or min(image_shape) < 1:
    raise ValueError(
      f"image_shape is {image_shape}: give height, width and channels, each at least 1"
    )
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  template = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)
  tensors = tensors_of(module, template, image_shape)
  return template, tensors, f"{list(layers.values())[-1]}.bias"


def tensors_of(
  module: nn.Module, variables: PyTree, image_shape: tuple[int, ...]
) -> list[Tensor]:
  """Where PyTorch has each leaf of a network, which may be cut.

  Args:
    module: one of the paper's networks.
    variables: its tree, of arrays or shapes.
    image_shape: [height, width, channels] of one image.

  Returns:
    A list in the order of the leaves.

  Raises:
    ValueError: the network is another one.
  """
  layers, tensors = _layers(module), []
  for path, leaf in jax.tree.leaves_with_path(variables):
    _, *owners, last = path_names(path)
    layer = [layers["/".join(owners)]] if owners else []
    name = ".".join([*layer, _LEAVES.get(last, last)])
    flat = image_shape if isinstance(module, MLP) and owners == ["Dense_0"] else None
    tensors.append(_tensor(name, last, leaf.shape, flat))
  return tensors


def fitting_options(
  module: nn.Module, found: Mapping[str, Any], num_classes: int | None = None
) -> str:
  """What to do where weights do not fit: the options that they ask for, as advice.

  Args:
    module: the network that they are to fit.
    found: arrays by name, PyTorch's or ours.
    num_classes: of these weights, where it is another than the network's.
  """
  options = []
  first = next((x for name, x in found.items() if _FIRST.search(name)), None)
  if isinstance(module, ResNet) and first is not None and np.ndim(first) == 4:
    stem = "imagenet" if 7 in np.shape(first) else "cifar"
    options += [f'stem="{stem}"'] if stem != module.stem else []
  options += [f"num_classes={num_classes}"] if num_classes else []
  if options:
    return f"make the network with {' and '.join(options)}"
  return "make the network with the options and the image shape of these weights"


def _tensor(name, kind, shape, flattened_image):
  if kind == "bias":  # those of attention have an axis of heads
    return Tensor(name, (math.prod(shape),), (math.prod(shape),), (0,))
  if kind != "kernel":
    return Tensor(name, shape, shape, tuple(range(len(shape))))
  if len(shape) == 4:
    return Tensor(name, tuple(shape[axis] for axis in (3, 2, 0, 1)), shape, (3, 2, 0, 1))
  if flattened_image:
    return Tensor(name, shape[::-1], (*flattened_image, shape[-1]), (3, 2, 0, 1))
  inputs = math.prod(shape[:-1]) if name.endswith("attn.proj.weight") else shape[0]
  outputs = math.prod(shape) // inputs
  return Tensor(name, (outputs, inputs), (inputs, outputs), (1, 0))


def canonical(name: str) -> str:
  """One name for all names that a layer of PyTorch has in public code."""
  for pattern, replacement in _ALIASES:
    name = pattern.sub(replacement, name)
  return name


def _layers(module) -> dict[str, str]:
  """PyTorch's name of each layer that has weights, the one with the logits last."""
  for network, layers in _NETWORKS.items():
    if isinstance(module, network):
      return layers(module)
  raise ValueError(
    f"the network is {type(module).__name__}: give one of jaxsms.models.create, which "
    f"are {', '.join(network.__name__ for network in _NETWORKS)}"
  )


def _mlp(module):
  return {f"Dense_{i}": f"fc{i + 1}" for i in range(len(module.hidden) + 1)}


def _residual(block, blocks, convolutions, shortcut="shortcut", head="linear"):
  """Layers of a residual network; `convolutions` is how many a block has in a row."""
  layers = {"Conv_0": "conv1", "BatchNorm_0": "bn1"}
  places = [f"layer{s}.{i}" for s, n in enumerate(blocks, 1) for i in range(n)]
  for number, place in enumerate(places):
    for i in range(convolutions):
      layers[f"{block}_{number}/Conv_{i}"] = f"{place}.conv{i + 1}"
      layers[f"{block}_{number}/BatchNorm_{i}"] = f"{place}.bn{i + 1}"
    layers[f"{block}_{number}/Conv_{convolutions}"] = f"{place}.{shortcut}.0"
    layers[f"{block}_{number}/BatchNorm_{convolutions}"] = f"{place}.{shortcut}.1"
  return layers | {"Dense_0": head}


def _resnet(module):
  block, convolutions = ("Bottleneck", 3) if module.bottleneck else ("BasicBlock", 2)
  names = ("downsample", "fc") if module.stem == "imagenet" else ()
  return _residual(block, module.blocks, convolutions, *names)


def _vgg(module):
  layers: dict[str, str] = {}
  place = 0
  for number in module.convolutions:
    for _ in range(number):
      convolution = len(layers) // 2
      layers[f"Conv_{convolution}"] = f"features.{place}"
      layers[f"BatchNorm_{convolution}"] = f"features.{place + 1}"
      place += 3  # with the ReLU
    place += 1  # the maximum
  return layers | {"Dense_0": "classifier"}


def _vit(module):
  layers = {"patches": "patch_embed.proj", "LayerNorm_0": "norm"}
  attention = "MultiHeadDotProductAttention_0"
  for i in range(module.depth):
    for ours, theirs in {
      "LayerNorm_0": "norm1",
      f"{attention}/query": "attn.q",
      f"{attention}/key": "attn.k",
      f"{attention}/value": "attn.v",
      f"{attention}/out": "attn.proj",
      "LayerNorm_1": "norm2",
      "Dense_0": "mlp.fc1",
      "Dense_1": "mlp.fc2",
    }.items():
      layers[f"TransformerBlock_{i}/{ours}"] = f"blocks.{i}.{theirs}"
  return layers | {"Dense_0": "head"}


_NETWORKS: dict[type[nn.Module], Callable[[Any], dict[str, str]]] = {
  MLP: _mlp,
  CifarResNet: lambda m: _residual("BasicBlock", [(m.depth - 2) // 6] * 3, 2),
  ResNet: _resnet,
  VGG: _vgg,
  WideResNet: lambda m: _residual("WideBlock", [(m.depth - 4) // 6] * 3, 2),
  ViT: _vit,
}
