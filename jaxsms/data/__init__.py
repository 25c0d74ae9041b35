"""Data sets, the validation split, augmentation, corruptions."""

from jaxsms.data.augmentation import (
  AUGMENTATIONS,
  evaluation_images,
  normalize,
  training_images,
)
from jaxsms.data.corruptions import CORRUPTIONS, corrupt, corrupted, corruptions_for
from jaxsms.data.sources import Dataset, load
from jaxsms.data.splits import train_validation_split
from jaxsms.data.tfds_source import corrupted_sets, load_split

__all__ = [
  "AUGMENTATIONS",
  "CORRUPTIONS",
  "Dataset",
  "corrupt",
  "corrupted",
  "corrupted_sets",
  "corruptions_for",
  "evaluation_images",
  "load",
  "load_split",
  "normalize",
  "train_validation_split",
  "training_images",
]
