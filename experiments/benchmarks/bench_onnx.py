"""How much faster a network answers in ONNX Runtime once some of its channels are cut.

python -m experiments.benchmarks.bench_onnx --model=resnet18

The same share of every group of channels goes. Rounds of both alternate.
"""

import dataclasses
import os
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from jaxsms import channel_groups, channel_masks, compact, export, models

from ..config.fields import (
  at_least,
  define_flags,
  ensure,
  flag,
  one_of,
  read_fields,
  whole_numbers,
)
from ..costs.onnx_latency import times_of
from ..run.flag_files import check_no_arguments, refusals

NETWORKS = tuple(name for name in models.MODELS if name != "mlp")  # those of images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The flags of this benchmark."""

  model: str = flag(
    f"Network: {', '.join(NETWORKS)}.", one_of("model", NETWORKS), default="resnet18"
  )
  share: float = flag(
    "Share of the channels of each group that goes.",
    ensure(lambda value: 0 < value < 1, "give a share between 0 and 1"),
    default=0.5,
  )
  size: int = flag("Height and width of an image.", at_least(1), default=32)
  batches: tuple[int, ...] = flag(
    "Images at once, such as 1,32.",
    ensure(lambda value: value and min(value) >= 1, "give numbers from 1 on"),
    default="1,32",
    parse=whole_numbers("1,32"),
  )
  width: int | None = flag(
    "Channels of the first stage. Default: those of the network.", at_least(1)
  )


def main(argv: list[str]) -> None:
  """Times what the flags say; bad input ends it with one sentence and exit status 2."""
  logging.set_verbosity(logging.WARNING)
  with refusals():
    check_no_arguments(argv)
    config = read_fields(Config, flags.FLAGS)
    found = measure(config)
  print(text(found))


def measure(config: Config) -> dict[str, Any]:
  """Times of the ONNX files "dense" and "cut", see `onnx_latency.times_of`.

  Raises:
    ValueError: the images, or the width, do not fit the network.
    ImportError: jax2onnx or ONNX Runtime is missing.
  """
  options = {} if config.width is None else {"width": config.width}
  module = models.create(
    config.model, 10, convolution=jax.lax.conv_general_dilated, **options
  )
  images = jax.ShapeDtypeStruct((2, config.size, config.size, 3), jnp.float32)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.05 * rng.standard_normal(x.shape)).astype(x.dtype) ** 2,
    jax.eval_shape(module.init, jax.random.key(0), images),
  )
  groups = channel_groups(module.apply, params, images)
  masks = channel_masks(
    params, config.share, groups=groups, budget="channels", scope="uniform"
  )
  small = compact(module.apply, params, masks, images)
  with tempfile.TemporaryDirectory() as folder:
    files = {name: os.path.join(folder, f"{name}.onnx") for name in ("dense", "cut")}
    export.save_onnx(files["dense"], module.apply, params, images)
    export.save_onnx(files["cut"], small.apply, small.params, images)
    return times_of(files, config.batches)


def text(found: dict[str, Any]) -> str:
  """What is printed of times: bytes and milliseconds of both, and their ratios."""
  dense, cut = (found["files"][name] for name in ("dense", "cut"))
  lines = [
    f"{found['runtime']} {found['device']}",
    f"bytes {dense['bytes']:,} -> {cut['bytes']:,}",
  ]
  for batch, before in dense["milliseconds"].items():
    after = cut["milliseconds"][batch]
    lines.append(
      f"batch {batch}: {before['median']:.1f} -> {after['median']:.1f} ms, "
      f"{before['median'] / after['median']:.2f} times as fast"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  define_flags(Config)  # by the binary alone: others have some of them
  app.run(main)
