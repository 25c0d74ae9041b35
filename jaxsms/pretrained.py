"""Weights trained elsewhere: reading their files, and converting PyTorch's networks."""

import os
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxsms import checkpoint
from jaxsms.disk import storage
from jaxsms.disk.by_name import by_path, check_fit
from jaxsms.disk.torch_layout import (
  canonical,
  fitting_options,
  layout,
  state_dict_of,
  to_flax_axes,
)
from jaxsms.disk.weight_files import as_array, load_weights
from jaxsms.trees import check_finite

__all__ = [
  "fit_model",
  "from_torch",
  "load_arrays",
  "load_model",
  "load_weights",
  "to_torch",
]

# Put before every name by DataParallel, AveragedModel and torch.compile.
_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
_COLLECTIONS = ("params", "batch_stats")
_IGNORED = re.compile(r"(^|\.)num_batches_tracked$|^n_averaged$")


def from_torch(
  state_dict: Mapping[str, Any], module: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
  """Turns PyTorch's weights of one of the paper's networks into Flax variables.

  The layers may be called as in the paper's code, in the usual CIFAR networks ("shortcut",
  "linear") or in torchvision ("downsample", "fc"), those of the Vision Transformer as in
  timm; prefixes of DataParallel and torch.compile are dropped, and weights that
  torch.nn.utils.prune keeps with their masks are masked.

  Args:
    state_dict: arrays or PyTorch tensors by name, such as `load_weights` gives.
    module: what `jaxsms.models.create` made, with the options of those weights.
    image_shape: [height, width, channels] of one image. The first layer of an MLP expects
      images flattened in PyTorch's order, [channels, height, width], and is permuted.

  Returns:
    {"params": ..., "batch_stats": ...}, of NumPy arrays; no statistics give {}.

  Raises:
    ValueError: the network is another one, names or shapes do not all agree, or a weight
      is not floating.

  References:
    https://github.com/ZIB-IOL/SMS/tree/main/models
    https://github.com/kuangliu/pytorch-cifar
    https://github.com/pytorch/vision/blob/main/torchvision/models/resnet.py
    https://github.com/huggingface/pytorch-image-models (timm)

  Example:
    >>> mlp = jaxsms.models.create("mlp", num_classes=2, hidden=(3,))
    >>> layers = {"Dense_0": {"kernel": np.arange(12.0).reshape(4, 3), "bias": np.zeros(3)},
    ...           "Dense_1": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}
    >>> state = jaxsms.pretrained.to_torch({"params": layers}, mlp, (2, 2, 1))
    >>> model = jaxsms.pretrained.from_torch(state, mlp, (2, 2, 1))
    >>> model["params"]["Dense_0"]["kernel"][1].tolist()
    [3.0, 4.0, 5.0]
  """
  template, tensors, head = layout(module, image_shape)
  expected = {tensor.name: tensor for tensor in tensors}
  ours = {canonical(name): name for name in expected}
  found: dict[str, np.ndarray] = {}
  sources: dict[str, str] = {}
  for name, array in _plain(state_dict).items():
    known = ours.get(canonical(name), name)
    if known in found:
      raise ValueError(
        f"{sources[known]} and {name} are names of one layer: keep one of them"
      )
    found[known], sources[known] = array, name
  other = head in found and found[head].shape != expected[head].shape
  classes = found[head].size if other else None
  check_fit(
    f"the weights do not fit {type(module).__name__} with {module.num_classes} classes",
    expected,
    found,
    fitting_options(module, found, classes),
  )
  for name, array in found.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} is {array.dtype}: give floating weights, none quantized")
  leaves, structure = jax.tree.flatten(template)
  arrays = [
    to_flax_axes(found[tensor.name], tensor, leaf)
    for tensor, leaf in zip(tensors, leaves, strict=True)
  ]
  variables = jax.tree.unflatten(structure, arrays)
  return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def load_model(
  path: str | os.PathLike, module: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
  """Reads a trained model of one of the paper's networks from any of the formats.

  Args:
    path: a folder that `jaxsms.checkpoint.save` or orbax wrote, with `params` and
      `batch_stats`; or a file as `load_weights` reads it, under our names, as
      `save_safetensors` writes them, or under PyTorch's, see `from_torch`.
    module: what `jaxsms.models.create` made, with the options of those weights.
    image_shape: [height, width, channels] of one image.

  Returns:
    {"params": ..., "batch_stats": ...}, of NumPy arrays; no statistics give {}.

  Raises:
    ValueError: there is no such model, it cannot be read, names or shapes are not those of
      the network, or values are not finite.
    ImportError: a PyTorch checkpoint without PyTorch.

  Example:
    >>> import tempfile
    >>> mlp = jaxsms.models.create("mlp", num_classes=2, hidden=(3,))
    >>> params = {"Dense_0": {"kernel": np.ones((4, 3)), "bias": np.zeros(3)},
    ...           "Dense_1": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> jaxsms.checkpoint.save(folder, {"params": params, "batch_stats": {}})
    >>> model = jaxsms.pretrained.load_model(folder, mlp, image_shape=(2, 2, 1))
    >>> model["params"]["Dense_1"]["kernel"].tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
  """
  return fit_model(load_arrays(path), module, image_shape, f"{path}")


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a model of any network from any of the formats.

  Args:
    path: a folder that `jaxsms.checkpoint.save` or orbax alone wrote, or a file as
      `load_weights` reads it.

  Returns:
    The arrays by name. Where some have names under "params", only those and "batch_stats"
    are read, without the optimizer, the step and the masks of a training state.

  Raises:
    ValueError: there is no such model, or it cannot be read.
    ImportError: a PyTorch checkpoint without PyTorch.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.npz"
    >>> np.savez(path, **{"params/Dense_0/kernel": np.ones((2, 3)), "step": np.array(7)})
    >>> list(jaxsms.pretrained.load_arrays(path))
    ['params/Dense_0/kernel']
  """
  folder = storage.as_path(path)
  if not folder.is_dir():
    found = load_weights(path)
    if any(name.startswith("params/") for name in found):
      found = {k: v for k, v in found.items() if k.split("/")[0] in _COLLECTIONS}
    return found
  whole = (folder / checkpoint.MANIFEST).exists()
  if not whole and checkpoint.holds_nothing(path):
    raise ValueError(
      f"{path} cannot be read (it holds no whole checkpoint): give a folder that "
      "jaxsms.checkpoint.save wrote, such as RUN/soup/seed_0"
    )
  tree = checkpoint.restore(path) if whole else checkpoint.restore_plain(path)
  if isinstance(tree, Mapping) and "params" in tree:
    tree = {name: tree[name] for name in tree if name in _COLLECTIONS}
  return {k: as_array(path, k, v) for k, v in by_path(tree).items()}


def fit_model(
  found: dict[str, np.ndarray],
  module: nn.Module,
  image_shape: tuple[int, int, int],
  what: str,
) -> dict[str, Any]:
  """Arrays under names of this library or of PyTorch, as the variables of a network.

  Args:
    found: see `load_arrays`; parameters alone may lie under their names without "params".
    module: what `jaxsms.models.create` made, with the options of those weights.
    image_shape: [height, width, channels] of one image.
    what: where they come from, for the message.

  Returns:
    {"params": ..., "batch_stats": ...}, of NumPy arrays; no statistics give {}.

  Raises:
    ValueError: see `load_model`.

  Example:
    >>> mlp = jaxsms.models.create("mlp", num_classes=2, hidden=(3,))
    >>> arrays = {"Dense_0/kernel": np.ones((4, 3)), "Dense_0/bias": np.zeros(3),
    ...           "Dense_1/kernel": np.ones((3, 2)), "Dense_1/bias": np.zeros(2)}
    >>> model = jaxsms.pretrained.fit_model(arrays, mlp, (2, 2, 1), "this file")
    >>> model["params"]["Dense_1"]["bias"].tolist()
    [0.0, 0.0]
  """
  template = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.zeros((1, *image_shape), jnp.float32))
  )
  template = {k: template.get(k, {}) for k in _COLLECTIONS}
  if found.keys() == by_path(template["params"]).keys() and not template["batch_stats"]:
    found = {f"params/{name}": array for name, array in found.items()}
  if any(name.startswith("params/") for name in found):
    problem = f"{what} does not fit {type(module).__name__}"
    check_fit(problem, by_path(template), found, fitting_options(module, found))
    model = checkpoint.fill(template, found, what)
  else:
    model = from_torch(found, module, image_shape)
  check_finite(model, what)
  return model


def to_torch(
  variables: Mapping[str, Any], module: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
  """Turns variables of one of the paper's networks into PyTorch's: undoes `from_torch`.

  Args:
    variables: {"params": ..., "batch_stats": ...}.
    module: what `jaxsms.models.create` made.
    image_shape: [height, width, channels] of one image.

  Returns:
    Arrays by name, as in the paper's code, torchvision (with the ImageNet stem) or timm.

  Raises:
    ValueError: the variables are not those of the network.

  Example:
    >>> mlp = jaxsms.models.create("mlp", num_classes=2, hidden=(3,))
    >>> layers = {"Dense_0": {"kernel": np.ones((4, 3)), "bias": np.zeros(3)},
    ...           "Dense_1": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}
    >>> state = jaxsms.pretrained.to_torch({"params": layers}, mlp, image_shape=(2, 2, 1))
    >>> {name: array.shape for name, array in state.items()}
    {'fc1.bias': (3,), 'fc1.weight': (3, 4), 'fc2.bias': (2,), 'fc2.weight': (2, 3)}
  """
  template, tensors, _ = layout(module, image_shape)
  arrays = by_path(variables)
  check_fit(
    f"the variables do not fit {type(module).__name__}",
    by_path(template),
    arrays,
    "give those of this network, for images of this shape",
  )
  state = state_dict_of(tensors, arrays.values())
  for name in [name for name in state if ".attn.q." in name]:
    parts = [state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
    state[name.replace(".attn.q.", ".attn.qkv.")] = np.concatenate(parts)
  return state


def _plain(state_dict):
  """Weights alone, without prefixes, masks of pruning, and joined attention matrices."""
  plain = {}
  for full_name, tensor in state_dict.items():
    name = _PREFIXES.sub("", full_name)
    if _IGNORED.search(name):
      continue
    if name in plain:
      raise ValueError(f"{name} comes twice, with and without a prefix: keep one of them")
    plain[name] = as_array("the state dict", name, tensor)
  for name in [name for name in plain if name.endswith("_orig")]:
    bare, mask = name.removesuffix("_orig"), name.removesuffix("_orig") + "_mask"
    if mask in plain and bare not in plain and plain[mask].shape == plain[name].shape:
      weight = plain.pop(name)
      plain[bare] = np.where(plain.pop(mask) != 0, weight, np.zeros((), weight.dtype))
  for name in [name for name in plain if ".attn.qkv." in name]:
    if plain[name].shape and plain[name].shape[0] % 3 == 0:
      for part, array in zip("qkv", np.split(plain.pop(name), 3), strict=True):
        plain[name.replace(".qkv.", f".{part}.")] = array
  return plain
