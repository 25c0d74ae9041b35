"""Data sets prepared by TensorFlow Datasets, read without TensorFlow or network."""

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shlex

import numpy as np
from absl import logging

from jaxsms.disk.files import output_file
from jaxsms.disk.npz import read_npz
from jaxsms.names import check_name

# TFDS's name/config:version, and nothing that could leave its directory, reach a
# community repository or pass arguments.
_NAME = re.compile(r"[A-Za-z]\w*(/\w[\w.\-]*)?(:\d+\.\d+\.\d+)?", re.ASCII)


def load_train_test(name, data_dir=None, cache_dir=None):
  """Training and test arrays in the order of `sources.ARRAYS`, and the classes."""
  with _tfds_errors(name):
    builder = _builder(name, data_dir)
    test = _find_test_split(builder, name)
    _check_splits(builder, name, "train", test)
    arrays = [
      array for split in ("train", test) for array in _split(builder, split, cache_dir)
    ]
    label = builder.info.features["label"]
  train, test = arrays[0].shape[1:], arrays[2].shape[1:]
  if train != test:
    raise ValueError(_sizes_differ(name, train, test))
  # Only a ClassLabel knows how many classes there are.
  largest = max(int(arrays[1].max()), int(arrays[3].max()))
  return arrays, max(getattr(label, "num_classes", None) or 0, largest + 1)


