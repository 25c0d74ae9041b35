"""The shares of the training data that the copies of a run have."""

import jax
import numpy as np

from jaxsms.data import (
  Dataset,
  StreamedDataset,
  balanced_shares,
  class_counts,
  dirichlet_shares,
  group_shares,
  imbalanced_shares,
  oversampled_shares,
  random_shares,
  train_validation_split,
)
from jaxsms.data.subsets import Shares, check_sizes

from ..config.run_config import Config


def draw_shares(
  config: Config,
  labels: np.ndarray,
  groups: np.ndarray | None,
  key: jax.Array,
  copies: int,
) -> Shares:
  """The training examples of each copy.

  Args:
    config: of the run.
    labels: int [n], of the training split.
    groups: int [n], of its examples; None where the data have none.
    key: the stream `SHARES` of a seed.
    copies: m.

  Raises:
    ValueError: the data have no groups, or a share would be too small.
  """
  labels, batch_size = np.asarray(labels), config.batch_size
  if config.subsets == "groups":
    if groups is None:
      raise ValueError(
        f"--subsets=groups needs train_groups, int [n], in the .npz of --dataset, and "
        f"{config.dataset} has none: add it, or give other --subsets"
      )
    shares = group_shares(groups, copies)
  elif config.subsets == "dirichlet":
    shares = dirichlet_shares(key, labels, copies, config.subset_alpha, batch_size)
  elif config.subsets == "oversampled":
    shares = oversampled_shares(key, labels, copies)
  elif config.subsets == "imbalance":
    shares = imbalanced_shares(key, labels, config.values[:copies], config.subset_fraction)
  else:
    draw = {"random": random_shares, "balanced": balanced_shares}[config.subsets]
    shares = draw(key, labels, copies, config.subset_fraction)
  check_sizes(shares, batch_size)
  return shares


def training_groups(dataset: Dataset | StreamedDataset) -> np.ndarray | None:
  """The groups of the training split, after validation examples are held out."""
  groups = getattr(dataset, "train_groups", None)
  return None if groups is None else groups[train_validation_split(len(groups))[0]]


def order_for_split(labels: np.ndarray) -> np.ndarray:
  """An order of examples in which every class is in the training split.

  A rare class may have all its examples among those held out for validation. The first of
  them changes places with a training example of the most frequent class.

  Args:
    labels: int [n].

  Returns:
    int [n]; 0 to n - 1 where nothing changes places.
  """
  order = np.arange(len(labels))
  train, validation = train_validation_split(len(labels))
  for absent in np.setdiff1d(labels, labels[train]):
    trained = labels[order[train]]
    given = train[np.argmax(trained == class_counts(trained).argmax())]
    taken = validation[np.argmax(labels[order[validation]] == absent)]
    order[[given, taken]] = order[[taken, given]]
  return order


def check_every_class(config: Config, labels: np.ndarray, classes: int) -> None:
  """Raises ValueError where the training split lacks a class."""
  absent = np.flatnonzero(class_counts(labels, classes) == 0)
  if len(absent):
    raise ValueError(
      f"--imbalance is {config.imbalance:g}: all examples of class {absent[0]} went to "
      "validation and none is left to train on, give less"
    )
