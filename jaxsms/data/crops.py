"""ImageNet's crops, on the host: images of any size become images of one size.

They are what torchvision's transforms do to a Pillow image: antialiased bilinear resizing.
Pixels are normalised later, on the device.
"""

import math
from typing import Any

import numpy as np

RATIO = (3 / 4, 4 / 3)
SCALE = (0.08, 1.0)


def random_resized_crop(
  rng: np.random.Generator,
  image: Any,
  size: int = 224,
  scale: tuple[float, float] = SCALE,
  ratio: tuple[float, float] = RATIO,
) -> np.ndarray:
  """A random part of an image, resized, and mirrored with chance 1/2: for training.

  Args:
    rng: where all draws come from.
    image: a Pillow image, or uint8 [height, width, channels] with 1 or 3 channels.
    size: height and width of the result, in pixels.
    scale: least and greatest share of the image's area.
    ratio: least and greatest width per height.

  Returns:
    uint8 [size, size, channels].

  Raises:
    ValueError: `size`, `scale` or `ratio` are not positive and in order, or the image is
      none.

  References:
    Szegedy et al., 2015, https://arxiv.org/abs/1409.4842
    https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.RandomResizedCrop

  Example:
    >>> rng = np.random.default_rng(0)
    >>> jaxsms.data.random_resized_crop(rng, np.zeros((20, 30, 3), np.uint8), size=8).shape
    (8, 8, 3)
  """
  _check_size(size)
  _check_range("scale", scale, 1.0)
  _check_range("ratio", ratio, math.inf)
  image = _as_pillow(image)
  columns, rows = image.size
  left, top, width, height = random_box(rng, columns, rows, scale, ratio)
  # Not `resize(box=...)`: its filter reaches beyond the box.
  part = image.crop((left, top, left + width, top + height))
  resized = as_array(part.resize((size, size), _bilinear()))
  return resized[:, ::-1] if rng.random() < 0.5 else resized


def resize_centre_crop(image: Any, size: int = 224, resize: int = 256) -> np.ndarray:
  """The centre of an image whose shorter side has been resized: for evaluation.

  Args:
    image: a Pillow image, or uint8 [height, width, channels] with 1 or 3 channels.
    size: height and width of the result, in pixels.
    resize: what the shorter side becomes before the crop, at least `size`.

  Returns:
    uint8 [size, size, channels].

  Raises:
    ValueError: `size` is not between 1 and `resize`, or the image is none.

  References:
    https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.Resize

  Example:
    >>> image = np.zeros((4, 8, 1), np.uint8)
    >>> image[:, 2:6] = 255
    >>> jaxsms.data.resize_centre_crop(image, size=4, resize=4)[0, :, 0].tolist()
    [255, 255, 255, 255]
  """
  _check_size(size)
  if resize < size:
    raise ValueError(f"resize is {resize} for crops of {size}: give at least {size}")
  image = _as_pillow(image)
  width, height = image.size
  short = min(width, height)
  width, height = (int(resize * side / short) for side in (width, height))
  left, top = round((width - size) / 2), round((height - size) / 2)
  image = image.resize((width, height), _bilinear())
  return as_array(image.crop((left, top, left + size, top + size)))


def random_box(
  rng: np.random.Generator,
  width: int,
  height: int,
  scale: tuple[float, float] = SCALE,
  ratio: tuple[float, float] = RATIO,
) -> tuple[int, int, int, int]:
  """Draws a part of an image by its share of the area and its shape.

  Ten draws at most; where none fits into the image, its centre with the closest ratio.

  Args:
    rng: where all draws come from.
    width: of the image, in pixels.
    height: of the image, in pixels.
    scale: least and greatest share of the image's area.
    ratio: least and greatest width per height; uniform in its logarithm.

  Returns:
    (left, top, width, height) in pixels, inside the image.
  """
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      return int(rng.integers(width - w + 1)), top, w, h
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  return (width - w) // 2, (height - h) // 2, w, h


def as_array(image: Any) -> np.ndarray:
  """uint8 [height, width, channels] of a Pillow image or of such an array."""
  array = np.asarray(image)
  return array[..., None] if array.ndim == 2 else array


def _as_pillow(image):
  from PIL import Image

  if isinstance(image, Image.Image):
    return image
  array = np.asarray(image)
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
    raise ValueError(
      f"an image is {array.dtype} of shape {array.shape}: give uint8 [height, width, "
      "channels] with 1 or 3 channels"
    )
  return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _bilinear():
  from PIL import Image

  return Image.Resampling.BILINEAR


def _check_size(size):
  if size < 1:
    raise ValueError(f"size is {size}: give a number of pixels, at least 1")


def _check_range(what, pair, most):
  low, high = pair
  if not 0 < low <= high <= most:
    raise ValueError(
      f"{what} is {pair}: give the least and the greatest, above 0 and at most {most}"
    )