def load_split(
  name: str, split: str, data_dir: str | None = None, cache_dir: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Loads one split of a TFDS data set into host memory.

  Decoding takes a while (CIFAR-10: some 10 to 20 s), so the arrays are kept under
  `cache_dir` and read from there the next time, until the prepared files change.

  Args:
    name: TFDS name, as in "cifar10" or "cifar10_corrupted/brightness_1".
    split: a split of it, or a part of one: "test", "train[:10%]".
    data_dir: where TFDS prepared its data; None means TFDS's own default.
    cache_dir: where decoded images are kept; None means $JAXSMS_CACHE, or
      ~/.cache/jaxsms without it.

  Returns:
    (images uint8 [n, height, width, channels], labels int32 [n]).

  Raises:
    ValueError: the name or the split is unknown, the data are not prepared as
      array_record, or they are not images of one size with a label each.
    ImportError: TFDS has no image decoder.

  References:
    https://www.tensorflow.org/datasets/tfless_tfds
  """
  with _tfds_errors(name):
    builder = _builder(name, data_dir)
    check_name(f"split of {name}", split.split("[")[0], builder.info.splits)
    return _split(builder, split, cache_dir)


def find_test_split(name: str, data_dir: str | None = None) -> str:
  """The split to test on: "test", or "validation" where there is none."""
  with _tfds_errors(name):
    return _find_test_split(_builder(name, data_dir), name)


def _find_test_split(builder, name):
  test = "test" if "test" in builder.info.splits else "validation"
  _check_splits(builder, name, test)
  return test


def _check_splits(builder, name, *needed):
  if not set(needed) <= set(builder.info.splits):
    raise ValueError(
      f"data set {name!r} has only the splits {', '.join(builder.info.splits)}: give one "
      "with train, and test or validation"
    )


class TfdsExamples:
  """One split, read and decoded example by example: images of any size.

  Attributes:
    num_classes: number of classes; None where the data set does not say.
    mode: Pillow's name of what images are decoded to, "L" or "RGB".
  """

  def __init__(self, name: str, split: str, data_dir: str | None = None):
    """Opens a split; nothing is decoded yet.

    Args:
      name: TFDS name, as in "imagenet2012".
      split: a split of it, or a part of one: "validation", "train[:10%]".
      data_dir: where TFDS prepared its data; None means TFDS's own default.

    Raises:
      ValueError: the name or the split is unknown, the data are not prepared as
        array_record, or they are not uint8 images with a label each.
      ImportError: a package to read them with is missing.
    """
    with _tfds_errors(name):
      from tensorflow_datasets import decode

      builder = _builder(name, data_dir)
      check_name(f"split of {name}", split.split("[")[0], builder.info.splits)
      self._name = builder.info.full_name
      self._split = split
      image = builder.info.features["image"]
      channels = (image.shape or (None,))[-1]
      if image.np_dtype != np.uint8 or channels not in (1, 3, None):
        raise ValueError(
          f"{self._name} has images that are {image.np_dtype.__name__} with {channels} "
          "channels: give a data set of uint8 with 1 or 3 channels"
        )
      self.mode = "L" if channels == 1 else "RGB"
      self.num_classes = getattr(builder.info.features["label"], "num_classes", None)
      decoders = {"image": decode.SkipDecoding()}
      self._source = builder.as_data_source(split, decoders=decoders)

  def __len__(self) -> int:
    """The number of examples."""
    return len(self._source)

  def __getitem__(self, index: int):
    """The Pillow image, decoded, and the label at an index."""
    with _tfds_errors(self._name):
      from PIL import Image

      example = self._source[index]
      label = example["label"]
      _check_label(self._name, self._split, np.asarray(label))
      image = Image.open(io.BytesIO(example["image"]))
      image.load()
      return image if image.mode == self.mode else image.convert(self.mode), label

  def __repr__(self) -> str:
    """A text that is equal in all processes that read these data."""
    return f"TfdsExamples({self._name}, {self._split}, {len(self)} examples)"


@contextlib.contextmanager
def _tfds_errors(name):
  """Puts what TFDS and its decoders raise into one sentence."""
  try:
    yield
  except (ValueError, MemoryError):
    raise
  except Exception as error:
    # On some file errors TFDS stumbles over the TensorFlow that is not there.
    stumbled = isinstance(error, ImportError) and isinstance(error.__context__, OSError)
    reason = " ".join(str(error.__context__ if stumbled else error).split())
    if isinstance(error, ImportError) and not stumbled:
      raise ImportError(
        f"TFDS cannot read data set {name!r} ({reason}): run `pip install 'jaxsms[data]'`"
      ) from error
    raise ValueError(
      f"data set {name!r} cannot be read ({reason}): where its files are damaged, "
      "delete and prepare them again"
    ) from error


def _builder(name, data_dir):
  """TFDS's reader of the prepared files; it uses nothing else."""
  if not _NAME.fullmatch(name):
    raise ValueError(
      f"{name!r} is no data set: give digits, a TFDS name such as cifar10 or "
      "imagenet_resized/32x32, or the path of an .npz file"
    )
  from tensorflow_datasets.core import file_adapters, read_only_builder, registered
  from tensorflow_datasets.core.utils import file_utils

  data_dir = os.path.expanduser(data_dir) if data_dir else None
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
  except registered.DatasetNotFoundError:
    _check_known(name)
    where = " or ".join(str(path) for path in file_utils.list_data_dirs(data_dir))
    raise ValueError(
      f"data set {name!r} is not prepared in {where}: give the data_dir that holds it, "
      f"or run `{_prepare(name, data_dir)}`"
    ) from None
  formats = builder.info.available_file_formats()
  if file_adapters.FileFormat.ARRAY_RECORD not in formats:
    has = " and ".join(sorted(f.value for f in formats)) or "an unknown format"
    raise ValueError(
      f"data set {name!r} is prepared as {has} in {builder.data_path}, and only "
      "array_record is read without TensorFlow: delete that directory or give another "
      f"data_dir, and run `{_prepare(name, data_dir)}`"
    )
  features = sorted(builder.info.features)
  missing = [f for f in ("image", "label") if f not in features]
  if missing:
    raise ValueError(
      f"data set {name!r} has the features {', '.join(features)}, but no "
      f"{' and no '.join(missing)}: give a data set for image classification"
    )
  return builder


def _check_known(name):
  """Raises ValueError with the closest names where TFDS does not have this one."""
  import tensorflow_datasets as tfds

  base, _, config = name.split(":")[0].partition("/")
  # Community data sets are listed on the network.
  known = ["digits", *tfds.list_builders(with_community_datasets=False)]
  if base not in known:
    close = difflib.get_close_matches(base.lower(), known, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(
      f"unknown data set {name!r}: {hint}known are digits, the names in "
      "TensorFlow Datasets (its catalogue is at "
      "https://www.tensorflow.org/datasets/catalog), and paths ending in .npz"
    )
  if config:
    configs = tfds.builder_cls(base).builder_configs
    whole = [f"{base}/{c}" for c in configs] or [base]
    check_name("data set", f"{base}/{config}", whole)


def _prepare(name, data_dir):
  """The command that prepares a data set, for a shell."""
  where = f", data_dir={json.dumps(data_dir)}" if data_dir else ""
  code = (
    f'import tensorflow_datasets as tfds; tfds.builder("{name}"{where})'
    '.download_and_prepare(file_format="array_record")'
  )
  return f"pip install tensorflow && python -c {shlex.quote(code)}"


def _split(builder, split, cache_dir):
  """Images and labels of a split, from the cache or decoded."""
  cache = _cache_path(builder, split, cache_dir)
  if os.path.exists(cache):
    try:
      return tuple(read_npz(cache, ("images", "labels")).values())
    except ValueError as error:
      logging.warning("ignoring a damaged cache: %s", error)
  logging.info("decoding %s %s, cached as %s", builder.info.full_name, split, cache)
  images, labels = _decode(builder, split)
  _write_cache(cache, images, labels)
  return images, labels


def _decode(builder, split):
  name = builder.info.full_name
  source = builder.as_data_source(split)
  if not len(source):
    raise ValueError(f"split {split} of {name} is empty: give another")
  images, labels = None, np.empty(len(source), np.int32)
  for start in range(0, len(source), 1000):
    stop = min(start + 1000, len(source))
    # Not in threads: the decoder is Python for the most part, and gets slower there.
    for i, example in enumerate(source.__getitems__(list(range(start, stop))), start):
      image, label = np.asarray(example["image"]), np.asarray(example["label"])
      if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(
          f"{name} has images that are {image.dtype} of shape {image.shape}: give a "
          "data set of uint8 [height, width, channels]"
        )
      _check_label(name, split, label)
      if images is None:
        images = np.empty((len(source), *image.shape), np.uint8)
      if image.shape != images.shape[1:]:
        raise ValueError(_sizes_differ(name, images.shape[1:], image.shape))
      images[i], labels[i] = image, label
  return images, labels


def _check_label(name, split, label):
  if not np.issubdtype(label.dtype, np.integer) or label.ndim or label < 0:
    raise ValueError(
      f"{name} has the label {label.tolist()} in {split}: give a data set whose labels "
      "are classes counted from 0"
    )


def _sizes_differ(name, one, other):
  return (
    f"data set {name} has images of shape {one} and of shape {other}: give one where "
    "all are alike, such as imagenet_resized/64x64, or resize them into an .npz"
  )


def _cache_path(builder, split, cache_dir):
  """A file name that changes with the prepared files."""
  cache_dir = cache_dir or os.environ.get("JAXSMS_CACHE") or "~/.cache/jaxsms"
  path = builder.data_path.resolve()
  files = sorted((f.name, f.stat().length, _modified(f)) for f in path.iterdir())
  identity = [builder.info.full_name, split, str(path), files]
  digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  readable = re.sub(r"[^\w.\-]+", "-", f"{builder.info.full_name}-{split}")
  return os.path.join(os.path.expanduser(cache_dir), f"{readable}-{digest}.npz")


def _modified(file):
  """Nanoseconds where there are any: array_record files grow by whole blocks only."""
  try:
    return os.stat(file).st_mtime_ns
  except OSError:  # on a remote file system
    return file.stat().mtime


def _write_cache(path, images, labels):
  """Writes all or nothing; where that fails, the next run decodes again."""
  try:
    with output_file(path) as file:
      np.savez(file, images=images, labels=labels)
  except OSError as error:
    logging.warning("decoded images are not cached: %s", error)
