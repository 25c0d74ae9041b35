"""Numbers that go wrong: copies that diverge, and averages that fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import finish, run_phases
from engine import train as train_to_the_end

from experiments.reporting import tables
from experiments.reporting.cases import Case
from experiments.reporting.summary import sentences
from jaxsms import Phase, models, training
from jaxsms.baselines import imp_reprune
from jaxsms.phases import finite_models
from jaxsms.sms import phase_sparsities
from jaxsms.training import Engine, Model, Splits, TrainState
from jaxsms.training.failures import (
  MARGIN,
  averaging_failure,
  collapsed_copies,
  merged_copies,
)
from jaxsms.training.measurements import best_candidate
from jaxsms.training.merging import Merging, merging_of
from jaxsms.training.phases import merge_candidates

pytestmark = pytest.mark.usefixtures("quick_compilation")


def examples(n, seed=0):
  rng = np.random.default_rng(seed)
  labels = np.arange(n) % 3
  images = rng.integers(0, 60, (n, 4, 4, 1)) + 90 * labels[:, None, None, None]
  return training.Data(images.astype(np.uint8), labels.astype(np.int32))


@pytest.fixture(scope="module")
def programs():
  return training.make_programs(
    models.create("mlp", 3, hidden=(6,), dropout=0.0),
    training.sgd,
    training_images=lambda key, images: images / 255 - 0.5,
    evaluation_images=lambda images: images / 255 - 0.5,
    batch_size=4,
  )


@pytest.fixture(scope="module")
def dense():
  module = models.create("mlp", 3, hidden=(6,), dropout=0.0)
  return Model(*training.init_variables(module, jax.random.key(0), (4, 4, 1)))


SPLITS = Splits(examples(24), examples(9, 1), examples(9, 2))


def phases(programs, dense, rates, number=1, **options):
  """Copies with learning rates of their own."""
  m = len(rates)
  varied = {
    "seed": np.arange(m, dtype=np.int32),
    "weight_decay": np.zeros(m, np.float32),
    "steps": np.full(m, 12, np.int32),
  }

  def plan(record):
    of_phase = rates if record["phase"] == number else np.full(m, 0.1)
    return varied, np.tile(np.float32(of_phase)[:, None], (1, 12))

  return run_phases(
    programs, SPLITS, jax.random.key(0), dense, plan, goal_sparsity=0.5, phases=number,
    chunk_steps=3, **options,
  )  # fmt: skip


@pytest.mark.slow
def test_a_diverged_copy_is_frozen_and_left_out_of_everything(programs, dense):
  together = phases(programs, dense, [0.1, 1e38, 0.1])
  record = together.records[0]
  assert record["diverged"] == [1]
  assert record["weights"] == [0.5, 0, 0.5]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(together.model))
  assert all(np.isnan(value) for value in record["candidates"][1].values())
  healthy = [record["candidates"][i] for i in (0, 2)]
  for name, value in record["mean_candidate"].items():
    assert value == pytest.approx(np.mean([scores[name] for scores in healthy]))
  assert record["best_candidate"] == healthy[best_candidate(healthy)]
  assert np.isfinite([*record["prediction_ensemble"].values()]).all()
  assert np.isfinite([*record["geometry"].values()]).all()
  # As if it had never been there.
  alone = phases(programs, dense, [0.1, 0.1, 0.1]).records[0]["candidates"]
  assert healthy == [pytest.approx(alone[i], rel=1e-5) for i in (0, 2)]


@pytest.mark.slow
def test_greedy_merging_leaves_it_out_as_well(programs, dense):
  record = phases(programs, dense, [1e38, 0.1, 0.1], greedy=True).records[0]
  assert record["diverged"] == [0]
  assert record["weights"][0] == 0
  assert sum(record["weights"]) == pytest.approx(1)


def test_a_loss_that_was_not_finite_once_ends_a_copy(dense):
  """One example's loss is NaN, and nothing moves: the parameters alone would not tell."""
  images = np.array(SPLITS.train.images, np.float32)
  images[5] = np.inf
  programs = training.make_programs(
    models.create("mlp", 3, hidden=(6,), dropout=0.0),
    training.sgd,
    training_images=lambda key, images: images,
    evaluation_images=lambda images: images,
    batch_size=4,
  )
  varied = {
    "seed": np.array([0, 1, 1], np.int32),
    "weight_decay": np.zeros(3, np.float32),
    "steps": np.array([6, 2, 6], np.int32),
  }
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), dense.params)
  zero = jax.tree.map(jnp.zeros_like, dense)
  chunks = []
  trained = train_to_the_end(
    programs, training.Data(images, SPLITS.train.labels), nothing, jax.random.key(8), zero,
    varied, np.zeros((3, 6), np.float32), chunk_steps=2, on_chunk=chunks.append,
  )  # fmt: skip
  losses = np.array([chunk.loss for chunk in chunks])
  # Six steps are an epoch: two copies come by it, in other chunks, and one is done before.
  np.testing.assert_array_equal(np.isnan(losses[:, 0]), [False, False, True])
  np.testing.assert_array_equal(np.isnan(losses[:, 2]), [False, True, True])
  assert np.isfinite(losses[0, 1])
  np.testing.assert_array_equal(finite_models(trained), [False, True, False])


