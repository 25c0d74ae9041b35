"""Averages along a training: their closed forms, from the parameters of every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from engine import finish, run_phases
from main_job import SMALL, assert_same_run, config_of, results, run
from test_resume import stopped_with
from test_training import (
  BATCH,
  Tiny,
  assert_close,
  half_masks,
  ingredients,
  make_data,
  make_programs,
)

from experiments.methods.seeds import averaged
from jaxsms import make_mesh, training
from jaxsms.disk.safetensors import by_path
from jaxsms.dynamic import GradualPruning, prune_during_training
from jaxsms.training import Engine, Model, Splits, averaged_ingredients, train_copies
from jaxsms.training.averaging import average_weight, has_average
from jaxsms.training.engine import trained

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_figures")

DATA = make_data(23)  # 5 steps an epoch
SPLITS = Splits(DATA, make_data(7, 1), make_data(9, 2))
KEY, STEPS = jax.random.key(3), 12


@pytest.fixture(scope="module")
def programs():
  return make_programs()


@pytest.fixture(scope="module")
def dense():
  return Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))


def rates(m, steps=STEPS):
  return np.full([m, steps], 0.1, np.float32)


def last_state_of(
  programs, dense, chosen, *, chunk_steps=50, each=None, masks=half_masks, start=None
):
  """The state after all steps; `each` is called with every one after a chunk."""
  engine = Engine(
    programs, SPLITS, chunk_steps=chunk_steps, wants_state=lambda: each is not None
  )
  m = len(chosen["seed"])
  start = start or engine.start(pruned(dense), m)
  lrs = rates(m, max(chosen["steps"]))
  events = train_copies(engine, masks(dense.params), KEY, start, chosen, lrs)
  while True:
    try:
      event = next(events)
    except StopIteration as end:
      return end.value
    if isinstance(event, training.TrainState):
      each(jax.tree.map(np.array, event.params))


def pruned(dense):
  return dense._replace(
    params=jax.tree.map(jnp.multiply, dense.params, half_masks(dense.params))
  )


def with_averages(seeds, steps, decays, after, every):
  """Copies whose averages differ."""
  m = len(seeds)
  return averaged_ingredients(ingredients(seeds, steps), every=1) | {
    "average_decay": np.broadcast_to(np.float32(decays), [m]),
    "average_after": np.broadcast_to(np.int32(after), [m]),
    "average_every": np.broadcast_to(np.int32(every), [m]),
  }


@pytest.fixture(scope="module")
def trajectory(programs, dense):
  """Parameters [m, ...] after each step of the copies 1, 0 and 2."""
  steps = []
  last_state_of(
    programs, dense, ingredients([1, 0, 2], STEPS), chunk_steps=1, each=steps.append
  )
  assert len(steps) == STEPS
  return steps


def closed_form(steps, weights):
  weights = np.asarray(weights, np.float64)
  return jax.tree.map(
    lambda *x: (
      sum(w * np.asarray(v, np.float64) for w, v in zip(weights, x, strict=True))
      / weights.sum()
    ),
    *steps,
  )


def test_weights_of_the_newest_by_hand():
  # A decay of 1 is the mean: of the ends of three steps after the fourth, and of the last.
  found = [float(average_weight(t, 10, 1.0, 4, 3)) for t in range(1, 11)]
  np.testing.assert_allclose(found, [0, 0, 0, 0, 0, 1, 0, 0, 1 / 2, 1 / 3], rtol=1e-6)
  # Sums of 1, 1/2, 1/4: 1, 1 of 3/2, 1 of 7/4; nothing after the copy's own last step.
  found = [float(average_weight(t, 3, 0.5, 0, 1)) for t in (1, 2, 3)]
  np.testing.assert_allclose(found, [1, 2 / 3, 4 / 7], rtol=1e-6)


def test_averages_are_their_closed_forms(programs, dense, trajectory):
  """An EMA of all steps, one of every third, and the mean of the last seven, at once."""
  chosen = with_averages([1, 0, 2], STEPS, [0.8, 0.5, 1.0], [0, 2, 5], [1, 3, 1])
  found = last_state_of(programs, dense, chosen, chunk_steps=4)
  n = np.arange(1, STEPS + 1)
  weights = (
    0.8 ** (STEPS - n),
    np.where(np.isin(n, (3, 6, 9, 12)), 0.5 ** ((STEPS - n) // 3), 0),
    n > 5,
  )
  for i, weight in enumerate(weights):
    of_copy = [jax.tree.map(lambda x, i=i: x[i], step) for step in trajectory]
    expected = closed_form(of_copy, weight)
    average = jax.tree.map(lambda x, i=i: x[i], found.average)
    assert_close(average, expected, 1e-5)
    distance = [np.abs(a - b).max() for a, b in zip(
      jax.tree.leaves(average), jax.tree.leaves(of_copy[-1]), strict=True)]  # fmt: skip
    assert max(distance) > 1e-3  # not the last step
  assert_close(found.params, trajectory[-1], 1e-6)  # the training does not notice
  masks = half_masks(dense.params)
  for x, mask in zip(jax.tree.leaves(found.average), jax.tree.leaves(masks), strict=True):
    removed = np.asarray(x)[:, ~np.asarray(mask)]
    assert not removed.any() and not np.signbit(removed).any()


@pytest.mark.slow
def test_a_stop_on_the_way_does_not_enter_the_average(programs, dense):
  """A search stops copies at its rungs, here at step 7 of an average of 4, 8 and 12."""
  chosen = with_averages([1, 0], STEPS, 1.0, 2, 4)
  whole = last_state_of(programs, dense, chosen)
  until = {**chosen, "steps": np.full(2, 7, np.int32)}
  stopped = last_state_of(programs, dense, until)
  found = last_state_of(programs, dense, chosen, start=stopped)
  assert_close(found.average, whole.average, 1e-6)


def test_when_copies_have_an_average_by_hand():
  chosen = with_averages([0, 1], STEPS, 1.0, [4, 5], 3)  # steps 6, 9, 12 enter
  assert [has_average(chosen, taken) for taken in (0, 4, 5, 6, 12)] == [
    False, False, False, True, True,
  ]  # fmt: skip
  assert not has_average(ingredients([0, 1], STEPS), 12)


OTHERS = ([3, 1, 4], [12, 7, 12], [0.9, 1.0, 0.6], [0, 3, 4], [1, 2, 1])


@pytest.mark.slow
def test_averages_on_a_mesh_and_one_after_another(programs, dense):
  together = last_state_of(programs, dense, with_averages(*OTHERS))
  for other in (
    make_programs(mesh=make_mesh(2, devices=jax.devices()[:2])),
    make_programs(at_once=1),
  ):
    elsewhere = last_state_of(other, dense, with_averages(*OTHERS))
    assert_close(elsewhere.average, together.average, 1e-4)


@pytest.mark.slow
def test_copies_at_once_equal_copies_alone(programs, dense):
  """Also where they take fewer steps."""
  options = OTHERS
  together = last_state_of(programs, dense, with_averages(*options))
  for i in range(3):
    one = with_averages(*([option[i]] for option in options))
    alone = last_state_of(programs, dense, one)
    assert_close(
      jax.tree.map(lambda x, i=i: x[i], together.average),
      jax.tree.map(lambda x: x[0], alone.average),
    )


def test_a_state_without_averages_has_none(programs, dense):
  state = last_state_of(programs, dense, ingredients([0], STEPS))
  names = {name.split("/")[0] for name in by_path(state._asdict())}
  assert names == {"params", "batch_stats", "opt_state", "step"}
  assert trained(state).params is state.params


def test_an_average_of_a_copy_that_diverged_is_lost(programs, dense):
  chosen = with_averages([0, 1], STEPS, 0.9, 0, 1)
  chosen["weight_decay"] = np.array([1e-3, 1e38], np.float32)
  state = last_state_of(programs, dense, chosen)
  lost = [np.isnan(np.asarray(x)).all((1, 2)) for x in jax.tree.leaves(state.average)
          if x.ndim == 3]  # fmt: skip
  assert lost and all(x.tolist() == [False, True] for x in lost)


@pytest.mark.slow
def test_candidates_are_averages(programs, dense):
  """And the soup is their mean, with batch statistics that are its own."""
  chosen = with_averages([1, 0, 2], STEPS, 0.7, 0, 1)
  seen = []
  finished = run_phases(
    programs, SPLITS, KEY, dense, lambda record: (chosen, rates(3)), goal_sparsity=0.6,
    phases=2, on_event=seen.append,
  )  # fmt: skip
  plain = run_phases(
    programs, SPLITS, KEY, dense,
    lambda record: (ingredients([1, 0, 2], STEPS), rates(3)), goal_sparsity=0.6, phases=1,
  )  # fmt: skip
  phase = next(event for event in seen if hasattr(event, "candidates"))
  kernels = [np.asarray(p["Dense_0"]["kernel"]) for p in (
    phase.candidates.params, phase.params.params, plain.model.params)]  # fmt: skip
  np.testing.assert_allclose(kernels[0].mean(0), kernels[1], rtol=1e-6, atol=1e-7)
  assert np.abs(kernels[1] - kernels[2]).max() > 1e-3
  assert finished.records[-1]["sparsity"] == pytest.approx(0.6, abs=0.01)
  kept = [np.asarray(x) != 0 for x in jax.tree.leaves(finished.model.params)]
  for x, mask in zip(kept, jax.tree.leaves(finished.masks), strict=True):
    assert not (x & ~np.asarray(mask)).any()


def own_pass(params, images):
  """The hidden layer before its normalization, in NumPy."""
  inputs = (np.asarray(images, np.float64) / 255 - 0.5) / 0.25
  layer = params["Dense_0"]
  return inputs.reshape(len(inputs), -1) @ layer["kernel"] + layer["bias"]


def own_statistics(params, data, batches):
  hidden = own_pass(params, data.images[: batches * BATCH]).reshape(batches, BATCH, -1)
  return {"mean": hidden.mean(1).mean(0), "var": hidden.var(1).mean(0)}


def own_loss(params, statistics, data):
  norm, last = params["BatchNorm_0"], params["Dense_1"]
  hidden = (own_pass(params, data.images) - statistics["mean"]) / np.sqrt(
    np.asarray(statistics["var"], np.float64) + 1e-5
  )
  hidden = np.maximum(hidden * norm["scale"] + norm["bias"], 0)
  logits = hidden @ last["kernel"] + last["bias"]
  picked = logits[np.arange(len(logits)), np.asarray(data.labels)]
  return (scipy.special.logsumexp(logits, -1) - picked).mean()


@pytest.mark.slow
def test_batch_statistics_of_averages_are_those_of_a_pass_over_training_data(dense):
  """Of an EMA, of a mean of the last steps, and of their soup: as NumPy has them."""
  train, test = make_data(11 * BATCH), make_data(9, 2)  # 20 % of 11 batches are 2
  chosen, seen = with_averages([1, 0], STEPS, [0.7, 1.0], [0, 6], 1), []
  run_phases(
    make_programs(augmentation="none"), Splits(train, make_data(7, 1), test), KEY, dense,
    lambda record: (chosen, rates(2)), goal_sparsity=0.6, phases=1, on_event=seen.append,
  )  # fmt: skip
  phase = next(event for event in seen if hasattr(event, "candidates"))
  for copy in range(2):
    params, last_steps = jax.tree.map(
      lambda x, i=copy: np.asarray(x[i], np.float64),
      (phase.candidates.params, phase.candidates.batch_stats["BatchNorm_0"]),
    )
    measured = phase.record["candidates"][copy]["test_loss"]
    statistics = own_statistics(params, train, 2)
    assert measured == pytest.approx(own_loss(params, statistics, test), rel=1e-4)
    assert abs(measured - own_loss(params, last_steps, test)) > 3e-3
  soup, statistics = jax.tree.map(
    np.asarray, (phase.params.params, phase.params.batch_stats["BatchNorm_0"])
  )
  expected = own_statistics(soup, train, 2)
  for name in ("mean", "var"):
    np.testing.assert_allclose(statistics[name], expected[name], rtol=1e-4, atol=1e-5)
  measured = phase.record["soup"]["test_loss"]
  assert measured == pytest.approx(own_loss(soup, expected, test), rel=1e-4)


@pytest.mark.slow
def test_pruning_during_training_averages_what_follows_the_last_pruning(programs, dense):
  options = dict(pruning=GradualPruning(0.5, ramp_steps=5, mask_steps=5))
  steps = ingredients([1, 0], STEPS)
  after = averaged_ingredients(steps, after=5)
  models = [
    finish(
      prune_during_training(
        Engine(programs, SPLITS), KEY, dense, chosen, rates(2), **options
      )
    ).model.params
    for chosen in (averaged_ingredients(steps), after, steps)
  ]
  assert_close(models[0], models[1], 0)
  assert np.abs(models[1]["Dense_0"]["kernel"] - models[2]["Dense_0"]["kernel"]).max() > 0
  assert (models[0]["Dense_0"]["kernel"] == 0).sum() >= 6


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"decay": 0.0}, "decay is 0.0: it must be in (0, 1]"),
    ({"decay": 1.1}, "decay is 1.1"),
    ({"decay": float("nan")}, "decay is nan"),
    ({"every": 0}, "every is 0: it must be at least 1"),
    ({"after": 4}, "leaves out 4 of [4, 4] steps"),
    ({"after": -1}, "leaves out -1 of"),
  ],
)
def test_averages_that_cannot_be(options, words, rejects):
  with rejects(words):
    averaged_ingredients(ingredients([0, 1], 4), **options)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--average=lawa"], "known are none, ema, swa"),
    (["--ema_decay=1"], "--ema_decay is 1.0: it must be in (0, 1)"),
    (["--ema_decay=0"], "--ema_decay is 0.0"),
    (["--average_from=1"], "--average_from is 1.0: it is a share"),
    (["--average_from=-0.1"], "--average_from is -0.1"),
    (["--average_every=0"], "--average_every is 0: it must be at least 1"),
    (["--average=swa", "--retrain_epochs=0", "--baselines="],
     "--average=swa with --retrain_epochs=0"),
    (["--baselines=soup_ema", "--retrain_epochs=0"], "--baselines has soup_ema"),
    (["--ema_decay=0.9"], "--ema_decay=0.9 is of an average: give --average=ema, or one"),
    (["--average=swa", "--ema_decay=0.9"], "--ema_decay=0.9 is of an average"),
    (["--average_from=0"], "--average_from=0 is of an average: give --average=swa or"),
    (["--average_every=2"], "--average_every=2 is of an average"),
  ],
)  # fmt: skip
def test_flags_that_cannot_be(flags, words, rejects):
  with rejects(words):
    config_of(*flags)


def test_what_the_flags_stand_for():
  steps = ingredients([0, 1], [10, 21])
  assert averaged(config_of(), steps) is steps
  ema = averaged(config_of("--average=ema", "--ema_decay=0.5"), steps)
  assert ema["average_decay"].tolist() == [0.5, 0.5]
  assert ema["average_after"].tolist() == [0, 0]
  swa = averaged(config_of("--average=swa", "--average_every=3"), steps)
  assert swa["average_decay"].tolist() == [1, 1]
  assert swa["average_after"].tolist() == [5, 10]
  assert swa["average_every"].tolist() == [3, 3]
  last = averaged(config_of("--average=swa", "--average_from=0.9"), steps)
  assert last["average_after"].tolist() == [9, 18]


@pytest.mark.slow
def test_a_run_with_averages_goes_on_in_the_midst_of_a_phase(tmp_path, monkeypatch):
  """Stopped in the soup's first phase and in a baseline's; and a baseline is the flag."""
  flags = (
    *SMALL,
    "--phases=1",
    "--average=ema",
    "--ema_decay=0.8",
    "--baselines=imp_ema,imp",
  )
  assert run(*flags, f"--workdir={tmp_path / 'undisturbed'}") == 0
  killed = tmp_path / "killed"
  for chunk in (6, 3):
    status = stopped_with(monkeypatch, chunk, *flags, f"--workdir={killed}")
    assert status == 143
  assert run(*flags, f"--workdir={killed}") == 0
  assert_same_run(killed, tmp_path / "undisturbed")
  (last,) = results(killed)["seeds"][0]["phases"]
  assert last["imp"] == last["imp_ema"]


@pytest.mark.slow
def test_averages_in_networks_that_shrink_on_a_mesh(tmp_path, monkeypatch):
  flags = (*SMALL, "--average=swa", "--criterion=channels", "--shrink", "--hidden=16,16",
           "--mesh=2x1", "--baselines=imp_mx_ema")  # fmt: skip
  assert run(*flags, f"--workdir={tmp_path / 'undisturbed'}") == 0
  assert stopped_with(monkeypatch, 9, *flags, f"--workdir={tmp_path / 'killed'}") == 143
  assert run(*flags, f"--workdir={tmp_path / 'killed'}") == 0
  assert_same_run(tmp_path / "killed", tmp_path / "undisturbed")
  last = results(tmp_path / "killed")["seeds"][0]["phases"][-1]
  for name in ("soup", "imp_mx_ema"):
    assert last[name]["sparsity"] == pytest.approx(last["sparsity"])
