"""Soups at several sparsities at once: one pruning each, all copies in one program."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.devices.ingredients import take_ingredients
from jaxsms.phases import Prune
from jaxsms.pruning import magnitude_masks
from jaxsms.sms import soup_phases
from jaxsms.training.candidates import merge_candidates
from jaxsms.training.engine import Engine, Model, Plan, Record, start_each, trained
from jaxsms.training.loop import train_copies
from jaxsms.training.merging import Merging
from jaxsms.training.pruned import accuracy_on_test, prune_and_measure
from jaxsms.trees import PyTree, number_of_models, stack


class Nested(NamedTuple):
  """One model for each sparsity, in rising order.

  Attributes:
    models: `Model`s with leaves [...].
    masks: of each; what one removed, all that follow removed too.
    records: of each, by the number of its sparsity.
  """

  models: list[Model]
  masks: list[PyTree]
  records: dict[int, Record]


def one_shot_soups(
  engine: Engine,
  key: jax.Array,
  dense: Model,
  plan: Plan,
  sparsities: Mapping[int, float],
  *,
  prune: Prune = magnitude_masks,
  merging: Merging | None = None,
) -> Iterator[Any]:
  """Soups at several sparsities, each pruned from the dense model in one go.

  The masks are nested: what is removed at one sparsity is removed at all higher ones. The m
  copies of each of the k sparsities train together, as k m copies with masks of their own.

  Args:
    engine: its programs made with `own_masks`.
    key: as in `jaxsms.sms.soup_phases`; there is one phase.
    dense: the trained model that all start from.
    plan: given the pruning record of a sparsity, ingredients and learning rates of its m
      copies, see `jaxsms.training.phases.training_phases`.
    sparsities: by their numbers, none lower than the one before.
    prune: `prune(params, sparsity, masks=masks)` giving masks.
    merging: of the copies of one sparsity; None means their mean.

  Yields:
    Chunks of training, and one `jaxsms.Phase`. Its params are `Nested`, whose records are
    those of `jaxsms.prune_phase` and `merge_candidates`.

  Raises:
    ValueError: there is no sparsity, one is lower than the one before, or see
      `jaxsms.prune_phase`.
    FloatingPointError: all copies of one sparsity diverged.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, section 3 (one phase)
  """
  check_rising(sparsities)
  if merging is not None:
    merging.check(engine)

  def prune_to_each(model, masks, highest):
    found: list[tuple[Model, PyTree, Record]] = []
    before = accuracy_on_test(engine, model)
    for sparsity in sparsities.values():
      inside = found[-1][1] if found else None
      found.append(
        prune_and_measure(engine, _within(prune, inside), model, None, sparsity, before)
      )
    models, each, records = map(list, zip(*found, strict=True))
    numbered = {
      number: {"phase": number, **record}
      for number, record in zip(sparsities, records, strict=True)
    }
    return Nested(models, each, numbered), each, {"sparsity": highest}

  def retrain(key, nested, masks, record):
    plans = [plan(one) for one in nested.records.values()]
    m = number_of_models(plans[0][0], "ingredients")
    each = jax.tree.map(lambda x: jnp.repeat(x, m, axis=0), stack(nested.models))
    end = yield from train_copies(
      engine,
      jax.tree.map(lambda x: jnp.repeat(x, m, axis=0), stack(masks)),
      key,
      start_each(engine, each),
      jax.tree.map(lambda *x: np.concatenate(x), *[chosen for chosen, _ in plans]),
      np.concatenate([rates for _, rates in plans]),
      phase=record["phase"],
    )
    every = trained(end)
    groups = [take_ingredients(every, np.arange(m) + m * i) for i in range(len(plans))]
    return (nested, groups), {}

  def merge(key, candidates, record):
    nested, groups = candidates
    soups, records = [], {}
    for base, group, (number, pruning) in zip(
      nested.models, groups, nested.records.items(), strict=True
    ):
      before = pruning["pruned"]["validation_accuracy"]
      soup, merged = merge_candidates(engine, key, group, merging, before, base)
      soups.append(soup)
      records[number] = {**pruning, **merged}
    return nested._replace(models=soups, records=records), {}

  return soup_phases(
    key,
    dense,
    {1: max(sparsities.values())},
    prune=prune_to_each,
    retrain=retrain,
    merge=merge,
  )


def check_rising(sparsities: Mapping[int, float]) -> None:
  """Raises ValueError where sparsities are none, or fall."""
  values = list(sparsities.values())
  if not values or values != sorted(values):
    raise ValueError(
      f"sparsities are {values}: masks that are nested need at least one, and none lower "
      "than the one before"
    )


def _within(prune, inside):
  """The criterion, for masks that keep nothing that `inside` removed."""
  return lambda params, sparsity, masks=None: prune(params, sparsity, masks=inside)
