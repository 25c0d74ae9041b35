"""Training on the host's side: chunk after chunk of the jitted program."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.ingredients import pad_ingredients
from jaxsms.schedules import retrain_schedule
from jaxsms.training.programs import Programs
from jaxsms.training.state import Data, start
from jaxsms.trees import PyTree, number_of_models


class Chunk(NamedTuple):
  """What a progress bar or a log wants to know after each chunk.

  Attributes:
    copies: how many train at once.
    step: steps taken by the longest copy so far.
    steps: steps that it will take.
    taken: steps in this chunk.
    epoch: the epoch that the chunk is in, from 1.
    loss: float [m], training loss over the chunk.
    accuracy: float [m], training accuracy over the chunk.
    learning_rate: float [m], of the last step.
  """

  copies: int
  step: int
  steps: int
  taken: int
  epoch: int
  loss: np.ndarray
  accuracy: np.ndarray
  learning_rate: np.ndarray


def train_copies(
  programs: Programs,
  data: Data,
  masks: PyTree,
  key: jax.Array,
  params: PyTree,
  batch_stats: PyTree,
  ingredients: dict[str, np.ndarray],
  learning_rates: np.ndarray,
  *,
  chunk_steps: int = 50,
  on_chunk: Callable[[Chunk], None] | None = None,
) -> tuple[PyTree, PyTree]:
  """Trains one copy of a model per ingredient.

  Args:
    programs: of this network and data set.
    data: the training split.
    masks: shared by all copies; all True trains a dense model.
    key: of the phase, the same for all copies.
    params: the model that every copy starts from, leaves [...].
    batch_stats: its batch statistics.
    ingredients: `seed` int [m], `weight_decay` float [m], `steps` int [m].
    learning_rates: float [m, max(steps)].
    chunk_steps: most steps between two looks of the host; an epoch is cut into equal
      chunks of at most that many.
    on_chunk: called after each chunk.

  Returns:
    Parameters and batch statistics of the m copies, leaves [m, ...].

  Raises:
    FloatingPointError: the loss of every copy has become NaN or infinite.
  """
  m = number_of_models(ingredients)
  devices = 1 if programs.mesh is None else programs.mesh.shape["ingredient"]
  (ingredients, learning_rates), _ = pad_ingredients(
    (jax.tree.map(np.asarray, ingredients), np.asarray(learning_rates)), devices
  )
  optimizer = programs.optimizer(0.0, 0.0)
  state = start(params, batch_stats, optimizer, len(learning_rates))
  steps = int(np.max(ingredients["steps"]))
  steps_per_epoch = len(data.labels) // programs.batch_size
  chunk = chunk_length(steps_per_epoch, chunk_steps)
  done = 0
  while done < steps:
    taken = min(chunk, steps_per_epoch - done % steps_per_epoch, steps - done)
    rates = learning_rates[:, done : done + taken]
    rates = np.pad(rates, [(0, 0), (0, chunk - taken)]).astype(np.float32)
    state, metrics = programs.train(data, masks, key, state, ingredients, rates)
    metrics = jax.device_get(metrics)
    if not np.isfinite(metrics["loss"][:m]).any():
      raise FloatingPointError(
        f"the loss of {'all copies' if m > 1 else 'the model'} is not finite after step "
        f"{done + taken}: lower the learning rate"
      )
    epoch = done // steps_per_epoch + 1
    done += taken
    if on_chunk is not None:
      on_chunk(
        Chunk(
          copies=m,
          step=done,
          steps=steps,
          taken=taken,
          epoch=epoch,
          loss=metrics["loss"][:m],
          accuracy=metrics["accuracy"][:m],
          learning_rate=rates[:m, taken - 1],
        )
      )
  return jax.tree.map(lambda x: x[:m], (state.params, state.batch_stats))


def chunk_length(steps_per_epoch: int, most: int) -> int:
  """The length of the equal chunks of at most `most` steps that make up an epoch."""
  return -(-steps_per_epoch // -(-steps_per_epoch // most))


def retrain_learning_rates(
  name: str,
  pretrain_lrs: np.ndarray,
  steps: np.ndarray,
  *,
  initial_lr: np.ndarray | None = None,
  **options,
) -> np.ndarray:
  """The learning rate of every step of every copy.

  Args:
    name: retraining schedule, see `jaxsms.retrain_schedule`.
    pretrain_lrs: float [pretraining steps].
    steps: int [m], steps of each copy.
    initial_lr: float [m] for LLR, or None.
    **options: further arguments of `jaxsms.retrain_schedule`, the same for all copies.

  Returns:
    float32 [m, max(steps)]; past its own steps a copy's entries mean nothing.
  """
  lrs = jnp.asarray(pretrain_lrs, jnp.float32)
  at = jnp.arange(int(np.max(steps)))
  rows = [
    retrain_schedule(
      name, lrs, int(n), initial_lr=None if initial_lr is None else initial_lr[i], **options
    )(at)
    for i, n in enumerate(steps)
  ]
  return np.asarray(jnp.stack(rows))