@pytest.mark.parametrize("name", ["large", "small", "half"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_in_a_leaf_of_any_size_makes_a_model_not_finite(name, value):
  models = {
    "large": np.ones((3, 7, 10_000), np.float32),
    "small": np.ones((3, 2), np.float32),
    "half": np.ones((3, 4, 5), jnp.bfloat16),
    "count": np.arange(3),
  }
  assert finite_models(models).tolist() == [True, True, True]
  models[name][1].flat[-1] = value
  assert finite_models(models).tolist() == [True, False, True]


TEN = np.repeat(np.arange(10), 12)  # of each class the same number: chance is 10 %


@pytest.mark.parametrize(
  "accuracies, start, expected",
  [
    # The run that showed it: one copy, at chance, from a model that knew all.
    ([0.1], 0.967, [0]),
    ([0.97, 0.98, 0.1, 0.97, 0.98], 0.95, [2]),
    ([0.97, 0.98, 0.40, 0.97, 0.98], 0.95, [2]),
    # Several do not hide one another, whether a median is among them or not.
    ([0.1, 0.97, 0.1, 0.12, 0.1], 0.95, [0, 2, 3, 4]),
    ([0.1, 0.12, 0.1], 0.95, [0, 1, 2]),
    ([np.nan, 0.97, 0.1], 0.95, [2]),
    # Worse than the others, or than the start, is no collapse.
    ([0.97, 0.98, 0.85], 0.95, []),
    ([0.70, 0.68, 0.71], 0.95, []),
    ([0.5], 0.95, []),
    # After heavy pruning all begin near chance, and some may learn little.
    ([0.6, 0.55, 0.2, 0.62], 0.11, []),
    ([0.1, 0.6, 0.6], 0.1, []),
    ([0.11, 0.1], 0.12, []),
    ([0.3, 0.2], 0.35, []),
    # A start that nobody measured: near chance, and others know far more.
    ([0.1, 0.95, 0.97], None, [0]),
    ([0.4, 0.95, 0.97], None, []),
    ([0.1, 0.12, 0.1], None, []),
  ],
)
def test_what_counts_as_collapsed(accuracies, start, expected):
  assert collapsed_copies(accuracies, TEN, start) == expected


def test_chance_is_that_of_the_most_frequent_class():
  labels = np.repeat([0, 1], [900, 100])
  assert collapsed_copies([0.99, 0.9], labels, 0.98) == []  # 8 points are not far
  labels = np.repeat([0, 1], [700, 300])
  assert collapsed_copies([0.99, 0.7], labels, 0.98) == [1]
  assert collapsed_copies([0.7], labels, 0.98) == [0]
  assert collapsed_copies([0.99, 0.85], labels, 0.98) == []  # 0.15 of 0.29 above chance


def test_few_examples_ask_for_more():
  few = np.arange(9) % 3
  assert collapsed_copies([1.0, 3 / 9], few, 8 / 9) == []  # 5 of 9 may be chance
  assert collapsed_copies([1.0, 1 / 9], few, 8 / 9) == [1]


def copies_of(model, changed):
  """Four copies of a model that differ a little; functions by index change some more."""
  rng = np.random.default_rng(0)

  def copy(i):
    params = jax.tree.map(
      lambda x: x + 0.01 * rng.normal(size=x.shape).astype(x.dtype), model.params
    )
    return changed.get(i, lambda p: p)(params)

  copies = [copy(i) for i in range(4)]
  return Model(jax.tree.map(lambda *x: jnp.stack(x), *copies), model.batch_stats)


def negated(params):
  """All that the network says is turned around, and no value is out of the ordinary."""
  return {**params, "Dense_1": jax.tree.map(jnp.negative, params["Dense_1"])}


def lost(params):
  return jax.tree.map(lambda x: x.at[...].set(jnp.nan), params)


MANY = Splits(examples(24), examples(150, 1), examples(60, 2))


@pytest.fixture(scope="module")
def trained(programs, dense):
  return phases(programs, dense, [0.1], number=3).model


def merged(programs, candidates, merge=None, greedy=False, start=None):
  merging = merging_of("greedy" if greedy else "uniform")
  if merge is not None:
    merging = Merging(lambda engine, key, base: merge)
  engine = Engine(programs, MANY)
  return merge_candidates(engine, jax.random.key(1), candidates, merging, start)


@pytest.mark.slow
def test_a_collapsed_copy_is_left_out_of_everything_but_its_own_figures(
  programs, trained, assert_trees_equal, caplog
):
  whole = copies_of(trained, {})
  model, record = merged(programs, copies_of(trained, {2: negated, 0: lost}), start=0.95)
  assert record["collapsed"] == [2]
  assert record["diverged"] == [0]
  assert record["weights"] == [0, 0.5, 0, 0.5]
  assert "all_collapsed" not in record
  assert merged_copies(record) == [1, 3]
  assert "copies [2] collapsed" in caplog.text
  assert record["candidates"][2]["validation_accuracy"] < 0.5
  rest = Model(jax.tree.map(lambda x: x[jnp.array([1, 3])], whole.params), {})
  expected_model, expected = merged(programs, rest, start=0.95)
  assert_trees_equal(model, expected_model, atol=1e-6)
  for name in (
    "soup", "mean_candidate", "max_candidate", "prediction_ensemble", "geometry",
    "ensemble_agreement", "best_candidate",
  ):  # fmt: skip
    assert record[name] == pytest.approx(expected[name], rel=1e-5), name
  assert "averaging_failed" not in record
  (first, second) = tables.notes([{"seed": 7, "phases": [{"phase": 1, **record}]}])
  assert first == "Seed 7, phase 1: 1 of 4 copies diverged and is left out (from 0: 0)."
  assert second == "Seed 7, phase 1: 1 of 4 copies collapsed and is left out (from 0: 2)."


@pytest.mark.slow
def test_averaging_that_fails_is_not_hidden_by_a_collapsed_copy(programs, trained):
  """The soup is held against the worst candidate: that one would make any soup good."""

  def half_bad(candidates):
    bad = jax.tree.map(lambda x: -x[0], candidates.params)
    return candidates._replace(params=bad)

  copies = copies_of(trained, {3: negated})
  _, record = merged(programs, copies, start=0.95, merge=half_bad)
  assert record["collapsed"] == [3]
  failed = record["averaging_failed"]
  good = [record["candidates"][i]["validation_accuracy"] for i in range(3)]
  assert failed["worst_candidate_validation_accuracy"] == min(good)
  assert failed["copies"] == [0, 1]


@pytest.mark.slow
def test_where_all_collapsed_they_are_merged_and_said(programs, trained):
  _, record = merged(
    programs, copies_of(trained, dict.fromkeys(range(4), negated)), start=1
  )
  assert record["collapsed"] == [0, 1, 2, 3]
  assert record["all_collapsed"]
  assert record["weights"] == [0.25] * 4
  assert merged_copies(record) == [0, 1, 2, 3]
  (note,) = tables.notes([{"seed": 7, "phases": [{"phase": 1, **record}]}])
  assert "all its copies collapsed on validation data (from 0: 0, 1, 2, 3)" in note
  _, record = merged(programs, copies_of(trained, {}), start=1)
  assert record["collapsed"] == []


@pytest.mark.slow
def test_greedy_merging_leaves_a_collapsed_copy_out(programs, trained):
  copies = copies_of(trained, {1: negated})
  _, record = merged(programs, copies, start=0.95, greedy=True)
  assert record["collapsed"] == [1]
  assert record["weights"][1] == 0
  assert sum(record["weights"]) == pytest.approx(1)


@pytest.mark.slow
def test_a_phase_that_makes_its_only_copy_collapse_says_so(programs, dense):
  """Steps far too large, whose values stay finite; as IMP with many epochs may take."""
  varied = {
    "seed": np.zeros(1, np.int32),
    "weight_decay": np.zeros(1, np.float32),
    "steps": np.full(1, 12, np.int32),
  }

  def plan(record):
    rate = {1: 0.1, 2: 0.1, 3: 300.0}[record["phase"]]
    return varied, np.full((1, 12), rate, np.float32)

  found = run_phases(
    programs, MANY, jax.random.key(0), dense, plan, goal_sparsity=0.3, phases=3,
    chunk_steps=6,
  )  # fmt: skip
  first, before, second = found.records
  assert [first["collapsed"], before["collapsed"]] == [[], []]
  assert second["diverged"] == []
  assert second["collapsed"] == [0]
  assert second["all_collapsed"]
  assert second["weights"] == [1]
  assert (
    second["soup"]["validation_accuracy"] < 0.5 < second["pruned"]["validation_accuracy"]
  )


def test_a_method_that_collapsed_is_named_wherever_it_is_compared():
  entry = {"seed": 5, "dense": {"test_accuracy": 0.98}, "phases": []}
  imp = {"test_accuracy": 0.12, "collapsed": [0], "all_collapsed": True}
  soup = {"test_accuracy": 0.97}
  entry["phases"] = [{"phase": 1, "sparsity": 0.5, "soup": soup, "imp": imp}]
  (note,) = tables.notes([entry])
  assert note.startswith("Seed 5, phase 1, IMP: its copy collapsed on validation data")
  flags = {"ingredients": 3}
  text = " ".join(sentences(Case("", flags, [entry])))
  assert (
    "above IMP, which trains as many steps as one copy, which collapsed with seed 5"
    in (text)
  )
  entry["phases"][0]["all_collapsed"] = True
  text = " ".join(sentences(Case("", flags, [entry])))
  assert "With seed 5 all its copies collapsed: the soup is not to be trusted." in text


@pytest.mark.slow
def test_imp_reprune_leaves_a_diverged_run_out_for_good(dense, rejects, caplog):
  own = training.make_programs(
    models.create("mlp", 3, hidden=(6,), dropout=0.0),
    training.sgd,
    training_images=lambda key, images: images / 255 - 0.5,
    evaluation_images=lambda images: images / 255 - 0.5,
    batch_size=4,
    own_masks=True,
  )

  def reprune(first, later, copies=3):
    varied = {
      "seed": np.arange(copies, dtype=np.int32),
      "weight_decay": np.zeros(copies, np.float32),
      "steps": np.full(copies, 12, np.int32),
    }

    def plan(record):
      rates = np.float32(first if record["phase"] == 1 else later)
      return varied, np.tile(rates[:, None], (1, 12))

    engine = Engine(own, SPLITS, chunk_steps=3)
    runs, _, records = finish(
      imp_reprune(engine, jax.random.key(0), dense, plan, phase_sparsities(0.5, 2), copies)
    )
    return runs.average, records

  model, records = reprune([1e38, 0.1, 0.1], [0.1, 0.1, 0.1])
  assert [record["diverged"] for record in records] == [[0], [0]]
  assert "copies [0] diverged" in caplog.text
  _, expected = reprune([0.1, 0.1, 0.1], [0.1, 0.1, 0.1])
  for record, whole in zip(records, expected, strict=True):
    for i in (1, 2):  # each run is what it would be without the other
      assert record["candidates"][i] == pytest.approx(whole["candidates"][i], rel=1e-4)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))
  with rejects("3 copies is not finite after step", FloatingPointError):
    reprune([0.1, 0.1, 0.1], [1e38, 1e38, 1e38])


