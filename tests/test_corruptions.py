import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from jaxsms import data
from jaxsms.data import filters

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
# Published constants that do not grow with severity: less saturation and then more,
# small displacements and then rough ones, one pass of glass with more blur and then two.
UNORDERED = {"saturate", "elastic_transform", "glass_blur"}
STILL = {
  "gaussian_blur",
  "defocus_blur",
  "glass_blur",
  "motion_blur",
  "zoom_blur",
  "contrast",
  "pixelate",
  "jpeg_compression",
  "elastic_transform",
}


@functools.cache
def photos():
  """Four pieces of photographs and one even image, uint8 [5, 32, 32, 3]."""
  from PIL import Image
  from sklearn.datasets import load_sample_images

  pieces = []
  for photo in load_sample_images().images:
    small = np.asarray(Image.fromarray(photo).resize((64, 43), Image.Resampling.BOX))
    pieces += [small[:32, :32], small[-32:, -32:]]
  return np.stack([*pieces, np.full((32, 32, 3), 100, np.uint8)])


@functools.cache
def corrupted_photos(name, severity):
  return np.asarray(data.corrupted(KEY, photos(), name, severity))


def by_scipy(function):
  """The photos as bytes after a function of floats [height, width, channels]."""
  results = [function(image / 255) for image in photos()]
  return np.clip(np.stack(results), 0, 1) * 255


def nearly(got, want, levels=0.51):
  assert np.abs(got.astype(float) - want).max() <= levels


three_severities = pytest.mark.parametrize("severity", [1, 3, 5])
all_names = pytest.mark.parametrize("name", data.CORRUPTIONS)
# One of each kind: noise, blur, weather, digital.
QUICK = {"impulse_noise", "motion_blur", "fog", "saturate", "jpeg_compression"}


def sample_of(names):
  """All of them, most of them slow."""
  return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


# All of them


@pytest.mark.slow
@all_names
def test_shape_dtype_and_draws(name):
  got = corrupted_photos(name, 3)
  assert got.shape == photos().shape
  assert got.dtype == np.uint8
  assert (got[:4] != photos()[:4]).any((1, 2, 3)).all()
  np.testing.assert_array_equal(got, data.corrupted(KEY, photos(), name, 3))
  drawn = (got != np.asarray(data.corrupted(jax.random.key(1), photos(), name, 3))).any()
  deterministic = {"gaussian_blur", "defocus_blur", "zoom_blur", "brightness"} | {
    *("contrast", "saturate", "pixelate", "jpeg_compression")
  }
  assert drawn == (name not in deterministic)


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(data.CORRUPTIONS))
def test_the_same_in_batches_and_mapped_over_keys(name):
  """Gray and no square where that applies."""
  channels = 3 if name == "saturate" else 1
  images = photos()[:4, 5:22, 2:14, :channels]
  keys = jax.random.split(jax.random.key(3), 2)
  whole = jax.jit(jax.vmap(lambda key: data.corrupt(key, images, name, 5)))(keys)
  assert whole.shape == (2, 4, 17, 12, channels)
  for key, want in zip(keys, whole, strict=True):
    got = np.asarray(data.corrupted(key, images, name, 5, batch_size=2))
    # Another program may round the last bit another way.
    nearly(got, want, levels=1)
    assert (got == want).mean() > 0.99


def test_an_image_depends_on_its_place_only():
  want = corrupted_photos("impulse_noise", 5)
  for n, batch_size in ((5, 2), (3, 1), (4, 100)):
    got = data.corrupted(KEY, photos()[:n], "impulse_noise", 5, batch_size)
    np.testing.assert_array_equal(got, want[:n])


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", sample_of(n for n in data.CORRUPTIONS if n not in UNORDERED)
)
def test_distance_grows_with_severity(name):
  distances = [
    np.square(corrupted_photos(name, severity)[:4] - photos()[:4].astype(float)).mean()
    for severity in (1, 3, 5)
  ]
  assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STILL))
def test_even_image_stays(name):
  np.testing.assert_array_equal(corrupted_photos(name, 3)[4], photos()[4])


def test_smallest_sets_and_images():
  assert data.corrupted(KEY, photos()[:0], "contrast", 5).shape == (0, 32, 32, 3)
  pixel = np.full((1, 1, 1, 1), 90, np.uint8)
  for name in sorted(STILL):
    np.testing.assert_array_equal(data.corrupted(KEY, pixel, name, 5), pixel)
  for name in ("fog", "snow"):
    assert data.corrupted(KEY, pixel, name, 5).shape == pixel.shape


