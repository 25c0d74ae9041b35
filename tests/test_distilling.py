"""Soups that learn from their candidates: labels, loss, training, going on."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from by_hand import own_batches, own_images, own_optimizer
from main_job import SMALL, assert_same_run, config_of, results, run
from test_kills import launch, tear  # noqa: F401
from test_resume import stopped_with
from test_training import (
  BATCH,
  Tiny,
  assert_close,
  ingredients,
  make_data,
  make_programs,
)

from jaxsms import Phase, checkpoint, training
from jaxsms.training import Engine, Model, Splits, TrainState
from jaxsms.training.distilling import STREAM, Distillation, teacher_weights
from jaxsms.training.measurements import RECALIBRATION, recalibrated
from jaxsms.training.phases import PhaseRecipe, Start, training_phases
from jaxsms.training.soft_labels import SoftLabels, mean_loss, soft_labels
from jaxsms.training.state import Teacher

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_figures")

DATA = make_data(23)  # 5 steps an epoch
KEY, STEPS, LAST, RATE, DECAY = jax.random.key(3), 7, 8, 0.1, 1e-3


@pytest.fixture(scope="module")
def dense():
  return Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))


@pytest.fixture(scope="module")
def engine():
  programs = make_programs(augmentation="none")
  return Engine(programs, Splits(DATA, make_data(7, 1), make_data(9, 2)), chunk_steps=3)


def phases(engine, start, sparsities, temperature=2.0, chosen=None):
  def plan(m, steps):
    def of(record):
      same = ingredients(range(m), steps, DECAY) if chosen is None or m == 1 else chosen
      return same, np.full((m, steps), RATE, np.float32)

    return of

  distillation = temperature and Distillation(plan(1, LAST), temperature)
  return training_phases(
    engine,
    KEY,
    start,
    plan(3, STEPS),
    sparsities,
    PhaseRecipe(distillation=distillation),
  )


def test_labels_are_the_mean_prediction_of_the_models_that_count():
  rng = np.random.default_rng(0)
  variables = [Tiny().init(jax.random.key(i), np.zeros((1, 4, 4, 1))) for i in range(3)]
  images = rng.normal(size=(5, 4, 4, 1)).astype(np.float32)
  logits = np.stack([Tiny().apply(v, images) for v in variables[:2]])
  variables[2] = jax.tree.map(lambda x: x * np.nan, variables[2])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *variables)
  weights, temperature = jnp.array([0.5, 0.5, 0.0]), jnp.float32(3.0)
  teacher = Teacher(stacked["params"], stacked["batch_stats"], weights, temperature)
  found = soft_labels(Tiny(), teacher, images, jnp.arange(5))
  expected = scipy.special.softmax(logits.astype(np.float64) / 3, -1).mean(0)
  np.testing.assert_allclose(found.probabilities, expected, rtol=1e-5)
  assert found.labels.tolist() == list(range(5))
  assert found.temperature.tolist() == [3.0] * 5


def test_the_loss_and_its_gradient_by_hand():
  """Of the logits, T (q - p) / n: as large whatever T, where p and q are nearly uniform."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(6, 4)).astype(np.float32)
  p = scipy.special.softmax(rng.normal(size=(6, 4)), -1)
  for t in (0.5, 1.0, 4.0):
    soft = SoftLabels(jnp.zeros(6, int), jnp.asarray(p, jnp.float32), jnp.full([6], t))
    loss, gradient = jax.value_and_grad(mean_loss)(logits, soft)
    log_q = scipy.special.log_softmax(logits.astype(np.float64) / t, -1)
    assert float(loss) == pytest.approx(-(t**2) * (p * log_q).sum(-1).mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, t * (np.exp(log_q) - p) / 6, atol=1e-6)


