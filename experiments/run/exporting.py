"""The network of a run, whole or cut, and the files that hold it as a program."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms import Compact, compact, export, models
from jaxsms.data import Dataset, StreamedDataset, evaluation_images
from jaxsms.disk import storage
from jaxsms.disk.onnx_files import start_session
from jaxsms.trees import PyTree

from ..config.run_config import Config, config_of
from ..costs.inference_times import filled
from ..setup.task import load
from . import run_directory
from .latency_file import FOLDER, LATENCY_FILE

VARIABLES = ("params", "batch_stats")
BATCH, CALIBRATION_BATCHES = 100, 5


class Network(NamedTuple):
  """The network of a run.

  Attributes:
    module: with plain convolutions, which programs are made of.
    image_shape: [height, width, channels].
    dataset: of the run.
  """

  module: Any
  image_shape: tuple[int, ...]
  dataset: Dataset | StreamedDataset

  def apply(self, variables: PyTree, images: jax.Array) -> jax.Array:
    """Logits in inference."""
    return self.module.apply(variables, images, train=False)

  @property
  def images(self) -> jax.ShapeDtypeStruct:
    """Two of them."""
    return jax.ShapeDtypeStruct((2, *self.image_shape), jnp.float32)


def run_config(path: str | os.PathLike, data_dir: str | None = None) -> Config:
  """The flags of a run.

  Raises:
    ValueError: its directory does not have them.
  """
  try:
    config = config_of(run_directory.read_run(path)["flags"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} does not tell the flags of its run, or was written by another version: "
      "give --format=compact, or --format=safetensors --nocut, which need none"
    ) from error
  return config if data_dir is None else dataclasses.replace(config, data_dir=data_dir)


def network(config: Config) -> Network:
  """The module of a run, and its data.

  Raises:
    ValueError: the data are not there.
  """
  dataset = load(config)
  options = config.model_options()
  if config.model != "mlp":
    options["convolution"] = jax.lax.conv_general_dilated
  module = models.create(config.model, dataset.num_classes, **options)
  if isinstance(dataset, StreamedDataset):
    shape = (config.image_size, config.image_size, len(dataset.mean))
  else:
    shape = dataset.train_images.shape[1:]
  return Network(module, shape, dataset)


def variables_of(soup: dict[str, PyTree]) -> dict[str, PyTree]:
  """Parameters and batch statistics of a soup, without its masks."""
  return {name: soup[name] for name in VARIABLES}


def cut(found: Network, soup: dict[str, PyTree]) -> Compact:
  """The soup's network without the channels that its masks emptied."""
  statistics = jax.tree.map(lambda x: np.ones(x.shape, bool), soup["batch_stats"])
  masks = {"params": soup["masks"], "batch_stats": statistics}
  return compact(found.apply, variables_of(soup), masks, found.images)


def write_cut_torch(
  out: str, network: Compact, found: Network, write: Callable[[str, Any], None]
) -> str:
  """Writes a cut network's state dict and, beside it, the module that loads it.

  Args:
    out: the file of weights.
    network: cut.
    found: the network of the run.
    write: what writes arrays to a file.

  Returns:
    Path of the module.

  Raises:
    ValueError: the module's file exists already.
  """
  module = storage.as_path(os.path.splitext(out)[0] + ".py")
  if module.exists():
    raise ValueError(f"{module}, which would load {out}, exists already: remove it")
  write(out, export.cut_to_torch(network, found.module, found.image_shape))
  storage.write_bytes(module, export.torch_module().encode())
  return str(module)


def normalization(found: Network) -> dict[str, str]:
  """What images scaled to [0, 1] are normalized with, as text for a file."""
  names = {"mean": found.dataset.mean, "std": found.dataset.std}
  return {name: json.dumps([float(x) for x in values]) for name, values in names.items()}


def save_onnx(
  out: str, found: Network, apply: Callable[..., Any], variables: PyTree
) -> None:
  """Writes a network from normalized "images" [batch, height, width, channels] to "logits".

  Raises:
    ValueError, ImportError, OSError: see `jaxsms.export.save_onnx`.
  """
  export.save_onnx(
    out, apply, variables, found.images, input_names=["images"], output_names=["logits"],
    metadata=normalization(found),
  )  # fmt: skip


def onnx_place(path: str | os.PathLike) -> str:
  """Where a run's own ONNX file of its soup goes, beside that of the dense network.

  Raises:
    ValueError: they are there already.
  """
  folder = storage.as_path(path) / FOLDER
  if folder.exists():
    raise ValueError(
      f"{folder} exists already: remove it, or say with --out where another file goes"
    )
  return str(folder / "soup.onnx")


def save_dense(out: str, found: Network, soup: dict[str, PyTree]) -> str:
  """Writes, beside a soup's ONNX file, that of a network without zeros, to be timed."""
  variables = variables_of(soup) | {"params": filled(soup["params"], soup["masks"])}
  dense = str(storage.as_path(out).parent / "dense.onnx")
  save_onnx(dense, found, found.apply, variables)
  (storage.as_path(out).parent / LATENCY_FILE).unlink(missing_ok=True)
  return dense


def int8_place(out: str) -> str:
  """Where the int8 form of an ONNX file goes."""
  return os.path.splitext(out)[0] + "_int8.onnx"


def check_int8(out: str, found: Network) -> None:
  """Raises ValueError where the int8 file exists, or the data are not in memory."""
  path = storage.as_path(int8_place(out))
  if path.exists():
    raise ValueError(
      f"{path}, where --int8 would write, exists already: remove it, or give another --out"
    )
  if isinstance(found.dataset, StreamedDataset):
    raise ValueError(
      "--int8 takes its ranges from data in memory, and this run streams them: leave it out"
    )


def save_int8(out: str, found: Network) -> tuple[str, float, float]:
  """Writes the int8 form of an ONNX file beside it; what that costs on the test data.

  Args:
    out: the ONNX file.
    found: the network of the run. Ranges come from 500 images of its training data.

  Returns:
    Path of the int8 file, and test accuracy before and after.

  Raises:
    ValueError: the file cannot be quantized.
    ImportError: onnxruntime or onnx is missing.
  """
  path = int8_place(out)
  data = found.dataset
  rows = np.random.default_rng(0).permutation(len(data.train_labels))
  rows = rows[: CALIBRATION_BATCHES * BATCH]
  export.quantize_onnx(out, path, list(_batches(found, data.train_images[rows])))
  return path, test_accuracy(out, found), test_accuracy(path, found)


def _batches(found: Network, images: np.ndarray) -> Iterator[np.ndarray]:
  mean, std = found.dataset.mean, found.dataset.std
  for i in range(0, len(images), BATCH):
    yield np.asarray(evaluation_images(images[i : i + BATCH], mean, std))


def test_accuracy(path: str, found: Network) -> float:
  """Share of a run's test images that an ONNX file classifies rightly."""
  session = start_session(path)
  logits = [
    session.run(None, {"images": x})[0] for x in _batches(found, found.dataset.test_images)
  ]
  return float(np.mean(np.concatenate(logits).argmax(1) == found.dataset.test_labels))
