"""Copies that train on a share of the data each, in the one program of all copies."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import run_phases
from engine import train as train_to_the_end

from jaxsms import Phase, make_mesh, training
from jaxsms.training import Model
from jaxsms.training.candidates import merge_candidates
from jaxsms.training.engine import one_model
from jaxsms.training.measurements import predict
from jaxsms.training.merging import (
  Merging,
  mean_by_weights,
  merging_of,
  weights_by_ratios,
)
from jaxsms.training.own_share import share_batches
from jaxsms.training.phases import Start, training_phases
from jaxsms.training.programs import METRICS

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLASSES, BATCH, SIDE = 3, 4, 3


class Linear(nn.Module):
  norm_momentum: float = 0.9

  @nn.compact
  def __call__(self, images, train=False):
    return nn.Dense(CLASSES)(images.reshape(len(images), -1))


def make_programs(**options):
  return training.make_programs(
    Linear(),
    functools.partial(training.sgd, momentum=0.0),
    training_images=lambda key, images: images / 255.0,
    evaluation_images=lambda images: images / 255.0,
    batch_size=BATCH,
    **options,
  )


@pytest.fixture(scope="module")
def programs():
  return make_programs()


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, 30)
  images = rng.integers(0, 60, (30, SIDE, SIDE, 1))
  images[np.arange(30), labels, 0, 0] += 190
  return training.Data(jnp.asarray(images.astype(np.uint8)), jnp.asarray(labels, jnp.int32))


@pytest.fixture(scope="module")
def dense():
  return Model(*training.init_variables(Linear(), jax.random.key(0), (SIDE, SIDE, 1)))


def on_shares(parts, steps, seeds=None):
  most = max(map(len, parts))
  return {
    "seed": np.arange(len(parts), dtype=np.int32) if seeds is None else np.array(seeds),
    "weight_decay": np.zeros(len(parts), np.float32),
    "steps": np.full(len(parts), steps, np.int32),
    "examples": np.stack([np.resize(part, most) for part in parts]).astype(np.int32),
    "size": np.array([len(part) for part in parts], np.int32),
  }


def train(programs, data, dense, chosen, rate=0.5, **options):
  m, steps = len(chosen["steps"]), int(chosen["steps"].max())
  everything = jax.tree.map(lambda x: jnp.ones(x.shape, bool), dense.params)
  rates = np.full([m, steps], rate, np.float32)
  return train_to_the_end(
    programs, data, everything, jax.random.key(7), dense, chosen, rates, **options
  )


def batches(size, steps, first=0, most=None, key=1):
  examples = 100 + np.arange(size if most is None else most)
  return np.asarray(
    share_batches(jax.random.key(key), jnp.asarray(examples), size, first, steps, BATCH)
  )


@pytest.mark.parametrize("size", [4, 7, 12, 30])
def test_no_example_comes_twice_in_a_pass_over_the_share(size):
  found, in_a_pass = batches(size, 20), size // BATCH
  assert found.shape == (20, BATCH)
  assert set(found.ravel()) <= set(range(100, 100 + size))
  passes = [
    found[i : i + in_a_pass].ravel().tolist() for i in range(0, 20 - in_a_pass, in_a_pass)
  ]
  for one in passes:
    assert len(set(one)) == in_a_pass * BATCH
  assert len({tuple(one) for one in passes}) > 1, "each pass has its own order"
  assert set(found.ravel()) == set(range(100, 100 + size)), "what is dropped changes"


def test_the_order_depends_neither_on_chunks_nor_on_other_shares():
  whole = batches(11, 12)
  parts = [batches(11, 5, first=first) for first in (0, 5, 10)]
  np.testing.assert_array_equal(np.concatenate(parts)[:12], whole)
  np.testing.assert_array_equal(batches(11, 12, most=29), whole)
  assert (batches(11, 12, key=2) != whole).any()


def test_all_orders_of_a_share_are_equally_likely():
  found = batches(BATCH, 4800).tolist()
  orders = [tuple(order) for order in itertools.permutations(range(100, 100 + BATCH))]
  counts = np.array([found.count(list(order)) for order in orders])
  assert counts.sum() == 4800
  # Chi-squared with 23 degrees of freedom exceeds 60 once in 30,000 times.
  assert np.sum((counts - 200) ** 2 / 200) < 60


def descent(data, examples, params, steps, rate):
  """Softmax regression on all of a few examples, in NumPy."""
  x = np.asarray(data.images)[examples].reshape(len(examples), -1) / 255.0
  one_hot = np.eye(CLASSES)[np.asarray(data.labels)[examples]]
  kernel, bias = (np.asarray(params["Dense_0"][k], float) for k in ("kernel", "bias"))
  for _ in range(steps):
    logits = x @ kernel + bias
    shares = np.exp(logits - logits.max(1, keepdims=True))
    error = (shares / shares.sum(1, keepdims=True) - one_hot) / len(x)
    kernel, bias = kernel - rate * x.T @ error, bias - rate * error.sum(0)
  return kernel, bias


def test_a_copy_sees_its_own_share_alone(programs, data, dense):
  """Shares of one batch each: whatever the order, it is gradient descent on the share."""
  parts = [np.array([3, 17, 8, 21]), np.array([0, 1, 2, 29])]
  candidates = train(programs, data, dense, on_shares(parts, 9))
  for i, part in enumerate(parts):
    kernel, bias = descent(data, part, dense.params, 9, 0.5)
    found = jax.tree.map(lambda x, i=i: x[i], candidates.params)["Dense_0"]
    np.testing.assert_allclose(found["kernel"], kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["bias"], bias, rtol=1e-4, atol=1e-5)


def test_wrong_labels_in_one_share_harm_its_copy_alone(programs, data, dense):
  wrong = np.arange(0, 30, 2)
  labels = np.array(data.labels)
  labels[wrong] = (labels[wrong] + 1) % CLASSES
  mixed = training.Data(data.images, jnp.asarray(labels))
  chosen = on_shares([np.arange(1, 30, 2), wrong], 200)
  candidates = train(programs, mixed, dense, chosen)
  right, misled = predict(programs, data, candidates).logits.argmax(-1)
  assert np.mean(right == data.labels) > 0.9
  assert np.mean(misled == data.labels) < 0.1


@pytest.mark.slow
def test_copies_together_are_what_each_is_alone(programs, data, dense, assert_trees_equal):
  parts = [np.arange(9), np.arange(5, 30), np.arange(20, 26)]
  chosen = on_shares(parts, 17, seeds=[4, 0, 2])
  together = train(programs, data, dense, chosen, chunk_steps=3)
  for i, part in enumerate(parts):
    alone = train(programs, data, dense, on_shares([part], 17, seeds=[chosen["seed"][i]]))
    one = jax.tree.map(lambda x, i=i: x[i : i + 1], together)
    assert_trees_equal(one, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1), (2, 2)])
def test_on_a_mesh_it_is_the_same(programs, data, dense, shape, assert_trees_equal):
  chosen = on_shares([np.arange(9), np.arange(5, 30), np.arange(20, 26)], 8)
  mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  found = train(make_programs(mesh=mesh), data, dense, chosen)
  expected = train(programs, data, dense, chosen)
  assert_trees_equal(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_phases_at_one_sparsity_keep_the_mask(programs, data, dense):
  chosen = on_shares([np.arange(12), np.arange(12, 30)], 7)

  def plan(record):
    return chosen, np.full([2, 7], 0.2, np.float32)

  splits = training.Splits(data, data, data)
  masks = []
  finished = run_phases(
    programs, splits, jax.random.key(0), dense, plan, goal_sparsity=0.5, phases=1
  )
  # The same again from there: nothing is pruned any more.
  engine = training.Engine(programs, splits)
  start = Start(finished.model, finished.masks)
  sparsities = {2: 0.5, 3: 0.5}
  for event in training_phases(engine, jax.random.key(0), start, plan, sparsities):
    if isinstance(event, Phase):
      masks.append(event.masks)
      assert event.record["pruned_fraction"] == 0 and event.record["norm_drop"] == 0
      assert event.record["pruned"]["test_accuracy"] >= 0
  for mask in masks:
    for a, b in zip(jax.tree.leaves(mask), jax.tree.leaves(finished.masks), strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_soups_by_samples_weight_those_that_are_left(programs, data, dense):
  candidates = train(programs, data, dense, on_shares([[0] * 4, [1] * 4, [2] * 4], 3))
  merging = merging_of("by_samples", weights=np.array([10, 30, 60]))
  engine = training.Engine(programs, training.Splits(data, data, data))
  _, record = merge_candidates(engine, jax.random.key(0), candidates, merging)
  np.testing.assert_allclose(record["weights"], [0.1, 0.3, 0.6])
  kernel = np.array(candidates.params["Dense_0"]["kernel"])
  kernel[1] = np.nan
  lost = Model({"Dense_0": {**candidates.params["Dense_0"], "kernel": kernel}}, {})
  soup, record = merge_candidates(engine, jax.random.key(0), lost, merging)
  np.testing.assert_allclose(record["weights"], [1 / 7, 0, 6 / 7])
  expected = kernel[0] / 7 + 6 * kernel[2] / 7
  np.testing.assert_allclose(soup.params["Dense_0"]["kernel"], expected, rtol=1e-5)


def test_a_copy_that_knows_its_own_class_alone_stays_in_a_soup_by_samples(
  programs, data, dense
):
  first = np.flatnonzero(np.asarray(data.labels) == 0)[:BATCH]
  chosen = on_shares([first, np.arange(30)], 300)
  candidates = train(programs, data, dense, chosen)
  engine = training.Engine(programs, training.Splits(data, data, data))
  arguments = engine, jax.random.key(0), candidates
  _, plain = merge_candidates(*arguments, start=0.9)
  assert plain["collapsed"] == [0] and plain["weights"] == [0, 1]
  merging = merging_of("by_samples", weights=chosen["size"])
  _, record = merge_candidates(*arguments, merging, start=0.9)
  assert record["collapsed"] == []
  np.testing.assert_allclose(record["weights"], [4 / 34, 30 / 34])


def test_weights_by_ratios_are_those_of_the_interpolation_one_by_one():
  rng = np.random.default_rng(0)
  copies = rng.normal(size=(6, 5)).astype(np.float32)
  ratios, retained = np.array([8, 1, 2, 1, 4, 2]), 0.3
  at = {ratio: copies[ratios == ratio].mean(0) for ratio in (1, 2, 4, 8)}
  average = at[1]
  for ratio in (2, 4, 8):
    average = (1 - retained) * at[ratio] + retained * average
  weights = weights_by_ratios(ratios, retained)
  merged = merging_of("by_ratios", weights=weights).among([*range(6)], None, None, None)(
    {"w": copies}
  )
  np.testing.assert_allclose(merged.params["w"], average, atol=1e-6)
  np.testing.assert_allclose(merged.weights, weights)
  np.testing.assert_allclose(weights_by_ratios([3, 3], 0.3), [0.5, 0.5])


def test_by_samples_needs_weights(rejects):
  with rejects("merge by_samples needs the training examples of each copy"):
    merging_of("by_samples")
  with rejects("merge by_ratios needs the weight of each copy"):
    merging_of("by_ratios")
  assert Merging(lambda *_: mean_by_weights).among([0], None, None, None) is mean_by_weights


def test_further_metrics_are_measured(data, dense):
  extra = {**METRICS, "constant": lambda logits, labels: jnp.float32(0.25)}
  programs = make_programs(metrics=extra)
  found = programs.evaluate(*predict(programs, data, one_model(dense)))
  assert found.keys() == extra.keys() and found["constant"].tolist() == [0.25]
