"""One seed of a run: dense training, Sparse Model Soups, and what they compare with."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.hardware import Hardware, copies_at_once, mesh_of, network_options
from experiments.settings import Settings, check_data, dense_schedule
from experiments.work import Work
from jaxsms import data, models
from jaxsms.data import (
  Dataset,
  StreamedDataset,
  evaluation_images,
  random_resized_crop,
  resize_centre_crop,
  train_validation_split,
  training_images,
)
from jaxsms.ingredients import ingredient
from jaxsms.meshes import place
from jaxsms.pruning import magnitude_masks, prunable_flags
from jaxsms.training import (
  Chunk,
  Data,
  Programs,
  Saving,
  StreamedData,
  init_variables,
  make_programs,
  retrain_learning_rates,
  sgd,
  train_copies,
)
from jaxsms.training.phases import Model, Phases, Splits, measure, one_model, run_phases

# Independent streams of a seed's key.
INIT, PRETRAIN, RETRAIN = 0, 1, 2

Record = dict[str, Any]


class Observer(NamedTuple):
  """What a run tells and asks while it goes on.

  Attributes:
    chunk: called with method, phase (0 in dense training) and each chunk of training.
    phase: called with method and the record of each phase; for dense training, once,
      with its metrics.
    soup: called with the last soup as soon as there is one: `params`, `batch_stats`,
      `masks`.
    due: whether the training under way is to be saved, asked after every chunk.
    save: called with a seed's work when it is, and after each phase.
  """

  chunk: Callable[[str, int, Chunk], None]
  phase: Callable[[str, Record], None]
  soup: Callable[[dict[str, Any]], None]
  due: Callable[[], bool] = lambda: False
  save: Callable[[Work], None] = lambda work: None


class Task(NamedTuple):
  """What all seeds and methods of a run share.

  Attributes:
    module: the network.
    programs: its compiled work.
    splits: the data on the device.
    shapes: of the network's parameters and batch statistics.
    image_shape: [height, width, channels].
    steps_per_epoch: training steps.
    pretrain_lrs: float [pretraining steps].
    warmup_steps: how many of them are warmup.
  """

  module: Any
  programs: Programs
  splits: Splits
  shapes: Model
  image_shape: tuple[int, ...]
  steps_per_epoch: int
  pretrain_lrs: np.ndarray
  warmup_steps: int


def load(settings: Settings) -> Dataset | StreamedDataset:
  """The data set, in memory or to be read as it is used.

  Raises:
    ValueError: see `jaxsms.data.load` and `jaxsms.data.open_streamed`.
  """
  if settings.stream:
    return data.open_streamed(settings.dataset, settings.data_dir)
  return data.load(settings.dataset, settings.data_dir, settings.cache_dir)


def make_task(
  settings: Settings, chosen: Hardware, dataset: Dataset | StreamedDataset
) -> Task:
  """Splits the data, puts it on the devices, and makes network and programs.

  Raises:
    ValueError: settings do not fit the data or the devices.
  """
  if isinstance(dataset, StreamedDataset):
    splits, image_shape = streamed_splits(settings, dataset)
  else:
    splits, image_shape = resident_splits(dataset), dataset.train_images.shape[1:]
  module = make_network(settings, chosen, dataset.num_classes)
  shapes = Model(
    *jax.eval_shape(
      functools.partial(init_variables, module, image_shape=image_shape), jax.random.key(0)
    )
  )
  pairs = zip(jax.tree.leaves(shapes.params), prunable_flags(shapes.params), strict=True)
  check_data(
    settings, dataset.name, splits.train.size, sum(x.size for x, flag in pairs if flag)
  )
  parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
  programs = network_programs(settings, chosen, dataset, module, parameters)
  splits = on_devices(splits, programs.mesh_of(settings.ingredients))
  steps_per_epoch = splits.train.size // settings.batch_size
  steps = settings.epochs * steps_per_epoch
  schedule, warmup_steps = dense_schedule(settings, steps_per_epoch)
  pretrain_lrs = np.asarray(schedule(jnp.arange(steps)), np.float32)
  return Task(
    module,
    programs,
    splits,
    shapes,
    image_shape,
    steps_per_epoch,
    np.broadcast_to(pretrain_lrs, [steps]),
    warmup_steps,
  )


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
  settings: Settings, dataset: StreamedDataset
) -> tuple[Splits, tuple[int, int, int]]:
  """Training, validation and test images to be decoded; and the shape of one."""
  size = settings.image_size
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


def make_network(settings: Settings, chosen: Hardware, num_classes: int) -> Any:
  """The Flax module that the flags describe."""
  options = network_options(chosen, settings.model)
  if settings.model == "mlp":
    options |= {"hidden": settings.hidden, "dropout": settings.dropout}
  return models.create(settings.model, num_classes, **options)


def network_programs(
  settings: Settings,
  chosen: Hardware,
  dataset: Dataset | StreamedDataset,
  module: Any,
  parameters: int,
) -> Programs:
  """The compiled work of a network, of so many parameters, on a data set."""
  return make_programs(
    module,
    functools.partial(sgd, momentum=settings.momentum, nesterov=settings.weight_decay > 0),
    training_images=lambda key, images: training_images(
      settings.augmentation, key, images, dataset.mean, dataset.std
    ),
    evaluation_images=lambda images: evaluation_images(images, dataset.mean, dataset.std),
    batch_size=settings.batch_size,
    mesh=mesh_of(chosen, settings.model, settings.batch_size),
    at_once=copies_at_once(chosen, settings.model, settings.ingredients * parameters),
    skip_inactive=jax.default_backend() == "cpu",
    micro_batches=chosen.micro_batches,
    split_params=chosen.split_params,
  )


def chunk_steps(settings: Settings) -> int:
  """Most steps in one dispatch: an epoch, where the host need not look more often."""
  if settings.chunk_steps is not None:
    return settings.chunk_steps
  often = settings.stream or jax.default_backend() == "cpu"
  return 50 if often else 2**31


def planned_steps(settings: Settings, steps_per_epoch: int) -> dict[int, int]:
  """Steps of a whole run, by the number of copies that a step trains."""
  m, retrain = settings.ingredients, settings.phases * settings.retrain_epochs
  epochs = {1: settings.epochs}
  for copies, length in (
    (m, retrain),
    (1, retrain * ("imp" in settings.baselines)),
    (1, retrain * m * ("imp_mx" in settings.baselines)),
  ):
    epochs[copies] = epochs.get(copies, 0) + length
  return {k: settings.seeds * steps_per_epoch * n for k, n in epochs.items()}


def saving(work: Work, observer: Observer) -> Saving:
  """Hands a seed's work to the observer, with the state of the training under way."""

  def save_state(state):
    observer.save(dataclasses.replace(work, state=state))

  def save_phases(done):
    work.model, work.masks, work.phases[work.method] = done
    observer.save(work)

  return Saving(observer.due, save_state, save_phases)


