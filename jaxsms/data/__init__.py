"""Data sets, the validation split, augmentation."""

from jaxsms.data.augmentation import (
  AUGMENTATIONS,
  evaluation_images,
  normalize,
  training_images,
)
from jaxsms.data.sources import Dataset, load
from jaxsms.data.splits import train_validation_split
from jaxsms.data.tfds_source import load_split

__all__ = [
  "AUGMENTATIONS",
  "Dataset",
  "evaluation_images",
  "load",
  "load_split",
  "normalize",
  "train_validation_split",
  "training_images",
]
