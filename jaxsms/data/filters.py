"""Image filters that corruptions are made of, for one image [height, width, channels].

What is linear, separable and known before the image (a Gaussian, a zoom, a resize) is
one matrix per axis, borders included: at the sizes of these images two matrix products
are quicker than a convolution or a gather.
"""

import jax
import jax.numpy as jnp
import numpy as np

_LUMA_TABLE = np.array(
  [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
  ]
)
_CHROMA_TABLE = np.full((8, 8), 99)
_CHROMA_TABLE[:4, :4] = [
  [17, 18, 24, 47],
  [18, 21, 26, 66],
  [24, 26, 56, 99],
  [47, 66, 99, 99],
]
_TO_YCC = np.array(
  [
    [0.299, 0.587, 0.114],
    [-0.168735892, -0.331264108, 0.5],
    [0.5, -0.418687589, -0.081312411],
  ]
)


def along_axes(matrix_of, image):
  """Multiplies rows by matrix_of(height) and columns by matrix_of(width)."""
  rows, columns = (jnp.asarray(matrix_of(n), image.dtype) for n in image.shape[:2])
  # A GPU's default precision would be off by a grey level.
  return jnp.einsum("ij,jkc,lk->ilc", rows, image, columns, precision="highest")


def gaussian_blur(image, sigma, truncate=4.0, mode="edge"):
  """As scipy.ndimage.gaussian_filter per channel; `mode` is that of numpy.pad."""
  reach = int(truncate * sigma + 0.5)
  weights = _gaussian(reach, sigma) if reach else np.ones(1)
  return along_axes(lambda size: _convolution_matrix(size, weights, mode), image)


def zoom(image, factor):
  """The middle of the image enlarged linearly, as scipy.ndimage.zoom with order 1."""
  return along_axes(lambda size: _zoom_matrix(size, factor), image)


def pixelate(image, share):
  """Shrinks each side to `share` of it and back, with Pillow's box filter."""

  def matrix(size):
    small = max(int(size * share), 1)
    return _box_matrix(size, small) @ _box_matrix(small, size)

  return along_axes(matrix, image)


def disk_blur(image, radius, alias_sigma):
  """Convolves with a disk smoothed by a 3x3 Gaussian; borders mirror."""
  reach = int(radius) + 1
  y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
  smooth = _convolution_matrix(2 * reach + 1, _gaussian(1, alias_sigma), "constant")
  kernel = smooth @ (x**2 + y**2 <= radius**2) @ smooth
  kernel /= kernel.sum()
  height, width, _ = image.shape
  padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), "reflect")
  return sum(
    weight * padded[i : i + height, j : j + width]
    for (i, j), weight in np.ndenumerate(kernel)
  )


def poisson(key, image, photons):
  """Poisson counts of mean image * photons, for images of 256 grey levels.

  So few means fit one table of their distributions, in which a uniform draw is looked
  up: some twenty times faster on CPU than sampling by rejection.
  """
  bits = int(photons + 10 * photons**0.5).bit_length()
  counts = np.arange(1 << bits)
  log_factorials = np.cumsum(np.log(np.maximum(counts, 1)))
  means = np.maximum(np.arange(256)[:, None] / 255 * photons, 1e-30)
  below = np.cumsum(np.exp(counts * np.log(means) - means - log_factorials), axis=1)
  table = jnp.asarray(below, jnp.float32)
  levels = jnp.round(image * 255).astype(jnp.int32)
  draw = jax.random.uniform(key, image.shape)
  count = jnp.zeros_like(levels)
  for bit in reversed(range(bits)):
    larger = count + (1 << bit)
    count = jnp.where(table[levels, larger - 1] <= draw, larger, count)
  return count


