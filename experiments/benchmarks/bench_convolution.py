"""Times ways to run a convolution of m copies and its two gradients.

python -m experiments.benchmarks.bench_convolution --json=convolution.json
python -m experiments.benchmarks.bench_convolution --layers=3x3/16/32,1x1/64/32 --minutes=2

A layer is kernel/channels/size, with /2 behind it for stride 2: 3x3/64/32/2. What is not
done when the time is over is left out, and said.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax

from jaxsms.convolution import conv_general_dilated
from jaxsms.nn.lowerings import NHWC

from ..config.fields import (
  at_least,
  define_flags,
  flag,
  one_of,
  read_fields,
  whole_numbers,
)
from ..costs.timing import Contender, alternate, calls_for, repeated, scaled, seconds
from ..run.environment import environment
from ..run.flag_files import check_no_arguments, refusals
from ..run.terminal import terminal
from .bench_figures import write_figures

BATCH, REPEATS, ROUNDS = 128, 4, 5
ROUND_SECONDS = 0.01
OPERATIONS = ("forward", "image gradient", "kernel gradient")
LAYERS = (
  "3x3/16/32", "3x3/64/32", "3x3/128/16", "3x3/256/8", "3x3/512/4", "3x3/32/16",
  "3x3/64/8", "3x3/16/32/2", "3x3/64/32/2", "1x1/64/32", "1x1/256/8", "1x1/64/32/2",
)  # fmt: skip


class Layer(NamedTuple):
  """A convolution from so many channels to as many; twice as many at stride 2.

  Attributes:
    kernel: height and width of the kernel.
    channels: of the images.
    size: height and width of the images.
    stride: along both.
  """

  kernel: int
  channels: int
  size: int
  stride: int

  @property
  def features(self) -> int:
    """Channels of the outputs."""
    return self.channels * self.stride

  @property
  def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """As the networks here have it."""
    return ((self.kernel // 2, self.kernel // 2),) * 2

  def flops(self, copies: int) -> float:
    """Of one operation on all copies, two for a multiply-add."""
    outputs = BATCH * (self.size // self.stride) ** 2 * self.features
    return 2.0 * copies * outputs * self.channels * self.kernel**2


def read_layer(text: str) -> Layer:
  """`3x3/64/32` or `3x3/64/32/2` as a layer.

  Raises:
    ValueError: it is written in another way.
  """
  try:
    kernel, channels, size, *stride = text.split("/")
    height, width = map(int, kernel.split("x"))
    layer = Layer(height, int(channels), int(size), *map(int, stride or ["1"]))
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"--layers has {text}: write kernel/channels/size or kernel/channels/size/stride, "
      "such as 3x3/64/32"
    ) from error
  if height != width or min(layer) < 1 or layer.size % layer.stride:
    raise ValueError(
      f"--layers has {text}: kernels are square, all numbers at least 1, and the stride "
      "divides the size"
    )
  return layer


# Ways to run a layer on images [m, batch, size, size, channels] and kernels [m, ...].


def native(layer: Layer, images: jax.Array, kernel: jax.Array) -> jax.Array:
  """XLA's convolution of one copy."""
  return lax.conv_general_dilated(
    images, kernel, (layer.stride,) * 2, layer.padding, dimension_numbers=NHWC
  )


def ours(lowering: str, layer: Layer, images: jax.Array, kernel: jax.Array) -> jax.Array:
  """The library's convolution of one copy, by one of its lowerings."""
  return conv_general_dilated(
    images, kernel, (layer.stride,) * 2, layer.padding, dimension_numbers=NHWC,
    lowering=lowering,
  )  # fmt: skip


def patches(layer: Layer, images: jax.Array, kernel: jax.Array) -> jax.Array:
  """One copy as patches (im2col) and a matrix product."""
  columns = lax.conv_general_dilated_patches(
    images, kernel.shape[:2], (layer.stride,) * 2, layer.padding, dimension_numbers=NHWC
  )  # channels before places of the kernel
  matrix = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])
  return columns @ matrix


def shifts(layer: Layer, images: jax.Array, kernel: jax.Array) -> jax.Array:
  """One copy as a sum of matrix products, one for each place of the kernel."""
  padded = jnp.pad(images, ((0, 0), *layer.padding, (0, 0)))
  out = layer.size // layer.stride
  total = None
  for y, x in itertools.product(range(layer.kernel), repeat=2):
    part = padded[:, y :: layer.stride, x :: layer.stride][:, :out, :out] @ kernel[y, x]
    total = part if total is None else total + part
  return total


WAYS: dict[str, Callable[[Layer, jax.Array, jax.Array], jax.Array]] = {
  "native": native,
  "grouped": functools.partial(ours, "grouped"),
  "unrolled": functools.partial(ours, "unrolled"),
  "loop": functools.partial(ours, "loop"),
  "patches": patches,
  "shifts": shifts,
}