def test_names_by_channels(rejects):
  assert data.corruptions_for(3) == list(data.CORRUPTIONS)
  assert set(data.CORRUPTIONS) - set(data.corruptions_for(1)) == {"saturate"}
  with rejects("images have 4 channels: give 1 (gray) or 3"):
    data.corruptions_for(4)


@pytest.mark.parametrize("corrupt", [data.corrupt, data.corrupted])
def test_bad_input(corrupt, rejects):
  images = np.zeros((2, 8, 8, 3), np.uint8)
  with rejects("unknown corruption 'brightnes': did you mean brightness"):
    corrupt(KEY, images, "brightnes", 1)
  for severity in (0, 6, -1, 2.0, "3", True, None):
    with rejects(f"severity is {severity!r}: give"):
      corrupt(KEY, images, "fog", severity)
  for wrong in (
    images / 255,
    images[0],
    images[..., :2],
    images[:, :0],
    images.astype(int),
  ):
    with rejects(f"images are {wrong.dtype} of shape {wrong.shape}: give uint8"):
      corrupt(KEY, wrong, "fog", 1)
  with rejects("images are list of shape"):
    corrupt(KEY, images.tolist(), "fog", 1)
  with rejects("'saturate' changes colours, and the images are gray"):
    corrupt(KEY, images[..., :1], "saturate", 1)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_bad_batch_size(batch_size, rejects):
  with rejects(f"batch_size is {batch_size!r}: give a positive integer"):
    data.corrupted(KEY, photos(), "fog", 1, batch_size=batch_size)


# Noise


def noisy(name, level, severity=5):
  """100,000 values of one grey level, corrupted."""
  images = np.full((1, 200, 500, 1), level, np.uint8)
  return np.asarray(data.corrupted(KEY, images, name, severity)).astype(float).ravel()


def test_gaussian_noise():
  got = noisy("gaussian_noise", 128)
  std = np.sqrt((0.1 * 255) ** 2 + 1 / 12)  # rounding adds its own
  assert abs(got.mean() - 128) < 4 * std / np.sqrt(got.size)
  assert abs(got.std() - std) < 4 * std / np.sqrt(2 * got.size)
  assert scipy.stats.skew(got) == pytest.approx(0, abs=0.05)


def test_speckle_noise():
  for level in (0, 60, 120):
    got, std = noisy("speckle_noise", level), np.sqrt((0.2 * level) ** 2 + 1 / 12)
    assert abs(got.mean() - level) < 4 * std / np.sqrt(got.size)
    if level:
      assert abs(got.std() - std) < 4 * std / np.sqrt(2 * got.size)


def test_impulse_noise():
  got = noisy("impulse_noise", 77)
  assert set(got) == {0, 77, 255}
  for value in (0, 255):
    share = np.mean(got == value)
    assert abs(share - 0.035) < 4 * np.sqrt(0.035 / got.size)


@pytest.mark.parametrize("photons", [50, 500])
def test_poisson_against_scipy(photons):
  levels = np.array([0, 1, 2, 30, 127, 254, 255])
  image = jnp.broadcast_to(levels / 255, (20000, 7))
  counts = np.asarray(jax.jit(filters.poisson, static_argnums=2)(KEY, image, photons))
  for level, got in zip(levels, counts.T, strict=True):
    poisson = scipy.stats.poisson(level / 255 * photons)
    at = np.arange(got.max() + 2)
    empirical = np.searchsorted(np.sort(got), at, side="right") / got.size
    # Kolmogorov-Smirnov: surpassed with chance 1e-5, and less for counts.
    assert np.abs(empirical - poisson.cdf(at)).max() < 2.5 / np.sqrt(got.size)
    error = np.sqrt(poisson.var() / got.size)
    assert abs(got.mean() - poisson.mean()) <= 4 * error


def test_shot_noise():
  got = noisy("shot_noise", 100)
  assert abs(got.mean() - 100) < 4 * got.std() / np.sqrt(got.size)
  assert got.std() == pytest.approx(255 * np.sqrt(100 / 255 / 50), rel=0.02)
  assert len(set(got)) < 60  # whole photons only


# Blur


@three_severities
def test_gaussian_blur(severity):
  sigma = {1: 0.4, 3: 0.7, 5: 1.0}[severity]
  want = by_scipy(
    lambda image: scipy.ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")
  )
  nearly(corrupted_photos("gaussian_blur", severity), want)


