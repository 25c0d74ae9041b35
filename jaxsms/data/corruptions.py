"""Corrupted images, out of distribution: noise, blur, weather and digital damage.

The corruptions of CIFAR-10-C with its published constants, on the device and for any
set of images. Constants count pixels of 32x32 images (kernel sizes, blurs, steps) and
stay the same at other sizes; only `pixelate` and `elastic_transform` are relative to
the size. What differs from the published files, beside the draws:

- results are rounded to the nearest grey level, where the files cut them off;
- `jpeg_compression` quantises cosines itself instead of calling an encoder;
- frost, which needs photographs of frost, and spatter are left out.

References:
  Hendrycks & Dietterich, 2019, https://arxiv.org/abs/1903.12261
  https://github.com/hendrycks/robustness (ImageNet-C/create_c/make_cifar_c.py)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxsms.data import filters
from jaxsms.names import check_name

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue


def corrupt(key: jax.Array, images: ArrayLike, name: str, severity: int) -> jax.Array:
  """Corrupts images, each with a draw of its own; for use under `jit` and `vmap`.

  Args:
    key: a key; image i draws from `fold_in(key, i)`.
    images: uint8 [n, height, width, channels], 1 or 3 channels.
    name: one of `CORRUPTIONS`; `corruptions_for` says which fit the channels.
    severity: 1 (weakest) to 5, static.

  Returns:
    uint8 [n, height, width, channels].

  Raises:
    ValueError: `name` or `severity` is unknown, `images` have another rank, dtype or
      number of channels, or the corruption needs colours and they have none.

  References:
    Hendrycks & Dietterich, 2019, https://arxiv.org/abs/1903.12261

  Example:
    >>> images = np.full((1, 2, 2, 1), 100, np.uint8)
    >>> brighter = jaxsms.data.corrupt(jax.random.key(0), images, "brightness", severity=4)
    >>> brighter.ravel().tolist()  # 0.2 of 255 more
    [151, 151, 151, 151]
  """
  _check(images, name, severity)
  images = jnp.asarray(images)
  return jax.vmap(_corrupt_one(name, severity))(_keys(key, images), images)


def corrupted(
  key: jax.Array, images: ArrayLike, name: str, severity: int, batch_size: int = 500
) -> jax.Array:
  """Corrupts a whole data set as `corrupt` does, in batches: memory stays small.

  Args:
    key: a key; image i draws from `fold_in(key, i)`, whatever `batch_size` is. (Where
      the last bit of a float decides, a grey level may still differ by one.)
    images: uint8 [n, height, width, channels], 1 or 3 channels.
    name: one of `CORRUPTIONS`.
    severity: 1 (weakest) to 5.
    batch_size: images at a time.

  Returns:
    uint8 [n, height, width, channels].

  Raises:
    ValueError: as `corrupt`, or `batch_size` is no positive integer.

  Example:
    >>> images = np.array([0, 200], np.uint8).reshape(1, 1, 2, 1)
    >>> flatter = jaxsms.data.corrupted(jax.random.key(0), images, "contrast", severity=2)
    >>> flatter.ravel().tolist()  # half as far from their mean
    [50, 150]
  """
  _check(images, name, severity)
  if not isinstance(batch_size, int | np.integer) or batch_size < 1:
    raise ValueError(f"batch_size is {batch_size!r}: give a positive integer")
  return _in_batches(key, jnp.asarray(images), name, int(severity), int(batch_size))


def corruptions_for(channels: int) -> list[str]:
  """Names the corruptions that apply to images of this number of channels.

  Args:
    channels: 1 (gray) or 3 (colour).

  Returns:
    Names, keys of `CORRUPTIONS`: all but saturate for gray images.

  Raises:
    ValueError: `channels` is neither.

  Example:
    >>> set(jaxsms.data.corruptions_for(3)) - set(jaxsms.data.corruptions_for(1))
    {'saturate'}
  """
  if channels not in (1, 3):
    raise ValueError(f"images have {channels} channels: give 1 (gray) or 3 (colour)")
  return [name for name in CORRUPTIONS if channels == 3 or name != "saturate"]


def gaussian_noise(key, image, std):
  """Noise of one strength everywhere."""
  return image + std * jax.random.normal(key, image.shape)


def shot_noise(key, image, photons):
  """Counts of `photons` per white pixel and channel."""
  return filters.poisson(key, image, photons) / photons


def impulse_noise(key, image, share):
  """A share of all values black or white, by halves."""
  draw = jax.random.uniform(key, image.shape)
  return jnp.where(draw < share, draw < share / 2, image)


def speckle_noise(key, image, std):
  """Noise in proportion to the brightness."""
  return image + image * std * jax.random.normal(key, image.shape)


def defocus_blur(image, constants):
  """A lens out of focus: a disk."""
  return filters.disk_blur(image, *constants)


def glass_blur(key, image, constants):
  """Pixels replaced by near ones, as behind frosted glass, between two Gaussians.

  The published code means to exchange pixels, but its assignment copies: each takes
  the value of one up to a row above and a column to the left, from row and column 2.
  """
  sigma, times = constants
  image = filters.gaussian_blur(image, sigma)
  rows, columns = np.indices(image.shape[:2])
  moves = (rows >= 2) & (columns >= 2)
  for draw in jax.random.bernoulli(key, shape=(times, 2, *moves.shape)):
    image = image[rows - (draw[0] & moves), columns - (draw[1] & moves)]
  return filters.gaussian_blur(image, sigma)


def motion_blur(key, image, constants):
  """A camera moved in a direction within 45 degrees of the rows."""
  angle = jax.random.uniform(key, minval=-45.0, maxval=45.0)
  return filters.motion_blur(image, angle, *constants)


def zoom_blur(image, end):
  """A camera moved towards the scene: the mean over zooms in steps of 0.01."""
  # As published, since the last bits decide how many zooms there are and their sizes.
  zooms = np.arange(1, end, 0.01)
  return (image + sum(filters.zoom(image, z) for z in zooms)) / (len(zooms) + 1)


def snow(key, image, constants):
  """Flakes that fall, and a scene in whitish light."""
  mean, std, factor, threshold, radius, sigma, keep = constants
  flake_key, angle_key = jax.random.split(key)
  flakes = mean + std * jax.random.normal(flake_key, (*image.shape[:2], 1))
  flakes = filters.zoom(flakes, factor)
  flakes = jnp.clip(jnp.where(flakes < threshold, 0, flakes), 0, 1)
  angle = jax.random.uniform(angle_key, minval=-135.0, maxval=-45.0)
  flakes = filters.motion_blur(flakes, angle, radius, sigma)
  gray = image if image.shape[-1] == 1 else (image * jnp.array(LUMA)).sum(-1, keepdims=True)
  image = keep * image + (1 - keep) * jnp.maximum(image, 1.5 * gray + 0.5)
  return image + flakes + flakes[::-1, ::-1]


def fog(key, image, constants):
  """Cloudy brightness, scaled back into the image's own range."""
  density, decay = constants
  height, width, _ = image.shape
  size = 1 << (max(height, width) - 1).bit_length()
  cloud = filters.plasma(key, size, decay)[:height, :width, None]
  largest = image.max()
  return (image + density * cloud) * largest / (largest + density)