def pretrain(
  settings: Settings, task: Task, key: jax.Array, work: Work, observer: Observer
) -> None:
  """Trains the dense model of `work`, and measures it."""
  params, batch_stats = init_variables(
    task.module, jax.random.fold_in(key, INIT), task.image_shape
  )
  everything = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
  trained = train_copies(
    task.programs,
    task.splits.train,
    everything,
    jax.random.fold_in(key, PRETRAIN),
    params,
    batch_stats,
    ingredients(1, settings.weight_decay, len(task.pretrain_lrs)),
    task.pretrain_lrs[None],
    chunk_steps=chunk_steps(settings),
    on_chunk=lambda chunk: observer.chunk("dense", 0, chunk),
    state=work.state,
    saving=saving(work, observer),
  )
  work.dense, work.state = ingredient(Model(*trained), 0), None
  (work.metrics,), _ = measure(task.programs, task.splits, one_model(work.dense))
  observer.phase("dense", work.metrics)
  observer.save(work)


def ingredients(m: int, weight_decay: float, steps: int) -> dict[str, np.ndarray]:
  """Ingredients that differ in their seed."""
  return {
    "seed": np.arange(m, dtype=np.int32),
    "weight_decay": np.full([m], weight_decay, np.float32),
    "steps": np.full([m], steps, np.int32),
  }


