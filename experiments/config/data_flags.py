"""Flags of the data and the network."""

import dataclasses
from typing import Any

from jaxsms import models
from jaxsms.data import AUGMENTATIONS
from jaxsms.data.long_tail import check_ratio

from .fields import (
  at_least,
  by_dataset,
  define_flags,
  flag,
  one_of,
  whole_numbers,
)

# Options of `jaxsms.models.create` that some networks have.
MODEL_OPTIONS = ("width", "widening", "stem")


def networks_with(option: str) -> list[str]:
  """The names of the networks that have an option."""
  return [name for name in models.MODELS if hasattr(models.create(name, 2), option)]


def _of_mlp(digits, other):
  """A `fill` that leaves other networks without."""
  fill = by_dataset(digits, other)
  return lambda values: fill(values) if values["model"] == "mlp" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags:
  """The data and the network. Defaults were chosen on validation data: BUILD_NOTES.md."""

  dataset: str = flag(
    "'digits' (8x8 images that come with scikit-learn), the name of a TFDS image "
    "classification set such as 'cifar10', or the path of an .npz with train_images uint8 "
    "[n, height, width, channels], train_labels int [n], test_images and test_labels.",
    default="digits",
  )
  data_dir: str | None = flag("Where TFDS finds prepared data. Default: TFDS's own folder.")
  cache_dir: str | None = flag(
    "Where decoded TFDS images are kept. Default: ~/.cache/jaxsms."
  )
  augmentation: str | None = flag(
    "How training images are augmented: none, crop_flip (padded by 4 pixels), "
    "crop_flip_rotate (up to 15 degrees), noise (Gaussian), shift_noise (by a pixel). "
    "Default: set by the data set, noise for digits.",
    one_of("augmentation", AUGMENTATIONS),
  )
  imbalance: float | None = flag(
    "Makes a long-tailed training set of the data, before validation images are held "
    "out. Class 0 keeps this many times the examples of the last class; the classes "
    "between them decay exponentially. Test images stay as they are. Accuracy on head, "
    "middle and tail classes is measured, too.",
    lambda name, value: check_ratio(value, f"--{name}"),
  )
  stream: bool = flag(
    "Decodes training images while the device trains, with random resized crops. For "
    "data that do not fit on the device. Default: on for imagenet2012.",
    fill=lambda values: values["dataset"].startswith("imagenet2012"),
  )
  image_size: int = flag("Height and width of streamed images.", at_least(1), default=224)
  model: str = flag(
    f"Network: {', '.join(models.MODELS)}. Default: mlp for digits, else resnet20.",
    one_of("model", models.MODELS),
    fill=by_dataset("mlp", "resnet20"),
  )
  hidden: tuple[int, ...] | None = flag(
    "Widths of the MLP's hidden layers. Default: 256,256 for digits, else 512.",
    fill=_of_mlp((256, 256), (512,)),
    parse=whole_numbers("256,256"),
  )
  dropout: float | None = flag(
    "Dropout rate of the mlp (default: 0 for digits, else 0.2), of wide residual networks "
    "(0.3) and of the ViT (0).",
    bounds={"lower_bound": 0.0, "upper_bound": 0.99},
    fill=_of_mlp(0.0, 0.2),
  )
  width: int | None = flag(
    "Channels of the first stage of a residual network or VGG; for the ViT, the "
    "embedding width. Default: the network's own.",
    at_least(1),
  )
  widening: int | None = flag(
    "Widening factor of a wide residual network. Default: the factor in its name.",
    bounds={"lower_bound": 1},
  )
  stem: str | None = flag(
    "First layers of resnet18 and resnet50: cifar (3x3, for small images) or imagenet (7x7 "
    "and pooling). Default: cifar for resnet18, imagenet for resnet50.",
    one_of("stem", ("cifar", "imagenet")),
  )
  init: str | None = flag(
    "Trained weights to start from instead of training densely: a folder that a run or "
    "jaxsms.checkpoint wrote, .safetensors, .npz, or a PyTorch file. Retraining "
    "schedules use the learning rates that dense training with --epochs etc. would "
    "have had."
  )

  @property
  def in_memory(self) -> bool:
    """Whether the data are certain to be no TFDS set."""
    return self.dataset == "digits" or self.dataset.lower().endswith(".npz")

  def model_options(self) -> dict[str, Any]:
    """Options of `jaxsms.models.create`."""
    options = {name: getattr(self, name) for name in (*MODEL_OPTIONS, "hidden", "dropout")}
    return {name: value for name, value in options.items() if value is not None}


define_flags(DataFlags)


def check(config: DataFlags) -> None:
  """Raises ValueError where data and network do not fit one another."""
  if config.model != "mlp" and config.hidden is not None:
    raise ValueError(
      f"--hidden belongs to the mlp: leave it out with --model={config.model}"
    )
  having = networks_with("dropout")
  if config.dropout is not None and config.model not in having:
    raise ValueError(
      f"--dropout belongs to {', '.join(having)}: leave it out with --model={config.model}"
    )
  for name in MODEL_OPTIONS:
    having = networks_with(name)
    if getattr(config, name) is not None and config.model not in having:
      raise ValueError(
        f"--{name} belongs to {', '.join(having)}: leave it out with {config.model}"
      )
  if config.stream and config.imbalance is not None:
    raise ValueError(
      f"--imbalance is {config.imbalance:g}: it chooses among images in memory, and these "
      "are streamed, leave it out"
    )
  if config.stream and config.in_memory:
    raise ValueError(f"--stream reads TFDS data sets: {config.dataset} fits on the device")
  if config.stream and config.augmentation not in (None, "none"):
    raise ValueError(
      f"--augmentation is {config.augmentation}: streamed images are cropped and flipped "
      "on the host, leave it out"
    )
