"""Data sets, resident or streamed, the validation split, augmentation, corruptions.

`AUGMENTATIONS`: functions of (key, images, mean, std) that give training images, by name.
`CORRUPTIONS`: functions of (key, image, constants), and the constants of severities 1 to 5,
by name.
"""

from jaxsms.data.augmentation import (
  AUGMENTATIONS,
  evaluation_images,
  normalize,
  training_images,
)
from jaxsms.data.corruptions import CORRUPTIONS, corrupt, corrupted, corruptions_for
from jaxsms.data.crops import random_resized_crop, resize_centre_crop
from jaxsms.data.evaluation import EvaluationBatch, evaluation_batches
from jaxsms.data.examples import ArrayExamples
from jaxsms.data.sources import (
  Dataset,
  StreamedDataset,
  base_name,
  load,
  open_streamed,
  open_streamed_test,
)
from jaxsms.data.splits import train_validation_split
from jaxsms.data.streaming import Batches, Stream, StreamState, stream
from jaxsms.data.tfds_corrupted import corrupted_folders, corrupted_sets
from jaxsms.data.tfds_source import TfdsExamples, load_split

__all__ = [
  "AUGMENTATIONS",
  "CORRUPTIONS",
  "ArrayExamples",
  "Batches",
  "Dataset",
  "EvaluationBatch",
  "Stream",
  "StreamState",
  "StreamedDataset",
  "TfdsExamples",
  "base_name",
  "corrupt",
  "corrupted",
  "corrupted_folders",
  "corrupted_sets",
  "corruptions_for",
  "evaluation_batches",
  "evaluation_images",
  "load",
  "load_split",
  "normalize",
  "open_streamed",
  "open_streamed_test",
  "random_resized_crop",
  "resize_centre_crop",
  "stream",
  "train_validation_split",
  "training_images",
]
