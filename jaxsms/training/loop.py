"""Training on the host's side: chunk after chunk of the jitted program."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsms.ingredients import first_ingredients, pad_ingredients
from jaxsms.meshes import INGREDIENT_AXIS, fetch, params_sharding, place
from jaxsms.sms import finite_models
from jaxsms.training.memory import says_what_fits
from jaxsms.training.programs import Programs
from jaxsms.training.state import Data, TrainState, start
from jaxsms.training.streamed import StreamedData, training_batches
from jaxsms.trees import PyTree, number_of_models

Remask = Callable[[int, TrainState], tuple[TrainState, PyTree]]


class Chunk(NamedTuple):
  """What a progress bar or a log wants to know after each chunk.

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
  """

  copies: int
  step: int
  steps: int
  taken: int
  epoch: int
  loss: np.ndarray | jax.Array
  accuracy: np.ndarray | jax.Array
  learning_rate: np.ndarray


class Saving(NamedTuple):
  """What lets a training go on after a break.

  Attributes:
    due: whether the state is wanted, asked after every chunk. Of several processes, all
      must say the same.
    state: called with it, when all chunks up to it have been looked at. It is donated to
      the next chunk: take a copy.
    phase: called by `run_phases` with all phases so far, after each one.
  """

  due: Callable[[], bool]
  state: Callable[[TrainState], None]
  phase: Callable[[Any], None] = lambda phases: None


def train_copies(
  programs: Programs,
  data: Data | StreamedData,
  masks: PyTree,
  key: jax.Array,
  params: PyTree,
  batch_stats: PyTree,
  ingredients: dict[str, np.ndarray],
  learning_rates: np.ndarray,
  *,
  chunk_steps: int = 50,
  on_chunk: Callable[[Chunk], None] | None = None,
  state: TrainState | None = None,
  saving: Saving | None = None,
  on_state: Callable[[TrainState, Chunk], None] | None = None,
) -> tuple[PyTree, PyTree]:
  """Trains one copy of a model per ingredient, from the first step to the last.

  A copy whose loss or parameters become NaN or infinite stays NaN from then on; the others
  do not notice.

  Args:
    programs: of this network and data set.
    data: the training split.
    masks: shared by all copies, or leaves [m, ...] where the programs were made for
      masks of their own; all True trains a dense model.
    key: of the phase, the same for all copies.
    params: the model that every copy starts from, leaves [...].
    batch_stats: its batch statistics.
    ingredients: `seed` int [m], `weight_decay` float [m], `steps` int [m].
    learning_rates: float [m, max(steps)].
    chunk_steps: most steps between two looks of the host; an epoch is cut into equal
      chunks of at most that many.
    on_chunk: called after each chunk.
    state: of the m copies, as `saving` got it from such a training, to go on from there;
      None begins at step 0.
    saving: asked after each chunk whether it wants the state.
    on_state: called with the state of the copies and its chunk, both possibly unfinished.
      The state is donated to the next chunk: keep what is worked out from it alone.

  Returns:
    Parameters and batch statistics of the m copies, leaves [m, ...].

  Raises:
    FloatingPointError: every copy has become NaN or infinite.
    MemoryError: the device is too small for so many copies at once.
  """
  m = number_of_models(ingredients, "ingredients")
  if state is None:
    state = start(params, batch_stats, programs.optimizer(0.0, 0.0), m)
  state = continue_training(
    programs,
    data,
    masks,
    key,
    state,
    ingredients,
    learning_rates,
    chunk_steps=chunk_steps,
    on_chunk=on_chunk,
    on_state=on_state,
    saving=saving,
  )
  return state.params, state.batch_stats


def continue_training(
  programs: Programs,
  data: Data | StreamedData,
  masks: PyTree | Remask,
  key: jax.Array,
  state: TrainState,
  ingredients: dict[str, np.ndarray],
  learning_rates: np.ndarray,
  *,
  chunk_steps: int = 50,
  on_chunk: Callable[[Chunk], None] | None = None,
  on_state: Callable[[TrainState, Chunk], None] | None = None,
  saving: Saving | None = None,
) -> TrainState:
  """Trains m copies from a state to their last step.

  Args:
    programs: see `train_copies`.
    data: the same.
    masks: see `train_chunks`.
    key: see `train_copies`.
    state: of all copies, leaves [m, ...]; donated.
    ingredients: see `train_copies`.
    learning_rates: float [m, max(steps)], from step 0 on.
    chunk_steps: see `train_copies`.
    on_chunk: the same.
    on_state: the same.
    saving: the same.

  Returns:
    The last state.

  Raises:
    FloatingPointError: every copy has become NaN or infinite.
    MemoryError: the device is too small for so many copies at once.
  """
  m = number_of_models(ingredients, "ingredients")
  running = None  # the host looks at a chunk once the next one is on the device

  def look(chunk):
    chunk = fetched(chunk, ingredients["steps"])
    if on_chunk is not None:
      on_chunk(chunk)

  length = chunk_length(data.size // programs.batch_size, chunk_steps)
  like = _one_mask(state.params) if callable(masks) else masks
  with says_what_fits(programs, data, like, key, state, length):
    for latest, chunk in train_chunks(
      programs, data, masks, key, state, ingredients, learning_rates, chunk_steps
    ):
      state = latest
      if on_state is not None:
        on_state(state, chunk)
      if running is not None:
        look(running)
      running = chunk
      if saving is not None and saving.due():
        look(running)
        running = None
        saving.state(state)
    if running is not None:
      look(running)
  if not np.any(fetch(finite_models((state.params, state.batch_stats)))):
    raise FloatingPointError(
      f"{_copies(m)} has parameters that are not finite: lower the learning rate"
    )
  return state


def _one_mask(params: PyTree) -> PyTree:
  """The shapes of masks that all copies share, from leaves [m, ...]."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], bool), params)


def fetched(chunk: Chunk, steps: np.ndarray) -> Chunk:
  """Waits for a chunk's loss and accuracy.

  Args:
    chunk: from `train_chunks`.
    steps: int [m], how many steps each copy takes in all.

  Returns:
    The chunk with both on the host.

  Raises:
    FloatingPointError: the loss of every copy is NaN or infinite. Where some are done
      already, it is not: they may be well.
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
  ingredients: dict[str, np.ndarray],
  learning_rates: np.ndarray,
  chunk_steps: int = 50,
) -> Iterator[tuple[TrainState, Chunk]]:
  """Goes on training from a state, and gives it back after every chunk.

  A state that is kept (it is donated to the next chunk, so copy it) and given to another
  call with the same other arguments goes on as if there had been no break.

  Args:
    programs: of this network and data set.
    data: the training split.
    masks: see `train_copies`; or a function that gives the masks of each chunk anew, from
      the step it begins with and the state, and the state to go on from.
    key: of the phase, the same for all copies.
    state: of all m copies, leaves [m, ...], as `start` or an earlier chunk gives it.
    ingredients: `seed` int [m], `weight_decay` float [m], `steps` int [m].
    learning_rates: float [m, max(steps)], from the first step of the phase on.
    chunk_steps: see `train_copies`.

  Yields:
    The state of the m copies and what to show of the chunk, before either is finished:
    `fetched` waits for a chunk and tells whether it went well.
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
  state = place(state, sharding(state, True))
  return data, masks, key, state, ingredients, learning_rates


def _copies(m: int) -> str:
  return f"each of {m} copies" if m > 1 else "the model"


def chunk_length(steps_per_epoch: int, most: int) -> int:
  """The length of the equal chunks of at most `most` steps that make up an epoch."""
  return -(-steps_per_epoch // -(-steps_per_epoch // most))
