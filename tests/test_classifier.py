"""The classifier of a soup trained alone, as if all classes were equal."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from by_hand import own_batches, own_images, own_optimizer
from engine import train as train_to_the_end
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

from experiments.config.pruning_criteria import classifier
from jaxsms import models, training
from jaxsms.training import Model
from jaxsms.training.classifier import classifier_alone, log_prior, logit_adjusted
from jaxsms.training.soft_labels import mean_loss, prior_labels

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_figures")

KEY, STEPS, RATE, DECAY = jax.random.key(7), 7, 0.1, 1e-2
PRIOR = np.log([0.6, 0.3, 0.1]).astype(np.float32)


@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet18", "wide_resnet22_10",
                                  "vgg16", "vit_tiny"])  # fmt: skip
def test_the_classifier_is_the_layer_that_gives_the_classes(name):
  """Seven of them, a width that no other layer has."""
  module = models.create(name, num_classes=7)

  def init(key):
    return training.init_variables(module, key, (32, 32, 3))[0]

  params = jax.eval_shape(init, jax.random.key(0))
  chosen = classifier_alone(ingredients([0, 1], 3), params, classifier(params), PRIOR)
  wanted = jax.tree.map(lambda x: [x.shape[-1] != 7] * 2, params)
  assert jax.tree.map(lambda x: x.tolist(), chosen["frozen"]) == wanted
  np.testing.assert_array_equal(chosen["log_prior"], [PRIOR, PRIOR])


def test_a_layer_that_is_not_there_is_refused(rejects):
  with rejects("layer is 'Dense_9': the network has a, b"):
    classifier_alone(ingredients([0], 3), {"b": {}, "a": {}}, "Dense_9", PRIOR)


def test_the_prior_is_each_class_s_share():
  found = log_prior([2, 0, 0, 2, 0, 0, 0, 2], 4)
  np.testing.assert_allclose(np.exp(found), [5 / 8, 1 / 8, 3 / 8, 1 / 8], rtol=1e-6)


def test_the_prior_of_a_copy_is_that_of_its_own_share():
  labels = np.array([2, 0, 0, 1, 0, 1, 0, 2])
  whole = logit_adjusted(ingredients([0, 1], 3), jnp.asarray(labels), 3)["log_prior"]
  np.testing.assert_allclose(np.exp(whole), [[4 / 8, 2 / 8, 2 / 8]] * 2, rtol=1e-6)
  shares = {
    "examples": np.array([[0, 3, 1, 0, 3], [1, 2, 4, 6, 3]]), "size": np.array([3, 5]),
  }  # fmt: skip
  found = logit_adjusted(ingredients([0, 1], 3) | shares, labels, 3)
  # Class 2 is absent from the second share and counts as one example.
  wanted = [[1 / 3, 1 / 3, 1 / 3], [4 / 5, 1 / 5, 1 / 5]]
  np.testing.assert_allclose(np.exp(found["log_prior"]), wanted, rtol=1e-6)
  assert found["log_prior"].dtype == np.float32 and found["examples"] is shares["examples"]


def test_copies_with_priors_of_their_own_train_as_by_hand():
  data, priors = make_data(23), np.stack([PRIOR, PRIOR[::-1]])
  dense = Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))
  masks = half_masks(dense.params)
  dense = dense._replace(params=jax.tree.map(jnp.multiply, dense.params, masks))
  chosen = {**ingredients([4, 5], STEPS, DECAY), "log_prior": priors}
  found = train_to_the_end(
    make_programs(augmentation="none"), data, masks, KEY, dense, chosen,
    np.full((2, STEPS), RATE, np.float32), chunk_steps=3,
  )  # fmt: skip
  images, optimizer = own_images(data.images), own_optimizer(RATE, DECAY)

  def loss(params, batch_stats, batch, prior):
    logits, updated = Tiny().apply(
      {"params": params, "batch_stats": batch_stats},
      images[batch], train=True, mutable=["batch_stats"],
    )  # fmt: skip
    odds = jnp.exp(logits) * jnp.exp(prior)  # softmax weighted by the classes' shares
    picked = jnp.take_along_axis(odds, data.labels[batch][:, None], -1)[:, 0]
    return -jnp.log(picked / odds.sum(-1)).mean(), updated["batch_stats"]

  @jax.jit
  def step(params, batch_stats, state, batch, prior):
    grads, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats, batch, prior)
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(lambda p, u, m: (p + u) * m, params, updates, masks)
    return params, batch_stats, state

  for copy, (seed, prior) in enumerate(zip((4, 5), priors, strict=True)):
    params, batch_stats = dense
    state, key = optimizer.init(params), jax.random.fold_in(KEY, seed)
    for batch in own_batches(key, len(data.labels), BATCH, STEPS):
      params, batch_stats, state = step(params, batch_stats, state, batch, prior)
    assert_close(jax.tree.map(lambda x, i=copy: x[i], found.params), params, 2e-5)


def test_the_loss_with_a_prior_by_hand():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(5, 3)).astype(np.float32), np.array([0, 2, 1, 0, 2])
  loss, gradient = jax.value_and_grad(mean_loss)(
    logits, prior_labels(jnp.asarray(labels), PRIOR)
  )
  adjusted = logits.astype(np.float64) + PRIOR
  expected = -scipy.special.log_softmax(adjusted, -1)[np.arange(5), labels].mean()
  assert float(loss) == pytest.approx(expected, rel=1e-6)
  wanted = (scipy.special.softmax(adjusted, -1) - np.eye(3)[labels]) / 5
  np.testing.assert_allclose(gradient, wanted, atol=1e-7)
  level = prior_labels(jnp.asarray(labels), jnp.full([3], -np.log(3), jnp.float32))
  assert float(mean_loss(logits, level)) == pytest.approx(
    float(mean_loss(logits, jnp.asarray(labels))), rel=1e-6
  )


def own_training(data, dense, masks):
  """Steps of the last layer alone, written out with Flax and optax."""
  images = own_images(data.images)
  optimizer = own_optimizer(RATE, DECAY)

  def loss(last, batch_stats, batch):
    logits, updated = Tiny().apply(
      {"params": {**dense.params, "Dense_1": last}, "batch_stats": batch_stats},
      images[batch], train=True, mutable=["batch_stats"],
    )  # fmt: skip
    log_q = jax.nn.log_softmax(logits + PRIOR)
    picked = jnp.take_along_axis(log_q, data.labels[batch][:, None], -1)
    return -picked.mean(), updated["batch_stats"]

  key = jax.random.fold_in(KEY, 4)  # of copy's seed 4
  last, batch_stats = dense.params["Dense_1"], dense.batch_stats
  state = optimizer.init(last)
  for batch in own_batches(key, len(data.labels), BATCH, STEPS):
    grads, batch_stats = jax.grad(loss, has_aux=True)(last, batch_stats, batch)
    updates, state = optimizer.update(grads, state, last)
    last = jax.tree.map(lambda p, u, m: (p + u) * m, last, updates, masks["Dense_1"])
  return last, batch_stats


def test_all_baselines_leave_it_out_where_data_are_streamed():
  chosen = config_of("--baselines=all", "--stream", "--dataset=cifar10").baselines
  assert set(config_of("--baselines=all").baselines) - set(chosen) == {"soup_classifier"}


def test_what_is_frozen_does_not_round_in_an_average():
  data, steps = make_data(12), 12
  dense = Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))
  whole = jax.tree.map(lambda x: jnp.ones(x.shape, bool), dense.params)
  chosen = classifier_alone(ingredients([0], steps), dense.params, "Dense_1", PRIOR)
  chosen = training.averaged_ingredients(chosen, decay=0.99)
  found = train_to_the_end(
    make_programs(augmentation="none"), data, whole, KEY, dense, chosen,
    np.full((1, steps), RATE, np.float32),
  )  # fmt: skip
  params = jax.tree.map(lambda x: x[0], found.params)
  assert (params.pop("Dense_1")["kernel"] != dense.params["Dense_1"]["kernel"]).any()
  for name, layer in params.items():
    for leaf, value in layer.items():
      np.testing.assert_array_equal(value, dense.params[name][leaf])


@pytest.mark.parametrize("average", [False, True])
def test_only_the_classifier_moves_and_as_by_hand(average):
  data = make_data(23)
  dense = Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))
  masks = half_masks(dense.params)
  dense = dense._replace(params=jax.tree.map(jnp.multiply, dense.params, masks))
  chosen = classifier_alone(ingredients([4], STEPS, DECAY), dense.params, "Dense_1", PRIOR)
  if average:  # of the last step alone: the average of what stays is exactly that
    chosen = training.averaged_ingredients(
      chosen, decay=0.5, after=np.array([STEPS - 1], np.int32), every=1
    )
  found = train_to_the_end(
    make_programs(augmentation="none"), data, masks, KEY, dense, chosen,
    np.full((1, STEPS), RATE, np.float32), chunk_steps=3,
  )  # fmt: skip
  last, batch_stats = own_training(data, dense, masks)
  params = jax.tree.map(lambda x: x[0], found.params)
  assert_close(params.pop("Dense_1"), last, 2e-5)
  assert_close(jax.tree.map(lambda x: x[0], found.batch_stats), batch_stats, 2e-5)
  for name, layer in params.items():
    for leaf, value in layer.items():
      np.testing.assert_array_equal(value, dense.params[name][leaf])
  moved = np.abs(last["kernel"] - dense.params["Dense_1"]["kernel"])
  assert moved[np.asarray(masks["Dense_1"]["kernel"])].min() > 1e-4
  kernel = np.asarray(found.params["Dense_1"]["kernel"][0])
  assert not kernel[~np.asarray(masks["Dense_1"]["kernel"])].any()


@pytest.mark.slow
def test_a_batch_in_parts_has_the_same_loss():
  data, steps = make_data(12), 3
  module = models.create("mlp", num_classes=3, hidden=(5,), dropout=0.0)
  dense = Model(*training.init_variables(module, jax.random.key(0), (4, 4, 1)))
  whole = jax.tree.map(lambda x: jnp.ones(x.shape, bool), dense.params)
  chosen = classifier_alone(ingredients([0], steps), dense.params, "Dense_1", PRIOR)
  lrs = np.full((1, steps), RATE, np.float32)
  one, two = (
    train_to_the_end(
      make_programs(module, "none", micro_batches=parts), data, whole, KEY, dense, chosen,
      lrs,
    )
    for parts in (1, 2)
  )  # fmt: skip
  assert_close(one.params, two.params, 1e-6)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (
      ["--stream", "--dataset=tiny", "--data_dir=."],
      "which counts the labels of images in memory, and these are streamed",
    ),
    (["--retrain_epochs=0"], "trains for at least one epoch"),
  ],
)
def test_flags_that_cannot_be(flags, words, rejects):
  with rejects(words):
    config_of("--baselines=soup_classifier", *flags)


@pytest.mark.slow
def test_a_run_is_stopped_while_a_classifier_learns(tmp_path, monkeypatch):
  flags = (
    *SMALL, "--epochs=1", "--imbalance=5", "--vary=subset", "--subsets=balanced",
    "--batch_size=16", "--criterion=channels", "--shrink", "--hidden=16,16",
    "--average=ema", "--baselines=soup_classifier",
  )  # fmt: skip
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  assert run(*flags, f"--workdir={whole}") == 0
  lines = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
  # All trainings are of one epoch, in chunks of at most eight steps.
  chunks = sum(-(-line["step"] // 8) for line in lines if "epoch" in line)
  assert stopped_with(monkeypatch, chunks - 1, *flags, f"--workdir={stopped}") == 143
  assert run(*flags, f"--workdir={stopped}") == 0
  assert_same_run(stopped, whole)
  first, last = results(whole)["seeds"][0]["phases"]
  found = last["soup_classifier"]
  assert "soup_classifier" not in first
  assert found["test_loss"] != last["soup"]["test_loss"]
  assert found["sparsity"] == pytest.approx(last["sparsity"])
  phases = [line for line in lines if "evaluation" in line]
  soups = {
    method: [x["evaluation"]["soup"] for x in phases if x["method"] == method]
    for method in ("sms", "soup_classifier")
  }
  assert soups["soup_classifier"] == [*soups["sms"], found]
