"""The benchmark's peer in PyTorch does the same work."""

import functools

import jax
import numpy as np
import pytest

from jaxsms import magnitude_masks, models
from jaxsms.disk.torch_layout import layout
from jaxsms.pretrained import to_torch
from jaxsms.training import TrainState, init_variables, sgd, start
from jaxsms.training import step as training_step

torch = pytest.importorskip("torch")

from experiments.benchmarks.bench_torch import Alone, Ensemble, Recipe  # noqa: E402
from experiments.benchmarks.torch_batches import Batches, resident  # noqa: E402
from experiments.benchmarks.torch_models import make_network  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilation")]
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


def network(name):
  if name == "mlp":
    return models.create("mlp", 10, hidden=(12,), dropout=0.0), (4, 4, 2)
  return models.create(name, 10, width=4), (8, 8, 3)


@pytest.mark.parametrize(
  ("name", "options"),
  [("mlp", {"dropout": 0.0}), ("resnet8", {}), ("resnet56", {}), ("resnet18", {})],
)
def test_pytorch_has_the_same_parameters(name, options):
  module = models.create(name, 10, **options)
  expected = {tensor.name: tensor.shape for tensor in layout(module, (32, 32, 3))[1]}
  for vmapped in (False, True):
    state = make_network(module, (32, 32, 3), vmapped).state_dict()
    state = {k: tuple(v.shape) for k, v in state.items() if "num_batches" not in k}
    wanted = {k: v for k, v in expected.items() if not (vmapped and "running" in k)}
    assert state == wanted


def made(module, image_shape, copies, batch=6, steps=3, sparsity=0.5):
  """One network, masks, and a different batch for each step and copy."""
  rng = np.random.default_rng(0)
  params, batch_stats = init_variables(module, jax.random.key(1), image_shape)
  masks = magnitude_masks(params, sparsity)
  params = jax.tree.map(lambda x, mask: x * mask, params, masks)
  images = rng.standard_normal((steps, copies, batch, *image_shape)).astype(np.float32)
  labels = rng.integers(0, 10, (steps, copies, batch)).astype(np.int32)
  return params, batch_stats, masks, images, labels


def recipe_of(module, image_shape, params, batch_stats, masks, bfloat16=False):
  def named(tree):
    variables = {"params": tree, **({"batch_stats": batch_stats} if batch_stats else {})}
    return to_torch(jax.device_get(variables), module, image_shape)

  return Recipe(named(params), named(masks), LR, MOMENTUM, DECAY, bfloat16, "cpu")


def train_torch(training, images, labels, channels_last):
  for batch, classes in zip(images, labels, strict=True):
    batch = torch.tensor(batch).permute(0, 1, 4, 2, 3)
    batch = batch if channels_last else batch.contiguous()
    training.step(batch, torch.tensor(classes, dtype=torch.long))
  return training


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_steps_of_pytorch_are_ours(name):
  module, shape = network(name)
  params, batch_stats, masks, images, labels = made(module, shape, copies=2)
  recipe = recipe_of(module, shape, params, batch_stats, masks)

  optimizer = sgd(LR, DECAY, momentum=MOMENTUM, nesterov=True)
  state = start(params, batch_stats, optimizer, 2)
  step = jax.jit(
    jax.vmap(
      lambda state, images, labels: training_step.train_step(
        training_step.Recipe(module),
        optimizer,
        jax.random.key(0),
        state,
        masks,
        images,
        labels,
      )
    )
  )
  losses, accuracies = [], []
  for now in zip(images, labels, strict=True):
    state, metrics = step(state, *now)
    losses.append(metrics["loss"])
    accuracies.append(metrics["accuracy"])

  ensemble = Ensemble(make_network(module, shape, vmapped=True), recipe, 2)
  train_torch(ensemble, images, labels, channels_last=False)
  np.testing.assert_allclose(ensemble.totals.loss, sum(losses), rtol=1e-4)
  np.testing.assert_array_equal(ensemble.totals.correct, np.round(6 * sum(accuracies)))
  for i in range(2):
    own: TrainState = jax.tree.map(lambda x, i=i: x[i], jax.device_get(state))
    stats = {"batch_stats": own.batch_stats} if batch_stats else {}
    ours = to_torch({"params": own.params, **stats}, module, shape)
    one = (images[:, i : i + 1], labels[:, i : i + 1])
    alone = Alone(make_network(module, shape, vmapped=False), recipe, channels_last=True)
    train_torch(alone, *one, channels_last=True)
    assert float(alone.totals.loss) == pytest.approx(float(sum(losses)[i]), rel=1e-4)
    for key, value in alone.parameters().items():
      close = {"rtol": 2e-3, "atol": 2e-5, "err_msg": key}
      np.testing.assert_allclose(value[0], ours[key], **close)
      np.testing.assert_allclose(ensemble.parameters()[key][i], ours[key], **close)
      if value.dim() > 2:  # a kernel behind the axis of copies
        removed = ~recipe.masks[key]
        assert removed.any()
        assert not np.asarray(value[0])[removed].any()
        assert not np.asarray(ensemble.parameters()[key][i])[removed].any()
    for key, buffer in alone.network.named_buffers():
      if key.endswith("running_mean"):
        np.testing.assert_allclose(buffer, ours[key], rtol=1e-3, atol=1e-5)


