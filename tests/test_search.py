"""Searching inside a phase: the worse half begins anew from the average of the better."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import run_phases
from test_training import BATCH, Tiny, half_masks, make_data, make_programs

from jaxsms import Phase, make_mesh, training
from jaxsms.training import (
  Engine,
  Model,
  Splits,
  TrainState,
  last_state,
  search,
  search_values,
)
from jaxsms.training.measurements import RECALIBRATION, measure, recalibrated
from jaxsms.training.search import Rung, Search

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)
RANGES = {"learning_rate": (0.01, 1.0), "weight_decay": (1e-5, 1e-1)}
SPLITS = Splits(make_data(23), make_data(17, 1), make_data(9, 2))
EPOCH = 23 // BATCH
STEPS = 2 * EPOCH
M = 5


@pytest.fixture(scope="module")
def programs():
  return make_programs(augmentation="none")


@pytest.fixture(scope="module")
def dense():
  return Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))


@pytest.mark.parametrize("m", [4, 7])
def test_first_values_have_one_in_each_part_of_a_range(m):
  """With a range of 10^m, a part of it is a decade."""
  ranges = {"b": (0.01, 10.0 ** (m - 2)), "a": (1.0, 10.0**m)}
  found = search_values.first_values(KEY, ranges, m)
  for number, name in enumerate(("a", "b")):
    order_key, place_key = jax.random.split(jax.random.fold_in(KEY, number))
    decades = np.array(jax.random.permutation(order_key, m))
    expected = ranges[name][0] * 10 ** (
      decades + np.array(jax.random.uniform(place_key, [m]))
    )
    np.testing.assert_allclose(found[name], expected, rtol=1e-5)
    decade = np.floor(np.log10(found[name] / ranges[name][0]))
    assert sorted(decade) == list(range(m))
  again = search_values.first_values(KEY, dict(sorted(ranges.items())), m)
  np.testing.assert_array_equal(found["a"], again["a"])


def test_the_best_have_a_child_each():
  assert search_values.parents_of([6, 0, 3, 5], 8) == [0, 6, 0, 3, 3, 5, 6, 5]
  assert search_values.parents_of([2], 4) == [2, 2, 2, 2]
  assert search_values.parents_of([1, 0, 2], 5) == [0, 1, 2, 1, 0]


def test_near_values_are_a_factor_away_and_inside_their_range():
  values = {"a": np.float32([0.1, 0.4, 7.0, 0.3]), "b": np.float32([8.0, 9.0, 1.0, 2.0])}
  ranges = {"a": (0.01, 0.5), "b": (1.0, 100.0)}
  parents, seen = [0, 1, 0, 1], set()
  for seed in range(12):
    found = search_values.near_values(jax.random.key(seed), values, parents, ranges, 2.0)
    np.testing.assert_array_equal(found["a"][:2], values["a"][:2])
    np.testing.assert_array_equal(found["b"][:2], values["b"][:2])
    seen.add((*found["a"][2:].tolist(), *found["b"][2:].tolist()))
  # Copy 2 halves or doubles 0.1 and 8, copy 3 halves 0.4 and 9 or doubles them, to 0.5 at
  # most.
  possible = itertools.product((0.05, 0.2), (0.2, 0.5), (4.0, 16.0), (4.5, 18.0))
  possible = np.float32(list(possible))
  assert seen <= set(map(tuple, possible.tolist()))
  assert len(seen) > 6
  for place in range(4):
    assert len({one[place] for one in seen}) == 2


def scores_of(accuracies, losses):
  return [
    {"validation_accuracy": a, "validation_loss": x}
    for a, x in zip(accuracies, losses, strict=True)
  ]


def test_the_better_half_by_accuracy_then_loss():
  nan = np.nan
  scores = scores_of([0.5, 0.9, 0.5, 0.5, 0.1, 0.9], [0.3, 0.8, 0.2, 0.3, 0.0, 0.7])
  assert search.better_half(scores) == [5, 1, 2]
  assert search.better_half(scores, [0, 3, 4, 5]) == [5, 0, 3]
  odd = scores_of([0.2, nan, 0.2, 0.4, 0.3], [nan, nan, 9.0, 0.1, 0.1])
  assert search.better_half(odd) == [3, 4, 2]
  assert search.better_half(scores_of([nan, 0.1, nan, nan], [nan, 1.0, nan, nan])) == [1]


def test_a_restart_averages_all_of_the_state_and_keeps_the_better_half():
  rng = np.random.default_rng(0)
  mask = np.array([[True, False, True], [False, True, True]])
  params = {"w": np.where(mask, rng.normal(size=(4, 2, 3)), 0).astype(np.float32)}
  params["w"][1] = np.nan
  stats, momentum = rng.normal(size=(2, 4, 3)).astype(np.float32)
  state = TrainState(
    params, {"mean": stats}, {"trace": momentum}, np.full([4], 7, np.int32)
  )
  found = search.restarted(jax.tree.map(jnp.asarray, state), [3, 0])
  for before, after in zip(
    jax.tree.leaves(state[:3]), jax.tree.leaves(found[:3]), strict=True
  ):
    mean = (before[0].astype(np.float64) + before[3]) / 2
    np.testing.assert_array_equal(after[np.array([0, 3])], before[np.array([0, 3])])
    np.testing.assert_allclose(after[1], mean, rtol=1e-6)
    np.testing.assert_array_equal(after[1], after[2])
  np.testing.assert_array_equal(
    np.asarray(found.params["w"]) == 0, ~mask[None].repeat(4, 0)
  )
  assert found.step.tolist() == [7, 7, 7, 7]


def plan(record, values=None, m=M, steps=STEPS):
  """A rate that falls to 0, from its first value."""
  values = values or {name: np.full([m], low) for name, (low, _) in RANGES.items()}
  chosen = {
    "seed": np.arange(m, dtype=np.int32),
    "weight_decay": np.float32(values["weight_decay"]),
    "steps": np.full([m], steps, np.int32),
  }
  falling = 1 - np.arange(steps) / steps
  return chosen, np.float32(values["learning_rate"][:, None] * falling)


def engine_of(programs, **options):
  return Engine(programs, SPLITS, chunk_steps=3, **options)


def searching(engine, dense, ends=(EPOCH, STEPS), state=None, rungs=(), ranges=RANGES):
  masks = half_masks(dense.params)
  start = Model(
    jax.tree.map(lambda x, m: jnp.where(m, x, 0), dense.params, masks), dense.batch_stats
  )
  return search.search_copies(
    engine, masks, KEY, state or engine.start(start, M), Search(ranges, ends),
    functools.partial(plan, None), rungs, phase=1,
  )  # fmt: skip


@pytest.mark.slow
def test_copies_at_once_are_what_each_is_alone(programs, dense):
  """Rung by rung, each copy trained and measured by itself, restarted by NumPy."""
  engine = engine_of(programs)
  end, rungs = last_state(searching(engine, dense))
  masks, last = half_masks(dense.params), rungs[-1]
  alone = [
    engine.start(
      Model(jax.tree.map(lambda x, m: jnp.where(m, x, 0), dense.params, masks), dense[1]), 1
    )
    for _ in range(M)
  ]
  for rung in rungs:
    chosen, rates = plan(None, {k: np.float32(v) for k, v in rung.values.items()})
    chosen["steps"][:] = rung.step
    for i in range(M):
      one = {name: of[i : i + 1] for name, of in chosen.items()}
      training_ = training.train_copies(engine, masks, KEY, alone[i], one, rates[i : i + 1])
      alone[i] = last_state(training_)
    if rung is last:
      break
    found = []
    for state in alone:
      model = recalibrated(
        engine,
        jax.random.fold_in(KEY, RECALIBRATION),
        Model(state.params, state.batch_stats),
      )
      found.append(measure(engine, model).scores[0])
    accuracy = [one["validation_accuracy"] for one in found]
    np.testing.assert_allclose(rung.validation_accuracy, accuracy, rtol=1e-5)
    loss = [one["validation_loss"] for one in found]
    np.testing.assert_allclose(rung.validation_loss, loss, rtol=1e-4)
    order = np.lexsort((loss, -np.array(accuracy)))
    assert rung.kept == order[:3].tolist()
    mean = jax.tree.map(
      lambda *x: np.mean(np.stack(x), 0).astype(x[0].dtype), *(alone[i] for i in order[:3])
    )
    for i in order[3:]:
      alone[i] = jax.tree.map(jnp.asarray, mean)
  for i, state in enumerate(alone):
    ours = jax.tree.map(lambda x, i=i: x[i : i + 1], end)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(state), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_values_and_parents_by_rung(programs, dense):
  _, (first, second) = last_state(searching(engine_of(programs), dense))
  assert (first.phase, first.step, first.parents) == (1, EPOCH, [None] * M)
  assert (second.step, second.kept) == (STEPS, ())  # scored with the candidates
  assert second.parents == search_values.parents_of(first.kept, M)
  for name, (low, high) in RANGES.items():
    for i, parent in enumerate(second.parents):
      ratio = second.values[name][i] / first.values[name][parent]
      near = [1.0] if i == parent else [search.FACTOR, 1 / search.FACTOR]
      assert np.isclose(ratio, near).any() or second.values[name][i] in np.float32(
        [low, high]
      )


def test_rungs_compile_nothing_anew(programs, dense):
  engine = engine_of(programs)
  last_state(searching(engine, dense))
  size = programs.train.on(None, M)._cache_size()
  last_state(searching(engine, dense, (2, EPOCH, EPOCH + 1, STEPS)))
  assert programs.train.on(None, M)._cache_size() == size


def test_it_goes_on_bit_by_bit_from_any_chunk(programs, dense, assert_trees_equal):
  """At a rung, before and after it."""
  engine = engine_of(programs, wants_state=lambda: True)
  saved, rungs = [], []

  def watched(events):
    for event in events:
      if isinstance(event, TrainState):
        saved.append((jax.tree.map(np.array, event), list(rungs)))
      if isinstance(event, Rung):
        rungs.append(event)

  ends = (4, EPOCH, STEPS)
  undisturbed = []

  def whole():
    undisturbed.append((yield from searching(engine, dense, ends)))

  watched(whole())
  assert sorted({int(state.step[0]) for state, _ in saved}) == [3, 4, 5, 8, 10]
  assert {len(found) for _, found in saved} == {0, 1, 2}
  for state, found in saved:
    state = jax.tree.map(jnp.asarray, state)
    again, all_rungs = last_state(searching(engine, dense, ends, state, found))
    assert all_rungs == undisturbed[0][1]
    assert_trees_equal(again, undisturbed[0][0])


def phases(programs, dense, **options):
  return run_phases(
    programs, SPLITS, KEY, dense, plan, goal_sparsity=0.75, phases=2, chunk_steps=3,
    search=Search(RANGES, (EPOCH, STEPS)), **options,
  )  # fmt: skip


@pytest.mark.slow
def test_the_better_half_is_merged_and_each_phase_draws_values_anew(programs, dense):
  kept = []

  def on_event(event):
    if isinstance(event, Phase):
      kept.append(jax.tree.map(np.array, event.candidates))

  found = phases(programs, dense, on_event=on_event)
  for record, candidates, number in zip(found.records, kept, (1, 2), strict=True):
    rungs = record["search"]
    assert [(rung["phase"], rung["step"]) for rung in rungs] == [
      (number, EPOCH), (number, STEPS)
    ]  # fmt: skip
    scores = record["candidates"]
    for name in ("validation_accuracy", "validation_loss"):
      assert rungs[-1][name] == [one[name] for one in scores]
    half = search.better_half(scores)
    assert rungs[-1]["kept"] == half and len(half) == 3
    expected = [1 / 3 if i in half else 0 for i in range(M)]
    np.testing.assert_allclose(record["weights"], expected)
    key = jax.random.fold_in(jax.random.fold_in(KEY, number), search.SEARCH)
    drawn = search_values.first_values(jax.random.fold_in(key, 0), RANGES, M)
    assert rungs[0]["parents"] == [None] * M
    assert rungs[0]["values"] == {name: of.tolist() for name, of in drawn.items()}
    assert rungs[1]["parents"] == search_values.parents_of(rungs[0]["kept"], M)
    mean = jax.tree.map(lambda x, half=half: x[np.array(half)].mean(0), candidates.params)
  for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(found.model.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_diverged_copy_begins_anew_and_is_never_merged(programs, dense, monkeypatch):
  first_values = search.first_values

  def with_one_that_diverges(*arguments):
    values = first_values(*arguments)
    values["learning_rate"][2] = 1e38
    return values

  monkeypatch.setattr(search, "first_values", with_one_that_diverges)
  end, (rung, _) = last_state(searching(engine_of(programs), dense))
  assert np.isnan(rung.validation_accuracy[2]) and np.isfinite(rung.validation_accuracy[3])
  assert 2 not in rung.kept
  assert np.isfinite(end.params["Dense_0"]["kernel"]).all()
  found = run_phases(
    programs, SPLITS, KEY, dense, plan, goal_sparsity=0.5, phases=1,
    search=Search(RANGES, (STEPS,)),
  ).records[0]  # fmt: skip
  assert found["diverged"] == [2] and found["weights"][2] == 0
  assert 2 not in found["search"][0]["kept"] and len(found["search"][0]["kept"]) == 3


@pytest.mark.slow
def test_on_a_mesh_and_copies_at_once(programs, dense):
  expected = phases(programs, dense)
  for options in ({"mesh": make_mesh(2, 2)}, {"at_once": 2}):
    found = phases(make_programs(augmentation="none", **options), dense)
    for a, b in zip(expected.records, found.records, strict=True):
      for x, y in zip(a["search"], b["search"], strict=True):
        assert (x["kept"], x["parents"]) == (y["kept"], y["parents"])
    for a, b in zip(
      jax.tree.leaves(expected.model), jax.tree.leaves(found.model), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("ranges", "ends", "copies", "words"),
  [
    ({}, (1,), 4, "at least one variable"),
    ({"a": (1.0, 1.0)}, (1,), 4, "a goes from 1 to 1"),
    ({"a": (2.0, 1.0)}, (1,), 4, "a goes from 2 to 1"),
    ({"a": (0.0, 1.0)}, (1,), 4, "a number above 0"),
    ({"a": (1.0, np.inf)}, (1,), 4, "a goes from 1 to inf"),
    ({"a": (np.nan, 1.0)}, (1,), 4, "a goes from nan"),
    ({"a": (1.0, 2.0)}, (), 4, "at least one step"),
    ({"a": (1.0, 2.0)}, (2, 2), 4, "increasing"),
    ({"a": (1.0, 2.0)}, (2, 3), 3, "at least 4"),
  ],
)
def test_what_cannot_be_searched_is_refused(ranges, ends, copies, words, rejects):
  with rejects(words):
    search.check_search(Search(ranges, ends), copies)
  with rejects("factor is 1"):
    search.check_search(Search({"a": (1.0, 2.0)}, (1,), 1.0), 4)
