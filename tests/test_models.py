"""The networks: counts, initialisation and logits, against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsms import models, prunable
from jaxsms.models.resnet_cifar import pad_shortcut

pytestmark = pytest.mark.usefixtures("quick_compilation")


def shapes(name, image_shape, **options):
  module = models.create(name, 10, **options)
  return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *image_shape)))


@pytest.mark.parametrize(
  ("name", "image_shape", "parameters", "prunable_weights"),
  [
    ("mlp", (28, 28, 1), 407_050, 406_528),
    ("resnet56", (32, 32, 3), 853_018, 848_944),
    # 19 convolutions: 3*9*16 + 6*16*16*9 + (16 + 5*32)*32*9 + (32 + 5*64)*64*9, 64*10 dense
    ("resnet20", (32, 32, 3), 269_722, 268_336),
    # 7 convolutions: 3*9*16 + 2*16*16*9 + (16 + 32)*32*9 + (32 + 64)*64*9, 64*10 dense
    ("resnet8", (32, 32, 3), 75_290, 74_800),
  ],
)
def test_counts(name, image_shape, parameters, prunable_weights):
  params = shapes(name, image_shape)["params"]
  leaves = jax.tree_util.tree_leaves_with_path(params)
  assert sum(x.size for _, x in leaves) == parameters
  assert sum(x.size for path, x in leaves if prunable(path, x)) == prunable_weights


def test_initialisation_is_pytorchs():
  module = models.create("mlp", 10, hidden=(300,), dropout=0.0)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 20, 20, 1)))["params"]
  for name, fan_in in (("Dense_0", 400), ("Dense_1", 300)):
    for leaf in params[name].values():
      bound = 1 / np.sqrt(fan_in)
      assert np.abs(leaf).max() <= bound
      if leaf.size > 1000:  # uniform: standard deviation bound / sqrt(3)
        assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.02)
  init = jax.jit(models.create("resnet8", 10).init)
  params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  stem = np.asarray(params["params"]["Conv_0"]["kernel"])
  assert 0.95 / np.sqrt(27) < np.abs(stem).max() <= 1 / np.sqrt(27)


def torch_resnet(torch, variables, depth):
  """The same network written with PyTorch's functions, on our weights."""
  functional = torch.nn.functional
  params, stats = variables["params"], variables["batch_stats"]

  def conv(x, p, stride=1):
    kernel = torch.tensor(np.asarray(p["kernel"]).transpose(3, 2, 0, 1).copy())
    return functional.conv2d(x, kernel, stride=stride, padding=1)

  def norm(x, p, s):
    arrays = (s["mean"], s["var"], p["scale"], p["bias"])
    return functional.batch_norm(x, *(torch.tensor(np.asarray(a)) for a in arrays))

  def block(x, p, s, features, stride):
    y = norm(conv(x, p["Conv_0"], stride), p["BatchNorm_0"], s["BatchNorm_0"])
    y = norm(conv(y.relu(), p["Conv_1"]), p["BatchNorm_1"], s["BatchNorm_1"])
    if features != x.shape[1]:
      quarter = features // 4
      x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
    return (x + y).relu()

  def network(images):
    x = torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())
    x = norm(conv(x, params["Conv_0"]), params["BatchNorm_0"], stats["BatchNorm_0"]).relu()
    number = 0
    for stage in range(3):
      for first in [True] + [False] * ((depth - 2) // 6 - 1):
        name = f"BasicBlock_{number}"
        stride = 2 if stage and first else 1
        x = block(x, params[name], stats[name], 16 * 2**stage, stride)
        number += 1
    dense = params["Dense_0"]
    weight = torch.tensor(np.asarray(dense["kernel"]).T.copy())
    return functional.linear(
      x.mean((2, 3)), weight, torch.tensor(np.asarray(dense["bias"]))
    )

  return network


@pytest.mark.torch
def test_logits_equal_pytorchs():
  import torch

  module = models.create("resnet8", 7)
  key = jax.random.key(3)
  images = np.asarray(jax.random.normal(key, (4, 12, 12, 3)))
  variables = jax.jit(module.init)(key, images)
  # Statistics that are not those of a fresh network.
  variables["batch_stats"] = jax.tree.map(
    lambda x: x + jnp.linspace(0.1, 0.5, x.size), variables["batch_stats"]
  )
  with torch.no_grad():
    expected = torch_resnet(torch, variables, 8)(images).numpy()
  logits = jax.jit(module.apply)(variables, images)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_shortcut_takes_every_second_pixel_and_pads_both_sides():
  x = jnp.arange(1 * 4 * 4 * 2, dtype=jnp.float32).reshape(1, 4, 4, 2) + 1
  y = pad_shortcut(x, 4, 2)
  assert y.shape == (1, 2, 2, 4)
  np.testing.assert_array_equal(y[..., 1:3], x[:, ::2, ::2])
  assert not y[..., 0].any() and not y[..., 3].any()


def test_dropout_acts_in_training_alone():
  module = models.create("mlp", 3, hidden=(50,), dropout=0.5)
  images = jnp.ones((2, 4, 4, 1))
  variables = module.init(jax.random.key(0), images)

  def logits(seed, train):
    return module.apply(
      variables, images, train=train, rngs={"dropout": jax.random.key(seed)}
    )

  assert np.abs(logits(0, True) - logits(1, True)).max() > 1e-3
  np.testing.assert_array_equal(logits(0, False), logits(1, False))


@pytest.mark.parametrize(
  ("arguments", "options", "words"),
  [
    (("resnet21", 10), {}, "did you mean resnet20"),
    (("MLP", 10), {}, "did you mean mlp"),
    (("mlp", 1), {}, "at least 2"),
    (("mlp", 10), {"width": 3}, "does not take"),
    (("mlp", 10), {"hidden": (0,)}, "at least 1"),
  ],
)
def test_bad_requests(arguments, options, words):
  with pytest.raises(ValueError, match=words):
    models.create(*arguments, **options)
