"""How much faster a network answers in ONNX Runtime once half of its channels are cut.

python -m experiments.benchmarks.bench_onnx --model=resnet18
"""

import argparse
import os
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms import channel_groups, channel_masks, compact, export, models

from ..run.onnx_latency import measured


def main(argv: Sequence[str] | None = None) -> None:
  """Prints bytes and milliseconds of both, and their ratios."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", default="resnet18")
  parser.add_argument("--share", type=float, default=0.5, help="of the channels that go")
  parser.add_argument("--size", type=int, default=32, help="height and width of an image")
  parser.add_argument("--batches", default="1,32", help="images at once")
  parser.add_argument("--width", type=int, help="channels of the first stage")
  chosen = parser.parse_args(argv)
  options = {} if chosen.width is None else {"width": chosen.width}
  module = models.create(
    chosen.model, 10, convolution=jax.lax.conv_general_dilated, **options
  )
  images = jax.ShapeDtypeStruct((2, chosen.size, chosen.size, 3), jnp.float32)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.05 * rng.standard_normal(x.shape)).astype(x.dtype) ** 2,
    jax.eval_shape(module.init, jax.random.key(0), images),
  )
  groups = channel_groups(module.apply, params, images)
  masks = channel_masks(
    params, chosen.share, groups=groups, budget="channels", scope="uniform"
  )
  small = compact(module.apply, params, masks, images)
  with tempfile.TemporaryDirectory() as folder:
    files = {name: os.path.join(folder, f"{name}.onnx") for name in ("dense", "cut")}
    export.save_onnx(files["dense"], module.apply, params, images)
    export.save_onnx(files["cut"], small.apply, small.params, images)
    found = measured(files, [int(n) for n in chosen.batches.split(",")])
  print(found["runtime"], found["device"])
  dense, cut = (found["files"][name] for name in ("dense", "cut"))
  print(f"bytes {dense['bytes']:,} -> {cut['bytes']:,}")
  for batch, before in dense["milliseconds"].items():
    after = cut["milliseconds"][batch]
    print(
      f"batch {batch}: {before['median']:.1f} -> {after['median']:.1f} ms, "
      f"{before['median'] / after['median']:.2f} times as fast"
    )


if __name__ == "__main__":
  main()