def motion_blur(image, angle, radius, sigma):
  """Half a Gaussian along a line, nearest pixels, as ImageMagick's MotionBlurImage.

  Args:
    image: float [height, width, channels]; borders go on as they are.
    angle: float [], in degrees, clockwise from the direction of a row.
    radius: int, the line has 2 * radius + 1 pixels.
    sigma: float, in pixels.
  """
  taps = np.arange(2 * radius + 1)
  weights = np.exp(-(taps**2) / (2 * sigma**2))
  weights /= weights.sum()
  taps = taps[weights > 1e-5]  # the others are far below a grey level
  height, width, channels = image.shape
  row_steps = jnp.ceil(jnp.sin(jnp.deg2rad(angle)) * taps - 0.5).astype(jnp.int32)
  column_steps = jnp.ceil(jnp.cos(jnp.deg2rad(angle)) * taps - 0.5).astype(jnp.int32)
  flat = image.reshape(height * width, channels)

  def add(i, total):
    rows = jnp.clip(jnp.arange(height) + row_steps[i], 0, height - 1)
    columns = jnp.clip(jnp.arange(width) + column_steps[i], 0, width - 1)
    moved = flat.at[rows[:, None] * width + columns].get(mode="promise_in_bounds")
    return total + jnp.asarray(weights, image.dtype)[i] * moved

  return jax.lax.fori_loop(0, len(taps), add, jnp.zeros_like(image))


def resample(image, rows, columns, mode):
  """The image at float positions [height, width], linearly interpolated."""
  at = jax.scipy.ndimage.map_coordinates
  channel = jax.vmap(lambda plane: at(plane, (rows, columns), 1, mode), -1, -1)
  return channel(image)


def plasma(key, size, decay):
  """Cloudy noise in [0, 1], float32 [size, size], by the diamond-square algorithm.

  Args:
    key: a key.
    size: a power of 2.
    decay: float, by whose square the noise shrinks from one octave to the next.
  """
  draw = jax.random.uniform(key, (size, size), minval=-1.0)
  grid, step = jnp.zeros((1, 1)), size
  while step > 1:
    half = step // 2
    noise = draw / decay ** (2 * len(grid).bit_length())
    right, below = jnp.roll(grid, -1, 1), jnp.roll(grid, -1, 0)
    centre = grid + right + below + jnp.roll(right, -1, 0)
    centre = centre / 4 + noise[half::step, half::step]
    top = grid + right + centre + jnp.roll(centre, 1, 0)
    left = grid + below + centre + jnp.roll(centre, 1, 1)
    top, left = top / 4 + noise[::step, half::step], left / 4 + noise[half::step, ::step]
    quads = jnp.stack([jnp.stack([grid, top], -1), jnp.stack([left, centre], -1)], 1)
    grid, step = quads.reshape(2 * len(grid), -1), half
  grid = grid - grid.min()
  return grid / jnp.maximum(grid.max(), 1e-9)


