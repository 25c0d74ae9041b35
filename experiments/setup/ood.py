"""Corrupted test data: prepared TFDS sets, or our own corruptions on the device."""

import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms import data
from jaxsms.data import (
  CORRUPTIONS,
  Dataset,
  StreamedDataset,
  base_name,
  corrupted,
  corruptions_for,
  open_streamed_test,
  resize_centre_crop,
)
from jaxsms.disk import storage
from jaxsms.names import check_name
from jaxsms.training import Data, StreamedData

from ..config.run_config import Config

SEED = 42  # of our own corruptions: the same for every model, seed and run
Corrupted = dict[str, list[Callable[[], Data | StreamedData]]]


def corrupted_test_data(
  config: Config,
  dataset: Dataset | StreamedDataset,
  test: Data | StreamedData,
) -> tuple[Corrupted, dict[str, str]]:
  """What --ood and --ood_severities ask for.

  Args:
    config: of the run.
    dataset: clean.
    test: its test split, on the device or streamed.

  Returns:
    By corruption, functions that give the test data with it, one for each severity; and
    where each comes from, "tfds" or "jaxsms".

  Raises:
    ValueError: a corruption is unknown, or does not fit the images; or they are streamed,
      and TFDS has not prepared it.
  """
  if not config.ood:
    return {}, {}
  prepared = frozenset(prepared_sets(config))
  own = [] if config.stream else corruptions_for(dataset.test_images.shape[-1])

  def in_tfds(name):
    return all(f"{name}_{severity}" in prepared for severity in config.ood_severities)

  names = config.ood
  if names == ("all",):
    found = sorted({name.rpartition("_")[0] for name in prepared})
    names = [name for name in found if in_tfds(name)] or own
    if not names:
      raise ValueError(
        "--ood is all, but streamed images are not corrupted here and TFDS has no "
        f"{base_name(config.dataset)}_corrupted prepared: prepare it as array_record, or "
        "leave --ood out"
      )
  sets, sources = {}, {}
  for name in names:
    if in_tfds(name):
      make, sources[name] = functools.partial(_from_tfds, config), "tfds"
    elif config.stream:
      raise ValueError(
        f"--ood has {name}: streamed images are not corrupted here, prepare "
        f"{_set_name(config, name, config.ood_severities[0])} and the other severities "
        "with TFDS as array_record, or leave it out"
      )
    else:
      check_name("corruption", name, CORRUPTIONS)
      if name not in own:
        raise ValueError(
          f"--ood has {name}, which changes colours, and the images are gray: choose from "
          f"{', '.join(own)}"
        )
      make, sources[name] = functools.partial(_own, test), "jaxsms"
    sets[name] = [functools.partial(make, name, n) for n in config.ood_severities]
  return sets, sources


def prepared_digests(config: Config) -> dict[str, str]:
  """Digests of the prepared sets that --ood may read, by name: other ones, other figures.

  Raises:
    ValueError: one cannot be read.
  """
  if not config.ood or not prepared_sets(config):
    return {}
  digests = {}
  for whole, folders in data.corrupted_folders(config.dataset, config.data_dir).items():
    name, _, severity = whole.split("/")[1].rpartition("_")
    wanted = config.ood == ("all",) or name in config.ood
    if wanted and severity in map(str, config.ood_severities):
      try:
        digests[f"{name}_{severity}"] = " ".join(map(_prepared_digest, folders))
      except OSError as error:
        raise ValueError(
          f"{whole} cannot be read ({error.strerror}): prepare it again"
        ) from error
  return digests


def _prepared_digest(folder) -> str:
  """Of what TFDS says of a set, and of the names and sizes of its files.

  All of their bytes are gigabytes, which each start would have to read. Times do not count:
  a copy of the folder holds the same data.
  """
  digest = hashlib.sha256()
  for file in sorted(storage.as_path(folder).iterdir()):
    digest.update(f"{file.name}\0{file.stat().length}\0".encode())
    if file.name == "dataset_info.json":
      digest.update(file.read_bytes())
  return digest.hexdigest()


def prepared_sets(config: Config) -> list[str]:
  """Names such as "brightness_1" that TFDS has prepared for this data set."""
  if config.in_memory:
    return []
  found = data.corrupted_sets(config.dataset, config.data_dir)
  return [name.split("/")[1] for name in found]


def _set_name(config: Config, name: str, severity: int) -> str:
  return f"{base_name(config.dataset)}_corrupted/{name}_{severity}"


def _from_tfds(config: Config, name: str, severity: int) -> Data | StreamedData:
  name = _set_name(config, name, severity)
  if config.stream:  # they are cropped already
    size = config.image_size
    source = open_streamed_test(name, config.data_dir)
    crop = functools.partial(resize_centre_crop, size=size, resize=size)
    return StreamedData(source, np.arange(len(source)), eval_transform=crop)
  images, labels = data.load_split(name, "test", config.data_dir, config.cache_dir)
  return Data(jnp.asarray(images), jnp.asarray(labels))


def _own(test: Data, name: str, severity: int) -> Data:
  images = corrupted(jax.random.key(SEED), test.images, name, severity)
  return Data(images, test.labels)
