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
from jaxsms.data.long_tail import (
  class_counts,
  head_middle_tail,
  long_tail,
  profile_counts,
)
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
from jaxsms.data.subsets import (
  Shares,
  balanced_shares,
  dirichlet_shares,
  group_shares,
  imbalanced_shares,
  oversampled_shares,
  random_shares,
)
from jaxsms.data.tfds_corrupted import corrupted_folders, corrupted_sets
from jaxsms.data.tfds_source import TfdsExamples, load_split

__all__ = [
  "AUGMENTATIONS",
  "CORRUPTIONS",
  "ArrayExamples",
  "Batches",
  "Dataset",
  "EvaluationBatch",
  "Shares",
  "Stream",
  "StreamState",
  "StreamedDataset",
  "TfdsExamples",
  "balanced_shares",
  "base_name",
  "class_counts",
  "corrupt",
  "corrupted",
  "corrupted_folders",
  "corrupted_sets",
  "corruptions_for",
  "dirichlet_shares",
  "evaluation_batches",
  "evaluation_images",
  "group_shares",
  "head_middle_tail",
  "imbalanced_shares",
  "load",
  "load_split",
  "long_tail",
  "normalize",
  "open_streamed",
  "open_streamed_test",
  "oversampled_shares",
  "profile_counts",
  "random_resized_crop",
  "random_shares",
  "resize_centre_crop",
  "stream",
  "train_validation_split",
  "training_images",
]
