"""Pruning during training: GMP and DPF, alone and as soups."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsms.checks import check_sparsity
from jaxsms.devices.ingredients import repeat_model
from jaxsms.devices.meshes import fetch
from jaxsms.mask_trees import mask_leaves
from jaxsms.phases import Prune, finite_models
from jaxsms.pruning import apply_masks, magnitude_masks, prunable_flags
from jaxsms.sms import Phase
from jaxsms.training.candidates import merge_candidates
from jaxsms.training.engine import Engine, Model, trained
from jaxsms.training.loop import Remask, train_copies
from jaxsms.training.programs import Programs
from jaxsms.training.state import Ingredients
from jaxsms.trees import PyTree, model_at, number_of_models


def cubic_sparsity(goal: float, step: int, ramp_steps: int) -> float:
  """The sparsity at a step of a training that prunes from dense to a goal.

  goal * (1 - (1 - step / ramp_steps)^3): fast at first, where much is redundant.

  Args:
    goal: sparsity from step `ramp_steps` on, in [0, 1).
    step: from 0.
    ramp_steps: at least 1.

  Returns:
    The sparsity, exactly `goal` from the end of the ramp on.

  Raises:
    ValueError: an argument is out of range.

  References:
    Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878, section 3

  Example:
    >>> [jaxsms.dynamic.cubic_sparsity(0.5, step, ramp_steps=2) for step in (0, 1, 2, 3)]
    [0.0, 0.4375, 0.5, 0.5]
  """
  check_sparsity(goal, "goal sparsity")
  if step < 0 or ramp_steps < 1:
    raise ValueError(
      f"step is {step} of a ramp of {ramp_steps} steps: steps count from 0, and a ramp has "
      "at least one"
    )
  return goal if step >= ramp_steps else goal * (1 - (1 - step / ramp_steps) ** 3)


class GradualPruning(NamedTuple):
  """How a model is pruned while it trains.

  Attributes:
    goal_sparsity: from step `ramp_steps` on, in [0, 1).
    ramp_steps: after which the masks are fixed, at least 1.
    mask_steps: most steps between two masks: an epoch is cut into equal parts of at most
      this length.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
  """

  goal_sparsity: float
  ramp_steps: int
  mask_steps: int
  prune: Prune = magnitude_masks


def gradual_masks(pruning: GradualPruning, feedback: bool = False) -> Remask:
  """Masks that follow the cubic ramp, for `jaxsms.training.train_chunks`.

  Args:
    pruning: the ramp, and how masks are made.
    feedback: makes them from all weights each time, so that removed ones may return, and
      leaves the weights as they are (DPF). Otherwise removed weights are set to 0 and stay
      so (GMP).

  Returns:
    `remask(step, state)` giving the state and its masks; of one copy, leaves [1, ...].

  Example:
    >>> pruning = jaxsms.dynamic.GradualPruning(0.5, ramp_steps=2, mask_steps=1)
    >>> remask = jaxsms.dynamic.gradual_masks(pruning)
    >>> params = {"kernel": jnp.array([[1.0, -4.0], [2.0, 3.0]])}
    >>> state = jaxsms.training.start(params, {}, optax.sgd(0.1), m=1)
    >>> state, masks = remask(2, state)  # the end of the ramp
    >>> state.params["kernel"].tolist()
    [[[0.0, -4.0], [0.0, 3.0]]]
  """
  masks: PyTree | None = None

  def remask(step, state):
    nonlocal masks
    if not np.any(fetch(finite_models(state.params))):
      raise FloatingPointError(
        "the model has parameters that are not finite: lower the learning rate"
      )
    params = model_at(state.params, 0)
    sparsity = cubic_sparsity(pruning.goal_sparsity, step, pruning.ramp_steps)
    masks = pruning.prune(params, sparsity, masks=None if feedback else masks)
    if not feedback:
      state = state._replace(params=apply_masks(state.params, masks))
    return state, masks

  return remask


def prune_during_training(
  engine: Engine,
  key: jax.Array,
  fresh: Model,
  ingredients: Ingredients,
  learning_rates: np.ndarray,
  pruning: GradualPruning,
  *,
  feedback_programs: Programs | None = None,
  phase: int = 1,
) -> Iterator[Any]:
  """GMP or DPF, pruning during one training from scratch; with m copies, their soup.

  One model trains with the first ingredient while its masks change. Then the masks are
  fixed. m copies of its whole state, momentum included, go on with the same learning rates
  and their own ingredients, and are averaged. With m = 1 this is GMP or DPF itself.

  Args:
    engine: the network and its data.
    key: of the training.
    fresh: the model to begin with.
    ingredients: of the copies, each [m]; `steps` is the whole length.
    learning_rates: float [m, max(steps)].
    pruning: the ramp, and how masks are made.
    feedback_programs: made with `feedback`; given, the method is DPF, else GMP.
    phase: number that its chunks and its record are marked with.

  Yields:
    Chunks of training, and at last a `jaxsms.Phase`. Its record holds `sparsity` (of the
    prunable weights) and what `merge_candidates` gives.

  Raises:
    ValueError: an argument is out of range, or see `jaxsms.magnitude_masks`.
    FloatingPointError: the model diverged.

  References:
    Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878 (GMP)
    Lin et al., 2020, https://arxiv.org/abs/2006.07253 (DPF)
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788 (soups of both)
  """
  m = number_of_models(ingredients, "ingredients")
  remask = gradual_masks(pruning, feedback_programs is not None)
  first = Ingredients(
    seed=ingredients["seed"][:1],
    weight_decay=ingredients["weight_decay"][:1],
    steps=np.minimum(ingredients["steps"][:1], pruning.ramp_steps),
  )
  ramp = engine._replace(
    programs=feedback_programs or engine.programs, chunk_steps=pruning.mask_steps
  )
  state = yield from train_copies(
    ramp, remask, key, engine.start(fresh, 1), first, learning_rates[:1], phase=phase
  )
  state, masks = remask(pruning.ramp_steps, state)
  state = model_at(state, 0)
  state = state._replace(params=apply_masks(state.params, masks))
  copies = repeat_model(state, m)
  if "average_after" in ingredients:  # what was not pruned yet has no place in an average
    after = np.maximum(ingredients["average_after"], pruning.ramp_steps)
    ingredients = {**ingredients, "average_after": after}
  end = yield from train_copies(
    engine, masks, key, copies, ingredients, learning_rates, phase=phase
  )
  candidates = trained(end)
  model, record = merge_candidates(engine, key, candidates)
  sparsity = removed_share(model.params, masks)
  yield Phase(model, masks, candidates, {"phase": phase, "sparsity": sparsity, **record})


def removed_share(params: PyTree, masks: PyTree) -> float:
  """The share of the prunable weights that masks remove.

  Args:
    params: one model.
    masks: tree of bool arrays with the structure of `params`, True where kept.

  Returns:
    The share, in [0, 1].

  Example:
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    >>> masks = {"kernel": jnp.array([[True, False], [True, True]]),
    ...          "bias": jnp.array([True, True])}
    >>> jaxsms.dynamic.removed_share(params, masks)  # the bias does not count
    0.25
  """
  flags = prunable_flags(params)
  masks = mask_leaves(params, masks)
  chosen = [x for x, flag in zip(masks, flags, strict=True) if flag]
  return 1 - sum(int(x.sum()) for x in chosen) / sum(x.size for x in chosen)
