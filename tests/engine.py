"""The engine's generators, run to their end."""

import typing

from jaxsms import Phase
from jaxsms.sms import phase_sparsities
from jaxsms.training import Engine, Model, Splits, TrainState, last_state, train_copies
from jaxsms.training.engine import trained
from jaxsms.training.merging import Merging, merging_of
from jaxsms.training.phases import PhaseRecipe, Start, training_phases


class Finished(typing.NamedTuple):
  model: Model
  masks: typing.Any
  records: list


def finish(events, on_event=lambda event: None):
  """The last phase's model and masks, and the records of all phases."""
  model, masks, records = None, None, []
  for event in events:
    if isinstance(event, Phase):
      model, masks = event.params, event.masks
      records.append(event.record)
    on_event(event)
  return Finished(model, masks, records)


def run_phases(
  programs, splits, key, dense, plan, *, goal_sparsity, phases, merge=None, greedy=False,
  chunk_steps=50, done=0, masks=None, state=None, wants_state=lambda: False,
  on_event=lambda event: None, **options,
):  # fmt: skip
  merging = merging_of("greedy" if greedy else "uniform")
  if merge is not None:
    merging = Merging(lambda engine, key, base: merge)
  engine = Engine(programs, splits, chunk_steps=chunk_steps, wants_state=wants_state)
  sparsities = phase_sparsities(goal_sparsity, phases, done)
  start = Start(dense, masks, state)
  recipe = PhaseRecipe(merging=merging, **options)
  events = training_phases(engine, key, start, plan, sparsities, recipe)
  return finish(events, on_event)


def train(
  programs, data, masks, key, model, chosen, lrs, *, chunk_steps=50, on_chunk=None,
  on_state=None,
):  # fmt: skip
  """Parameters and batch statistics of m copies, leaves [m, ...]."""
  engine = Engine(
    programs, Splits(data, data, data), chunk_steps=chunk_steps,
    wants_state=lambda: on_state is not None,
  )  # fmt: skip
  start = engine.start(Model(*model), len(chosen["steps"]))

  def training():
    chunk, events = None, train_copies(engine, masks, key, start, chosen, lrs)
    while True:
      try:
        event = next(events)
      except StopIteration as end:
        return end.value
      if isinstance(event, TrainState):  # after its chunk
        on_state(event, chunk)
      else:
        chunk = event
        if on_chunk:
          on_chunk(chunk)
      yield event

  state = last_state(training())
  return trained(state)
