"""What all seeds and methods of a run share: data, network, programs, schedule."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsms import ChannelGroups, data, models, pretrained
from jaxsms.channels.budgets import check_reachable
from jaxsms.data import (
  Dataset,
  StreamedDataset,
  class_counts,
  evaluation_images,
  head_middle_tail,
  long_tail,
  random_resized_crop,
  resize_centre_crop,
  train_validation_split,
  training_images,
)
from jaxsms.data.subsets import Shares
from jaxsms.devices.meshes import place
from jaxsms.metrics import accuracy_among
from jaxsms.names import quantity
from jaxsms.pruning import prunable_flags, removal_count
from jaxsms.training import (
  METRICS,
  Data,
  Engine,
  Model,
  Programs,
  Splits,
  StreamedData,
  init_variables,
  make_programs,
  sgd,
)
from jaxsms.training.cutting import Cut, cut_engine, groups_of, image_multiply_adds
from jaxsms.training.measurements import describe_weights

from ..config.dense_flags import dense_schedule
from ..config.pruning_criteria import pruning, removes_channels
from ..config.run_config import Config
from ..costs.latency_budget import NetworkClock
from .hardware import copies_at_once, mesh_of, network_options
from .ood import corrupted_test_data
from .seed_streams import SHARES
from .shares import (
  check_every_class,
  draw_shares,
  order_for_split,
  training_groups,
)


class Task(NamedTuple):
  """What all seeds and methods of a run share.

  Attributes:
    module: the network.
    engine: its compiled work, on the data.
    variant: `variant(own_masks=True)` or `variant(feedback=True)`: other programs.
    shapes: of the network's parameters and batch statistics.
    image_shape: [height, width, channels].
    steps_per_epoch: training steps.
    pretrain_lrs: float [pretraining steps].
    warmup_steps: how many of them are warmup.
    initial: the trained model to start from; None trains one.
    ood_sources: where each corruption comes from.
    groups: gives the groups of channels of the network.
    shrink: cuts it between phases, see `cut_engine`; None leaves it whole.
    shares: `shares(key, copies)` giving the training examples of each copy, indices in the
      training split; None where every copy has all.
    clock: of cut networks, for --budget=latency; None for other budgets.
  """

  module: Any
  engine: Engine
  variant: Callable[..., Programs]
  shapes: Model
  image_shape: tuple[int, ...]
  steps_per_epoch: int
  pretrain_lrs: np.ndarray
  warmup_steps: int
  initial: Model | None
  ood_sources: dict[str, str]
  groups: Callable[[], ChannelGroups]
  shrink: Callable[[Engine, Model, Any], Cut] | None = None
  shares: Callable[[jax.Array, int], Shares] | None = None
  clock: NetworkClock | None = None


def load(config: Config) -> Dataset | StreamedDataset:
  """The data set, in memory or to be read as it is used.

  Raises:
    ValueError: see `jaxsms.data.load` and `jaxsms.data.open_streamed`.
  """
  if config.stream:
    return data.open_streamed(config.dataset, config.data_dir)
  dataset = data.load(config.dataset, config.data_dir, config.cache_dir)
  return dataset if config.imbalance is None else long_tailed(dataset, config.imbalance)


def long_tailed(dataset: Dataset, ratio: float) -> Dataset:
  """The same data set with a long-tailed training set, see `jaxsms.data.long_tail`.

  Every class has examples to train on after validation examples are held out.
  """
  kept = long_tail(dataset.train_labels, ratio)
  kept = kept[order_for_split(dataset.train_labels[kept])]
  groups = dataset.train_groups
  return dataset._replace(
    train_images=dataset.train_images[kept],
    train_labels=dataset.train_labels[kept],
    train_groups=None if groups is None else groups[kept],
  )


def with_data(config: Config, dataset: Dataset | StreamedDataset) -> Config:
  """Fills in what the data set itself decides: the augmentation."""
  augmentation = config.augmentation or dataset.augmentation
  return dataclasses.replace(config, augmentation=augmentation)


def make_task(config: Config, dataset: Dataset | StreamedDataset) -> Task:
  """Splits the data, puts it on the devices, and makes network and programs.

  Raises:
    ValueError: flags do not fit the data or the devices, or the weights to start from
      not the network.
  """
  if isinstance(dataset, StreamedDataset):
    splits, image_shape = streamed_splits(config, dataset)
  else:
    splits, image_shape = resident_splits(dataset), dataset.train_images.shape[1:]
  module = make_network(config, dataset.num_classes)
  shapes = Model(
    *jax.eval_shape(
      functools.partial(init_variables, module, image_shape=image_shape), jax.random.key(0)
    )
  )
  pairs = zip(jax.tree.leaves(shapes.params), prunable_flags(shapes.params), strict=True)
  if config.imbalance is not None:
    check_every_class(config, splits.train.labels, dataset.num_classes)
  check_data(
    config, dataset.name, splits.train.size, sum(x.size for x, flag in pairs if flag)
  )
  shares = None
  if config.vary == "subset":
    shares = functools.partial(
      draw_shares, config, splits.train.labels, training_groups(dataset)
    )
    for seed in range(config.seed, config.seed + config.seeds):  # before any is trained
      shares(jax.random.fold_in(jax.random.key(seed), SHARES), config.ingredients)
  initial = None
  if config.init is not None:
    initial = Model(**pretrained.load_model(config.init, module, image_shape))
  parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
  variant = functools.cache(
    functools.partial(network_programs, config, dataset, module, parameters)
  )
  groups = functools.cache(functools.partial(groups_of, module, shapes, image_shape))
  check_channels(config, shapes.params, groups)
  clock = None
  if config.budget == "latency":
    clock = NetworkClock(module, shapes, groups, image_shape)
  shrink = functools.partial(
    cut_engine,
    module=module,
    programs_of=lambda cut: network_programs(config, dataset, cut, parameters),
    image_shape=image_shape,
  )
  programs = variant()
  splits = on_devices(splits, programs.mesh_of(config.ingredients))
  corrupted, ood_sources = corrupted_test_data(config, dataset, splits.test)
  splits = splits._replace(
    corrupted=corrupted, also_measured=("train",) if config.train_metrics else ()
  )
  steps_per_epoch = splits.train.size // config.batch_size
  steps = config.epochs * steps_per_epoch
  schedule, warmup_steps = dense_schedule(config, steps_per_epoch)
  pretrain_lrs = np.asarray(schedule(jnp.arange(steps)), np.float32)
  describe = functools.partial(
    describe_weights,
    goal_sparsity=config.goal_sparsity,
    multiply_adds=image_multiply_adds(
      functools.partial(module.apply, train=False), shapes._asdict(), image_shape
    ),
  )
  return Task(
    module=module,
    engine=Engine(programs, splits, describe, chunk_steps(config)),
    variant=variant,
    shapes=shapes,
    image_shape=image_shape,
    steps_per_epoch=steps_per_epoch,
    pretrain_lrs=np.broadcast_to(pretrain_lrs, [steps]),
    warmup_steps=warmup_steps,
    initial=initial,
    ood_sources=ood_sources,
    groups=groups,
    shrink=shrink if config.shrink else None,
    shares=shares,
    clock=clock,
  )


def check_channels(
  config: Config, params: Any, groups: Callable[[], ChannelGroups]
) -> None:
  """Raises ValueError where whole channels cannot make up the goal."""
  if removes_channels(config):
    prune = pruning(config, jax.random.key(0), groups)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
    check_reachable(prune, ones, config.goal_sparsity)


def check_data(config: Config, name: str, train_size: int, prunable_size: int) -> None:
  """Raises ValueError where flags do not fit the data and the network."""
  if removal_count(config.goal_sparsity, prunable_size) == prunable_size:
    raise ValueError(
      f"--goal_sparsity is {config.goal_sparsity}: that removes all {prunable_size} "
      "weights of the network, choose a smaller one"
    )
  if config.batch_size > train_size:
    raise ValueError(
      f"--batch_size is {config.batch_size}, but the training split of {name} "
      f"has {quantity(train_size, 'example')} (after 10 % went to validation): choose "
      "at most that"
    )


def chunk_steps(config: Config) -> int:
  """Most steps in one dispatch: an epoch, where the host need not look more often."""
  if config.chunk_steps is not None:
    return config.chunk_steps
  often = config.stream or jax.default_backend() == "cpu"
  return 50 if often else 2**31


def resident_splits(dataset: Dataset) -> Splits:
  """Training, validation and test images as arrays."""
  train, validation = train_validation_split(len(dataset.train_labels))

  def split(images, labels):
    return Data(np.asarray(images), np.asarray(labels, np.int32))

  return Splits(
    split(dataset.train_images[train], dataset.train_labels[train]),
    split(dataset.train_images[validation], dataset.train_labels[validation]),
    split(dataset.test_images, dataset.test_labels),
  )


def streamed_splits(
  config: Config, dataset: StreamedDataset
) -> tuple[Splits, tuple[int, int, int]]:
  """Training, validation and test images to be decoded; and the shape of one."""
  size = config.image_size
  transforms = (
    functools.partial(random_resized_crop, size=size),
    functools.partial(resize_centre_crop, size=size, resize=round(size * 256 / 224)),
  )
  train, validation = train_validation_split(len(dataset.train))
  splits = Splits(
    StreamedData(dataset.train, train, *transforms),
    StreamedData(dataset.train, validation, *transforms),
    StreamedData(dataset.test, np.arange(len(dataset.test)), *transforms),
  )
  return splits, (size, size, len(dataset.mean))


def on_devices(splits: Splits, mesh: jax.sharding.Mesh | None) -> Splits:
  """Resident splits on every device, once for the whole run."""
  if isinstance(splits.train, StreamedData):
    return splits
  if mesh is None:
    return jax.device_put(splits)
  return place(splits, NamedSharding(mesh, PartitionSpec()))


def make_network(config: Config, num_classes: int) -> Any:
  """The Flax module that the flags describe."""
  options = network_options(config) | config.model_options()
  return models.create(config.model, num_classes, **options)


def network_programs(
  config: Config,
  dataset: Dataset | StreamedDataset,
  module: Any,
  parameters: int,
  **variant: bool,
) -> Programs:
  """The compiled work of a network, of so many parameters, on a data set.

  A variant is an option of its own.
  """
  return make_programs(
    module,
    functools.partial(sgd, momentum=config.momentum, nesterov=config.weight_decay > 0),
    training_images=lambda key, images: training_images(
      config.augmentation, key, images, dataset.mean, dataset.std
    ),
    evaluation_images=lambda images: evaluation_images(images, dataset.mean, dataset.std),
    batch_size=config.batch_size,
    mesh=mesh_of(config),
    at_once=copies_at_once(config, config.ingredients * parameters),
    micro_batches=config.micro_batches,
    split_params=config.split_params,
    metrics=metrics_of(config, dataset),
    **variant,
  )


def metrics_of(config: Config, dataset: Dataset | StreamedDataset) -> dict[str, Any]:
  """What models are measured by; of a long-tailed set its thirds of the classes, too."""
  if config.imbalance is None or isinstance(dataset, StreamedDataset):
    return METRICS
  groups = head_middle_tail(class_counts(dataset.train_labels, dataset.num_classes))
  return METRICS | {
    f"{name}_accuracy": functools.partial(accuracy_among, classes=classes)
    for name, classes in groups.items()
  }