@three_severities
def test_defocus_blur(severity):
  radius, alias = {1: (0.3, 0.4), 3: (0.5, 0.6), 5: (1.5, 0.1)}[severity]
  y, x = np.mgrid[-8:9, -8:9]
  disk = (np.hypot(x, y) <= radius).astype(float)
  near = np.exp(-(np.arange(-1, 2) ** 2) / (2 * alias**2))
  kernel = scipy.ndimage.convolve(disk, np.outer(near, near), mode="constant")
  kernel = (kernel / kernel.sum())[..., None]
  want = by_scipy(lambda image: scipy.ndimage.convolve(image, kernel, mode="mirror"))
  nearly(corrupted_photos("defocus_blur", severity), want)


@three_severities
def test_zoom_blur(severity):
  end = {1: 1.06, 3: 1.16, 5: 1.26}[severity]

  def blur(image):
    total, zooms = image.copy(), np.arange(1, end, 0.01)
    for factor in zooms:
      kept = int(np.ceil(32 / factor))
      start = (32 - kept) // 2
      middle = image[start : start + kept, start : start + kept]
      larger = scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)
      start = (len(larger) - 32) // 2
      total += larger[start : start + 32, start : start + 32]
    return total / (len(zooms) + 1)

  nearly(corrupted_photos("zoom_blur", severity), by_scipy(blur))


@pytest.mark.parametrize("angle", [-45.0, 0.0, 17.0, 90.0, -118.0])
def test_motion_blur(angle):
  image = photos()[0] / 255
  weights = np.exp(-(np.arange(13) ** 2) / (2 * 2.0**2))
  want, padded = 0, np.pad(image, ((20, 20), (20, 20), (0, 0)), mode="edge")
  for i, weight in enumerate(weights / weights.sum()):
    row = 20 + int(np.ceil(i * np.sin(np.deg2rad(angle)) - 0.5))
    column = 20 + int(np.ceil(i * np.cos(np.deg2rad(angle)) - 0.5))
    want = want + weight * padded[row : row + 32, column : column + 32]
  blur = jax.jit(filters.motion_blur, static_argnums=(2, 3))
  np.testing.assert_allclose(blur(jnp.asarray(image), angle, 6, 2.0), want, atol=1e-3)


def test_glass_blur_moves_pixels():
  image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)  # each value once
  got = np.asarray(data.corrupted(KEY, np.repeat(image, 50, 0), "glass_blur", 1))[..., 0]
  image = image[0, ..., 0]
  np.testing.assert_array_equal(got[:, :2], np.broadcast_to(image[:2], (50, 2, 16)))
  np.testing.assert_array_equal(got[:, :, :2], np.broadcast_to(image[:, :2], (50, 16, 2)))
  moved = got[:, 2:, 2:]
  shares = [
    (moved == image[2 - up : 16 - up, 2 - left : 16 - left]).mean()
    for up in (0, 1)
    for left in (0, 1)
  ]
  assert sum(shares) == pytest.approx(1)
  assert np.allclose(shares, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / moved.size))


# Weather


@pytest.mark.slow
@pytest.mark.parametrize("decay", [1.75, 3.0])
def test_plasma_against_loops(decay):
  """Diamond-square, point by point, on a map that closes on itself."""
  size, amplitude = 16, 1.0
  draw = np.asarray(jax.random.uniform(KEY, (size, size), minval=-1.0), float)
  grid, step = np.zeros((size, size)), size
  orthogonal, diagonal = ((0, 1), (1, 0)), ((1, 1), (1, -1))
  while step > 1:
    half = step // 2
    for firsts, directions in (
      (((half, half),), diagonal),
      (((0, half), (half, 0)), orthogonal),
    ):
      for first in firsts:
        for row in range(first[0], size, step):
          for column in range(first[1], size, step):
            near = [
              grid[(row + s * dy * half) % size, (column + s * dx * half) % size]
              for dy, dx in directions
              for s in (-1, 1)
            ]
            grid[row, column] = np.mean(near) + amplitude * draw[row, column]
    step, amplitude = half, amplitude / decay**2
  want = (grid - grid.min()) / np.ptp(grid)
  got = jax.jit(filters.plasma, static_argnums=(1, 2))(KEY, size, decay)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_fog_keeps_the_range_and_adds_the_same_to_all_channels():
  got, image = corrupted_photos("fog", 5)[:4].astype(float), photos()[:4].astype(float)
  largest = image.max((1, 2, 3), keepdims=True)
  assert (got <= largest).all()
  cloud = got * (largest / 255 + 1.5) / largest - image / 255
  assert np.ptp(cloud, axis=-1).max() < 0.05
  assert cloud.min() > -0.03
  assert cloud.max() < 1.53
  assert np.ptp(cloud, axis=(1, 2)).min() > 1.4


