"""Training on the host's side: chunk after chunk of the jitted program."""

from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsms.devices.ingredients import first_ingredients, pad_ingredients
from jaxsms.devices.meshes import INGREDIENT_AXIS, fetch, params_sharding, place, release
from jaxsms.phases import finite_models
from jaxsms.training.averaging import begin_average
from jaxsms.training.engine import Engine
from jaxsms.training.memory import explain_out_of_memory
from jaxsms.training.programs import Programs
from jaxsms.training.state import Data, Ingredients, TrainState
from jaxsms.training.streamed import StreamedData, training_batches
from jaxsms.trees import PyTree, number_of_models

Remask = Callable[[int, TrainState], tuple[TrainState, PyTree]]


class Chunk(NamedTuple):
  """Some steps of training, for a progress bar or a log.

  Attributes:
    copies: how many train at once.
    step: steps taken by the longest copy so far.
    steps: steps that it will take.
    taken: steps in this chunk.
    epoch: the epoch that the chunk is in, from 1.
    loss: float [m], training loss over the chunk; NaN for a copy that took no step.
    accuracy: float [m], training accuracy over the chunk; likewise. Both may still be
      on their way from the device: `fetched` waits for them.
    learning_rate: float [m], of the last step.
    phase: that it belongs to; 0 in dense training.
  """

  copies: int
  step: int
  steps: int
  taken: int
  epoch: int
  loss: np.ndarray | jax.Array
  accuracy: np.ndarray | jax.Array
  learning_rate: np.ndarray
  phase: int = 0


def train_copies(
  engine: Engine,
  masks: PyTree | Remask,
  key: jax.Array,
  state: TrainState,
  ingredients: Ingredients,
  learning_rates: np.ndarray,
  *,
  phase: int = 0,
) -> Generator[Chunk | TrainState, None, TrainState]:
  """Trains m copies from a state to their last step.

  A copy whose loss or parameters become NaN or infinite stays NaN from then on. The others
  are not affected.

  Args:
    engine: the network and its data.
    masks: shared by all copies, or leaves [m, ...] where the programs were made for masks
      of their own; all True trains a dense model. Or a function that makes new ones for
      each chunk, see `train_chunks`.
    key: of the phase, the same for all copies.
    state: of all copies, leaves [m, ...], as `Engine.start` or an earlier training gives
      it; donated.
    ingredients: of the copies, each [m].
    learning_rates: float [m, max(steps)], from step 0 on.
    phase: number that the chunks are marked with.

  Yields:
    Each chunk when it is finished, mostly with the next one under way; and the state, where
    `engine.wants_state` says so and all chunks up to it have been given. It is donated to
    the next chunk: take a copy.

  Returns:
    The last state. `last_state` runs a training up to it.

  Raises:
    FloatingPointError: every copy has become NaN or infinite.
    MemoryError: the device is too small for so many copies at once.
  """
  programs, data = engine.programs, engine.splits.train
  m, steps = number_of_models(ingredients, "ingredients"), ingredients["steps"]
  length = chunk_length(engine.steps_per_epoch, engine.chunk_steps)
  like = masks  # in shapes: of one copy
  if callable(masks):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], bool), state.params)
  state = begin_average(state, ingredients)
  running = None  # the host looks at a chunk once the next one is on the device
  with explain_out_of_memory(programs, data, like, key, state, length):
    for latest, chunk in train_chunks(
      programs, data, masks, key, state, ingredients, learning_rates, engine.chunk_steps
    ):
      state, chunk = latest, chunk._replace(phase=phase)
      if running is not None:
        yield fetched(running, steps)
      running = chunk
      wanted = engine.wants_state()
      # It is ready where programs are waited for. Several processes must not differ here.
      if wanted or (jax.process_count() == 1 and cast(Any, chunk.loss).is_ready()):
        yield fetched(running, steps)
        running = None
      if wanted:
        yield state
    if running is not None:
      yield fetched(running, steps)
  if not np.any(fetch(finite_models((state.params, state.batch_stats)))):
    raise FloatingPointError(
      f"{_copies(m)} has parameters that are not finite: lower the learning rate"
    )
  return state


def last_state(training: Generator[Any, None, TrainState]) -> TrainState:
  """Runs a training to its end and drops what it yields.

  Args:
    training: as `train_copies` gives it.

  Returns:
    The last state.

  Example:
    >>> def training():  # as train_copies: chunks on the way, at the end the state
    ...   yield "a chunk"
    ...   return "the state"
    >>> jaxsms.training.last_state(training())
    'the state'
  """
  while True:
    try:
      next(training)
    except StopIteration as end:
      return end.value


def map_events(
  events: Generator[Any, None, Any], function: Callable[[Any], Any]
) -> Generator[Any, None, Any]:
  """Yields a function of each event, and returns what the events return."""
  while True:
    try:
      event = next(events)
    except StopIteration as end:
      return end.value
    yield function(event)