def jpeg(image, quality):
  """What a baseline JPEG file keeps: 4:2:0 colours, quantised cosines of 8x8 blocks.

  Numbers are rounded where libjpeg rounds them, but its integer arithmetic is not
  repeated: single pixels differ by a few grey levels from a decoded file.

  References:
    ITU-T T.81, annexes A and K, https://www.w3.org/Graphics/JPEG/itu-t81.pdf
  """
  height, width, channels = image.shape
  block = 8 if channels == 1 else 16
  padding = ((0, -height % block), (0, -width % block), (0, 0))
  levels = jnp.pad(image * 255, padding, "edge")
  if channels == 1:
    levels = _jpeg_planes(levels, _quantisation(_LUMA_TABLE, quality))
  else:
    colours = jnp.einsum("hwc,dc->hwd", levels, _TO_YCC, precision="highest")
    offset = jnp.array([0.0, 128.0, 128.0])
    colours = jnp.round(colours + offset)
    chroma = along_axes(lambda n: np.kron(np.eye(n // 2), [[0.5, 0.5]]), colours[..., 1:])
    # libjpeg rounds halves down and up by turns.
    half = np.where(np.arange(chroma.shape[1]) % 2, 0.5, 0.25)[:, None]
    chroma = jnp.floor(chroma + jnp.asarray(half, chroma.dtype))
    luma = _jpeg_planes(colours[..., :1], _quantisation(_LUMA_TABLE, quality))
    chroma = _jpeg_planes(chroma, _quantisation(_CHROMA_TABLE, quality))
    chroma = along_axes(_doubling_matrix, chroma)
    colours = jnp.concatenate([luma, chroma], -1) - offset
    levels = jnp.einsum("hwd,cd->hwc", colours, np.linalg.inv(_TO_YCC), precision="highest")
  return levels[:height, :width] / 255


def _jpeg_planes(planes, table):
  """Planes [height, width, planes] through blockwise cosines and quantisation."""
  height, width, channels = planes.shape
  n = np.arange(8)
  cosines = np.cos((2 * n + 1) * n[:, None] * np.pi / 16) / 2
  cosines[0] /= np.sqrt(2)
  blocks = (planes - 128).reshape(height // 8, 8, width // 8, 8, channels)
  table = jnp.asarray(table[None, :, None, :, None], planes.dtype)
  waves = jnp.einsum("ui,aibjc,vj->aubvc", cosines, blocks, cosines, precision="highest")
  # Half a step comes up often and goes away from zero, whatever the last bit says.
  steps = jnp.sign(waves) * jnp.floor(jnp.abs(waves) / table + 0.5 + 1e-4)
  blocks = jnp.einsum(
    "ui,aubvc,vj->aibjc", cosines, steps * table, cosines, precision="highest"
  )
  return jnp.clip(jnp.round(blocks.reshape(planes.shape) + 128), 0, 255)


def _quantisation(table, quality):
  scale = 5000 // quality if quality < 50 else 200 - 2 * quality
  return np.clip((table * scale + 50) // 100, 1, 255)


def _gaussian(reach, sigma):
  weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
  return weights / weights.sum()


def _convolution_matrix(size, weights, mode):
  """Convolution with `weights`, float [size, size], borders as numpy.pad's `mode`."""
  padded = np.pad(np.eye(size), ((len(weights) // 2,) * 2, (0, 0)), mode)
  return sum(weight * padded[i : i + size] for i, weight in enumerate(weights))


def _zoom_matrix(size, factor):
  """Linear interpolation of the middle ceil(size / factor) pixels, [size, size]."""
  kept = int(np.ceil(size / factor))
  enlarged = round(kept * factor)
  first = (enlarged - size) // 2
  steps = np.arange(first, first + size) * (kept - 1) / max(enlarged - 1, 1)
  matrix = np.maximum(1 - np.abs(steps[:, None] - np.arange(kept)), 0)
  top = (size - kept) // 2
  return np.pad(matrix, ((0, 0), (top, size - kept - top)))


def _box_matrix(size, source):
  """The mean of the pixels whose centres lie under each new pixel, [size, source]."""
  scale = source / size
  centres = (np.arange(size)[:, None] + 0.5) * scale
  offsets = (np.arange(source) + 0.5 - centres) / max(scale, 1)
  under = (offsets > -0.5) & (offsets <= 0.5)
  return under / under.sum(1, keepdims=True)


def _doubling_matrix(size):
  """Twice as many pixels, each 3/4 the nearest old one and 1/4 the next nearest."""
  matrix = np.kron(np.eye(size), [[0.75], [0.75]])
  for new in range(2 * size):
    neighbour = new // 2 + (1 if new % 2 else -1)
    matrix[new, np.clip(neighbour, 0, size - 1)] += 0.25
  return matrix


def affine_positions(key, rows, columns, shift):
  """Where each pixel comes from when three points move by up to `shift` pixels."""
  height, width = rows.shape
  side = 2 * max(min(height, width) // 3, 1)
  # A right angle: its corner, and the ends of its legs along rows and columns.
  old = np.array([height // 2 - side / 2, width // 2 + side / 2])
  legs = np.array([[0, 0], [0, -side], [side, 0]])
  new = old + legs + jax.random.uniform(key, (3, 2), minval=-shift, maxval=shift)
  (a, b), (c, d) = (new[2] - new[0]) / side, (new[0] - new[1]) / side
  # Row and column steps became (a, b) and (c, d): solve for how many of each.
  y, x = rows - new[0, 0], columns - new[0, 1]
  determinant = a * d - b * c
  return (d * y - c * x) / determinant + old[0], (a * x - b * y) / determinant + old[1]