@pytest.mark.slow
def test_snow_brightens_and_falls_both_ways():
  for severity in (1, 3, 5):
    assert (corrupted_photos("snow", severity) >= photos()).all()
  black = np.zeros((2, 16, 16, 1), np.uint8)
  got = np.asarray(data.corrupted(KEY, black, "snow", 3)).astype(int)
  assert got.min() == 13  # a tenth of half the range
  assert np.abs(got - got[:, ::-1, ::-1]).max() <= 1
  assert got.max() > 30


# Colour and digital


def with_hsv(change):
  from matplotlib import colors

  def apply(image):
    hsv = colors.rgb_to_hsv(image)
    change(hsv)
    return colors.hsv_to_rgb(hsv)

  return by_scipy(apply)


@three_severities
def test_brightness(severity):
  def change(hsv):
    hsv[..., 2] = np.clip(hsv[..., 2] + {1: 0.05, 3: 0.15, 5: 0.3}[severity], 0, 1)

  nearly(corrupted_photos("brightness", severity), with_hsv(change))


def test_brightness_of_black():
  black = np.zeros((1, 2, 2, 3), np.uint8)
  np.testing.assert_array_equal(data.corrupted(KEY, black, "brightness", 4), black + 51)


@three_severities
def test_saturate(severity):
  factor, more = {1: (0.3, 0), 3: (1.5, 0), 5: (2.5, 0.2)}[severity]

  def change(hsv):
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + more, 0, 1)

  nearly(corrupted_photos("saturate", severity), with_hsv(change))


@three_severities
def test_contrast(severity):
  factor = {1: 0.75, 3: 0.4, 5: 0.15}[severity]
  want = by_scipy(lambda i: factor * i + (1 - factor) * i.mean((0, 1), keepdims=True))
  nearly(corrupted_photos("contrast", severity), want)


@three_severities
def test_pixelate_against_pillow(severity):
  from PIL import Image

  small = int(32 * {1: 0.95, 3: 0.85, 5: 0.65}[severity])
  box = Image.Resampling.BOX
  for image, got in zip(photos(), corrupted_photos("pixelate", severity), strict=True):
    want = Image.fromarray(image).resize((small, small), box).resize((32, 32), box)
    nearly(got, np.asarray(want, float), levels=1)  # Pillow rounds after each pass


def decibels(a, b):
  return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


@pytest.mark.parametrize("shape", [(32, 32, 3), (21, 27, 3), (21, 27, 1)])
def test_jpeg_against_pillow(shape):
  from PIL import Image

  images = photos()[:4, : shape[0], : shape[1], : shape[2]]
  for severity, quality in ((1, 80), (5, 40)):
    got = np.asarray(data.corrupted(KEY, images, "jpeg_compression", severity))
    for i, image in enumerate(images):
      file = io.BytesIO()
      Image.fromarray(image.squeeze()).save(file, "jpeg", quality=quality)
      want = np.asarray(Image.open(file)).reshape(shape)
      assert decibels(got[i], want) > 38
      assert decibels(got[i], image) == pytest.approx(decibels(want, image), abs=0.5)


@pytest.mark.parametrize("mode", ["mirror", "reflect"])
def test_resample_against_scipy(mode):
  image = photos()[1] / 255
  rows, columns = np.random.default_rng(0).uniform(-40, 70, (2, 6, 7))
  got = filters.resample(jnp.asarray(image), jnp.asarray(rows), jnp.asarray(columns), mode)
  for channel in range(3):
    want = scipy.ndimage.map_coordinates(
      image[..., channel], (rows, columns), order=1, mode=mode
    )
    np.testing.assert_allclose(got[..., channel], want, atol=1e-4)


def test_elastic_affine_map_moves_three_points():
  """Towards where each came from the map is affine, and moves corners by its shift."""
  rows, columns = np.indices((32, 32))
  still = filters.affine_positions(KEY, rows, columns, 0.0)
  np.testing.assert_allclose(still, (rows, columns), atol=1e-5)
  largest = 0
  for seed in range(20):
    key = jax.random.key(seed)
    source = np.stack(filters.affine_positions(key, rows, columns, 2.56), -1)
    source = np.c_[source.reshape(-1, 2), np.ones(32 * 32)]
    target = np.stack([rows, columns], -1).reshape(-1, 2)
    forward, *_ = np.linalg.lstsq(source, target)
    np.testing.assert_allclose(source @ forward, target, atol=1e-3)
    points = np.array([[26, 26, 1], [6, 26, 1], [6, 6, 1]])
    moves = np.abs(points @ forward - points[:, :2])
    assert moves.max() < 2.57
    largest = max(largest, moves.max())
  assert largest > 2.3
