"""Where images and labels come from: digits, an .npz file or TFDS."""

import os
from typing import NamedTuple

import numpy as np

from jaxsms.data.examples import Examples
from jaxsms.data.tfds_source import TfdsExamples, find_test_split, load_train_test
from jaxsms.disk.npz import read_npz

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
GROUPS = "train_groups"

# Mean and standard deviation per channel; data sets not named here are measured.
NORMALIZATION = {
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
  "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "imagenet_resized": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "mnist": ((0.0,), (1.0,)),
  "digits": ((0.305437,), (0.375773,)),
}

# Training augmentation; "none" for data sets not named here.
AUGMENTATION = {
  "cifar10": "crop_flip",
  "cifar100": "crop_flip_rotate",
  "digits": "noise",
}


class Dataset(NamedTuple):
  """A data set in host memory.

  Attributes:
    name: what `load` was given.
    train_images: uint8 [n, height, width, channels].
    train_labels: int32 [n], from 0.
    test_images: uint8 [n_test, height, width, channels].
    test_labels: int32 [n_test].
    num_classes: number of classes.
    mean: per channel, of images scaled to [0, 1].
    std: per channel, of images scaled to [0, 1].
    augmentation: name of its training augmentation, one of `AUGMENTATIONS`.
    train_groups: int [n], such as the client that each training example belongs to, where
      the data say so.
  """

  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  augmentation: str
  train_groups: np.ndarray | None = None


class StreamedDataset(NamedTuple):
  """A data set that is read example by example.

  Attributes:
    name: what `open_streamed` was given.
    train: random access to the training examples.
    test: to the test examples, or TFDS's split "validation" where there is no "test".
    num_classes: number of classes.
    mean: per channel, of images scaled to [0, 1].
    std: per channel, of images scaled to [0, 1].
    augmentation: "none": streamed images are cropped and flipped on the host.
  """

  name: str
  train: Examples
  test: Examples
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  augmentation: str


def open_streamed(name: str, data_dir: str | None = None) -> StreamedDataset:
  """Opens a TFDS data set whose images, of any size, are decoded when they are used.

  Args:
    name: TFDS name, such as "imagenet2012".
    data_dir: where TFDS prepared its data; None means TFDS's own default.

  Returns:
    The data set. Where `NORMALIZATION` does not name it, it is normalized as ImageNet is.

  Raises:
    ValueError: see `jaxsms.data.TfdsExamples`, or there is no test split or no number of
      classes.
  """
  train = TfdsExamples(name, "train", data_dir)
  test = open_streamed_test(name, data_dir)
  if not train.num_classes:
    raise ValueError(f"data set {name!r} does not say how many classes it has")
  rgb = NORMALIZATION["imagenet2012"]
  mean, std = NORMALIZATION.get(base_name(name), rgb)
  channels = 1 if train.mode == "L" else 3
  if len(mean) != channels:
    mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
  return StreamedDataset(name, train, test, train.num_classes, mean, std, "none")


def open_streamed_test(name: str, data_dir: str | None = None) -> Examples:
  """Opens the test images of a TFDS data set, such as "imagenet2012_corrupted/fog_1".

  Args:
    name: TFDS name.
    data_dir: where TFDS prepared its data; None means TFDS's own default.

  Returns:
    Its split "test", or "validation" where that is missing.

  Raises:
    ValueError: see `jaxsms.data.TfdsExamples`, or there is neither.
  """
  return TfdsExamples(name, find_test_split(name, data_dir), data_dir)


def base_name(name: str) -> str:
  """The first part of TFDS's name/config:version.

  Args:
    name: of a data set, such as "imagenet_resized/32x32:0.1.0".

  Returns:
    The name alone, such as "imagenet_resized".

  Example:
    >>> jaxsms.data.base_name("imagenet_resized/32x32:0.1.0")
    'imagenet_resized'
  """
  return name.split("/")[0].split(":")[0]


def load(name: str, data_dir: str | None = None, cache_dir: str | None = None) -> Dataset:
  """Loads a data set into host memory.

  Args:
    name: "digits", a TFDS name such as "cifar10" or "imagenet_resized/32x32", or the
      path of an .npz file with `train_images` uint8 [n, height, width, channels],
      `train_labels` int [n], `test_images` and `test_labels`; perhaps `train_groups`
      int [n], which `group_shares` divides the training data by.
    data_dir: where TFDS prepared its data; None means TFDS's own default.
    cache_dir: where decoded TFDS images are kept; None means $JAXSMS_CACHE, or
      ~/.cache/jaxsms without it.

  Returns:
    The data set. An .npz has as many classes as its largest training label says. From
    TFDS come the splits "train" and "test", or "validation" where "test" is missing.

  Raises:
    ValueError: the name is unknown, the data are not there or not prepared as
      array_record, or they are not images of one size with a label each.
    ImportError: "digits" without scikit-learn, TFDS without an image decoder.

  References:
    Alpaydin and Kaynak, 1998, https://doi.org/10.24432/C50P49 (digits)
    Krizhevsky, 2009, https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR)

  Example:
    >>> import tempfile
    >>> path, images = tempfile.mkdtemp() + "/own.npz", np.zeros((3, 8, 8, 1), np.uint8)
    >>> np.savez(path, train_images=images, train_labels=[0, 1, 2],
    ...          test_images=images, test_labels=[0, 1, 2])
    >>> dataset = jaxsms.data.load(path)
    >>> dataset.train_images.shape, dataset.num_classes
    ((3, 8, 8, 1), 3)
  """
  name = os.fspath(name)
  if name == "digits":
    return _digits()
  if name.lower().endswith(".npz"):
    return _npz(name)
  arrays, num_classes = load_train_test(name, data_dir, cache_dir)
  return _dataset(name, arrays, num_classes)