def operation(way: Callable, layer: Layer, name: str, inside: bool) -> Callable:
  """Forward or a gradient for m copies at once.

  Args:
    way: how one copy runs.
    layer: what runs.
    name: one of `OPERATIONS`.
    inside: gradients are taken under `vmap`; else of the vmapped function.

  Returns:
    A function of images, kernels and outputs' gradients, all [m, ...].
  """
  one = functools.partial(way, layer)
  if name == "forward":
    return lambda images, kernels, _: jax.vmap(one)(images, kernels)
  which = OPERATIONS.index(name) - 1

  def gradient(function):
    def apply(images, kernels, outputs):
      operands = [images, kernels]

      def of_one(x):
        return function(*operands[:which], x, *operands[which + 1 :])

      return jax.vjp(of_one, operands[which])[1](outputs)[0]

    return apply

  return jax.vmap(gradient(one)) if inside else gradient(jax.vmap(one))


def contender(
  way: Callable, layer: Layer, name: str, inside: bool, arrays: Any
) -> Contender:
  """A round of it, compiled; several in one program, so that starting it costs little."""
  function = operation(way, layer, name, inside)

  @jax.jit
  def several(images, kernels, outputs):
    return [function(images[i], kernels[i], outputs[i]) for i in range(REPEATS)]

  compiled = several.lower(*arrays).compile()

  def once():
    jax.block_until_ready(compiled(*arrays))

  once()
  return repeated(once, calls_for(ROUND_SECONDS, seconds(once)), REPEATS)


def operands(layer: Layer, copies: int, dtype: Any) -> tuple[jax.Array, ...]:
  """Random images, kernels and outputs' gradients [repeats, m, ...]."""
  keys = jax.random.split(jax.random.key(0), 3)
  out = layer.size // layer.stride
  shapes = (
    (BATCH, layer.size, layer.size, layer.channels),
    (layer.kernel, layer.kernel, layer.channels, layer.features),
    (BATCH, out, out, layer.features),
  )
  return tuple(
    jax.random.normal(key, (REPEATS, copies, *shape), dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )


def measure(
  layers: Sequence[Layer], copies: Sequence[int], dtypes: Sequence[str], minutes: float
) -> Iterator[dict[str, Any]]:
  """A row for each layer, number of copies, precision and operation.

  Yields:
    `layer`, `copies`, `dtype`, `operation`, `milliseconds` (median of rounds) by way, and
    `teraflops` of the fastest.
  """
  end = time.monotonic() + 60 * minutes
  for dtype, m, layer in itertools.product(dtypes, copies, layers):
    arrays = operands(layer, m, dtype)
    for name in OPERATIONS:
      if time.monotonic() > end:
        return
      contenders = {}
      for key, way in WAYS.items():
        for inside in (False, True) if key == "native" and name != "forward" else (False,):
          label = f"{key}, gradient under vmap" if inside else key
          contenders[label] = contender(way, layer, name, inside, arrays)
      times = {k: scaled(v, 1000) for k, v in alternate(contenders, ROUNDS).items()}
      fastest = min(spread.median for spread in times.values())
      yield {
        "layer": layer._asdict(), "copies": m, "dtype": dtype, "operation": name,
        "milliseconds": {k: v.median for k, v in times.items()},
        "teraflops": layer.flops(m) / fastest / 1e9,
      }  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The flags of this benchmark."""

  layers: tuple[Layer, ...] = flag(
    "Layers, kernel/channels/size[/stride].",
    default=list(LAYERS),
    parse=lambda words, name, values: tuple(map(read_layer, words)),
  )
  copies: tuple[int, ...] = flag(
    "Numbers of copies, in order.",
    lambda name, value: at_least(1)(name, min(value, default=0)),
    default=["8", "1", "16", "4", "2"],
    parse=whole_numbers("8,1,16"),
  )
  precision: tuple[str, ...] = flag(
    "dtypes of all arrays.",
    one_of("precision", ("float32", "bfloat16", "float16")),
    default=["float32", "bfloat16"],
    parse=lambda words, name, values: tuple(words),
  )
  minutes: float = flag(
    "After which no other row is begun.", default=4.0, bounds={"lower_bound": 0.01}
  )
  json: str | None = flag("File for the figures.")


def main(argv: list[str]) -> None:
  """Times what the flags say; bad input ends it with one sentence and exit status 2."""
  with refusals():
    check_no_arguments(argv)
    config = read_fields(Config, flags.FLAGS)
  console, rows = terminal(), []
  console.print(f"{environment()}", soft_wrap=True)
  for row in measure(config.layers, config.copies, config.precision, config.minutes):
    rows.append(row)
    layer = Layer(**row["layer"])
    best = sorted(row["milliseconds"].items(), key=lambda item: item[1])
    console.print(
      f"{layer.kernel}x{layer.kernel}/{layer.channels}/{layer.size}/{layer.stride} "
      f"m={row['copies']} {row['dtype']} {row['operation']}: "
      + ", ".join(f"{name} {ms:.3f} ms" for name, ms in best)
      + f" ({row['teraflops']:.2f} TFLOP/s)",
      soft_wrap=True,
    )
  planned = (
    len(config.layers) * len(config.copies) * len(config.precision) * len(OPERATIONS)
  )
  if len(rows) < planned:
    console.print(f"The time was over after {len(rows)} of {planned} rows.")
  write_figures(config.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
  define_flags(Config)  # by the binary alone
  app.run(main)
