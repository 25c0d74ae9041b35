import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from jaxsms import data
from jaxsms.data import crops


def random_image(width, height, seed=0, channels=3):
  shape = (height, width, channels)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def torchvision_box(rng, width, height, scale, ratio):
  """`RandomResizedCrop.get_params`, by hand."""
  log_ratio = np.log(np.array(ratio))
  for _ in range(10):
    target = width * height * rng.uniform(scale[0], scale[1])
    aspect = np.exp(rng.uniform(log_ratio[0], log_ratio[1]))
    w = int(np.round(np.sqrt(target * aspect)))
    h = int(np.round(np.sqrt(target / aspect)))
    if 0 < w <= width and 0 < h <= height:
      i = rng.integers(0, height - h + 1)
      j = rng.integers(0, width - w + 1)
      return j, i, w, h
  in_ratio = width / height
  if in_ratio < min(ratio):
    w, h = width, int(np.round(width / min(ratio)))
  elif in_ratio > max(ratio):
    w, h = int(np.round(height * max(ratio))), height
  else:
    w, h = width, height
  return (width - w) // 2, (height - h) // 2, w, h


@given(
  width=st.integers(1, 700),
  height=st.integers(1, 700),
  seed=st.integers(0, 1000),
  scale=st.sampled_from([(0.08, 1.0), (0.9, 1.0)]),
)
def test_boxes_are_those_of_torchvision(width, height, seed, scale):
  ratio = (3 / 4, 4 / 3)
  got = crops.random_box(np.random.default_rng(seed), width, height, scale)
  want = torchvision_box(np.random.default_rng(seed), width, height, scale, ratio)
  assert got == want
  left, top, w, h = got
  assert 0 <= left <= left + w <= width
  assert 0 <= top <= top + h <= height
  assert min(w, h) >= 1


def test_boxes_are_distributed_as_they_should_be():
  # The largest fits: sqrt(0.5 * 4 / 3) < 1, so that no draw is refused.
  size, scale, rng = 10_000, (0.08, 0.5), np.random.default_rng(0)
  boxes = np.array([crops.random_box(rng, size, size, scale) for _ in range(2000)])
  left, top, w, h = boxes.T
  shares = {
    "area": (w * h / size**2 - 0.08) / 0.42,
    "shape": (np.log(w / h) / math.log(4 / 3) + 1) / 2,
    "left": left / (size - w),
    "top": top / (size - h),
  }
  for name, share in shares.items():
    assert stats.kstest(share, "uniform").pvalue > 0.01, name


@pytest.mark.parametrize("size", [(900, 20), (20, 900), (1, 50), (50, 1)])
def test_where_nothing_fits_it_is_the_centre(size):
  rng = np.random.default_rng(0)
  left, top, w, h = crops.random_box(rng, *size, scale=(0.9, 1.0))
  for side, start, length in zip(size, (left, top), (w, h), strict=True):
    assert start == (side - length) // 2
  short = min(size)
  assert sorted((w, h)) == [short, round(short * 4 / 3)]


@pytest.mark.torch
@pytest.mark.parametrize("channels", [1, 3])
def test_random_resized_crop_pixels_against_pytorch(channels):
  import torch

  image, mirrored = random_image(50, 37, channels=channels), 0
  for seed in range(20):
    got = data.random_resized_crop(np.random.default_rng(seed), image, 16)
    assert (got.shape, got.dtype) == ((16, 16, channels), np.uint8)
    rng = np.random.default_rng(seed)
    left, top, w, h = torchvision_box(rng, 50, 37, (0.08, 1), (3 / 4, 4 / 3))
    part = torch.tensor(image[top : top + h, left : left + w]).float()
    want = torch.nn.functional.interpolate(
      part.permute(2, 0, 1)[None], (16, 16), mode="bilinear", antialias=True
    )
    want = want[0].permute(1, 2, 0).numpy()
    if rng.random() < 0.5:
      want, mirrored = want[:, ::-1], mirrored + 1
    np.testing.assert_allclose(got, want, atol=1.5)
  assert 0 < mirrored < 20


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (33, 20), (20, 20), (9, 200)])
def test_centre_crop_against_pillow(shape):
  image = Image.fromarray(random_image(*shape))
  width, height = shape
  if width < height:
    resized = image.resize((20, int(20 * height / width)), Image.BILINEAR)
  else:
    resized = image.resize((int(20 * width / height), 20), Image.BILINEAR)
  left, top = round((resized.width - 16) / 2), round((resized.height - 16) / 2)
  want = np.asarray(resized)[top : top + 16, left : left + 16]
  for given_as in (image, np.asarray(image)):
    np.testing.assert_array_equal(data.resize_centre_crop(given_as, 16, 20), want)


def test_bad_crops(rejects):
  rng, image = np.random.default_rng(0), random_image(9, 9)
  with rejects("size is 0"):
    data.random_resized_crop(rng, image, 0)
  with rejects("scale is (0.5, 1.5)"):
    data.random_resized_crop(rng, image, 8, scale=(0.5, 1.5))
  with rejects("ratio is (2, 1)"):
    data.random_resized_crop(rng, image, 8, ratio=(2, 1))
  with rejects("resize is 7 for crops of 8"):
    data.resize_centre_crop(image, 8, 7)
  for bad in (image / 255, image[..., 0], np.zeros((4, 4, 2), np.uint8)):
    with rejects("with 1 or 3 channels"):
      data.resize_centre_crop(bad, 8, 8)
