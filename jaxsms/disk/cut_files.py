"""Files of networks that `compact` has cut: safetensors, and PyTorch's state dicts."""

import contextlib
import importlib.resources
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxsms.channels.arrays import expanded
from jaxsms.channels.cutting import Compact, compact_from, masks_of_row
from jaxsms.disk.by_name import by_path, nested
from jaxsms.disk.npz import check_memory
from jaxsms.disk.safetensors import (
  arrays_of,
  digest_of,
  read_with_metadata,
  write_safetensors,
)
from jaxsms.disk.storage import first_sentence
from jaxsms.disk.torch_layout import state_dict_of, tensors_of
from jaxsms.models.resnet_cifar import CifarResNet
from jaxsms.models.vit import ViT
from jaxsms.trees import PyTree

FORMAT = "jaxsms-cut-1"


def save_cut(
  path: str | os.PathLike, network: Compact, params: PyTree | None = None
) -> None:
  """Writes a cut network to a safetensors file: the smaller arrays and what was cut.

  The arrays have names such as "params/Dense_0/kernel". The metadata hold `format`,
  `layout`, the network's layout as JSON, and `sha256`, a digest of all the rest.

  Args:
    path: the file; its folder is made where it is missing, and an older file replaced.
    network: what `jaxsms.compact` gave, of parameters in dicts.
    params: smaller arrays, such as those after training; None means those of `network`.

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
  arrays = arrays_of(network.params if params is None else params)
  layout = json.dumps(network.layout, separators=(",", ":"))
  digest = digest_of(arrays, layout)
  write_safetensors(path, arrays, {"format": FORMAT, "layout": layout, "sha256": digest})


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
  with _whole(path):
    rows = _layout_of(arrays, metadata)
    return compact_from(apply, nested(arrays), list(rows.values()))


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
  with _whole(path):
    rows = _layout_of(arrays, metadata)
    sizes = (math.prod(rows[name]["shape"]) * x.itemsize for name, x in arrays.items())
    check_memory(sum(sizes), "it would take")
    masks = {name: masks_of_row(row, "kept") for name, row in rows.items()}
    return {name: expanded(array, masks[name]) for name, array in arrays.items()}


@contextlib.contextmanager
def _whole(path: str | os.PathLike) -> Iterator[None]:
  """Turns errors of many kinds into one ValueError that the file is damaged."""
  kinds = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)
  try:
    yield
  except (*kinds, RecursionError) as error:
    reason = first_sentence(error).partition(": ")[0]  # its advice is for others
    raise ValueError(
      f"{os.fspath(path)} does not fit its own layout ({reason}): give a whole file that "
      "save_cut wrote, of parameters in dicts"
    ) from error


def _layout_of(
  arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> dict[str, Any]:
  """The rows of a file's layout by name; files before the digest have none.

  Raises:
    ValueError, KeyError, TypeError, AttributeError, RecursionError: it is no layout of
      these arrays.
  """
  text = metadata["layout"]
  if metadata.get("sha256", "") not in ("", digest_of(arrays, text)):
    raise ValueError("its content does not have its digest")
  layout = json.loads(text)
  rows = {row["path"]: row for row in layout}
  if len(rows) < len(layout) or rows.keys() != arrays.keys():
    raise ValueError("its layout names other arrays")
  for name, array in arrays.items():
    _check_row(name, rows[name], array)
  check_memory(8 * sum(n for row in rows.values() for n in row["shape"]), "it would take")
  return rows


def _check_row(name: str, row: Mapping[str, Any], array: np.ndarray) -> None:
  """Raises ValueError unless an array is what a row of the layout left of a shape."""
  shape = row["shape"]
  if any(type(n) is not int or n < 0 for n in shape):  # True is an int too
    raise ValueError(f"{name!r} has no shape")
  axes = {str(axis): n for axis, n in enumerate(shape)}
  for positions in (row["kept"], row["empty"]):
    for axis, listed in positions.items():
      if any(type(i) is not int or not 0 <= i < axes[axis] for i in listed):
        raise ValueError(f"{name!r} has positions beyond its shape")
      if any(one >= other for one, other in itertools.pairwise(listed)):
        raise ValueError(f"{name!r} has positions that do not rise")
  left = [len(row["kept"].get(axis, range(n))) for axis, n in axes.items()]
  if list(array.shape) != left:
    raise ValueError(f"{name!r} is {list(array.shape)} and should be {left}")


def cut_to_torch(
  network: Compact, module: nn.Module, image_shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
  """The state dict of a cut network of `jaxsms.models`, for `torch_module` in PyTorch.

  Args:
    network: what `jaxsms.compact` gave of the module's variables, {"params": ...,
      "batch_stats": ...}.
    module: what `jaxsms.models.create` made.
    image_shape: [height, width, channels] of one image.

  Returns:
    Arrays by name. Besides the weights it has what shapes do not show: `pads` of shortcuts
    that are padded with zeros, `heads` and `scale` of attentions.

  Raises:
    ValueError: the network is not one of `jaxsms.models`.

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
  state = state_dict_of(tensors, jax.tree.leaves(network.params))
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
      kept.append(np.asarray(row["kept"].get("0", range(sizes[-1])), int))
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
