"""Averages of one copy's parameters over the steps that it takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsms.training.state import Ingredients, Scalar, TrainState


def averaged_ingredients(
  ingredients: Ingredients,
  *,
  decay: float = 1.0,
  after: np.ndarray | int = 0,
  every: int = 1,
) -> Ingredients:
  """Copies that end as the average of their parameters over their own training.

  The parameters enter the average once in `every` steps, and after the last step. With a
  decay below 1 it is an exponential moving average (EMA). It starts at 0 and is divided by
  the sum of its weights, as Adam's moments are, so the pruned model at the start is not in
  it. With decay 1 it is the plain mean (SWA; of the last part, LAWA).

  Args:
    ingredients: of the copies, each [m].
    decay: in (0, 1].
    after: int [m] or [], the steps of a phase that are left out.
    every: steps from one to the next, at least 1.

  Returns:
    The ingredients with those of the average.

  Raises:
    ValueError: an argument is out of range, or a copy takes no step.

  Example:
    >>> copies = {"seed": np.arange(2), "weight_decay": np.zeros(2), "steps": np.full(2, 9)}
    >>> averaged_ingredients(copies, decay=0.9)["average_decay"].tolist()
    [0.8999999761581421, 0.8999999761581421]

  References:
    Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046
    Izmailov et al., 2018, https://arxiv.org/abs/1803.05407 (SWA)
    Kaddour, 2022, https://arxiv.org/abs/2209.14981 (LAWA)
    Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980, section 3 (EMA without its start)
    Morales-Brotons et al., 2024, https://arxiv.org/abs/2411.18704 (EMA of weights)
  """
  m, steps = len(ingredients["steps"]), np.asarray(ingredients["steps"])
  if not 0 < decay <= 1:
    raise ValueError(f"decay is {decay}: it must be in (0, 1], where 1 is the plain mean")
  if every < 1:
    raise ValueError(f"every is {every}: it must be at least 1 step")
  if not np.min(steps) or np.any(np.asarray(after) >= steps) or np.min(after) < 0:
    raise ValueError(
      f"the average leaves out {after} of {steps.tolist()} steps: each copy must take at "
      "least one step that is not left out"
    )
  average: Any = {
    "average_decay": np.full([m], decay, np.float32),
    "average_after": np.broadcast_to(np.asarray(after, np.int32), [m]),
    "average_every": np.full([m], every, np.int32),
    "average_steps": np.asarray(steps, np.int32),  # a search stops copies before
  }
  return {**ingredients, **average}


def average_weight(
  taken: Scalar, steps: Scalar, decay: Scalar, after: Scalar, every: Scalar
) -> jax.Array:
  """What the newest parameters weigh in the average up to them.

  Args:
    taken: int, steps taken so far, the newest among them.
    steps: int, that the copy takes in all.
    decay: see `averaged_ingredients`, as what follows.
    after: int.
    every: int.

  Returns:
    float32 [], 0 where they do not enter, and 1 where they are the first.
  """
  enters = (taken > after) & ((taken % every == 0) | (taken == steps))
  count = jnp.maximum(-(-taken // every) - after // every, 1)
  decay = jnp.asarray(decay, jnp.float32)
  # The limit of the first as the decay goes to 1 is the second.
  below = (1 - decay) / jnp.where(decay < 1, 1 - decay**count, 1)
  return jnp.where(enters, jnp.where(decay < 1, below, 1 / count), 0)


def has_average(ingredients: Ingredients, taken: int) -> bool:
  """Whether all copies have steps in their average after `taken` steps.

  Args:
    ingredients: of the copies.
    taken: steps.
  """
  if "average_decay" not in ingredients:
    return False
  after, every = ingredients["average_after"], ingredients["average_every"]
  return bool(np.all(taken // np.asarray(every) > np.asarray(after) // every))


def begin_average(state: TrainState, ingredients: Ingredients) -> TrainState:
  """A state that carries an average, where its copies are averaged and it has none yet.

  Args:
    state: of the copies, leaves [m, ...].
    ingredients: of them.

  Returns:
    The state, its average a copy of the parameters.
  """
  if "average_decay" not in ingredients or jax.tree.leaves(state.average):
    return state
  return state._replace(average=jax.tree.map(jnp.copy, state.params))


def add_to_average(state: TrainState, ingredient: Ingredients) -> TrainState:
  """Takes the newest parameters of one copy into its average, where it has one."""
  if "average_decay" not in ingredient:
    return state
  weight = average_weight(
    state.step,
    ingredient["average_steps"],
    ingredient["average_decay"],
    ingredient["average_after"],
    ingredient["average_every"],
  )
  average = optax.incremental_update(state.params, state.average, weight)
  return state._replace(average=average)
