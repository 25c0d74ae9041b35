"""Files of networks that `compact` has cut: safetensors, and PyTorch's state dicts."""

import importlib.resources
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxsms.channels import Compact, compact_from
from jaxsms.disk.by_name import by_path
from jaxsms.disk.safetensors import read_with_metadata, write_safetensors
from jaxsms.disk.torch_layout import tensors_of, to_torch_axes
from jaxsms.models.resnet_cifar import CifarResNet
from jaxsms.models.vit import ViT
from jaxsms.trees import PyTree

FORMAT = "jaxsms-cut-1"


def save_cut(
  path: str | os.PathLike, network: Compact, params: PyTree | None = None
) -> None:
  """Writes a cut network to a safetensors file: its smaller arrays, and what was cut.

  The arrays lie under names such as "params/Dense_0/kernel"; the metadata hold `format`
  and `layout`, the network's layout as JSON.

  Args:
    path: the file; its folder is made where it is missing, and an older file replaced.
    network: what `jaxsms.compact` gave, of parameters in dicts.
    params: smaller arrays, trained from the network's own say; None means its own.

  Raises:
    ValueError: a leaf is of a dtype that the format does not have, or params are shapes.
    OSError: the file cannot be written.

  Example:
    >>> import tempfile
    >>> params = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[3.0], [0.0]])}
    >>> apply = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> masks = jax.tree.map(lambda x: x != 0, params)
    >>> network = jaxsms.compact(apply, params, masks, jnp.ones((1, 1)))
    >>> path = tempfile.mkdtemp() + "/cut.safetensors"
    >>> jaxsms.export.save_cut(path, network)
    >>> jaxsms.export.load_cut(path, apply).params["a"].tolist()
    [[1.0]]
  """
  arrays = by_path(network.params if params is None else params)
  layout = json.dumps(network.layout, separators=(",", ":"))
  write_safetensors(path, arrays, {"format": FORMAT, "layout": layout})


def load_cut(path: str | os.PathLike, apply: Callable[..., Any]) -> Compact:
  """Reads what `save_cut` wrote.

  Args:
    path: the file.
    apply: the function of the full network, as it was given to `compact`.

  Returns:
    The cut network, its params nested dicts of NumPy arrays; its masks are None.

  Raises:
    ValueError: the file is missing, damaged, or of something else.

  Example:
    >>> import tempfile
    >>> params = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[3.0], [0.0]])}
    >>> apply = lambda p, x: (x @ p["a"]) @ p["b"]
    >>> masks = jax.tree.map(lambda x: x != 0, params)
    >>> network = jaxsms.compact(apply, params, masks, jnp.ones((1, 1)))
    >>> path = tempfile.mkdtemp() + "/cut.safetensors"
    >>> jaxsms.export.save_cut(path, network)
    >>> loaded = jaxsms.export.load_cut(path, apply)
    >>> loaded.apply(loaded.params, jnp.array([[2.0]])).tolist()  # 2 * 1 * 3
    [[6.0]]
  """
  arrays, metadata = read_with_metadata(path)
  if metadata.get("format") != FORMAT:
    raise ValueError(
      f"{os.fspath(path)} holds no cut network: give a file that save_cut wrote"
    )
  tree: dict[str, Any] = {}
  for name, array in arrays.items():
    *folders, last = name.split("/")
    inner = tree
    for folder in folders:
      inner = inner.setdefault(folder, {})
    inner[last] = array
  try:
    return compact_from(apply, tree, json.loads(metadata["layout"]))
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(
      f"{os.fspath(path)} does not fit its own layout: give a whole file that save_cut "
      "wrote, of parameters in dicts"
    ) from error


def expand_cut(
  path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """The arrays of a cut network's file in their full shapes, zeros where it was cut.

  Args:
    path: of the file, for the message.
    arrays: of the file, by name.
    metadata: of the file, of this `FORMAT`.

  Raises:
    ValueError: they do not fit the layout.
  """
  try:
    rows = {row["path"]: row for row in json.loads(metadata["layout"])}
    full = {}
    for name, array in arrays.items():
      full[name] = np.zeros(rows[name]["shape"], array.dtype)
      kept = [
        rows[name]["kept"].get(str(i), range(n)) for i, n in enumerate(full[name].shape)
      ]
      full[name][np.ix_(*kept)] = array
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(
      f"{os.fspath(path)} does not fit its own layout: give a whole file that save_cut "
      "wrote"
    ) from error
  return full


def cut_to_torch(
  network: Compact, module: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
  """A cut network of ours as PyTorch's state dict, for the networks in `torch_module`.

  Args:
    network: what `jaxsms.compact` gave of the module's variables, {"params": ...,
      "batch_stats": ...}.
    module: what `jaxsms.models.create` made.
    image_shape: [height, width, channels] of one image.

  Returns:
    Arrays by name. Beside the weights lie what their shapes do not tell: `pads` of
    shortcuts that are padded with zeros, `heads` and `scale` of attentions.

  Raises:
    ValueError: the network is none of ours.

  Example:
    >>> module = jaxsms.models.create("mlp", 3, hidden=(4,))
    >>> images = jnp.ones((1, 2, 2, 1))
    >>> params = module.init(jax.random.key(0), images)
    >>> masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
    >>> small = jaxsms.compact(module.apply, params, masks, images)
    >>> state = jaxsms.export.cut_to_torch(small, module, (2, 2, 1))
    >>> state["fc1.weight"].shape
    (4, 4)
  """
  tensors = tensors_of(module, network.params, image_shape)
  leaves = jax.tree.leaves(network.params)
  state = {
    tensor.name: to_torch_axes(np.asarray(leaf), tensor)
    for tensor, leaf in zip(tensors, leaves, strict=True)
  }
  rows = {row["path"]: row for row in network.layout}
  if isinstance(module, CifarResNet):
    state |= _pads(module, rows)
  if isinstance(module, ViT):
    state |= _heads(module, rows, by_path(network.params))
  return state


def _pads(module: CifarResNet, rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """For each shortcut that is padded, how many new channels stay on each side."""
  blocks, pads = (module.depth - 2) // 6, {}
  for stage in (1, 2):
    sizes, kept = [], []
    for block in (stage * blocks - 1, stage * blocks):  # the last before, and the first
      row = rows[f"params/BasicBlock_{block}/BatchNorm_1/scale"]
      sizes.append(row["shape"][0])
      kept.append(np.asarray(row["kept"].get("0", range(sizes[-1]))))
    low = (sizes[1] - sizes[0]) // 2
    counts = [np.sum(kept[1] < low), np.sum(kept[1] >= low + sizes[0])]
    pads[f"layer{stage + 1}.0.pads"] = np.asarray(counts, np.int64)
  return pads


def _heads(
  module: ViT, rows: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """For each attention how many heads stay, and what full queries are multiplied by."""
  found = {}
  for i in range(module.depth):
    path = f"params/TransformerBlock_{i}/MultiHeadDotProductAttention_0/query/kernel"
    found[f"blocks.{i}.attn.heads"] = np.asarray(arrays[path].shape[1], np.int64)
    scale = rows[path]["shape"][2] ** -0.5
    found[f"blocks.{i}.attn.scale"] = np.asarray(scale, np.float32)
  return found


def torch_module() -> str:
  """The Python file, on PyTorch alone, that loads the state dicts of `cut_to_torch`.

  Returns:
    Its text.

  Example:
    >>> "def load(path):" in jaxsms.export.torch_module()
    True
  """
  source = importlib.resources.files("jaxsms.disk") / "torch_networks.py"
  return source.read_text(encoding="utf-8")