def fetched(chunk: Chunk, steps: np.ndarray | jax.Array) -> Chunk:
  """Waits for a chunk's loss and accuracy.

  Args:
    chunk: from `train_chunks`.
    steps: int [m], how many steps each copy takes in all.

  Returns:
    The chunk with both on the host.

  Raises:
    FloatingPointError: the loss of every copy is NaN or infinite. It is not raised where
      some copies were done before, as those may be finite.

  Example:
    >>> loss, accuracy = jnp.array([0.25, jnp.nan]), jnp.array([0.75, 0.0])
    >>> chunk = jaxsms.training.Chunk(2, 50, 100, 50, 1, loss, accuracy, np.ones(2))
    >>> jaxsms.training.fetched(chunk, steps=np.array([100, 100])).loss.tolist()
    [0.25, nan]
  """
  m = chunk.copies
  loss, accuracy = (x[:m] for x in fetch((chunk.loss, chunk.accuracy)))
  all_train = np.all(np.asarray(steps) > chunk.step - chunk.taken)
  if all_train and not np.isfinite(loss).any():
    raise FloatingPointError(
      f"the loss of {_copies(m)} is not finite after step {chunk.step}: lower the learning "
      "rate"
    )
  return chunk._replace(loss=loss, accuracy=accuracy)


def train_chunks(
  programs: Programs,
  data: Data | StreamedData,
  masks: PyTree | Remask,
  key: jax.Array,
  state: TrainState,
  ingredients: Ingredients,
  learning_rates: np.ndarray,
  chunk_steps: int = 50,
) -> Iterator[tuple[TrainState, Chunk]]:
  """Trains from a state, and gives it back after every chunk.

  To go on later, copy a state and give it to another call with the same other arguments.
  The copy is needed because the state itself is donated to the next chunk.

  Args:
    programs: of this network and data set.
    data: the training split.
    masks: see `train_copies`. A function `masks(step, state)` is called at the start of
      each chunk; it gives a state and masks.
    key: of the phase, the same for all copies.
    state: of all m copies, leaves [m, ...], as `start` or an earlier chunk gives it.
    ingredients: of the copies, each [m].
    learning_rates: float [m, max(steps)], from the first step of the phase on.
    chunk_steps: most steps of a chunk; an epoch is cut into equal chunks.

  Yields:
    The state of the m copies and the chunk, before either is finished: `fetched` waits for
    a chunk and raises where it failed.

  Raises:
    ValueError: state or learning rates are of another number of copies.
  """
  m = number_of_models(ingredients, "ingredients")
  if number_of_models((state, learning_rates), "copies") != m:
    raise ValueError(
      f"state and learning_rates are not of the {m} copies that ingredients has: give "
      "leaves [m, ...], as start makes them"
    )
  data, masks, key, state, ingredients, learning_rates = _place(
    programs, data, masks, key, state, ingredients, np.asarray(learning_rates, np.float32)
  )
  steps = int(np.max(ingredients["steps"]))
  steps_per_epoch = data.size // programs.batch_size
  length = chunk_length(steps_per_epoch, chunk_steps)
  done = int(np.max(fetch(state.step)))
  batches = None
  if isinstance(data, StreamedData):
    batches = training_batches(programs, data, key, ingredients, length, done)
  remask = masks if callable(masks) else None
  while done < steps:
    if remask is not None:
      state, masks = remask(done, state)
    taken = min(length, steps_per_epoch - done % steps_per_epoch, steps - done)
    rates = learning_rates[:, done : done + taken]
    rates = np.pad(rates, [(0, 0), (0, length - taken)])
    of_copies = (masks, key, state, ingredients, rates)
    if batches is None:
      state, metrics = programs.train(data, *of_copies)
    else:
      images, labels, *_ = next(batches)
      state, metrics = programs.train_batches(images, labels, np.int32(taken), *of_copies)
    chunk = Chunk(
      copies=m,
      step=done + taken,
      steps=steps,
      taken=taken,
      epoch=done // steps_per_epoch + 1,
      loss=metrics["loss"],
      accuracy=metrics["accuracy"],
      learning_rate=rates[:m, taken - 1],
    )
    done += taken
    yield first_ingredients(state, m) if len(rates) > m else state, chunk


def _place(programs, data, masks, key, state, ingredients, learning_rates):
  """Fills the copies up to the number of devices, and puts all where it is used.

  A copy that fills up takes no step. Arguments that were on the mesh before stay there.
  """
  ingredients = jax.tree.map(np.asarray, ingredients)
  mesh = programs.mesh_of(number_of_models(ingredients))
  if mesh is None:
    return data, masks, key, state, ingredients, learning_rates
  devices = mesh.shape[INGREDIENT_AXIS]
  given = state
  state, valid = pad_ingredients(state, devices)
  (ingredients, learning_rates), _ = pad_ingredients((ingredients, learning_rates), devices)
  ingredients = {**ingredients, "steps": np.where(valid, ingredients["steps"], 0)}
  if programs.own_masks:
    masks, _ = pad_ingredients(masks, devices)

  def sharding(tree, stacked):
    if not programs.split_params:
      return NamedSharding(mesh, PartitionSpec(*[INGREDIENT_AXIS][:stacked]))
    return jax.tree.map(lambda x: params_sharding(mesh, jnp.shape(x), stacked), tree)

  shared = NamedSharding(mesh, PartitionSpec())
  data = data if isinstance(data, StreamedData) else place(data, shared)
  key = place(key, shared)
  if not callable(masks):
    masks = place(masks, sharding(masks, programs.own_masks))
  placed = place(state, sharding(state, True))
  release(given, placed)
  return data, masks, key, placed, ingredients, learning_rates


def _copies(m: int) -> str:
  return f"each of {m} copies" if m > 1 else "the model"


def chunk_length(steps_per_epoch: int, most: int) -> int:
  """The length of the equal chunks of at most `most` steps that make up an epoch."""
  return -(-steps_per_epoch // -(-steps_per_epoch // most))
