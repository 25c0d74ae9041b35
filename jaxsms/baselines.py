"""What Sparse Model Soups are compared with beside IMP, from the same parts.

IMP is `run_phases` with one copy, the dense soup is it with goal sparsity 0, and BIMP is it
after a shorter dense training. Pruning during training: `jaxsms.dynamic`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.pruning import apply_masks, magnitude_masks, phase_sparsity
from jaxsms.sms import Merge, Prune, healthy_copies, prune_phase
from jaxsms.soups import uniform_soup
from jaxsms.training.loop import Chunk, continue_training, train_copies
from jaxsms.training.measurements import Describe, Model, Record, Splits
from jaxsms.training.phases import Plan, merge_candidates
from jaxsms.training.programs import Programs
from jaxsms.training.state import TrainState, start_each
from jaxsms.trees import PyTree, stack, unstack


def imp_reprune(
  programs: Programs,
  splits: Splits,
  key: jax.Array,
  dense: Model,
  plan: Plan,
  copies: int,
  *,
  goal_sparsity: float,
  phases: int,
  prune: Prune = magnitude_masks,
  describe: Describe | None = None,
  chunk_steps: int = 50,
  on_chunk: Callable[[int, Chunk], None] | None = None,
  on_phase: Callable[[Record], None] | None = None,
) -> tuple[Model, list[Record]]:
  """IMP-RePrune: m runs of IMP, averaged and pruned again to their sparsity.

  The runs never see the average: each goes on from itself, with its own masks. One that
  diverges is left out of this phase's average and of all that follow.

  Args:
    programs: made with `own_masks`.
    splits: training, validation and test data.
    key: each phase gets `fold_in(key, phase)`, as in `run_phases`.
    dense: the trained model that all runs start from.
    plan: see `run_phases`; asked once for each copy, with that copy's pruning record.
    copies: m.
    goal_sparsity: sparsity after the last phase, in [0, 1).
    phases: number of cycles, at least 1.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    describe: see `run_phases`.
    chunk_steps: see `train_copies`.
    on_chunk: called with the phase and each chunk of training.
    on_phase: called with each phase's record.

  Returns:
    The last average, and a record per phase: `phase`, `sparsity` and what
    `merge_candidates` gives, the runs as candidates and their average pruned again as
    `soup`.

  Raises:
    ValueError: see `jaxsms.prune_phase`.
    FloatingPointError: all runs diverged.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, section 3
  """
  models, masks, records = [dense] * copies, [None] * copies, []
  healthy = list(range(copies))
  for phase in range(1, phases + 1):
    phase_key = jax.random.fold_in(key, phase)
    goal = phase_sparsity(goal_sparsity, phase, phases)
    pruned = {i: prune_phase(models[i].params, masks[i], goal, prune) for i in healthy}
    # What diverged before stays as it is, and keeps its place among the copies.
    first = pruned[healthy[0]]
    params = [pruned[i][0] if i in pruned else models[i].params for i in range(copies)]
    masks = [pruned.get(i, first)[1] for i in range(copies)]
    sparsities = [pruned.get(i, first)[2] for i in range(copies)]
    plans = [plan({"phase": phase, **record}) for record in sparsities]
    state = continue_training(
      programs,
      splits.train,
      stack(masks),
      phase_key,
      start_each(
        stack(params), stack([x.batch_stats for x in models]), programs.optimizer(0.0, 0.0)
      ),
      plans[0][0],
      np.stack([rates[i] for i, (_, rates) in enumerate(plans)]),
      chunk_steps=chunk_steps,
      on_chunk=None if on_chunk is None else lambda c, p=phase: on_chunk(p, c),
    )
    candidates = Model(state.params, state.batch_stats)
    healthy = healthy_copies(candidates)
    average, merged = merge_candidates(
      programs, splits, phase_key, candidates, repruned(goal, prune), describe=describe
    )
    record = {"phase": phase, "sparsity": first[2]["sparsity"], **merged}
    models = unstack(candidates)
    records.append(record)
    if on_phase is not None:
      on_phase(record)
  return average, records


def repruned(sparsity: float, prune: Prune = magnitude_masks) -> Merge:
  """The mean of models whose masks differ, pruned again to a sparsity.

  Args:
    sparsity: share of the prunable weights that are removed afterwards, in [0, 1).
    prune: `prune(params, sparsity, masks=masks)` giving masks.

  Returns:
    A merge of candidates, leaves [m, ...], into one model.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788 (IMP-RePrune)
  """

  def merge(candidates: Model) -> Model:
    soup = uniform_soup(candidates)
    return soup._replace(params=prune_phase(soup.params, None, sparsity, prune)[0])

  return merge


def swamp(
  programs: Programs,
  splits: Splits,
  key: jax.Array,
  ticket: Model,
  plan: Plan,
  *,
  average_after: int,
  goal_sparsity: float,
  phases: int,
  prune: Prune = magnitude_masks,
  describe: Describe | None = None,
  chunk_steps: int = 50,
  on_chunk: Callable[[int, Chunk], None] | None = None,
  on_phase: Callable[[Record], None] | None = None,
) -> tuple[Model, list[Record]]:
  """SWAMP: IMP with rewinding, each round the average over several particles and over time.

  All particles of a round start from the same ticket, a checkpoint of early training,
  within the masks of the average of the round before; the first round is dense.

  Args:
    programs: of the network.
    splits: training, validation and test data.
    key: round t gets `fold_in(key, t)`, the dense one counting 0.
    ticket: the checkpoint that every round rewinds to.
    plan: ingredients and learning rates of a round's particles, see `run_phases`.
    average_after: steps of a round after which the parameters at the end of each epoch, and
      at the very end, enter a particle's average over time.
    goal_sparsity: sparsity after the last round, in [0, 1).
    phases: rounds after the dense one.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    describe: see `run_phases`.
    chunk_steps: see `train_copies`.
    on_chunk: called with the round and each chunk of training.
    on_phase: called with each round's record.

  Returns:
    The last average, and a record per round after the dense one: that of
    `jaxsms.prune_phase` and of `merge_candidates`, the particles' averages over time as
    candidates.

  Raises:
    ValueError: see `jaxsms.prune_phase`.
    FloatingPointError: all particles of a round diverged.

  References:
    Choi et al., 2024, https://arxiv.org/abs/2305.14852
    Izmailov et al., 2018, https://arxiv.org/abs/1803.05407 (averages over time)
    Frankle et al., 2020, https://arxiv.org/abs/1912.05671 (rewinding)
  """
  masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), ticket.params)
  steps_per_epoch = splits.train.size // programs.batch_size
  model, records = ticket, []
  for phase in range(phases + 1):
    phase_key = jax.random.fold_in(key, phase)
    record = {"phase": phase}
    if phase:
      goal = phase_sparsity(goal_sparsity, phase, phases)
      _, masks, pruned = prune_phase(model.params, masks, goal, prune)
      record |= pruned
    average = TimeAverage(average_after, steps_per_epoch)
    _, batch_stats = train_copies(
      programs,
      splits.train,
      masks,
      phase_key,
      apply_masks(ticket.params, masks),
      ticket.batch_stats,
      *plan(record),
      chunk_steps=chunk_steps,
      on_chunk=None if on_chunk is None else lambda c, p=phase: on_chunk(p, c),
      on_state=average.add,
    )
    candidates = Model(average.params, batch_stats)
    model, merged = merge_candidates(
      programs, splits, phase_key, candidates, describe=describe
    )
    if phase:
      records.append(record | merged)
      if on_phase is not None:
        on_phase(records[-1])
  return model, records


class TimeAverage:
  """The mean of the parameters at the end of each epoch after a number of steps.

  Attributes:
    params: the mean, None before there is any.
    count: how many went into it.
  """

  def __init__(self, after: int, steps_per_epoch: int):
    """`after`: steps that are left out."""
    self._after, self._steps_per_epoch = after, steps_per_epoch
    self.params: PyTree | None = None
    self.count = 0

  def add(self, state: TrainState, chunk: Chunk) -> None:
    """Takes the state after a chunk, where it is at the end of an epoch or of all.

    Args:
      state: of the training, parameters [m, ...].
      chunk: the steps that led to it.
    """
    ends = chunk.step % self._steps_per_epoch == 0 or chunk.step == chunk.steps
    if chunk.step <= self._after or not ends:
      return
    if self.params is None:
      self.params = jax.tree.map(jnp.zeros_like, state.params)
    self.count += 1
    self.params = _running_mean(self.params, state.params, self.count)


@jax.jit
def _running_mean(mean: PyTree, new: PyTree, count: int) -> PyTree:
  return jax.tree.map(lambda a, b: a + (b - a) / count, mean, new)
