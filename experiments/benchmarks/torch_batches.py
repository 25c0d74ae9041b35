"""Augmented batches in PyTorch from data on the device, for the benchmark."""

from typing import NamedTuple

import numpy as np
import torch

from .bench_jax import MEAN, STD

PADDING = 4  # of crop_flip


class Resident(NamedTuple):
  """Examples on the device.

  Attributes:
    images: uint8 [n, height, width, channels]; for crop_flip with its padding.
    labels: int64 [n].
    shape: [height, width, channels] without padding.
  """

  images: torch.Tensor
  labels: torch.Tensor
  shape: tuple[int, ...]


def resident(
  images: np.ndarray, labels: np.ndarray, augmentation: str, device: str
) -> Resident:
  """Puts uint8 images [n, height, width, channels] and labels [n] on the device."""
  shape = images.shape[1:]
  if augmentation == "crop_flip":
    images = np.pad(images, [(0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)])
  labels = torch.tensor(labels, dtype=torch.long, device=device)
  return Resident(torch.tensor(images, device=device), labels, shape)


class Batches:
  """Augmented batches for m copies from resident uint8 data, each in its own order."""

  def __init__(
    self,
    data: Resident,
    batch_size: int,
    copies: int,
    augmentation: str,
    channels_last: bool,
  ):
    """`data`: made for this augmentation."""
    self.data, self.batch_size, self.copies = data, batch_size, copies
    self.augmentation, self.channels_last = augmentation, channels_last
    self._order, self._next = None, 0

  def next(self) -> tuple[torch.Tensor, torch.Tensor]:
    """Images float [m, batch, channels, height, width] and labels int [m, batch]."""
    labels = self.data.labels
    n, device = len(labels), labels.device
    if self._order is None or self._next + self.batch_size > n:
      orders = [torch.randperm(n, device=device) for _ in range(self.copies)]
      self._order, self._next = torch.stack(orders), 0
    chosen = self._order[:, self._next : self._next + self.batch_size]
    self._next += self.batch_size
    return self._augmented(chosen), labels[chosen]

  def _augmented(self, chosen):
    height, width, channels = self.data.shape
    if self.augmentation == "crop_flip":
      images = self._crop_flip(chosen)
    else:
      images = self.data.images.index_select(0, chosen.reshape(-1))
    images = images.view(*chosen.shape, height, width, channels)
    images = images.float().sub_(255 * MEAN).div_(255 * STD)
    if self.augmentation == "noise":
      images += torch.randn_like(images)
    images = images.permute(0, 1, 4, 2, 3)
    return images if self.channels_last else images.contiguous()

  def _crop_flip(self, chosen):
    """One gather of pixels, as in jaxsms."""
    (height, width, channels), device = self.data.shape, chosen.device
    per_image = (*chosen.shape, 1, 1)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, *per_image), device=device)
    rows = top + torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)
    mirrored = torch.rand(per_image, device=device) < 0.5
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    padded_height, padded_width = self.data.images.shape[1:3]
    pixels = (chosen[..., None, None] * padded_height + rows) * padded_width + columns
    return self.data.images.view(-1, channels).index_select(0, pixels.reshape(-1))
