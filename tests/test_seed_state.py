"""What a run takes up from its checkpoints, and hands over where it ends."""

import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import methods
from experiments.methods import in_phases
from experiments.methods.seed_state import SeedState, packed, unpacked
from experiments.run import checkpointing
from experiments.run.run_costs import RunCosts
from experiments.run.signals import StopSignals
from jaxsms import training
from jaxsms.disk import storage
from jaxsms.disk.series import NewestCheckpoint
from jaxsms.training import Model

PROGRAMS = types.SimpleNamespace(
  mesh_of=lambda copies: None, split_params=False, optimizer=training.sgd
)


def trained():
  """A seed in the midst of its second phase, with two copies."""
  model = Model({"w": jnp.arange(3.0)}, {"mean": jnp.ones(2)})
  state = training.start(*model, training.sgd(0.0, 0.0), 2)
  masks = {"w": jnp.array([True, False, True])}
  return SeedState(4, model, {"loss": 1.0}, "sms", {"sms": []}, {}, model, masks, state)


def unpack(arrays, rest):
  shapes = jax.eval_shape(lambda: trained().dense)
  return unpacked(arrays, rest, shapes, PROGRAMS, 2, "checkpoint 1")


def test_what_is_restored_is_bound_to_no_device_as_what_was_trained(assert_trees_equal):
  """Else the programs that were compiled for the one would not do for the other."""
  seed_state = trained()
  again = unpack(*packed(seed_state))
  for name in ("dense", "model", "masks", "state"):
    before, after = getattr(seed_state, name), getattr(again, name)
    assert_trees_equal(before, after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
      assert x.committed == y.committed
      assert x.sharding == y.sharding
  assert (again.seed, again.method, again.phases) == (4, "sms", {"sms": []})


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def costs():
  """Of a run with a phase."""
  run = RunCosts()
  run.phase("sms", 1)
  return run.saved()


@hypothesis.given(st.data())
def test_any_content_of_a_checkpoint_is_taken_up_or_refused(tmp_path_factory, data):
  arrays, rest = packed(trained())
  meta = {
    "seeds": [],
    "epoch": {"taken": [8], "loss": [[1.0, None]], "accuracy": [[0.5, 0.5]]},
    "steps_left": {"2": 5},
    "work": rest,
    "seconds": 3.0,
    "metrics_bytes": 0,
    "costs": costs(),
  }
  of = data.draw(st.sampled_from([meta, meta["work"], meta["epoch"], meta["costs"]]))
  changed = data.draw(st.sampled_from(sorted(of)))
  if data.draw(st.booleans()):
    del of[changed]
  else:
    of[changed] = data.draw(JSON)
  for name in data.draw(st.sets(st.sampled_from(sorted(arrays)), max_size=1)):
    arrays[name] = np.zeros(data.draw(st.lists(st.integers(0, 3), max_size=2)))
  config = types.SimpleNamespace(
    ingredients=2, save_minutes=5, keep_checkpoints=2, shrink=False
  )
  checkpointer = checkpointing.Checkpointer(
    tmp_path_factory.getbasetemp(), {}, config, StopSignals()
  )
  task = types.SimpleNamespace(
    shapes=jax.eval_shape(lambda: trained().dense),
    engine=types.SimpleNamespace(programs=PROGRAMS),
  )
  try:
    checkpointer._take_up(NewestCheckpoint(1, arrays, storage.plain(meta), []), task)
  except ValueError as error:
    assert "checkpoint 1 of" in str(error)
    assert "\n" not in str(error)


def test_the_last_good_soup_is_handed_over_where_all_copies_diverge(monkeypatch):
  """After a phase that went well."""

  def diverges(run, *_):
    run.seed_state.model, run.seed_state.masks = Model("params", "statistics"), "masks"
    yield "chunk"
    raise FloatingPointError("the loss of each of 2 copies is not finite")

  monkeypatch.setattr(in_phases, "prune_and_retrain", diverges)
  config = types.SimpleNamespace(retrain_epochs=1, ingredients=2, phases=2)
  task = types.SimpleNamespace(steps_per_epoch=1)
  run, given = methods.Run(config, task, None, SeedState(0, dense="dense")), []
  with pytest.raises(FloatingPointError):
    for event in methods.seed_events(run, ["sms"]):
      given.append(event)
  soup = methods.Soup("params", "statistics", "masks")
  assert given == [("sms", None), ("sms", "chunk"), ("sms", soup)]