def own_training(soup, masks, teachers, temperature):
  """What the engine does with one soup, written out with Flax and optax alone."""
  images = own_images(DATA.images)
  optimizer = own_optimizer(RATE, DECAY)

  def mean_prediction(batch):
    logits = jnp.stack([
      Tiny().apply({"params": p, "batch_stats": s}, images[batch]) for p, s in teachers
    ])  # fmt: skip
    return jax.nn.softmax(logits / temperature).mean(0)

  def loss(params, batch_stats, batch, wanted):
    logits, updated = Tiny().apply(
      {"params": params, "batch_stats": batch_stats}, images[batch], train=True,
      mutable=["batch_stats"],
    )  # fmt: skip
    log_q = jax.nn.log_softmax(logits / temperature)
    return -(temperature**2) * (wanted * log_q).sum(-1).mean(), updated["batch_stats"]

  key = jax.random.fold_in(jax.random.fold_in(KEY, 2), RECALIBRATION)
  key = jax.random.fold_in(jax.random.fold_in(key, STREAM), 0)
  (params, batch_stats), state = soup, optimizer.init(soup.params)
  for batch in own_batches(key, len(DATA.labels), BATCH, LAST):
    grads, batch_stats = jax.grad(loss, has_aux=True)(
      params, batch_stats, batch, mean_prediction(batch)
    )
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(lambda p, u, m: (p + u) * m, params, updates, masks)
  return params


@pytest.mark.slow
def test_the_last_soup_learns_from_its_candidates(engine, dense):
  plain = [e for e in phases(engine, Start(dense), {1: 0.4, 2: 0.6}, None)
           if isinstance(e, Phase)]  # fmt: skip
  states, found = [], []
  watched = engine._replace(wants_state=lambda: True)
  for event in phases(watched, Start(dense), {1: 0.4, 2: 0.6}):
    if isinstance(event, TrainState) and event.teacher:
      states.append(jax.tree.map(np.array, event))
    if isinstance(event, Phase):
      found.append(event)
  first, last = found
  assert first.record == plain[0].record  # it is the last soup's alone
  assert "merged" not in first.record
  assert last.record["merged"] == plain[1].record["soup"] != last.record["soup"]
  assert last.record["candidates"] == plain[1].record["candidates"]
  key = jax.random.fold_in(jax.random.fold_in(KEY, 2), RECALIBRATION)
  teachers = recalibrated(engine, key, plain[1].candidates)
  teachers = [jax.tree.map(lambda x, i=i: x[i], teachers) for i in range(3)]
  expected = own_training(plain[1].params, plain[1].masks, teachers, 2.0)
  assert_close(last.params.params, expected, 2e-5)
  moved = (
    last.params.params["Dense_0"]["kernel"] - plain[1].params.params["Dense_0"]["kernel"]
  )
  assert np.abs(moved).max() > 1e-3
  for x, mask in zip(
    jax.tree.leaves(last.params.params), jax.tree.leaves(last.masks), strict=True
  ):
    assert not np.asarray(x)[~np.asarray(mask)].any()

  # From a state in its midst, with the soup of the phase before: bit by bit the same.
  assert [int(s.step[0]) for s in states] == [3, 5, 8]
  restored = jax.tree.map(jnp.asarray, states[0])
  again = list(phases(engine, Start(first.params, first.masks, restored), {2: 0.6}))
  assert sum(not isinstance(event, Phase) for event in again) == 2  # chunks that were left
  for a, b in zip(
    jax.tree.leaves(again[-1].params), jax.tree.leaves(last.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert again[-1].record == last.record


@pytest.mark.slow
def test_a_candidate_that_diverged_teaches_nothing(engine, dense):
  chosen = ingredients([0, 1, 2], STEPS, DECAY)
  chosen["weight_decay"] = np.array([DECAY, 1e38, DECAY], np.float32)
  *_, last = phases(engine, Start(dense), {1: 0.4}, chosen=chosen)
  assert last.record["diverged"] == [1]
  assert np.isfinite(last.record["soup"]["test_loss"])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(last.params.params))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_temperatures_that_cannot_be(engine, dense, temperature, rejects):
  with rejects("it must be a number above 0"):
    next(phases(engine, Start(dense), {1: 0.4}, temperature))


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--temperature=0"], "--temperature is 0.0: it must be a number above 0"),
    (["--distill_epochs=-1"], "--distill_epochs is -1"),
    (
      ["--baselines=soup_distilled", "--distill_epochs=0"],
      "--distill_epochs is 0: soup_di",
    ),
    (["--temperature=2"], "--temperature=2 is of soup_distilled: give it among"),
    (["--distill_epochs=3"], "--distill_epochs=3 is of soup_distilled"),
    (["--baselines=soup_distilled", "--ingredients=1"], "with --ingredients=1"),
  ],
)
def test_flags_that_cannot_be(flags, words, rejects):
  with rejects(words):
    config_of(*flags)


