"""Models to take away: compact files, cut networks, programs, sparse matrices."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from jaxsms.disk.by_name import by_path, check_fit, nested
from jaxsms.disk.cut_files import cut_to_torch, load_cut, save_cut, torch_module
from jaxsms.disk.onnx_files import quantize_onnx, save_onnx
from jaxsms.disk.programs import load_stablehlo, save_stablehlo
from jaxsms.disk.safetensors import (
  arrays_of,
  digest_of,
  read_with_metadata,
  write_safetensors,
)
from jaxsms.disk.storage import first_sentence
from jaxsms.mask_trees import mask_leaves
from jaxsms.pruning import prunable_flags
from jaxsms.trees import Prunable, PyTree, is_concrete

__all__ = [
  "apply_bcoo", "cut_to_torch", "expand", "load_compact", "load_cut", "load_stablehlo",
  "nested", "quantize_onnx", "save_compact", "save_cut", "save_onnx", "save_stablehlo",
  "to_bcoo", "torch_module",
]  # fmt: skip

FORMAT = "jaxsms-compact-1"
MASK = "#mask"  # after a leaf's name, the name of its bits


def save_compact(
  path: str | os.PathLike,
  tree: PyTree,
  masks: PyTree | None = None,
  prunable: Prunable | None = None,
) -> None:
  """Writes parameters to a safetensors file that holds a bit for each removed weight.

  A leaf whose mask removes something is stored as two arrays. Under its name are the kept
  values, in row-major order. Under name + "#mask" are the bits of its mask, uint8, the
  first entry in the lowest bit of the first byte. Other leaves are stored unchanged. The
  metadata hold `format`, `leaves` (the shapes of those in two parts, as JSON) and `sha256`,
  a digest of all the rest.

  Args:
    path: the file; its folder is made where it is missing, and an older file replaced.
    tree: floating (not complex), integer or bool arrays in dicts, lists, tuples: the
      parameters of any framework, with batch statistics if there are some.
    masks: tree of bool arrays for the same leaves, True where kept; a plain True keeps
      all of a leaf. None: prunable leaves keep what is not 0, others everything.
    prunable: which leaves those are; None means `jaxsms.prunable`.

  Raises:
    ValueError: a leaf is no such array, masks do not fit, a removed entry is not +0, or
      two arrays have the same name.

  Example:
    >>> import os, tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> kernel = np.zeros((100, 100), np.float32)
    >>> kernel[0, :50] = 1.0
    >>> jaxsms.export.save_compact(path, {"kernel": kernel})
    >>> kernel.nbytes, os.path.getsize(path) < 2000  # 50 values and 10,000 bits
    (40000, True)
  """
  arrays = arrays_of(tree)
  if masks is None:
    flags = prunable_flags(tree, prunable)
    pairs = zip(arrays.values(), flags, strict=True)
    kept = [_bits(array) != 0 if flag else True for array, flag in pairs]
  else:
    kept = [True if m is None else np.asarray(m) for m in mask_leaves(tree, masks)]
  parts: dict[str, np.ndarray] = {}
  shapes: dict[str, list[int]] = {}
  for (name, array), mask in zip(arrays.items(), kept, strict=True):
    if np.all(mask):
      stored = {name: array}
    else:
      mask = np.broadcast_to(mask, array.shape)
      if np.any(_bits(array)[~mask]):
        raise ValueError(
          f"{name} has entries other than +0 where its mask is False: call "
          "jaxsms.apply_masks(params, masks) first"
        )
      stored = {name: array[mask], name + MASK: np.packbits(mask, bitorder="little")}
      shapes[name] = list(array.shape)
    if twice := stored.keys() & parts.keys():
      raise ValueError(f"leaf {min(twice)} comes twice: no leaf may end in {MASK}")
    parts |= stored
  leaves = json.dumps(shapes, separators=(",", ":"))
  digest = digest_of(parts, leaves)
  write_safetensors(path, parts, {"format": FORMAT, "leaves": leaves, "sha256": digest})


def load_compact(
  path: str | os.PathLike, template: PyTree | None = None
) -> tuple[PyTree, PyTree]:
  """Reads what `save_compact` wrote, bit for bit.

  Args:
    path: the file.
    template: a tree of arrays or `jax.ShapeDtypeStruct` of the same names, shapes and
      dtypes, whose structure the result takes; None gives nested dicts.

  Returns:
    The tree, of NumPy arrays, and its masks: bool arrays, True where kept.

  Raises:
    ValueError: the file is missing, damaged, no compact file, or does not fit the
      template.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> jaxsms.export.save_compact(path, {"kernel": np.array([[0.0, 2.0]])})
    >>> params, masks = jaxsms.export.load_compact(path)
    >>> params["kernel"].tolist(), masks["kernel"].tolist()
    ([[0.0, 2.0]], [[False, True]])
  """
  arrays, metadata = read_with_metadata(path)
  if metadata.get("format") != FORMAT:
    raise ValueError(
      f"{os.fspath(path)} is no compact file: give one that save_compact wrote"
    )
  arrays, masks = expand(path, arrays, metadata)
  if template is None:
    return nested(arrays), nested(masks)
  expected = by_path(template)
  check_fit(
    f"{os.fspath(path)} does not fit the template",
    expected,
    arrays,
    "give a file that save_compact wrote of such a tree",
  )
  for name, leaf in expected.items():
    if leaf.dtype.name != arrays[name].dtype.name:
      raise ValueError(
        f"{name} is {arrays[name].dtype} in {os.fspath(path)} and {leaf.dtype} in the "
        "template: give one of the dtypes that were saved"
      )
  structure = jax.tree.structure(template)
  return tuple(
    jax.tree.unflatten(structure, [found[name] for name in expected])
    for found in (arrays, masks)
  )


def expand(
  path: str | os.PathLike,
  parts: Mapping[str, np.ndarray],
  metadata: Mapping[str, str],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """The leaves and masks of a compact file from the arrays in it.

  Args:
    path: of the file, for the message.
    parts: its arrays by name.
    metadata: its metadata, of this `FORMAT`.

  Returns:
    The leaves and their masks, by name.

  Raises:
    ValueError: they are not what was written.

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> jaxsms.export.save_compact(path, {"kernel": np.array([[0.0, 2.0]])})
    >>> parts, metadata = jaxsms.disk.safetensors.read_with_metadata(path)
    >>> leaves, masks = jaxsms.export.expand(path, parts, metadata)
    >>> parts["kernel"].tolist(), leaves["kernel"].tolist(), masks["kernel"].tolist()
    ([2.0], [[0.0, 2.0]], [[False, True]])
  """
  try:
    leaves = metadata.get("leaves", "")
    if metadata.get("sha256") != digest_of(parts, leaves):
      raise ValueError("its content does not have its digest")
    shapes = json.loads(leaves)
    if not isinstance(shapes, dict):
      raise ValueError("its leaves are no shapes by name")
    arrays, masks = {}, {}
    for name, part in parts.items():
      if name.endswith(MASK) and name.removesuffix(MASK) in shapes:
        continue
      mask = np.ones(part.shape, bool)
      if name in shapes:
        mask = _unpacked(name, shapes[name], parts.get(name + MASK), part)
        whole = np.zeros(mask.shape, part.dtype)
        whole[mask] = part
        part = whole
      arrays[name], masks[name] = part, mask
    if lost := shapes.keys() - arrays.keys():
      raise ValueError(f"it lacks {min(lost)!r}")
  except (ValueError, OverflowError, RecursionError) as error:
    raise ValueError(
      f"{os.fspath(path)} cannot be read ({first_sentence(error)}): give a whole file "
      "that save_compact wrote"
    ) from error
  return arrays, masks


def _unpacked(name, shape, bits, values):
  """The mask of a leaf from its bits; ValueError unless all four belong together."""
  if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
    raise ValueError(f"{name!r} has no shape")
  size = math.prod(shape)
  if bits is None or bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
    raise ValueError(f"{name!r} has no bit for each of its {size} entries")
  mask = np.unpackbits(bits, bitorder="little")
  if mask[size:].any() or values.shape != (np.count_nonzero(mask),):
    raise ValueError(f"{name!r} has not as many values as bits")
  return mask[:size].astype(bool).reshape(shape)


def _bits(array):
  """The entries as unsigned integers: only +0 is 0, and NaN is some other."""
  return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def to_bcoo(params: PyTree, prunable: Prunable | None = None) -> PyTree:
  """Turns the kernels of dense layers into sparse matrices.

  In a product `x @ kernel` of a JAX array with a sparse matrix zeros cost nothing. Whether
  that is faster depends on the device, the batch and the sparsity. An entry takes 12 bytes.

  Args:
    params: tree of concrete parameters of one model.
    prunable: which leaves are weights; None means `jaxsms.prunable`.

  Returns:
    The tree with each prunable leaf [inputs, outputs] as a
    `jax.experimental.sparse.BCOO` of its entries that are not 0, others unchanged.

  Raises:
    ValueError: nothing is prunable, no weight has two axes, or values are traced.

  Example:
    >>> sparse = jaxsms.export.to_bcoo({"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]])})
    >>> sparse["kernel"].nse, sparse["kernel"].shape  # entries that are stored
    (1, (2, 2))
    >>> (jnp.array([[3.0, 4.0]]) @ sparse["kernel"]).tolist()
    [[0.0, 6.0]]
  """
  if not is_concrete(params):
    raise ValueError("to_bcoo counts what is not 0: call it outside of jit")
  leaves, structure = jax.tree.flatten(params)
  pairs = zip(leaves, prunable_flags(params, prunable), strict=True)
  kernels = [i for i, (leaf, flag) in enumerate(pairs) if flag and leaf.ndim == 2]
  if not kernels:
    raise ValueError("no weight has two axes: there is no dense layer to make sparse")
  for i in kernels:
    leaves[i] = _to_bcoo(np.asarray(leaves[i]))
  return jax.tree.unflatten(structure, leaves)


def _to_bcoo(kernel):
  """As `BCOO.fromdense` gives it, which compiles dozens of programs for each shape."""
  from jax.experimental import sparse  # SciPy with it: too long for what is sparse nowhere

  indices = np.argwhere(kernel != 0).astype(np.int32)
  return sparse.BCOO(
    (jnp.asarray(kernel[kernel != 0]), jnp.asarray(indices)),
    shape=kernel.shape,
    indices_sorted=True,
    unique_indices=True,
  )


def apply_bcoo(module: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
  """Applies a Flax linen network whose dense layers may be sparse matrices; jittable.

  Args:
    module: the network.
    variables: its variables, the kernels of `nn.Dense` as `to_bcoo` gives them.
    *args: further arguments of `module.apply`, such as images.
    **kwargs: its keyword arguments.

  Returns:
    What `module.apply` gives, to rounding.

  Example:
    >>> import flax.linen as nn
    >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.ones(2)}
    >>> variables = {"params": jaxsms.export.to_bcoo(params)}
    >>> jaxsms.export.apply_bcoo(nn.Dense(2), variables, jnp.array([[3.0, 4.0]])).tolist()
    [[1.0, 7.0]]
  """
  from jax.experimental import sparse

  def dense(call, inputs, options, context):
    layer = context.module
    if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
      return call(*inputs, **options)
    kernel: Any = layer.get_variable("params", "kernel")
    bias: Any = layer.get_variable("params", "bias")
    if not isinstance(kernel, sparse.BCOO):
      return call(*inputs, **options)
    x, values, bias = promote_dtype(*inputs, kernel.data, bias, dtype=layer.dtype)
    # Sorted and unique as before: that saves work in the product.
    as_before: dict[str, Any] = {
      "indices_sorted": kernel.indices_sorted,
      "shape": kernel.shape,
      "unique_indices": kernel.unique_indices,
    }
    product = x @ sparse.BCOO((values, kernel.indices), **as_before)
    return product if bias is None else product + bias

  with nn.intercept_methods(dense):
    return module.apply(variables, *args, **kwargs)
