"""The ways to run a convolution that are timed give what they should."""

import jax
import numpy as np
import pytest
from jax import lax

from experiments.benchmarks import bench_convolution as bench
from jaxsms.nn.lowerings import NHWC


@pytest.mark.slow
@pytest.mark.parametrize("text", ["3x3/3/4", "3x3/2/4/2", "1x1/3/4", "1x1/2/4/2"])
def test_all_ways_are_the_convolution(text, monkeypatch):
  monkeypatch.setattr(bench, "BATCH", 2)
  layer = bench.read_layer(text)
  images, kernels, outputs = (np.asarray(x[0]) for x in bench.operands(layer, 2, "float32"))

  def both(images, kernels):
    return np.stack(
      [
        lax.conv_general_dilated(
          x, k, (layer.stride,) * 2, layer.padding, dimension_numbers=NHWC
        )
        for x, k in zip(images, kernels, strict=True)
      ]
    )

  assert both(images, kernels).shape == outputs.shape
  for name, way in bench.WAYS.items():
    forward = bench.operation(way, layer, "forward", False)(images, kernels, outputs)
    np.testing.assert_allclose(forward, both(images, kernels), atol=1e-4, err_msg=name)
    # A linear function's gradients, by its values: <y, f(dx, k)> = <dx, gradient>.
    other = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
    expected = np.sum(outputs * both(other, kernels))
    for inside in (False, True):
      of = bench.operation(way, layer, "image gradient", inside)
      found = np.sum(other * of(images, kernels, outputs))
      np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)
    other = np.random.default_rng(1).normal(size=kernels.shape).astype(np.float32)
    expected = np.sum(outputs * both(images, other))
    of = bench.operation(way, layer, "kernel gradient", False)
    found = np.sum(other * of(images, kernels, outputs))
    np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


def test_work_of_a_layer():
  # 128 images, 16x16 outputs of 128 channels, each from 3x3x64 inputs, of 5 copies.
  layer = bench.read_layer("3x3/64/32/2")
  assert layer.flops(5) == 2 * 5 * 128 * 16 * 16 * 128 * 9 * 64
  assert jax.tree.leaves(layer) == [3, 64, 32, 2]


@pytest.mark.parametrize("text", ["3x3/64", "3x5/64/32", "3x3/0/8", "a", "3x3/4/5/2"])
def test_layers_that_are_none(text, rejects):
  with rejects("--layers has"):
    bench.read_layer(text)