def _npz(name):
  path = os.path.expanduser(name)
  arrays = read_npz(path, ARRAYS, optional=(GROUPS,))
  groups = arrays.get(GROUPS)
  if groups is not None:
    _check_groups(path, groups, len(arrays["train_labels"]))
  for split in ("train", "test"):
    _check_split(path, split, arrays[f"{split}_images"], arrays[f"{split}_labels"])
  train, test = arrays["train_images"].shape[1:], arrays["test_images"].shape[1:]
  if train != test:
    raise ValueError(
      f"{path} has training images of shape {train} and test images of shape {test}: "
      "give both the same [height, width, channels]"
    )
  train_labels, test_labels = arrays["train_labels"], arrays["test_labels"]
  largest = int(train_labels.max())
  if test_labels.max() > largest:
    raise ValueError(
      f"{path} has the test label {test_labels.max()}, but training labels run from 0 "
      f"to {largest}: test only on classes that training has"
    )
  classes = np.unique(train_labels)
  if len(classes) != largest + 1 or largest == 0:
    absent = np.setdiff1d(np.arange(min(largest + 1, len(classes) + 1)), classes)
    raise ValueError(
      f"{path}: train_labels has {len(classes)} classes up to {largest}"
      + (f", but never {absent[0]}" if len(absent) else "")
      + ": give at least 2, counted from 0 without gaps"
    )
  dataset = _dataset(name, [arrays[a] for a in ARRAYS], largest + 1)
  return dataset._replace(train_groups=groups)


def _check_groups(path, groups, n):
  """Raises ValueError unless each training example has a group."""
  if groups.shape != (n,) or not np.issubdtype(groups.dtype, np.integer):
    raise ValueError(
      f"{path}: {GROUPS} is {groups.dtype} of shape {groups.shape}: give integers [{n}], "
      "one group per training image"
    )


def _check_split(path, split, images, labels):
  """Raises ValueError unless these are images with one class each."""
  what = f"{path}: {split}_images"
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(
      f"{what} is {images.dtype} of shape {images.shape}: give uint8 [n, height, width, "
      "channels] from 0 to 255"
    )
  if images.size == 0:
    raise ValueError(f"{what} is empty with shape {images.shape}: give some images")
  what = f"{path}: {split}_labels"
  if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
    raise ValueError(
      f"{what} is {labels.dtype} of shape {labels.shape}: give integers [n], one class "
      "per image"
    )
  if len(labels) != len(images):
    raise ValueError(
      f"{what} has {len(labels)} labels for {len(images)} images: give one per image"
    )
  if labels.min() < 0 or labels.max() >= np.iinfo(np.int32).max:
    raise ValueError(
      f"{what} runs from {labels.min()} to {labels.max()}: give classes counted from 0, "
      "below 2,147,483,647"
    )


def _digits():
  try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
  except ImportError as error:
    raise ImportError(
      "digits come with scikit-learn, which is not installed: run "
      "`pip install 'jaxsms[data]'`"
    ) from error
  images, labels = load_digits(return_X_y=True)
  images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
  train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=600, stratify=labels, random_state=0
  )
  return _dataset("digits", (train_images, train_labels, test_images, test_labels), 10)


def _dataset(name, arrays, num_classes):
  train_images, train_labels, test_images, test_labels = arrays
  base = base_name(name)
  mean, std = NORMALIZATION.get(base, ((), ()))
  if len(mean) != train_images.shape[-1]:
    mean, std = _mean_std(train_images)
  return Dataset(
    name,
    train_images,
    train_labels.astype(np.int32),
    test_images,
    test_labels.astype(np.int32),
    num_classes,
    mean,
    std,
    AUGMENTATION.get(base, "none"),
  )


def _mean_std(images):
  """Mean and standard deviation per channel, exactly, from the counts of each value."""
  values = np.arange(256) / 255
  means, stds = [], []
  for channel in range(images.shape[-1]):
    counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
    mean = float(counts @ values / counts.sum())
    variance = float(counts @ (values - mean) ** 2 / counts.sum())
    means.append(mean)
    stds.append(variance**0.5 or 1.0)  # a constant channel becomes 0, not NaN
  return tuple(means), tuple(stds)