def test_all_diverging_ends_with_one_sentence(programs, dense, rejects):
  done = []

  def keep(event):
    if isinstance(event, Phase):
      done.append(event)

  with rejects("2 copies is not finite after step", FloatingPointError):
    phases(programs, dense, [1e38, 1e38], number=2, on_event=keep)
  assert [phase.record["phase"] for phase in done] == [1]  # the last good soup was given


def test_a_kept_phase_and_state_go_on_as_if_there_had_been_no_break(programs, dense):
  done, states = [], []

  def keep(event):
    if isinstance(event, Phase):
      done.append(event)
    if isinstance(event, TrainState):
      states.append(jax.tree.map(np.array, event))

  whole = phases(
    programs, dense, [0.1, 0.2], number=2, wants_state=lambda: True, on_event=keep
  )
  assert [int(state.step[0]) for state in states] == [3, 6, 9, 12] * 2
  for state in states[4:]:
    again = phases(
      programs, done[0].params, [0.1, 0.2], number=2, done=1, masks=done[0].masks,
      state=state,
    )  # fmt: skip
    np.testing.assert_equal(again.records, whole.records[1:])  # NaN where undefined
    for a, b in zip(jax.tree.leaves(again[:2]), jax.tree.leaves(whole[:2]), strict=True):
      np.testing.assert_array_equal(a, b)


