"""The engine: copies trained together are what each would have been alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import run_phases
from engine import train as train_to_the_end

from jaxsms import Phase, make_mesh, models, training
from jaxsms import data as data_room
from jaxsms.training import Engine, Model, Splits
from jaxsms.training.engine import one_model
from jaxsms.training.loop import chunk_length, train_copies
from jaxsms.training.measurements import best_candidate, measure
from jaxsms.training.step import ORDER, Recipe, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEAN, STD = (0.5,), (0.25,)
BATCH = 4


class Tiny(nn.Module):
  """A dense layer and a batch normalization: enough to tell copies apart."""

  norm_momentum: float = 0.9

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Dense(6)(images.reshape(len(images), -1))
    x = nn.BatchNorm(use_running_average=not train, momentum=self.norm_momentum)(x)
    return nn.Dense(3)(nn.relu(x))


def make_data(n, seed=0):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, n)
  images = rng.integers(0, 256, (n, 4, 4, 1)) // 2 + 60 * (labels[:, None, None, None] == 1)
  return training.Data(jnp.asarray(images.astype(np.uint8)), jnp.asarray(labels, jnp.int32))


def make_programs(module=None, augmentation="noise", batch_size=BATCH, **options):
  return training.make_programs(
    module or Tiny(),
    functools.partial(training.sgd, nesterov=True),
    training_images=lambda key, images: data_room.training_images(
      augmentation, key, images, MEAN, STD
    ),
    evaluation_images=lambda images: data_room.evaluation_images(images, MEAN, STD),
    batch_size=batch_size,
    **options,
  )


@pytest.fixture(scope="module")
def programs():
  return make_programs()


@pytest.fixture(scope="module")
def plain_programs():
  return make_programs(augmentation="none")


@pytest.fixture(scope="module")
def data():
  return make_data(23)


@pytest.fixture(scope="module")
def dense():
  return Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))


def all_true(params):
  return jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)


def half_masks(params):
  return jax.tree.map(lambda x: (jnp.arange(x.size) % 2 == 0).reshape(x.shape), params)


def ingredients(seeds, steps, weight_decay=1e-3):
  m = len(seeds)
  return {
    "seed": np.array(seeds, np.int32),
    "weight_decay": np.broadcast_to(np.float32(weight_decay), [m]),
    "steps": np.broadcast_to(np.int32(steps), [m]),
  }


def train(programs, data, dense, chosen, lrs, masks=None, **options):
  return train_to_the_end(
    programs,
    data,
    all_true(dense.params) if masks is None else masks,
    jax.random.key(7),
    dense,
    chosen,
    np.asarray(lrs, np.float32),
    **options,
  )


def assert_close(a, b, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def copy_of(models_, i):
  return jax.tree.map(lambda x: x[i], models_)


def test_copies_together_equal_copies_alone(programs, data, dense):
  lrs = np.stack([np.linspace(0.2, 0, 12), np.linspace(0.1, 0, 12), np.full(12, 0.05)])
  together = train(
    programs, data, dense, ingredients([3, 1, 4], 12, [0.0, 1e-2, 1e-3]), lrs
  )
  for i, (seed, decay) in enumerate([(3, 0.0), (1, 1e-2), (4, 1e-3)]):
    alone = train(programs, data, dense, ingredients([seed], 12, decay), lrs[i : i + 1])
    assert_close(copy_of(together, i), copy_of(alone, 0))
  assert np.abs(together.params["Dense_0"]["kernel"][0]
                - together.params["Dense_0"]["kernel"][1]).max() > 1e-3  # fmt: skip


def test_removed_entries_stay_zero_and_kept_ones_move(programs, data, dense):
  masks = half_masks(dense.params)
  start = Model(
    jax.tree.map(lambda x, m: jnp.where(m, x, 0), dense.params, masks), dense[1]
  )
  trained = train(
    programs, data, start, ingredients([0, 1], 10), np.full((2, 10), 0.1), masks
  )
  for old, new, mask in zip(
    *map(jax.tree.leaves, (start.params, trained.params, masks)), strict=True
  ):
    assert (np.asarray(new)[:, ~np.asarray(mask)] == 0).all()
    moved = np.asarray(new)[:, np.asarray(mask)] != np.asarray(old)[np.asarray(mask)]
    assert moved.mean() > 0.9


@pytest.mark.parametrize("chunk_steps", [1, 2, 3, 100])
def test_result_does_not_depend_on_the_chunks(programs, data, dense, chunk_steps):
  lrs = np.linspace(0.1, 0.01, 13)[None]
  whole = train(programs, data, dense, ingredients([5], 13), lrs, chunk_steps=5)
  cut = train(programs, data, dense, ingredients([5], 13), lrs, chunk_steps=chunk_steps)
  assert_close(whole, cut, 1e-6)


def test_a_chunk_that_is_ready_is_not_held_back(programs, data, dense):
  """Where a program is waited for, its chunk is shown before the next one begins."""
  begun = []

  def train(*arguments):
    begun.append(True)
    return jax.block_until_ready(programs.train(*arguments))

  waiting = programs._replace(train=train)
  chosen = ingredients([0, 1], 10)
  engine = Engine(waiting, Splits(data, data, data), chunk_steps=5)
  events = train_copies(
    engine, all_true(dense.params), jax.random.key(0), engine.start(dense, 2), chosen,
    np.full((2, 10), 0.1, np.float32),
  )  # fmt: skip
  for n, chunk in enumerate(events, 1):
    assert len(begun) == n
    assert chunk.step == 5 * n
  assert n == 2


def test_copies_of_different_length_stop_when_they_are_done(programs, data, dense):
  lrs = np.stack([np.linspace(0.1, 0.05, 11)] * 3)
  together = train(programs, data, dense, ingredients([2, 2, 2], [3, 7, 11]), lrs)
  for i, steps in enumerate([3, 7, 11]):
    alone = train(programs, data, dense, ingredients([2], steps), lrs[:1, :steps])
    assert_close(copy_of(together, i), copy_of(alone, 0))


def test_an_epoch_sees_every_example_once(plain_programs, dense):
  data = make_data(BATCH * 5)
  chunks = []
  train(
    plain_programs, data, dense, ingredients([0, 1], 5), np.zeros((2, 5)),
    chunk_steps=1, on_chunk=chunks.append,
  )  # fmt: skip
  # Reconstruct the batches from the definition of the keys, and their losses by hand.
  module = Tiny()
  for copy, seed in enumerate((0, 1)):
    key = jax.random.fold_in(jax.random.key(7), seed)
    order_key = jax.random.fold_in(jax.random.fold_in(key, ORDER), 0)
    order = np.asarray(jax.random.permutation(order_key, BATCH * 5))
    assert sorted(order) == list(range(BATCH * 5))
    for number, chunk in enumerate(chunks):
      batch = order[number * BATCH : (number + 1) * BATCH]
      images = (np.asarray(data.images[batch]) / 255 - 0.5) / 0.25
      logits, _ = module.apply(
        {"params": dense.params, "batch_stats": dense.batch_stats},
        images.astype(np.float32), train=True, mutable=["batch_stats"],
      )  # fmt: skip
      log_p = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
      expected = -np.mean([log_p[i, data.labels[b]] for i, b in enumerate(batch)])
      np.testing.assert_allclose(chunk.loss[copy], expected, rtol=1e-4)


def test_batch_order_follows_the_seed_alone(plain_programs, data, dense):
  chunks = []
  train(
    plain_programs, data, dense, ingredients([0, 0, 1], 5, [0.0, 0.1, 0.0]),
    np.zeros((3, 5)), chunk_steps=1, on_chunk=chunks.append,
  )  # fmt: skip
  losses = np.array([chunk.loss for chunk in chunks])
  np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-6)
  assert np.abs(losses[:, 0] - losses[:, 2]).min() > 1e-4


def test_next_epoch_has_another_order(plain_programs, dense):
  data, chunks = make_data(BATCH * 3), []
  train(
    plain_programs, data, dense, ingredients([0], 6), np.zeros((1, 6)),
    chunk_steps=1, on_chunk=chunks.append,
  )  # fmt: skip
  losses = np.array([chunk.loss[0] for chunk in chunks])
  assert [chunk.epoch for chunk in chunks] == [1, 1, 1, 2, 2, 2]
  assert np.abs(losses[:3] - losses[3:]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("shape", [pytest.param((2, 1), marks=pytest.mark.slow), (2, 2)])
def test_training_on_a_mesh_equals_training_without(data, dense, programs, shape):
  lrs, chosen = np.full((3, 6), 0.1), ingredients([0, 1, 2], 6)
  expected = train(programs, data, dense, chosen, lrs)
  sharded = make_programs(mesh=make_mesh(*shape, devices=jax.devices()[: np.prod(shape)]))
  assert_close(train(sharded, data, dense, chosen, lrs), expected)


@pytest.mark.parametrize("stop", [1, 5, 6])
def test_a_kept_state_goes_on_as_if_there_had_been_no_break(programs, data, dense, stop):
  lrs, chosen = np.full((2, 11), 0.1), ingredients([0, 1], [8, 11])
  arguments = (programs, data, all_true(dense.params), jax.random.key(7))
  whole = train(programs, data, dense, chosen, lrs, chunk_steps=1)
  state = training.start(*dense, programs.optimizer(0.0, 0.0), 2)
  chunks = training.train_chunks(*arguments, state, chosen, lrs, 1)
  for _ in range(stop):
    state, _ = next(chunks)
  kept = jax.tree.map(np.asarray, state)
  *_, (state, _) = training.train_chunks(*arguments, kept, chosen, lrs, 1)
  assert_close((state.params, state.batch_stats), whole, 0)


@pytest.mark.slow
def test_masks_of_each_copys_own(programs, data, dense):
  masks = [half_masks(dense.params), all_true(dense.params)]
  start = jax.tree.map(lambda x, m: jnp.where(m, x, 0), dense.params, masks[0])
  model, lrs, chosen = Model(start, dense[1]), np.full((2, 6), 0.1), ingredients([3, 3], 6)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *masks)
  mesh = make_mesh(4, devices=jax.devices()[:4])
  expected = [
    copy_of(train(programs, data, model, ingredients([3], 6), lrs[:1], m), 0) for m in masks
  ]
  for on in (None, mesh):
    both = train(make_programs(own_masks=True, mesh=on), data, model, chosen, lrs, stacked)
    for i in range(2):
      assert_close(copy_of(both, i), expected[i])


@pytest.mark.slow
def test_phases_on_a_mesh_equal_phases_without(data):
  module = models.create("mlp", 3, hidden=(5,), dropout=0.0)
  dense = Model(*training.init_variables(module, jax.random.key(0), (4, 4, 1)))
  splits = Splits(data, make_data(7, 1), make_data(9, 2))
  found = []
  for mesh in (None, make_mesh(2, devices=jax.devices()[:2])):
    programs = make_programs(module, mesh=mesh)
    found.append(
      run_phases(
        programs, splits, jax.random.key(0), dense,
        lambda r: (ingredients([0, 1, 2], 6), np.full((3, 6), 0.1)),
        goal_sparsity=0.8, phases=3,
      )
    )  # fmt: skip
    assert programs.train.on(mesh, 3)._cache_size() == 1
  assert_close(found[0][0], found[1][0])
  for a, b in zip(found[0][2], found[1][2], strict=True):
    assert a["soup"] == pytest.approx(b["soup"], abs=1e-5)


@pytest.mark.slow
def test_three_phases_compile_once(data, dense):
  programs = make_programs()
  splits = Splits(data, make_data(7, 1), make_data(9, 2))
  spe = len(data.labels) // BATCH

  def plan(record):
    lr = 0.1 / record["phase"]
    return ingredients([0, 1], 2 * spe, 1e-3 * record["phase"]), np.full((2, 2 * spe), lr)

  seen = []

  def keep(event):
    if isinstance(event, Phase):
      seen.append(event.record["phase"])

  _, masks, records = run_phases(
    programs, splits, jax.random.key(0), dense, plan,
    goal_sparsity=0.9, phases=3, on_event=keep,
  )  # fmt: skip
  assert seen == [1, 2, 3]
  assert programs.train.on(None, 2)._cache_size() == 1
  n = sum(
    x.size for x, f in ((dense.params[d]["kernel"], 1) for d in ("Dense_0", "Dense_1"))
  )
  for t, record in enumerate(records, 1):
    assert record["sparsity"] == pytest.approx(round(n * (1 - 0.1 ** (t / 3))) / n)
    assert len(record["candidates"]) == 2
    for name, value in record["mean_candidate"].items():
      assert value == pytest.approx(np.mean([c[name] for c in record["candidates"]]))
  removed = sum(int((~m).sum()) for m in jax.tree.leaves(masks))
  assert removed == round(0.9 * n)


@pytest.mark.slow
def test_one_copy_without_noise_is_imp_and_needs_no_second_evaluation(
  data, dense, programs
):
  splits = Splits(data, make_data(7, 1), make_data(9, 2))
  model, _masks, records = run_phases(
    programs, splits, jax.random.key(0), dense,
    lambda r: (ingredients([0], 5), np.full((1, 5), 0.1)), goal_sparsity=0.5, phases=1,
  )  # fmt: skip
  assert records[0]["soup"] == records[0]["candidates"][0] == records[0]["best_candidate"]
  alone = train_scores(programs, splits, model)
  assert alone == pytest.approx(records[0]["soup"])


def train_scores(programs, splits, model):
  return measure(Engine(programs, splits), one_model(model)).scores[0]


@pytest.mark.slow
def test_equal_copies_are_their_own_ensemble(data, dense, programs):
  splits = Splits(data, make_data(7, 1), make_data(9, 2))
  _, _, records = run_phases(
    programs, splits, jax.random.key(0), dense,
    lambda r: (ingredients([2, 2], 5), np.full((2, 5), 0.1)), goal_sparsity=0.5, phases=1,
  )  # fmt: skip
  record = records[0]
  assert record["ensemble_agreement"] == {"validation": 1.0, "test": 1.0}
  assert record["prediction_ensemble"] == pytest.approx(record["soup"], abs=1e-5)


def test_no_retraining_only_prunes(data, dense, programs):
  splits = Splits(data, make_data(7, 1), make_data(9, 2))
  model, masks, _ = run_phases(
    programs, splits, jax.random.key(0), dense,
    lambda r: (ingredients([0, 1], 0), np.zeros((2, 0))), goal_sparsity=0.8, phases=2,
  )  # fmt: skip
  for old, new, mask in zip(
    *map(jax.tree.leaves, (dense.params, model.params, masks)), strict=True
  ):
    np.testing.assert_array_equal(new, np.where(mask, old, 0))


def test_best_candidate_is_chosen_on_validation():
  scores = [
    {"validation_accuracy": 0.8, "validation_loss": 0.2, "test_accuracy": 0.99},
    {"validation_accuracy": 0.9, "validation_loss": 0.5, "test_accuracy": 0.1},
    {"validation_accuracy": 0.9, "validation_loss": 0.4, "test_accuracy": 0.2},
    {"validation_accuracy": 0.9, "validation_loss": 0.4, "test_accuracy": 0.9},
  ]
  assert best_candidate(scores) == 2


@pytest.mark.parametrize("eval_batch_size", [1, 4, 7, 23, 500])
def test_evaluation_sees_every_example_once(data, dense, eval_batch_size):
  programs = make_programs(eval_batch_size=eval_batch_size)
  two = jax.tree.map(lambda x: jnp.stack([x, x * 0.5]), dense)
  logits = programs.predict(data.images, *two)
  images = (np.asarray(data.images) / 255 - 0.5) / 0.25
  for i in range(2):
    one = copy_of(two, i)
    expected = Tiny().apply(
      {"params": one.params, "batch_stats": one.batch_stats}, images.astype(np.float32)
    )
    np.testing.assert_allclose(logits[i], expected, rtol=1e-5, atol=1e-5)


def test_recalibrated_statistics_are_the_mean_over_the_first_batches(data, dense):
  programs = make_programs(augmentation="none")
  data = make_data(BATCH * 11)  # 20 % of 11 batches are 2
  one = one_model(dense)
  # What was there before does not matter, even if it is infinite.
  one = one._replace(batch_stats=jax.tree.map(lambda x: x + jnp.inf, one.batch_stats))
  measured = copy_of(programs.recalibrate(data, jax.random.key(0), *one), 0)
  kernel, bias = (
    np.asarray(dense.params["Dense_0"][k], np.float64) for k in ("kernel", "bias")
  )
  images = (np.asarray(data.images[: 2 * BATCH], np.float64) / 255 - 0.5) / 0.25
  hidden = (images.reshape(2 * BATCH, -1) @ kernel + bias).reshape(2, BATCH, -1)
  statistics = measured["BatchNorm_0"]
  np.testing.assert_allclose(
    statistics["mean"], hidden.mean(1).mean(0), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(statistics["var"], hidden.var(1).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
  ("momentum", "nesterov", "weight_decay"),
  [(0.9, True, 1e-2), (0.9, False, 1e-2), (0.0, False, 0.0), (0.9, False, 0.0)],
)
def test_steps_equal_pytorch(momentum, nesterov, weight_decay):
  import torch

  module = models.create("mlp", 3, hidden=(5,), dropout=0.0)
  params, _ = training.init_variables(module, jax.random.key(1), (2, 2, 1))
  net = torch.nn.Sequential(
    torch.nn.Flatten(), torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
  )
  with torch.no_grad():
    for layer, name in ((net[1], "Dense_0"), (net[3], "Dense_1")):
      layer.weight.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
      layer.bias.copy_(torch.tensor(np.asarray(params[name]["bias"])))
  theirs = torch.optim.SGD(
    net.parameters(),
    lr=0.1,
    momentum=momentum,
    nesterov=nesterov,
    weight_decay=weight_decay,
  )
  rng = np.random.default_rng(0)
  ours = training.sgd(0.1, weight_decay, momentum=momentum, nesterov=nesterov)
  state = training.TrainState(params, {}, ours.init(params), jnp.zeros((), jnp.int32))
  step = jax.jit(functools.partial(train_step, Recipe(module), ours))
  for _ in range(6):
    x = rng.normal(size=(8, 2, 2, 1)).astype(np.float32)
    y = rng.integers(0, 3, 8)
    state, metrics = step(jax.random.key(0), state, all_true(params), x, jnp.asarray(y))
    theirs.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(torch.tensor(x)), torch.tensor(y))
    loss.backward()
    theirs.step()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
  for layer, name in ((net[1], "Dense_0"), (net[3], "Dense_1")):
    np.testing.assert_allclose(
      state.params[name]["kernel"], layer.weight.detach().numpy().T, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      state.params[name]["bias"], layer.bias.detach().numpy(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("steps", "most"), [(64, 50), (351, 50), (5, 5), (1, 50), (7, 3)])
def test_chunks_are_equal_and_cover_the_epoch(steps, most):
  chunk = chunk_length(steps, most)
  assert 1 <= chunk <= most
  count = -(-steps // chunk)
  assert count == -(-steps // most)
  assert chunk * count - steps < count


def test_learning_rates_of_copies_with_different_peaks():
  lrs = training.retrain_learning_rates(
    "LLR", np.linspace(0.1, 0.01, 10), np.array([10, 20]), initial_lr=np.array([0.5, 1.0])
  )
  assert lrs.shape == (2, 20)
  np.testing.assert_allclose(lrs[:, 1:3].max(1), [0.5, 1.0])
  np.testing.assert_allclose(lrs[0, 1:10], 0.5 * (1 - np.arange(9) / 9), rtol=1e-5)