def test_pytorch_has_the_same_resnet18():
  module, shape = models.create("resnet18", 10, width=2), (16, 16, 3)
  params, batch_stats, masks, images, _ = made(module, shape, copies=1, steps=1)
  apply = functools.partial(module.apply, train=True, mutable=["batch_stats"])
  logits, _ = jax.jit(apply)({"params": params, "batch_stats": batch_stats}, images[0, 0])
  recipe = recipe_of(module, shape, params, batch_stats, masks)
  for vmapped in (False, True):
    alone = Alone(make_network(module, shape, vmapped), recipe, channels_last=True)
    theirs = alone.network(torch.tensor(images[0, 0]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(theirs.detach(), logits, rtol=1e-3, atol=1e-4)


def test_bfloat16_ensemble_stays_near_float32():
  module, shape = network("resnet8")
  params, batch_stats, masks, images, labels = made(module, shape, copies=2, steps=1)
  losses = []
  for bfloat16 in (False, True):
    recipe = recipe_of(module, shape, params, batch_stats, masks, bfloat16)
    ensemble = Ensemble(make_network(module, shape, vmapped=True), recipe, 2)
    train_torch(ensemble, images, labels, channels_last=True)
    losses.append(ensemble.totals.loss.numpy())
  assert (losses[0] != losses[1]).all()
  np.testing.assert_allclose(*losses, rtol=0.03)


def test_networks_that_pytorch_has_not(rejects):
  for name in ("vgg16", "mlp"):  # the latter with its dropout
    with rejects("give --torch=none"):
      make_network(models.create(name, 10), (32, 32, 3), vmapped=False)


def test_augmented_batches_are_crops_of_the_right_images():
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, (7, 5, 6, 2), np.uint8)
  labels = np.arange(7)
  scaled = (np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)]) / 255 - 0.5) / 0.25
  for channels_last in (True, False):
    batches = Batches(
      resident(images, labels, "crop_flip", "cpu"), 3, 2, "crop_flip", channels_last
    )
    seen, windows = [], set()
    for _ in range(8):
      batch, classes = batches.next()
      assert batch[0].shape == (3, 2, 5, 6)
      seen.append(classes.numpy())
      for image, label in zip(batch.flatten(0, 1), classes.flatten(), strict=True):
        image = image.permute(1, 2, 0).numpy()
        fits = {
          (top, left, flip)
          for top in range(9)
          for left in range(9)
          for flip in (1, -1)
          if np.allclose(
            scaled[label, top : top + 5, left : left + 6][:, ::flip], image, atol=1e-5
          )
        }
        assert fits
        windows |= fits
    assert len({flip for *_, flip in windows}) == 2
    assert len({top for top, *_ in windows}) > 4
    for epoch in range(4):  # two batches, no image twice, another order for each copy
      both = np.concatenate(seen[2 * epoch : 2 * epoch + 2], axis=1)
      assert all(len(set(order)) == 6 for order in both)
    assert any((order[0] != order[1]).any() for order in seen)


def test_batches_without_crops():
  images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
  labels = np.arange(64)
  normalized = (images / 255 - 0.5) / 0.25
  differences = {}
  for name in ("none", "noise"):
    data = resident(images, labels, name, "cpu")
    batch, classes = Batches(data, 64, 1, name, False).next()
    batch = batch[0].permute(0, 2, 3, 1).numpy()
    differences[name] = batch - normalized[classes[0].numpy()]
  np.testing.assert_allclose(differences["none"], 0, atol=1e-5)
  assert abs(differences["noise"].mean()) < 0.06  # 4096 draws: four standard errors
  assert abs(differences["noise"].std() - 1) < 0.05
