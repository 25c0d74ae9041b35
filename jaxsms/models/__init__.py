"""The paper's networks, as Flax linen modules."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jaxsms.models.layers import hidden_widths
from jaxsms.models.mlp import MLP
from jaxsms.models.resnet_cifar import CifarResNet
from jaxsms.names import check_name


def _mlp(num_classes: int, hidden=(512,), **options: Any) -> nn.Module:
  return MLP(num_classes, hidden=hidden_widths(hidden), **options)


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
  return lambda num_classes, **options: CifarResNet(num_classes, depth=depth, **options)


# A new network is one more entry: a function of num_classes and its own options.
MODELS: dict[str, Callable[..., nn.Module]] = {
  "mlp": _mlp,
  "resnet8": _cifar_resnet(8),
  "resnet20": _cifar_resnet(20),
  "resnet56": _cifar_resnet(56),
}


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
  """Makes one of the paper's networks.

  Args:
    name: "mlp", "resnet8", "resnet20" or "resnet56".
    num_classes: number of logits, at least 2.
    **options: fields of the network: `hidden` and `dropout` of the MLP, `width` of the
      residual networks.

  Returns:
    A module, to be called as `module.apply(variables, images, train=False)` on float
    images [batch, height, width, channels]; logits [batch, num_classes].

  Raises:
    ValueError: unknown name or option, or a number out of range.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, appendix A
  """
  check_name("model", name, MODELS)
  if num_classes < 2:
    raise ValueError(f"num_classes is {num_classes}: a classifier needs at least 2")
  try:
    return MODELS[name](num_classes, **options)
  except TypeError as error:
    raise ValueError(f"model {name!r} does not take these options: {error}") from error
