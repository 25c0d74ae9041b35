"""The paper's networks, as Flax linen modules."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxsms.models.layers import hidden_widths
from jaxsms.models.mlp import MLP
from jaxsms.models.resnet import ResNet, torchvision_init
from jaxsms.models.resnet_cifar import CifarResNet
from jaxsms.models.vgg import VGG
from jaxsms.models.vit import ViT
from jaxsms.models.wide_resnet import WideResNet
from jaxsms.names import check_name


def _mlp(num_classes: int, hidden=(512,), **options: Any) -> nn.Module:
  return MLP(num_classes, hidden=hidden_widths(hidden), **options)


def _resnet50(num_classes: int, stem: str = "imagenet", **options: Any) -> nn.Module:
  return ResNet(
    num_classes,
    blocks=(3, 4, 6, 3),
    bottleneck=True,
    stem=stem,
    conv_init=torchvision_init,
    **options,
  )


def _of(network: type[nn.Module], **fields: Any) -> Callable[..., nn.Module]:
  """Makes a network whose given fields are no options any more."""
  return lambda num_classes, **options: network(num_classes, **fields, **options)


# A new network is one more entry: a function of num_classes and its own options.
MODELS: dict[str, Callable[..., nn.Module]] = {
  "mlp": _mlp,
  "resnet8": _of(CifarResNet, depth=8),
  "resnet20": _of(CifarResNet, depth=20),
  "resnet56": _of(CifarResNet, depth=56),
  "resnet18": _of(ResNet, blocks=(2, 2, 2, 2), bottleneck=False),
  "vgg16": _of(VGG, convolutions=(2, 2, 3, 3, 3)),
  "wide_resnet28_10": _of(WideResNet, depth=28),
  "wide_resnet22_10": _of(WideResNet, depth=22),
  "resnet50": _resnet50,
  "vit_tiny": ViT,
}
"""What `create` makes, by name: functions of `num_classes` and a network's options."""

_SIZES = ("width", "widening", "patch_size", "depth", "heads")


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
  """Makes one of the paper's networks.

  Args:
    name: "mlp", "resnet8", "resnet20", "resnet56", "resnet18", "vgg16",
      "wide_resnet28_10", "wide_resnet22_10", "resnet50" or "vit_tiny".
    num_classes: number of logits, at least 2.
    **options: fields of the network: `hidden` and `dropout` of the MLP; `width` (channels
      of the first stage) of residual networks and VGG; `stem`, "cifar" (the default of
      "resnet18") or "imagenet" (that of "resnet50"); `widening` and `dropout` of wide
      ones; `patch_size`, `depth`, `width`, `heads` and `dropout` of the Vision
      Transformer; `dtype` of the activations (parameters are float32), such as
      `jax.numpy.bfloat16`; and of all but the MLP `convolution`, with the signature of
      `jax.lax.conv_general_dilated`, and
      `remat`, True for less memory and more time.

  Returns:
    A module, to be called as `module.apply(variables, images, train=False)` on float
    images [batch, height, width, channels]; logits [batch, num_classes].

  Raises:
    ValueError: unknown name or option, or a number out of range.

  References:
    Zimmer et al., 2024, https://arxiv.org/abs/2306.16788, appendix A

  Example:
    >>> mlp = jaxsms.models.create("mlp", num_classes=10, hidden=(256, 256))
    >>> images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    >>> shapes = jax.eval_shape(mlp.init, jax.random.key(0), images)["params"]
    >>> [layer["kernel"].shape for layer in shapes.values()]
    [(64, 256), (256, 256), (256, 10)]
  """
  check_name("model", name, MODELS)
  if num_classes < 2:
    raise ValueError(f"num_classes is {num_classes}: a classifier needs at least 2")
  try:
    for size in _SIZES:
      if size in options and options[size] < 1:
        raise ValueError(f"{size} is {options[size]}: it must be at least 1")
    if not 0 <= options.get("dropout", 0) < 1:
      raise ValueError(f"dropout is {options['dropout']:g}: it is a rate, in [0, 1)")
    dtype, convolution = options.get("dtype"), options.get("convolution", create)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"dtype is {jnp.dtype(dtype).name}: networks compute in a floating one, such as "
        "bfloat16"
      )
    if not callable(convolution):
      raise ValueError(
        f"convolution is {convolution!r}: pass a function with the signature of "
        "jax.lax.conv_general_dilated"
      )
    return MODELS[name](num_classes, **options)
  except TypeError as error:
    raise ValueError(f"model {name!r} does not take these options: {error}") from error
