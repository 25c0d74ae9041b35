"""Files of weights in any format, read without running what they hold."""

import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsms import export
from jaxsms.disk import cut_files, storage
from jaxsms.disk.files import on_disk
from jaxsms.disk.npz import read_npz
from jaxsms.disk.safetensors import read_with_metadata
from jaxsms.disk.storage import first_sentence
from jaxsms.disk.zips import unwrapped


def load_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads the weights in a file by their names; it unpickles only plain tensors.

  Args:
    path: a .safetensors file (a compact one, or one of a cut network, is expanded) or
      .npz file, or a PyTorch checkpoint (.pt, .pth, .bin, .pth.tar): a state dict, or a
      dict with one under "state_dict", "model_state_dict", "model" or "net". It may lie in
      an object store (gs://...), from which it is copied.

  Returns:
    The arrays by name, as the file has them; large ones are views of the file, which must
    not be written in place while they are used.

  Raises:
    ValueError: the name has another ending, the file is missing or damaged, or it holds
      something else than arrays of numbers.
    ImportError: a PyTorch checkpoint without PyTorch 2.6 or later, before which even
      reading weights alone could run code from the file.

  References:
    https://github.com/huggingface/safetensors#format
    https://nvd.nist.gov/vuln/detail/CVE-2025-32434 (PyTorch before 2.6)

  Example:
    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/model.npz"
    >>> np.savez(path, **{"fc.weight": np.ones((2, 3))})
    >>> jaxsms.pretrained.load_weights(path)["fc.weight"].shape
    (2, 3)
  """
  if storage.is_remote(storage.as_path(path)):
    return _load_remote(storage.as_path(path))
  path = os.path.expanduser(path)
  lower = path.lower()
  if lower.endswith(".safetensors"):
    arrays, metadata = read_with_metadata(path)
    if metadata.get("format") == export.FORMAT:
      arrays, _ = export.expand(path, arrays, metadata)
    elif metadata.get("format") == cut_files.FORMAT:
      arrays = cut_files.expand_cut(path, arrays, metadata)
    return arrays
  if lower.endswith(".npz"):
    return {name: as_array(path, name, array) for name, array in read_npz(path).items()}
  if lower.endswith((".pt", ".pth", ".bin", ".pth.tar")):
    return _load_pytorch(path)
  raise ValueError(
    f"weights are read from .safetensors, .npz, .pt, .pth, .bin or .pth.tar files, and "
    f"{path} is none of them: give one of these"
  )


def _load_remote(path):
  try:
    with on_disk(path) as local:
      try:
        return load_weights(local)
      except (ValueError, ImportError) as error:
        raise type(error)(str(error).replace(local, str(path))) from error
  except OSError as error:
    raise ValueError(
      f"there is no file {path} that can be read ({first_sentence(error)}): give a "
      ".safetensors, .npz or PyTorch file, or a folder with a checkpoint"
    ) from error


def _load_pytorch(path):
  if not os.path.isfile(path):
    raise ValueError(f"there is no file {path}: give a PyTorch checkpoint")
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path} is read by PyTorch, which is not installed: run `pip install torch`, or "
      "give a .safetensors or .npz file"
    ) from error
  if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
    raise ImportError(
      f"PyTorch is {torch.__version__}, which can run code from {path}: take 2.6 or later"
    )
  try:
    state = torch.load(
      path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
    )
  except Exception as error:  # its unpickler and zip reader raise a dozen kinds
    raise ValueError(
      f"{path} cannot be read ({first_sentence(error)}): give a PyTorch checkpoint that "
      "holds tensors alone, as torch.save(model.state_dict(), path) writes it"
    ) from error
  state = unwrapped(state)
  if not isinstance(state, Mapping):
    raise ValueError(
      f"{path} holds {type(state).__name__}, not weights by name: save model.state_dict()"
    )
  return {str(name): as_array(path, name, tensor) for name, tensor in state.items()}


def as_array(source: str | os.PathLike, name: str, tensor: Any) -> np.ndarray:
  """A PyTorch tensor or array as a NumPy array of numbers."""
  try:
    if hasattr(tensor, "detach"):
      tensor = tensor.detach().cpu()
      # NumPy alone has no bfloat16.
      tensor = (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()
    if tensor.dtype.kind in "biuf" or jnp.issubdtype(tensor.dtype, jnp.floating):
      return np.asarray(tensor)
    kind = tensor.dtype
  except (AttributeError, TypeError, RuntimeError):
    kind = getattr(tensor, "dtype", type(tensor).__name__)
  raise ValueError(
    f"{name!r} in {source} is {kind}: give real numbers, integers or bools by name"
  )
