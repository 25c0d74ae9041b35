"""Corrupted test data: prepared TFDS sets, or our own corruptions on the device."""

import functools
import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.method_flags import MethodFlags
from experiments.settings import Settings
from jaxsms import data, storage
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
from jaxsms.names import check_name
from jaxsms.training import Data, StreamedData

SEED = 42  # of our own corruptions: the same for every model, seed and run
Corrupted = dict[str, list[Callable[[], Data | StreamedData]]]


def corrupted_test_data(
  settings: Settings,
  method: MethodFlags,
  dataset: Dataset | StreamedDataset,
  test: Data | StreamedData,
) -> tuple[Corrupted, dict[str, str]]:
  """What --ood and --ood_severities ask for.

  Args:
    settings: of the run.
    method: the same.
    dataset: clean.
    test: its test split, on the device or streamed.

  Returns:
    By corruption, functions that give the test data with it, one for each severity; and
    where each comes from, "tfds" or "jaxsms".

  Raises:
    ValueError: a corruption is unknown, or does not fit the images; or they are streamed,
      and TFDS has not prepared it.
  """
  if not method.ood:
    return {}, {}
  prepared = frozenset(prepared_sets(settings))
  own = [] if settings.stream else corruptions_for(dataset.test_images.shape[-1])

  def in_tfds(name):
    return all(f"{name}_{severity}" in prepared for severity in method.ood_severities)

  names = method.ood
  if names == ("all",):
    found = sorted({name.rpartition("_")[0] for name in prepared})
    names = [name for name in found if in_tfds(name)] or own
    if not names:
      raise ValueError(
        "--ood is all, but streamed images are not corrupted here and TFDS has no "
        f"{base_name(settings.dataset)}_corrupted prepared: prepare it as array_record, or "
        "leave --ood out"
      )
  sets, sources = {}, {}
  for name in names:
    if in_tfds(name):
      make, sources[name] = functools.partial(_from_tfds, settings), "tfds"
    elif settings.stream:
      raise ValueError(
        f"--ood has {name}: streamed images are not corrupted here, prepare "
        f"{_config(settings, name, method.ood_severities[0])} and the other severities "
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
    sets[name] = [functools.partial(make, name, n) for n in method.ood_severities]
  return sets, sources


def prepared_digests(settings: Settings, method: MethodFlags) -> dict[str, str]:
  """Digests of the prepared sets that --ood may read, by name: other ones, other figures.

  Raises:
    ValueError: one cannot be read.
  """
  if not method.ood or not prepared_sets(settings):
    return {}
  digests = {}
  for whole, folders in data.corrupted_folders(settings.dataset, settings.data_dir).items():
    name, _, severity = whole.split("/")[1].rpartition("_")
    wanted = method.ood == ("all",) or name in method.ood
    if wanted and severity in map(str, method.ood_severities):
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


def prepared_sets(settings: Settings) -> list[str]:
  """Names such as "brightness_1" that TFDS has prepared for this data set."""
  if settings.dataset == "digits" or settings.dataset.lower().endswith(".npz"):
    return []
  found = data.corrupted_sets(settings.dataset, settings.data_dir)
  return [name.split("/")[1] for name in found]


def _config(settings: Settings, name: str, severity: int) -> str:
  return f"{base_name(settings.dataset)}_corrupted/{name}_{severity}"


def _from_tfds(settings: Settings, name: str, severity: int) -> Data | StreamedData:
  config = _config(settings, name, severity)
  if settings.stream:  # they are cropped already
    size = settings.image_size
    source = open_streamed_test(config, settings.data_dir)
    crop = functools.partial(resize_centre_crop, size=size, resize=size)
    return StreamedData(source, np.arange(len(source)), eval_transform=crop)
  images, labels = data.load_split(config, "test", settings.data_dir, settings.cache_dir)
  return Data(jnp.asarray(images), jnp.asarray(labels))


def _own(test: Data, name: str, severity: int) -> Data:
  images = corrupted(jax.random.key(SEED), test.images, name, severity)
  return Data(images, test.labels)
