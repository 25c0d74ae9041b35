"""Copies over devices: whatever the mesh, the groups and the parts of a batch, the same."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import run_phases
from test_training import (
  BATCH,
  all_true,
  assert_close,
  half_masks,
  ingredients,
  make_data,
  make_programs,
  train,
)

from jaxsms import data, fit_mesh, magnitude_masks, make_mesh, merge_phase, models, training
from jaxsms.convolution import conv_general_dilated
from jaxsms.training import Model, Splits
from jaxsms.training.state import start

pytestmark = pytest.mark.usefixtures("quick_compilation")

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


class Small(nn.Module):
  """A convolution, a normalization and a dense layer."""

  norm_momentum: float = 0.9

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Conv(8, (3, 3), conv_general_dilated=conv_general_dilated)(images)
    x = nn.BatchNorm(use_running_average=not train, momentum=self.norm_momentum)(x)
    return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def devices(n):
  return jax.devices()[:n]


@pytest.fixture(scope="module")
def small():
  return Model(*training.init_variables(Small(), jax.random.key(0), (4, 4, 1)))


@pytest.fixture(scope="module")
def examples():
  return make_data(23)


@pytest.fixture(scope="module")
def alone(small, examples):
  """What one device makes of three copies."""
  return train(make_programs(Small()), examples, small, *CHOSEN)


CHOSEN = (ingredients([0, 1, 2], [7, 7, 4]), np.full((3, 7), 0.1))


@pytest.mark.parametrize(
  "shape",
  [(2, 2), *map(slow, [(8, 1), (1, 1), (2, 1), (4, 1), (1, 2), (2, 4)])],
)
def test_copies_on_any_mesh_equal_those_on_one_device(shape, alone, small, examples):
  mesh = make_mesh(*shape, devices=devices(np.prod(shape)))
  assert_close(train(make_programs(Small(), mesh=mesh), examples, small, *CHOSEN), alone)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [slow(1), 2, slow(3)])
@pytest.mark.parametrize("mesh", [None, (2, 1)])
def test_groups_of_copies_equal_all_at_once(at_once, mesh, alone, small, examples):
  mesh = mesh and make_mesh(*mesh, devices=devices(2))
  programs = make_programs(Small(), mesh=mesh, at_once=at_once)
  assert_close(train(programs, examples, small, *CHOSEN), alone)


@functools.cache
def phases_on(n, greedy):
  """Two phases of three copies on n devices."""
  small = Model(*training.init_variables(Small(), jax.random.key(0), (4, 4, 1)))
  splits = Splits(make_data(23), make_data(7, 1), make_data(9, 2))
  programs = make_programs(Small(), mesh=lambda m: fit_mesh(m, BATCH, devices(n)))
  model, _, records = run_phases(
    programs, splits, jax.random.key(0), small,
    lambda record: (ingredients([0, 1, 2], 5), np.full((3, 5), 0.1)),
    goal_sparsity=0.5, phases=2, greedy=greedy,
  )  # fmt: skip
  return model, records


@pytest.mark.slow
@pytest.mark.parametrize(
  "n, greedy", [(8, False), slow(2, False), slow(4, False), slow(8, True)]
)
def test_phases_on_any_number_of_devices_equal(n, greedy):
  model, records = phases_on(n, greedy)
  on_one, records_on_one = phases_on(1, greedy)
  assert_close(model, on_one, 1e-4)
  for record, other in zip(records, records_on_one, strict=True):
    assert record["weights"] == other["weights"]
    assert record["soup"] == pytest.approx(other["soup"], abs=1e-4)


# Parts of a batch, and parameters in parts.


@pytest.mark.slow
@pytest.mark.parametrize(
  "micro_batches, mesh", [(4, (1, 2)), slow(2, (1, 2)), slow(4, None), slow(2, None)]
)
def test_micro_batches_equal_the_batch_without_normalization(micro_batches, mesh):
  mlp = models.create("mlp", 3, hidden=(5,), dropout=0.0)
  dense = Model(*training.init_variables(mlp, jax.random.key(0), (4, 4, 1)))
  mesh = mesh and make_mesh(*mesh, devices=devices(2))
  chosen = (ingredients([3, 5], 4), np.full((2, 4), 0.1))
  options = {"batch_size": 8}
  whole = train(make_programs(mlp, **options), make_data(23), dense, *chosen)
  parts = make_programs(mlp, mesh=mesh, micro_batches=micro_batches, **options)
  assert_close(train(parts, make_data(23), dense, *chosen), whole)


@pytest.mark.slow
def test_a_step_in_micro_batches_normalizes_each_by_itself(small, examples):
  """By hand: the mean of the gradients of both halves, and their statistics in turn."""
  sgd = training.sgd(0.1)
  state = jax.tree.map(lambda x: x[0], start(*small, sgd, 1))
  images = jnp.asarray(examples.images[:4], jnp.float32) / 255
  labels = examples.labels[:4]
  recipe = training.step.Recipe(Small(), micro_batches=2)
  new, metrics = jax.jit(training.step.train_step, static_argnums=(0, 1))(
    recipe, sgd, jax.random.key(0), state, all_true(small.params), images, labels
  )
  stats, gradients, losses = small.batch_stats, [], []
  for part in (slice(0, 4, 2), slice(1, 4, 2)):

    def loss(params, part=part, stats=stats):
      logits, updated = Small().apply(
        {"params": params, "batch_stats": stats}, images[part], True, mutable="batch_stats"
      )
      log_p = jax.nn.log_softmax(logits)
      return -log_p[jnp.arange(2), labels[part]].mean(), updated["batch_stats"]

    gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, stats), gradient = gradient_of(small.params)
    losses.append(value)
    gradients.append(gradient)
  expected = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b) / 2, small.params, *gradients)
  assert_close((new.params, new.batch_stats), (expected, stats))
  assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.slow
def test_parameters_in_parts_equal_whole_ones_and_take_less_memory():
  mlp = models.create("mlp", 4, hidden=(512,), dropout=0.0)
  dense = Model(*training.init_variables(mlp, jax.random.key(0), (4, 4, 1)))
  chosen = (ingredients([0, 1], 3), np.full((2, 3), 0.1))
  on = functools.partial(make_mesh, 2, 4)
  whole, parts = (make_programs(mlp, mesh=on(), split_params=s) for s in (False, True))
  masks = half_masks(dense.params)
  expected = train(whole, make_data(23), dense, *chosen, masks=masks)
  got = train(parts, make_data(23), dense, *chosen, masks=masks)
  assert_close(got, expected)
  kernel = got.params["Dense_0"]["kernel"]
  assert {s.data.shape for s in kernel.addressable_shards} == {(1, 16, 128)}
  # Merged and pruned in parts as well: no device ever holds a whole kernel.
  soup, _ = merge_phase(got)
  kernel = soup.params["Dense_0"]["kernel"]
  assert {s.data.shape for s in kernel.addressable_shards} == {(16, 128)}
  pruned = magnitude_masks(soup.params, 0.5)
  unsharded = magnitude_masks(jax.device_get(soup.params), 0.5)
  assert_close(pruned, unsharded)
  shapes = {s.data.shape for s in pruned["Dense_0"]["kernel"].addressable_shards}
  assert shapes == {(16, 128)}


@pytest.mark.slow
@pytest.mark.parametrize("copies", [2, 3])
def test_no_device_ever_holds_a_model_that_is_in_parts(copies):
  """From the first value to the last: made in parts, and no copy that was placed stays."""
  mesh, width = make_mesh(2, 4), 520  # of this test alone among all arrays alive
  mlp = models.create("mlp", 4, hidden=(width,), dropout=0.0)
  key, image_shape = jax.random.key(0), (4, 4, 1)
  dense = Model(*training.init_variables(mlp, key, image_shape, mesh))

  def largest_part():
    """The rows of the kernel times its width, in the largest part on any device."""
    sizes = [
      int(np.prod(shard.data.shape))
      for array in jax.live_arrays()
      for shard in array.addressable_shards
      if array.ndim >= 2 and array.shape[-2:] == (16, width)
    ]
    assert sizes
    return max(sizes)

  seen = [largest_part()]
  programs = make_programs(mlp, mesh=mesh, split_params=True)
  chosen = (ingredients(range(copies), 5), np.full((copies, 5), 0.1))
  got = train(
    programs, make_data(23), dense, *chosen, on_chunk=lambda _: seen.append(largest_part()),
    masks=jax.tree.map(lambda x: jnp.ones_like(x, bool), dense.params),
  )  # fmt: skip
  del dense
  # A quarter of the model; then of every copy that the device has, at most all of them.
  assert seen[0] == 16 * width // 4
  assert len(seen) > 1 and max(seen) <= copies * 16 * width // 4
  whole = Model(*training.init_variables(mlp, key, image_shape))
  assert_close(got, train(make_programs(mlp), make_data(23), whole, *chosen))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1), (4, 1)])
def test_a_state_that_is_placed_elsewhere_is_freed(mesh, small, examples):
  programs = make_programs(Small(), mesh=make_mesh(*mesh, devices=devices(mesh[0])))
  state = start(*small, programs.optimizer(0.0, 0.0), 3)
  chunks = training.train_chunks(
    programs, examples, all_true(small.params), jax.random.key(0), state, *CHOSEN
  )
  next(chunks)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves(small))


# What does not fit.


def test_fit_mesh():
  shape = lambda m, batch, n: tuple(fit_mesh(m, batch, devices(n)).shape.values())  # noqa: E731
  assert fit_mesh(5, 8, devices(1)) is None
  assert shape(8, 8, 8) == (8, 1)
  assert shape(5, 8, 8) == (8, 1)
  assert shape(1, 8, 8) == (1, 8)
  assert shape(2, 8, 8) == (2, 4)
  assert shape(3, 8, 8) == (4, 2)
  assert shape(1, 7, 8) == (8, 1)
  assert shape(1, 6, 4) == (2, 2)
  assert shape(5, 8, 2) == (2, 1)


def test_batches_that_do_not_split(small, examples, rejects):
  with rejects("a batch of 4 does not split into 3 micro-batches"):
    make_programs(Small(), micro_batches=3)
  programs = make_programs(Small(), batch_size=3, mesh=make_mesh(1, 2))
  with rejects("a batch of 3 does not split over 2 devices"):
    train(programs, examples, small, *CHOSEN)
  programs = make_programs(Small(), micro_batches=2, mesh=make_mesh(1, 4))
  with rejects("a batch of 4 in 2 micro-batches does not split over 4 devices"):
    train(programs, examples, small, *CHOSEN)


# Streamed data behind the same loop.


@pytest.mark.slow
def test_streamed_training_equals_the_same_batches_by_hand(small, examples):
  source = data.ArrayExamples(np.asarray(examples.images), np.asarray(examples.labels))
  streamed = training.StreamedData(source, np.arange(23), threads=0)
  programs = make_programs(Small(), augmentation="none")
  got = train(programs, streamed, small, *CHOSEN, chunk_steps=2)
  for mesh in (make_mesh(2, 2), make_mesh(4, 1)):
    on = make_programs(Small(), augmentation="none", mesh=mesh)
    assert_close(train(on, streamed, small, *CHOSEN, chunk_steps=2), got)
  key = jax.random.key(7)
  batches = data.stream(
    source, key, [1], batch_size=BATCH, steps=[7], chunk_steps=1, threads=0
  )
  sgd = functools.partial(training.sgd, nesterov=True)
  state = jax.tree.map(lambda x: x[0], start(*small, sgd(0.1, 1e-3), 1))
  step = jax.jit(
    lambda state, images, labels: training.step.train_step(
      training.step.Recipe(Small()), sgd(0.1, 1e-3), key, state, all_true(small.params),
      data.normalize(images, (0.5,), (0.25,)), labels,
    )[0]
  )  # fmt: skip
  for batch in batches:
    state = step(state, batch.images[0, 0], batch.labels[0, 0])
  assert_close((state.params, state.batch_stats), jax.tree.map(lambda x: x[1], tuple(got)))


@pytest.mark.slow
def test_streamed_phases_score_like_resident_ones(small, examples):
  def streamed(split):
    images, labels = np.asarray(split.images), np.asarray(split.labels)
    source = data.ArrayExamples(images, labels)
    return training.StreamedData(source, np.arange(len(labels)), threads=0)

  resident = Splits(examples, make_data(7, 1), make_data(9, 2))
  programs = make_programs(Small(), augmentation="none", eval_batch_size=4)
  found = [
    run_phases(
      programs, splits, jax.random.key(0), small,
      lambda record: (ingredients([0, 1], 0), np.zeros((2, 0), np.float32)),
      goal_sparsity=0.5, phases=1,
    )[2][0]
    for splits in (resident, Splits(*map(streamed, resident[:3])))
  ]  # fmt: skip
  # Before any batch statistics are estimated, from whichever batches.
  assert found[0]["pruned"] == pytest.approx(found[1]["pruned"], abs=1e-6)
  assert 0 <= found[1]["soup"]["test_accuracy"] <= 1