def test_the_barrier_between_two_candidates_is_the_evidence():
  """Two minima of a double well, whose average lies on the hill between them."""
  candidates = {"x": jnp.array([[-1.0], [1.0], [jnp.nan]])}
  weights = np.array([0.5, 0.5, 0])

  def evaluate(model):
    x = float(model["x"][0])
    return {"validation_loss": (x**2 - 1) ** 2, "validation_accuracy": 0.9}

  scores = [{"validation_accuracy": a} for a in (0.9, 0.8, np.nan)]
  fine = {"validation_accuracy": 0.8 - MARGIN}
  assert averaging_failure(evaluate, candidates, weights, fine, scores) is None
  soup = {"validation_accuracy": 0.75}
  found = averaging_failure(evaluate, candidates, weights, soup, scores)
  assert found["copies"] == [0, 1]
  assert found["worst_candidate_validation_accuracy"] == 0.8
  assert found["barrier"] == pytest.approx(1.0)
  expected = (np.linspace(-1, 1, 11) ** 2 - 1) ** 2
  np.testing.assert_allclose(found["losses"], expected, atol=1e-6)


def test_a_failed_average_is_in_the_record_and_below_the_table(programs, dense):
  def bad_merge(candidates):
    return jax.tree.map(lambda x: -x[0], candidates)

  record = phases(programs, dense, [0.05, 0.04, 1e38], merge=bad_merge).records[0]
  failed = record["averaging_failed"]
  worst = min(scores["validation_accuracy"] for scores in record["candidates"][:2])
  assert failed["soup_validation_accuracy"] == record["soup"]["validation_accuracy"] < worst
  assert failed["worst_candidate_validation_accuracy"] == worst
  for i, end in ((0, 0), (1, -1)):
    expected = record["candidates"][i]["validation_loss"]
    assert failed["losses"][end] == pytest.approx(expected, rel=1e-5)
  notes = tables.notes([{"seed": 7, "phases": [record]}])
  assert notes[0].startswith("Seed 7, phase 1: 1 of 3 copies diverged")
  assert "averaging failed" in notes[1]
  assert f"the loss rises by {failed['barrier']:.3g}" in notes[1]
  phase = {"phase": 2, "candidates": [{}] * 3, "imp_reprune": {"diverged": [0, 2]}}
  (note,) = tables.notes([{"seed": 8, "phases": [phase]}])
  assert note.startswith("Seed 8, phase 2, IMP-RePrune: ")
  assert "left out (from 0: 0, 2)" in note