def brightness(image, more):
  """Adds to the value of HSV; with hue and saturation kept, that scales all channels."""
  value = image.max(-1, keepdims=True)
  brighter = jnp.minimum(value + more, 1)
  return jnp.where(value > 0, image * brighter / jnp.where(value > 0, value, 1), brighter)


def contrast(image, factor):
  """Pulls each channel towards its mean."""
  mean = image.mean((0, 1), keepdims=True)
  return (image - mean) * factor + mean


def saturate(image, constants):
  """Changes the saturation of HSV; gray has hue 0 there, so added colour is red."""
  factor, more = constants
  largest, smallest = image.max(-1, keepdims=True), image.min(-1, keepdims=True)
  spread = largest - smallest
  saturation = spread / jnp.maximum(largest, 1e-9)
  saturation = jnp.clip(saturation * factor + more, 0, 1)
  hue = (largest - image) / jnp.where(spread > 0, spread, 1)
  hue = jnp.where(spread > 0, hue, jnp.array([0.0, 1.0, 1.0]))
  return largest * (1 - saturation * hue)


def elastic_transform(key, image, constants):
  """A random affine map, then random displacements smoothed by a Gaussian."""
  reach, sigma, shift = (min(image.shape[:2]) * c for c in constants)
  corner_key, step_key = jax.random.split(key)
  rows, columns = np.indices(image.shape[:2])
  from_rows, from_columns = filters.affine_positions(corner_key, rows, columns, shift)
  image = filters.resample(image, from_rows, from_columns, "mirror")
  if not reach:
    return image
  steps = jax.random.uniform(step_key, (*rows.shape, 2), minval=-1.0)
  steps = reach * filters.gaussian_blur(steps, sigma, truncate=3.0, mode="symmetric")
  return filters.resample(image, rows + steps[..., 0], columns + steps[..., 1], "reflect")


