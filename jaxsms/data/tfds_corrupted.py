"""Corrupted versions of data sets that TensorFlow Datasets prepared."""

import os
import re


def corrupted_sets(name: str, data_dir: str | None = None) -> list[str]:
  """Names the prepared corrupted versions of a data set, for `load_split`.

  Args:
    name: TFDS name of the clean data set, such as "cifar10".
    data_dir: where TFDS prepared its data; None means TFDS's own default.

  Returns:
    Sorted names such as "cifar10_corrupted/brightness_1"; empty where none is prepared.

  References:
    https://www.tensorflow.org/datasets/catalog/cifar10_corrupted

  Example:
    >>> import pathlib, tempfile
    >>> prepared = pathlib.Path(tempfile.mkdtemp(), "cifar10_corrupted", "fog_3", "1.0.0")
    >>> prepared.mkdir(parents=True)
    >>> (prepared / "dataset_info.json").touch()
    >>> jaxsms.data.corrupted_sets("cifar10", prepared.parents[2])
    ['cifar10_corrupted/fog_3']
  """
  return sorted(corrupted_folders(name, data_dir))


def corrupted_folders(
  name: str, data_dir: str | None = None
) -> dict[str, list[os.PathLike]]:
  """The folders of the prepared corrupted versions of a data set, by their names.

  Args:
    name: of the clean data set, such as "cifar10".
    data_dir: where TFDS prepared its data; None means TFDS's own default.

  Returns:
    Folders by names such as "cifar10_corrupted/fog_3".

  Example:
    >>> import pathlib, tempfile
    >>> prepared = pathlib.Path(tempfile.mkdtemp(), "cifar10_corrupted", "fog_3", "1.0.0")
    >>> prepared.mkdir(parents=True)
    >>> (prepared / "dataset_info.json").touch()
    >>> found = jaxsms.data.corrupted_folders("cifar10", prepared.parents[2])
    >>> [folder.name for folder in found["cifar10_corrupted/fog_3"]]
    ['1.0.0']
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.utils import file_utils

  whole = re.split(r"\W", name, maxsplit=1, flags=re.ASCII)[0] + "_corrupted"
  data_dir = os.path.expanduser(data_dir) if data_dir else None
  found: dict[str, list[os.PathLike]] = {}
  for folder in file_utils.list_data_dirs(data_dir):
    for config in _folders(tfds.core.Path(folder) / whole):
      for version in _folders(config):
        if (version / "dataset_info.json").exists():
          found.setdefault(f"{whole}/{config.name}", []).append(version)
  return found


def _folders(path):
  """Those in a folder, which may have brackets in its name: no pattern is looked for."""
  return sorted(f for f in path.iterdir() if f.is_dir()) if path.is_dir() else []
