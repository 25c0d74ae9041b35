"""What the network of a run takes to be used: bytes, and time for one batch of images."""

import functools
import os
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.channels.latency import ready
from jaxsms.export import apply_bcoo, save_compact, to_bcoo
from jaxsms.pruning import prunable_flags
from jaxsms.trees import PyTree

from .latency_budget import BATCH
from .timing import milliseconds

ROUND_SECONDS = 0.02  # of each model


def measure_inference(
  module: Any, image_shape: tuple[int, ...], soup: dict[str, PyTree]
) -> dict[str, Any]:
  """Bytes, and milliseconds of one batch on one device, of a network dense and sparse.

  Args:
    module: the network.
    image_shape: [height, width, channels].
    soup: `params`, `batch_stats` and `masks`.

  Returns:
    `device`, `batch` (images), `image_shape`, `sparsity` (of the weights) and `models`: by
    name `bytes` (of parameters and batch statistics) and, but for files, `milliseconds`
    (`median`, `min`, `max` over rounds). Of "dense" no weight is 0, "soup" holds its zeros
    as such, "soup, compact file" is what `jaxsms.export.save_compact` writes, and
    "soup, BCOO dense layers", of networks without other weights, what
    `jaxsms.export.to_bcoo` gives.
  """
  device = jax.local_devices()[0]
  variables = {"params": soup["params"], "batch_stats": soup.get("batch_stats", {})}
  models = {
    "dense": {**variables, "params": filled(soup["params"], soup["masks"])},
    "soup": variables,
  }
  dense = functools.partial(module.apply, train=False)
  applies = {"dense": dense, "soup": dense}
  flags = prunable_flags(soup["params"])
  weights = [x for x, f in zip(jax.tree.leaves(soup["params"]), flags, strict=True) if f]
  if all(x.ndim == 2 for x in weights):
    name = "soup, BCOO dense layers"
    models[name] = {**variables, "params": to_bcoo(soup["params"])}
    applies[name] = functools.partial(apply_bcoo, module, train=False)
  images = np.random.default_rng(0).standard_normal((BATCH, *image_shape), np.float32)
  images, models = jax.device_put((images, models), device)
  calls = {name: ready(applies[name], models[name], images) for name in models}
  times = milliseconds(calls, ROUND_SECONDS, slow=0.1)
  records = {
    name: {"bytes": size(tree), "milliseconds": times[name]}
    for name, tree in models.items()
  }
  records["soup, compact file"] = {"bytes": compact_bytes(variables, soup["masks"])}
  return {
    "device": device.device_kind,
    "batch": BATCH,
    "image_shape": list(image_shape),
    "sparsity": sum(int(np.sum(x == 0)) for x in weights) / sum(x.size for x in weights),
    "models": records,
  }


def filled(params: PyTree, masks: PyTree) -> PyTree:
  """The same with small random numbers for what was removed."""
  rng = np.random.default_rng(0)

  def leaf(x, mask):
    return np.where(mask, x, rng.uniform(0.01, 0.05, x.shape)).astype(x.dtype)

  return jax.tree.map(leaf, params, masks)


def size(tree: PyTree) -> int:
  """Bytes of all arrays; those of sparse matrices, too, are leaves."""
  return sum(jnp.asarray(x).nbytes for x in jax.tree.leaves(tree))


def compact_bytes(variables: dict[str, PyTree], masks: PyTree) -> int:
  """Of the file that `save_compact` writes."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "soup.safetensors")
    save_compact(path, variables, with_all_kept(variables, masks))
    return os.path.getsize(path)


def with_all_kept(variables: dict[str, PyTree], masks: PyTree) -> dict[str, PyTree]:
  """Masks of parameters as those of parameters and batch statistics."""
  statistics = jax.tree.map(lambda _: True, variables["batch_stats"])
  return {"params": masks, "batch_stats": statistics}