def _drawless(function):
  """A function of an image and constants, as a corruption that has no use for its key."""
  return lambda key, image, constants: function(image, constants)


# name: (function of key, image float32 [height, width, channels] in [0, 1] and one of
# the constants; the constants of severities 1 to 5). Results are clipped to [0, 1].
CORRUPTIONS: dict[str, tuple[Callable[..., jax.Array], tuple]] = {
  "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1)),
  "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
  "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
  "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
  "gaussian_blur": (_drawless(filters.gaussian_blur), (0.4, 0.6, 0.7, 0.8, 1.0)),
  "defocus_blur": (
    _drawless(defocus_blur),
    ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),  # radius, smoothing
  ),
  "glass_blur": (
    glass_blur,
    ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),  # sigma, times
  ),
  "motion_blur": (
    motion_blur,
    ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),  # radius, sigma
  ),
  "zoom_blur": (_drawless(zoom_blur), (1.06, 1.11, 1.16, 1.21, 1.26)),
  "snow": (
    snow,
    (  # mean, std and zoom of the flakes, threshold, radius, sigma, share of the scene
      (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
      (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
      (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
      (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
      (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    ),
  ),
  "fog": (fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
  "brightness": (_drawless(brightness), (0.05, 0.1, 0.15, 0.2, 0.3)),
  "contrast": (_drawless(contrast), (0.75, 0.5, 0.4, 0.3, 0.15)),
  "saturate": (
    _drawless(saturate),
    ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2)),  # factor, added
  ),
  "pixelate": (_drawless(filters.pixelate), (0.95, 0.9, 0.85, 0.75, 0.65)),
  "jpeg_compression": (_drawless(filters.jpeg), (80, 65, 58, 50, 40)),
  "elastic_transform": (
    elastic_transform,
    (  # displacement, its sigma and the affine map's shift, all times the shorter side
      (0.0, 0.0, 0.08),
      (0.05, 0.2, 0.07),
      (0.08, 0.06, 0.06),
      (0.1, 0.04, 0.05),
      (0.1, 0.03, 0.03),
    ),
  ),
}


def _check(images, name, severity):
  check_name("corruption", name, CORRUPTIONS)
  if isinstance(severity, bool) or not isinstance(severity, int | np.integer):
    raise ValueError(f"severity is {severity!r}: give an integer from 1 to 5")
  if not 1 <= severity <= 5:
    raise ValueError(f"severity is {severity}: give 1 (weakest) to 5")
  dtype, shape = getattr(images, "dtype", type(images).__name__), np.shape(images)
  if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape[1:]:
    raise ValueError(
      f"images are {dtype} of shape {shape}: give uint8 [n, height, width, channels] "
      "from 0 to 255 with 1 or 3 channels"
    )
  if name not in corruptions_for(shape[-1]):
    raise ValueError(
      f"corruption {name!r} changes colours, and the images are gray: choose from "
      "corruptions_for(1)"
    )


def _keys(key, images):
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(images)))


def _corrupt_one(name, severity):
  """From a key and uint8 [height, width, channels] to the same, corrupted."""
  function, constants = CORRUPTIONS[name]

  def one(key, image):
    image = function(key, image.astype(jnp.float32) / 255, constants[severity - 1])
    # A bit more than a half, so that the last bit does not decide means of two pixels.
    return jnp.floor(jnp.clip(image, 0, 1) * 255 + 0.501).astype(jnp.uint8)

  return one


@functools.partial(jax.jit, static_argnames=("name", "severity", "batch_size"))
def _in_batches(key, images, name, severity, batch_size):
  one = _corrupt_one(name, severity)
  return jax.lax.map(
    lambda pair: one(*pair), (_keys(key, images), images), batch_size=batch_size
  )
