"""From stored images to what the model sees, on device, one random draw per image.

Crops, flips and rotations only compute which pixel goes where; one gather moves the bytes.
On CPU, mapped over copies inside a scan, that is several times faster than slices or
one-hot matrix products.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsms.names import check_name

NOISE_STD = 1.0  # of normalised images


def normalize(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
  """Scales images to [0, 1], then to mean 0 and standard deviation 1 per channel.

  Args:
    images: uint8 [batch, height, width, channels].
    mean: float [channels], of images scaled to [0, 1].
    std: float [channels], of images scaled to [0, 1].

  Returns:
    float32 [batch, height, width, channels].

  Raises:
    ValueError: `images` has another rank or dtype, or `mean` or `std` another length.

  Example:
    >>> images = np.array([[[[0], [255]]]], np.uint8)
    >>> jaxsms.data.normalize(images, mean=[0.5], std=[0.25]).ravel().tolist()
    [-2.0, 2.0]
  """
  images = _checked(images)
  for what, values in (("mean", mean), ("std", std)):
    if np.shape(values) != images.shape[-1:]:
      raise ValueError(
        f"{what} has shape {np.shape(values)} for images of {images.shape[-1]} "
        "channels: give one number per channel"
      )
  mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  return (images.astype(jnp.float32) / 255 - mean) / std


def evaluation_images(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
  """Gives the model's input for validation and test: normalised, nothing random.

  Args:
    images: uint8 [batch, height, width, channels].
    mean: float [channels], of images scaled to [0, 1].
    std: float [channels], of images scaled to [0, 1].

  Returns:
    float32 [batch, height, width, channels].

  Raises:
    ValueError: as `normalize`.

  Example:
    >>> images = np.array([[[[0], [255]]]], np.uint8)
    >>> jaxsms.data.evaluation_images(images, mean=[0.5], std=[0.25]).ravel().tolist()
    [-2.0, 2.0]
  """
  return normalize(images, mean, std)


def training_images(
  name: str, key: jax.Array, images: ArrayLike, mean: ArrayLike, std: ArrayLike
) -> jax.Array:
  """Gives the model's input for training: augmented and normalised.

  Crops and rotations act on the stored images and leave black pixels, as in torchvision.
  Noise is added to normalised images. Each image has its own draw.

  Args:
    name: one of `AUGMENTATIONS`.
    key: a typed key; under `vmap` over copies, one per copy.
    images: uint8 [batch, height, width, channels].
    mean: float [channels], of images scaled to [0, 1].
    std: float [channels], of images scaled to [0, 1].

  Returns:
    float32 [batch, height, width, channels].

  Raises:
    ValueError: `name` is unknown, or as `normalize`.

  Example:
    >>> images, key = np.zeros((5, 1, 2, 1), np.uint8), jax.random.key(0)
    >>> jaxsms.data.training_images("none", key, images, [0.5], [0.25])[0].ravel().tolist()
    [-2.0, -2.0]
    >>> jaxsms.data.training_images("noise", key, images, [0.5], [0.25]).shape
    (5, 1, 2, 1)
  """
  check_name("augmentation", name, AUGMENTATIONS)
  return AUGMENTATIONS[name](key, _checked(images), mean, std)


def none(key, images, mean, std):
  """Normalised images, unchanged."""
  return normalize(images, mean, std)


def crop_flip(key, images, mean, std):
  """A crop of the image padded by 4 black pixels, and half of the images mirrored."""
  rows, columns = _pixels(images)
  return normalize(_gather(images, *_shift_flip(key, rows, columns, 4)), mean, std)


def crop_flip_rotate(key, images, mean, std):
  """As `crop_flip`, then a rotation by up to 15 degrees to the nearest pixel."""
  shift_key, angle_key = jax.random.split(key)
  height, width = images.shape[1:3]
  angle = jax.random.uniform(angle_key, (len(images), 1, 1), minval=-15.0, maxval=15.0)
  sin, cos = jnp.sin(jnp.deg2rad(angle)), jnp.cos(jnp.deg2rad(angle))
  rows, columns = _pixels(images)
  y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
  rows = jnp.round(cos * y - sin * x + (height - 1) / 2).astype(jnp.int32)
  columns = jnp.round(sin * y + cos * x + (width - 1) / 2).astype(jnp.int32)
  in_crop = _inside(rows, height) & _inside(columns, width)
  rows, columns = _shift_flip(shift_key, rows, columns, 4)
  # Beyond the crop it is black, even where the image itself goes on.
  return normalize(_gather(images, jnp.where(in_crop, rows, -1), columns), mean, std)


def noise(key, images, mean, std):
  """Normalised images with Gaussian noise of standard deviation 1."""
  images = normalize(images, mean, std)
  return images + NOISE_STD * jax.random.normal(key, images.shape)


def shift_noise(key, images, mean, std):
  """A shift by up to one pixel, and noise; no mirroring: the data are digits."""
  shift_key, noise_key = jax.random.split(key)
  rows, columns = _pixels(images)
  rows, columns = _shift_flip(shift_key, rows, columns, 1, flip=False)
  return noise(noise_key, _gather(images, rows, columns), mean, std)


# A new augmentation is one more function (key, images, mean, std) -> float32 images.
AUGMENTATIONS: dict[str, Callable[..., jax.Array]] = {
  "none": none,
  "crop_flip": crop_flip,
  "crop_flip_rotate": crop_flip_rotate,
  "noise": noise,
  "shift_noise": shift_noise,
}


def _checked(images: ArrayLike) -> jax.Array:
  dtype = getattr(images, "dtype", type(images).__name__)
  if dtype != np.uint8 or np.ndim(images) != 4:
    raise ValueError(
      f"images are {dtype} of shape {np.shape(images)}: give uint8 "
      "[batch, height, width, channels] from 0 to 255"
    )
  return jnp.asarray(images)


def _pixels(images):
  """The row and the column of every pixel, int32 [batch, height, width] each."""
  shape = images.shape[:3]
  return (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 2))


def _inside(positions, size):
  return (positions >= 0) & (positions < size)


def _shift_flip(key, rows, columns, reach, flip=True):
  """Where each pixel comes from: mirrored with chance 1/2, moved by up to `reach`."""
  offset_key, flip_key = jax.random.split(key)
  batch, _, width = rows.shape
  offsets = jax.random.randint(offset_key, (2, batch, 1, 1), -reach, reach + 1)
  if flip:
    mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1, 1))
    columns = jnp.where(mirrored, width - 1 - columns, columns)
  return rows + offsets[0], columns + offsets[1]


def _gather(images, rows, columns):
  """The pixels at `rows` and `columns`, int32 [batch, height, width]; black outside."""
  batch, height, width, channels = images.shape
  inside = _inside(rows, height) & _inside(columns, width)
  positions = jnp.where(inside, rows * width + columns, 0).reshape(batch, -1, 1)
  flat = images.reshape(batch, height * width, channels)
  # In bounds by the line above: without the promise every index is checked again.
  moved = jnp.take_along_axis(flat, positions, axis=1, mode="promise_in_bounds")
  return jnp.where(inside[..., None], moved.reshape(images.shape), 0)