def prune_and_retrain(
  settings: Settings,
  task: Task,
  key: jax.Array,
  work: Work,
  *,
  method: str,
  m: int,
  epochs: int,
  observer: Observer,
) -> Phases:
  """All phases of one method: m copies of so many epochs each; see `run_phases`.

  What `work` holds of them already is not done again.
  """
  if work.method != method:
    work.method, work.model, work.masks = method, None, None
  done = None
  if work.model is not None:
    done = Phases(work.model, work.masks, work.phases[method])
  state, work.state = work.state, None
  steps = epochs * task.steps_per_epoch

  def plan(record):
    varied = ingredients(m, settings.weight_decay, steps)
    if not steps:
      return varied, np.zeros([m, 0], np.float32)
    adaptive = {}
    if settings.retrain_schedule == "ALLR":
      adaptive = {k: record[k] for k in ("relative_norm_drop", "pruned_fraction")}
    lrs = retrain_learning_rates(
      settings.retrain_schedule,
      task.pretrain_lrs,
      varied["steps"],
      pretrain_warmup_steps=task.warmup_steps,
      **adaptive,
    )
    return varied, lrs

  return run_phases(
    task.programs,
    task.splits,
    jax.random.fold_in(key, RETRAIN),
    work.dense,
    plan,
    goal_sparsity=settings.goal_sparsity,
    phases=settings.phases,
    prune=functools.partial(magnitude_masks, scope=settings.scope),
    greedy=settings.merge == "greedy",
    chunk_steps=chunk_steps(settings),
    on_chunk=lambda phase, chunk: observer.chunk(method, phase, chunk),
    on_phase=lambda record: observer.phase(method, record),
    done=done,
    state=state,
    saving=saving(work, observer),
  )


def run_seed(settings: Settings, task: Task, work: Work, observer: Observer) -> Record:
  """Everything that one seed decides.

  Args:
    settings: of the run.
    task: shared by all seeds.
    work: the seed, and what is done of it already; grows until all is done.
    observer: told of everything on the way.

  Returns:
    The entry of results.json.
  """
  key = jax.random.key(work.seed)
  if work.dense is None:
    pretrain(settings, task, key, work, observer)
  m, epochs = settings.ingredients, settings.retrain_epochs
  run = functools.partial(prune_and_retrain, settings, task, key, work, observer=observer)

  def finished(method):
    return len(work.phases.get(method, [])) == settings.phases

  if not finished("sms") or work.method == "sms":
    try:
      run(method="sms", m=m, epochs=epochs)
    except FloatingPointError:  # the soup of the phase before is still good
      give_soup(work, observer)
      raise
    give_soup(work, observer)
  lengths = {"imp": epochs, "imp_mx": m * epochs}
  for method in settings.baselines:
    if not finished(method):
      run(method=method, m=1, epochs=lengths[method])
  phases = [dict(record) for record in work.phases["sms"]]
  for method in settings.baselines:
    for phase, record in zip(phases, work.phases[method], strict=True):
      phase[method] = record["soup"]
  return {"seed": work.seed, "dense": work.metrics, "phases": phases}


def give_soup(work: Work, observer: Observer) -> None:
  """Hands the last soup to the observer, if there is one."""
  if work.model is not None:
    params, batch_stats = work.model
    observer.soup({"params": params, "batch_stats": batch_stats, "masks": work.masks})
