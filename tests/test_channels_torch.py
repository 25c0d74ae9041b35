"""Groups and what is left after cutting, against an independent tool for PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cut_networks import masks_of

from jaxsms import channel_groups, compact, models

pytestmark = pytest.mark.slow

WIDTHS = ((1, 8, 1), (6, 12, 2), (6, 12, 1), (6, 16, 2))  # expansion, features, stride


class MobileNet(nn.Module):
  """Inverted residuals with depthwise convolutions."""

  @nn.compact
  def __call__(self, x, train=False):
    def layer(x, features, size, stride=1, groups=1, act=True):
      x = nn.Conv(
        features, (size, size), stride, feature_group_count=groups, use_bias=False
      )(x)
      x = nn.BatchNorm(use_running_average=not train)(x)
      return nn.relu6(x) if act else x

    x = layer(x, 16, 3)
    for expansion, features, stride in WIDTHS:
      inside = expansion * x.shape[-1]
      y = layer(x, inside, 1) if expansion > 1 else x
      y = layer(y, inside, 3, stride, inside)
      y = layer(y, features, 1, act=False)
      x = x + y if y.shape == x.shape else y
    return nn.Dense(10)(layer(x, 40, 1).mean((1, 2)))


def in_torch(torch):
  """The same networks in PyTorch, by name."""
  from torch import nn

  def layer(inputs, features, size, stride=1, groups=1, act=nn.ReLU, bias=False):
    conv = nn.Conv2d(inputs, features, size, stride, size // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(features), act())

  class Residual(nn.Module):
    def __init__(self, body, shortcut, after):
      super().__init__()
      self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, x):
      return self.after(self.body(x) + self.shortcut(x))

  def end(features):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10)]

  def resnet(blocks, bottleneck):
    layers, inputs = [layer(3, 64, 3)], 64
    for stage, number in enumerate(blocks):
      width = 64 * 2**stage
      for i in range(number):
        stride, outs = 2 if stage and not i else 1, width * (4 if bottleneck else 1)
        if bottleneck:
          body = [layer(inputs, width, 1), layer(width, width, 3, stride)]
          body += [layer(width, outs, 1, act=nn.Identity)]
        else:
          body = [layer(inputs, width, 3, stride), layer(width, outs, 3, act=nn.Identity)]
        same = stride == 1 and inputs == outs
        shortcut = (
          nn.Identity() if same else layer(inputs, outs, 1, stride, act=nn.Identity)
        )
        layers.append(Residual(nn.Sequential(*body), shortcut, nn.ReLU()))
        inputs = outs
    return nn.Sequential(*layers, *end(inputs))

  def vgg():
    layers, inputs = [], 3
    for features, number in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
      for _ in range(number):
        layers.append(layer(inputs, features, 3, bias=True))
        inputs = features
      layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *end(inputs))

  def mobilenet():
    layers, inputs = [layer(3, 16, 3, act=nn.ReLU6)], 16
    for expansion, features, stride in WIDTHS:
      inside = expansion * inputs
      body = [layer(inputs, inside, 1, act=nn.ReLU6)] if expansion > 1 else []
      body += [layer(inside, inside, 3, stride, inside, nn.ReLU6)]
      body = nn.Sequential(*body, layer(inside, features, 1, act=nn.Identity))
      same = stride == 1 and inputs == features
      layers.append(Residual(body, nn.Identity(), nn.Identity()) if same else body)
      inputs = features
    return nn.Sequential(*layers, layer(inputs, 40, 1, act=nn.ReLU6), *end(40))

  return {
    "resnet18": lambda: resnet((2, 2, 2, 2), False),
    "resnet50": lambda: resnet((3, 4, 6, 3), True),
    "vgg16": vgg,
    "mobilenet": mobilenet,
  }


@pytest.mark.torch
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16", "mobilenet"])
def test_the_same_groups_and_parameters(name):
  import torch

  pruning = pytest.importorskip("torch_pruning")

  network = in_torch(torch)[name]().eval()
  graph = pruning.DependencyGraph().build_dependency(network, torch.randn(1, 3, 32, 32))
  full, sizes = sum(p.numel() for p in network.parameters()), []
  options = {"ignored_layers": [network[-1]]}
  for group in list(graph.get_all_groups(**options)):
    module, function = group[0].dep.target.module, group[0].dep.handler
    n = len(group[0].idxs)
    sizes.append(n)
    graph.get_pruning_group(module, function, list(range(n // 2))).prune()

  options = {"stem": "cifar"} if name == "resnet50" else {}
  module = MobileNet() if name == "mobilenet" else models.create(name, 10, **options)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  assert sum(x.size for x in jax.tree.leaves(variables["params"])) == full
  groups = channel_groups(module.apply, variables, images)
  assert sorted(g.size for g in groups) == sorted(sizes)
  kept = [np.arange(g.size) >= g.size // 2 for g in groups]
  small = compact(module.apply, variables, masks_of(variables, groups, kept), images)
  # All arrays of both, but for the order of their axes: channels layer by layer.
  shapes = sorted(tuple(sorted(p.shape)) for p in network.parameters())
  ours = [x.shape for x in jax.tree.leaves(small.params["params"])]
  assert sorted(tuple(sorted(shape)) for shape in ours) == shapes