@pytest.mark.slow
@pytest.mark.parametrize(
  "more",
  [
    (),
    ("--criterion=channels", "--shrink", "--hidden=16,16", "--mesh=2x1",
     "--average=ema", "--ood=fog", "--ood_severities=3"),
  ],
)  # fmt: skip
def test_a_run_is_stopped_while_a_soup_learns(more, tmp_path, monkeypatch):
  flags = (
    *SMALL,
    "--phases=1",
    "--distill_epochs=2",
    "--baselines=soup_distilled,imp",
    *more,
  )
  assert run(*flags, f"--workdir={tmp_path / 'undisturbed'}") == 0
  killed = tmp_path / "killed"
  # Chunks: four of dense training, two of the soup, two of its copies, then it learns.
  for chunk in (9, 2):
    assert stopped_with(monkeypatch, chunk, *flags, f"--workdir={killed}") == 143
  assert run(*flags, f"--workdir={killed}") == 0
  assert_same_run(killed, tmp_path / "undisturbed")
  (last,) = results(killed)["seeds"][0]["phases"]
  assert last["soup_distilled"]["sparsity"] == pytest.approx(last["sparsity"])
  assert last["soup_distilled"]["test_loss"] != last["soup"]["test_loss"]
  assert set(last["uncertainty"]) >= {"validation", "test"}
  if more:
    assert 0 <= last["uncertainty"]["corrupted"]["fog"]["auroc_of_entropy"] <= 1


@pytest.mark.slow
def test_killed_while_a_soup_learns_it_ends_as_if_undisturbed(tmp_path, launch):  # noqa: F811
  flags = (*SMALL, "--phases=1", "--distill_epochs=2", "--baselines=soup_distilled")
  whole, killed = tmp_path / "undisturbed", tmp_path / "killed"
  assert launch(*flags, f"--workdir={whole}")[0] == 0
  # Four chunks of dense training, two of the soup, two of its copies, four in which it
  # learns. What a kill leaves is at least the checkpoint before the last one.
  for fault in ("chunk:12", "save arrays:1", "chunk:1"):
    status, said = launch(*flags, f"--workdir={killed}", fault=fault)
    assert status == -signal.SIGKILL, (fault, said)
    folders = sorted((killed / "checkpoints").iterdir())
    whole_ones = [folder for folder in folders if not checkpoint.is_unfinished(folder)]
    manifest = checkpoint.read_manifest(whole_ones[-1])
    assert manifest["meta"]["work"]["method"] == "soup_distilled"
    assert "state/teacher/weights" in manifest["leaves"], fault
    tear(killed)
  status, said = launch(*flags, f"--workdir={killed}")
  assert status == 0 and said.startswith("resuming")
  assert_same_run(killed, whole)


def test_teachers_are_the_copies_in_the_soup():
  """Here the second copy diverged, the third collapsed, and the merge left the last out."""
  record = {"weights": [0.6, 0, 0, 0.4, 0], "diverged": [1], "collapsed": [2]}
  assert teacher_weights(record).tolist() == [0.5, 0, 0, 0.5, 0]
