import functools
import itertools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import NamedSharding
from x64 import enable_x64

import jaxsms
from jaxsms import convolution, make_mesh, map_ingredients
from jaxsms.convolution import conv_general_dilated
from jaxsms.devices.meshes import split_batch
from jaxsms.nn import lowerings

pytestmark = pytest.mark.usefixtures("quick_compilation")

NHWC = ("NHWC", "HWIO", "NHWC")
ONE_PAD = ((1, 1), (1, 1))


def convolve(x, w, strides=(1, 1), padding="SAME", conv=conv_general_dilated):
  return conv(x, w, strides, padding, dimension_numbers=NHWC)


native = functools.partial(convolve, conv=lax.conv_general_dilated)


def normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(got, wanted, tolerance=1e-5):
  """Compares trees, relative to the largest entry of each leaf."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max() + 1e-12, rtol=0)


def loss(conv):
  return lambda x, w: jnp.sum(jnp.sin(conv(x, w)))


def gradients(conv):
  return jax.grad(loss(conv), (0, 1))


CASES = [
  # image, kernel, strides, padding, batch
  ((8, 8), (3, 3), (1, 1), ONE_PAD, 5),
  ((8, 8), (3, 3), (2, 2), ONE_PAD, 5),
  ((7, 10), (3, 3), (2, 2), "SAME", 3),
  ((9, 7), (5, 3), (3, 2), "SAME", 1),
  ((8, 8), (3, 3), (3, 3), "VALID", 2),
  ((6, 5), (2, 2), (1, 1), "SAME", 2),
  ((6, 7), (2, 2), (2, 2), ((1, 0), (0, 1)), 2),
  ((6, 6), (1, 1), (1, 1), "SAME", 3),
  ((7, 6), (1, 1), (2, 2), "VALID", 3),
  ((5, 5), (1, 1), (1, 2), ((1, 0), (0, 2)), 2),
  ((8, 6), (5, 5), (2, 1), ((0, 4), (3, 1)), 2),
  ((5, 6), (2, 3), (1, 1), ((3, 0), (1, 4)), 2),
  ((5, 4), (2, 2), (3, 3), ((2, 2), (0, 3)), 2),
  ((3, 3), (5, 5), (1, 1), ((2, 2), (2, 2)), 2),
  ((1, 1), (3, 3), (2, 2), ONE_PAD, 2),
  ((2, 2), (3, 3), (1, 1), ONE_PAD, 3),
  ((2, 5), (3, 3), (2, 2), "SAME", 2),
  ((1, 4), (2, 3), (1, 2), ((0, 1), (2, 0)), 2),
]


@pytest.mark.torch
@pytest.mark.parametrize("image, kernel, strides, padding, batch", CASES)
def test_value_and_gradients_equal_pytorch(image, kernel, strides, padding, batch):
  import torch

  x, w = normal(0, batch, *image, 3), normal(1, *kernel, 3, 4)

  @jax.jit
  def ours(x, w):
    y, pull = jax.vjp(lambda x, w: convolve(x, w, strides, padding), x, w)
    return y, *pull(jnp.cos(y))

  pads = padding
  if isinstance(padding, str):
    pads = lax.padtype_to_pads(image, kernel, strides, padding)
  (top, bottom), (left, right) = pads
  tx = torch.tensor(np.array(x), dtype=torch.float64).permute(0, 3, 1, 2)
  tw = torch.tensor(np.array(w), dtype=torch.float64).permute(3, 2, 0, 1)
  tx.requires_grad_(), tw.requires_grad_()
  padded = torch.nn.functional.pad(tx, (left, right, top, bottom))
  ty = torch.nn.functional.conv2d(padded, tw, stride=strides)
  ty.backward(torch.cos(ty.detach()))
  wanted = (
    ty.detach().permute(0, 2, 3, 1),
    tx.grad.permute(0, 2, 3, 1),
    tw.grad.permute(2, 3, 1, 0),
  )
  wanted = [np.asarray(a.numpy(), np.float32) for a in wanted]
  assert_close(ours(x, w), wanted)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_images_with_fewer_pixels_than_the_kernel(axes):
  """One matrix product: a loop over pixels, outputs and taps in NumPy gives the same."""
  m, strides = 2, (1, 2)
  x, w = normal(0, m, 3, 2, 3, 2), normal(1, m, 3, 3, 2, 4)
  x, w = (a if axis == 0 else a[0] for a, axis in zip((x, w), axes, strict=True))

  def step(x, w):
    y, pull = jax.vjp(lambda x, w: convolve(x, w, strides, ONE_PAD), x, w)
    return y, *pull(jnp.ones_like(y))

  y, gx, gw = jax.jit(jax.vmap(step, axes))(x, w)
  x, w = (
    np.broadcast_to(a, (m, *a.shape[axis is not None :]))
    for a, axis in zip((x, w), axes, strict=True)
  )
  wanted = [np.zeros(a.shape) for a in (y, gx, gw)]
  for i, j, a, b in np.ndindex(2, 2, 3, 3):  # of outputs, then taps
    row, column = i + a - 1, 2 * j + b - 1
    if 0 <= row < 2 and 0 <= column < 3:
      wanted[0][:, :, i, j] += np.einsum("mnc,mco->mno", x[:, :, row, column], w[:, a, b])
      wanted[1][:, :, row, column] += w[:, a, b].sum(-1)[:, None]
      wanted[2][:, a, b] += x[:, :, row, column].sum(1)[..., None]
  for got, want in zip((y, gx, gw), wanted, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4)


sizes = st.integers(5, 7)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_small_shape_equals_native(data):
  pick = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
  image = data.draw(sizes), data.draw(sizes)
  kernel = pick(1, 2, 3, 5), pick(1, 2, 3)
  strides = pick(1, 2, 3), pick(1, 2)
  # XLA's own image gradient is wrong on a CPU where padding exceeds kernel - 1.
  pairs = tuple((pick(0, k - 1), pick(k // 2, k - 1)) for k in kernel)
  padding = pick("SAME", "VALID", pairs)
  x, w = normal(0, pick(1, 3), *image, pick(1, 2)), None
  w = normal(1, *kernel, x.shape[-1], pick(1, 3))

  def both(conv):
    return jax.jit(
      lambda x, w: (
        conv(x, w, strides, padding),
        gradients(lambda x, w: conv(x, w, strides, padding))(x, w),
      )
    )(x, w)

  assert_close(both(convolve), both(native))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 6, 7])
@pytest.mark.parametrize("group", [1, 4])
def test_batches_that_groups_of_images_do_not_divide(batch, group, monkeypatch):
  monkeypatch.setattr(lowerings, "_GROUP", group)
  convolution._operation.cache_clear()
  x, w = normal(0, 2, batch, 8, 8, 2), normal(1, 2, 3, 3, 2, 3)
  got = jax.jit(jax.vmap(gradients(convolve)))(x, w)
  convolution._operation.cache_clear()
  assert_close(got, jax.jit(jax.vmap(gradients(native)))(x, w))


@pytest.mark.parametrize("width", [7, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "channels, features",
  [(3, 16), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((8, 8), (16, 24)))],
)
def test_few_and_many_channels(width, channels, features):
  x, w = normal(0, 2, 3, 5, width, channels), normal(1, 2, 3, 3, channels, features)
  step = lambda conv: jax.jit(jax.vmap(gradients(conv)))(x, w)  # noqa: E731
  assert_close(step(convolve), step(native))


@pytest.mark.parametrize(
  "channels, features, strides, side",
  [(9, 13, (2, 2), 3), pytest.param(13, 15, (1, 1), 3, marks=pytest.mark.slow),
   pytest.param(3, 17, (1, 1), 3, marks=pytest.mark.slow),
   pytest.param(11, 9, (1, 2), 1, marks=pytest.mark.slow)],
)  # fmt: skip
def test_odd_numbers_of_channels(channels, features, strides, side):
  x, w = normal(0, 2, 3, 6, 5, channels), normal(1, 2, side, side, channels, features)

  def step(conv):
    conv = functools.partial(conv, strides=strides, padding="SAME")
    value = jax.jit(jax.vmap(conv))(x, w)
    return value, jax.jit(jax.vmap(gradients(conv)))(x, w)

  assert_close(step(convolve), step(native))
  assert step(convolve)[0].shape[-1] == features


AXES = [(0, 0), (0, None), (None, 0)]


@pytest.mark.parametrize("axes", [*AXES[:2], pytest.param(AXES[2], marks=pytest.mark.slow)])
@pytest.mark.parametrize("strides", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 2)])
def test_vmap_of_grad_and_grad_of_vmap_equal_one_at_a_time(axes, strides):
  conv = functools.partial(convolve, strides=strides, padding=ONE_PAD)
  x, w = normal(0, 3, 2, 6, 5, 2), normal(1, 3, 3, 3, 2, 4)
  x, w = (v if axis == 0 else v[0] for v, axis in zip((x, w), axes, strict=True))

  @jax.jit
  def all_ways(x, w):
    vmap_grad = jax.vmap(gradients(conv), axes)(x, w)
    mapped = jax.vmap(loss(conv), axes)
    grad_vmap = jax.grad(lambda x, w: jnp.sum(mapped(x, w)), (0, 1))(x, w)
    singles = [
      gradients(conv)(x[i] if axes[0] == 0 else x, w[i] if axes[1] == 0 else w)
      for i in range(3)
    ]
    singles = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    return vmap_grad, grad_vmap, singles

  vmap_grad, grad_vmap, singles = all_ways(x, w)
  assert_close(vmap_grad, singles)
  summed = [g if a == 0 else g.sum(0) for g, a in zip(singles, axes, strict=True)]
  assert_close(list(grad_vmap), summed)


@pytest.mark.slow
@pytest.mark.parametrize(
  "outer, inner",
  [
    # Quickly where one operand after the other is mapped.
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] == pair[1] else ())
    for pair in itertools.product(AXES, AXES)
  ],
)
def test_nested_vmap(outer, inner):
  x, w = normal(0, 2, 3, 2, 5, 4, 2), normal(1, 2, 3, 3, 3, 2, 2)
  index = [
    tuple(slice(None) if a == 0 else 0 for a in pair)
    for pair in zip(outer, inner, strict=True)
  ]
  x, w = x[index[0]], w[index[1]]
  nested = lambda conv: jax.jit(  # noqa: E731
    jax.vmap(jax.vmap(gradients(conv), inner), outer)
  )
  assert_close(nested(convolve)(x, w), nested(native)(x, w))


def test_vmap_over_other_axes_and_out_axes():
  x, w = normal(0, 2, 6, 5, 3, 2), normal(1, 3, 3, 2, 4, 3)
  mapped = lambda conv: jax.vmap(conv, (3, 4), 1)(x, w)  # noqa: E731
  assert_close(mapped(convolve), mapped(native))


def test_in_a_checkpointed_scan():
  x, w = normal(0, 3, 2, 6, 6, 2), 0.3 * normal(1, 3, 4, 3, 3, 2, 2)

  def run(conv):
    def deep(x, w):
      layer = jax.checkpoint(lambda x, w: (jnp.tanh(conv(x, w)), None))
      return jnp.sum(lax.scan(layer, x, w)[0] ** 2)

    return jax.jit(jax.vmap(jax.value_and_grad(deep, (0, 1))))(x, w)

  assert_close(run(convolve), run(native))


def test_second_derivatives():
  x, w = normal(0, 2, 5, 5, 2), normal(1, 3, 3, 2, 2)

  def norm_of_gradient(conv):
    def squared(x, w):
      return sum(jnp.sum(g**2) for g in gradients(conv)(x, w))

    return jax.jit(jax.grad(squared, (0, 1)))(x, w)

  strided = functools.partial(convolve, strides=(2, 2), padding=ONE_PAD)
  wanted = functools.partial(native, strides=(2, 2), padding=ONE_PAD)
  assert_close(norm_of_gradient(strided), norm_of_gradient(wanted))


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen_layer(use_bias):
  make = lambda **more: nn.Conv(4, (3, 3), 2, use_bias=use_bias, **more)  # noqa: E731
  ours, theirs = make(conv_general_dilated=conv_general_dilated), make()
  x = normal(0, 2, 7, 7, 3)
  variables = theirs.init(jax.random.key(0), x)
  assert_close(ours.init(jax.random.key(0), x), variables)
  step = lambda m: jax.jit(  # noqa: E731
    jax.value_and_grad(lambda v: jnp.sum(jnp.sin(m.apply(v, x))))
  )
  assert_close(step(ours)(variables), step(theirs)(variables))


@pytest.mark.parametrize(
  "layer, shape",
  [
    (functools.partial(nn.Conv, kernel_size=(3, 3), feature_group_count=2), (6, 6, 4)),
    (functools.partial(nn.Conv, kernel_size=(3, 3), kernel_dilation=2), (6, 6, 4)),
    (
      functools.partial(nn.Conv, kernel_size=(3, 3), input_dilation=2, padding=2),
      (6, 6, 4),
    ),
    (functools.partial(nn.Conv, kernel_size=(3, 3), padding="CIRCULAR"), (6, 6, 4)),
    (functools.partial(nn.Conv, kernel_size=(3,), padding="CAUSAL"), (6, 4)),
    (functools.partial(nn.Conv, kernel_size=(3, 3, 3)), (4, 4, 4, 2)),
  ],
)
def test_linen_layers_of_other_kinds(layer, shape):
  x = normal(0, 2, *shape)
  variables = layer(4).init(jax.random.key(0), x)
  ours = layer(4, conv_general_dilated=conv_general_dilated)
  assert_close(ours.apply(variables, x), layer(4).apply(variables, x))


@pytest.mark.parametrize(
  "options",
  [
    {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    {"dimension_numbers": None},
    {"dimension_numbers": NHWC, "preferred_element_type": jnp.float32},
    {"dimension_numbers": NHWC, "dtype": "bfloat16", "preferred_element_type": "f4"},
    {"dimension_numbers": NHWC, "dtype": "int32"},
    {"dimension_numbers": NHWC, "batch_group_count": 2},
    {"dimension_numbers": NHWC, "precision": "highest"},
    {"dimension_numbers": NHWC, "precision": ["highest", "default"]},
    {"dimension_numbers": NHWC, "padding": ((-1, 0), (0, 1))},
    {"dimension_numbers": NHWC, "padding": "SAME_LOWER"},
    {"dimension_numbers": NHWC, "window_strides": [2, 1]},
  ],
)
def test_other_arguments_mean_what_they_mean_to_lax(options):
  options = {"window_strides": (1, 1), "padding": "SAME", **options}
  dtype = options.pop("dtype", "float32")
  if options["dimension_numbers"] != NHWC:
    x, w = normal(0, 4, 4, 6, 5, dtype=dtype), normal(1, 4, 4, 3, 3, dtype=dtype)
  else:
    x, w = normal(0, 4, 6, 5, 4, dtype=dtype), normal(1, 3, 3, 4, 4, dtype=dtype)
  got, wanted = (
    conv(x, w, **options) for conv in (conv_general_dilated, lax.conv_general_dilated)
  )
  assert_close(got, wanted)


def test_no_images_and_no_room_for_the_kernel():
  w = normal(1, 3, 3, 2, 4)
  for shape in [(0, 5, 5, 2), (2, 2, 2, 2)]:
    x = jnp.zeros(shape)
    assert convolve(x, w, padding="VALID").shape == native(x, w, padding="VALID").shape


def test_mismatched_operands_fail_as_in_lax():
  with pytest.raises(ValueError):
    convolve(normal(0, 1, 4, 4, 2), normal(1, 3, 3, 3, 2))
  with pytest.raises(TypeError):
    convolve(normal(0, 1, 4, 4, 2), normal(1, 3, 3, 2, 2, dtype=jnp.bfloat16))


def test_bfloat16_accumulates_in_float32():
  x, w = normal(0, 3, 300, 8, 8, 2), normal(1, 3, 3, 3, 2, 4)
  low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  mapped = jax.jit(
    jax.vmap(
      lambda x, w: (
        convolve(x, w),
        *jax.vjp(convolve, x, w)[1](jnp.ones((*x.shape[:3], 4), x.dtype)),
      )
    )
  )
  got = mapped(*low)
  assert {g.dtype for g in got} == {jnp.dtype(jnp.bfloat16)}
  wanted = mapped(*(v.astype(jnp.float32) for v in low))
  got = [g.astype(jnp.float32) for g in got]
  assert_close(got, wanted, tolerance=2.0**-8)  # one rounding, at the end


def test_double_precision():
  with enable_x64():
    x, w = normal(0, 2, 5, 5, 2, dtype=jnp.float64), normal(1, 3, 3, 2, 3)
    w = w.astype(jnp.float64)
    assert_close(gradients(convolve)(x, w), gradients(native)(x, w), 1e-13)


def test_forward_mode_needs_the_native_convolution():
  x, w = normal(0, 1, 4, 4, 1), normal(1, 3, 3, 1, 1)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(convolve, (x, w), (x, w))
  jax.jvp(native, (x, w), (x, w))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_shard_map_with_a_manual_ingredient_axis(check_vma, shared):
  kind = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((1, 1), ("ingredient", "data"), (kind, kind))
  x, w = normal(0, 2, 3, 5, 5, 2), normal(1, 2, 3, 3, 2, 3)
  x = x[0] if shared else x
  spec = jax.P() if shared else jax.P("ingredient")
  step = lambda conv: jax.vmap(  # noqa: E731
    gradients(conv), (None if shared else 0, 0)
  )
  mapped = jax.shard_map(
    step(convolve),
    mesh=mesh,
    in_specs=(spec, jax.P("ingredient")),
    out_specs=jax.P("ingredient"),
    axis_names={"ingredient"},
    check_vma=check_vma,
  )
  assert_close(jax.jit(mapped)(x, w), jax.jit(step(native))(x, w))


def exported_text(platform, m=3):
  x, w = jnp.zeros((m, 2, 8, 8, 4)), jnp.zeros((m, 3, 3, 4, 6))
  step = jax.jit(jax.vmap(gradients(convolve)))
  return export.export(step, platforms=[platform])(x, w).mlir_module()


def group_counts(text):
  lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
  count = lambda line, name: int(line.split(f"{name} = ")[1].split()[0])  # noqa: E731
  names = ("batch_group_count", "feature_group_count")
  return [tuple(count(line, name) for name in names) for line in lines]


def test_export_for_cpu_has_plain_convolutions_in_loops_over_the_copies():
  text = exported_text("cpu")
  assert group_counts(text) == [(1, 1)] * 3
  assert "stablehlo.dot_general" not in text
  assert text.count("stablehlo.while") == 3


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_export_for_other_platforms_has_grouped_convolutions(platform):
  text = exported_text(platform)
  assert sorted(set(group_counts(text))) == [(1, 3), (3, 1)]
  assert "stablehlo.dot_general" not in text and "stablehlo.while" not in text


def test_one_export_for_all_platforms_runs_here():
  x, w = normal(0, 3, 2, 8, 8, 4), normal(1, 3, 3, 3, 4, 6)
  step = jax.jit(jax.vmap(gradients(convolve)))
  program = export.export(step, platforms=["cpu", "cuda", "tpu"])(x, w)
  assert_close(program.call(x, w), jax.jit(jax.vmap(gradients(native)))(x, w))


def test_a_shared_kernel_gives_one_convolution_and_no_loop():
  x, w = jnp.zeros((3, 2, 8, 8, 4)), jnp.zeros((3, 3, 4, 6))
  text = jax.jit(jax.vmap(convolve, (0, None))).lower(x, w).as_text()
  assert group_counts(text) == [(1, 1)]
  assert "stablehlo.while" not in text


@pytest.mark.parametrize("lowering", ["loop", "grouped", "unrolled", "native"])
@pytest.mark.parametrize("strides", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 2)])
def test_every_lowering_gives_the_same(lowering, strides):
  x, w = normal(0, 3, 2, 6, 6, 4), normal(1, 3, 3, 3, 4, 5)
  conv = functools.partial(conv_general_dilated, lowering=lowering)

  def of(conv):
    step = gradients(
      functools.partial(convolve, strides=strides, padding=ONE_PAD, conv=conv)
    )
    return [
      jax.jit(jax.vmap(step))(x, w),
      jax.jit(jax.vmap(step, (None, 0)))(x[0], w),
      jax.jit(jax.vmap(step, (0, None)))(x, w[0]),
      jax.jit(step)(x[0], w[0]),
    ]

  assert_close(of(conv), of(lax.conv_general_dilated))


def test_a_lowering_that_is_chosen_holds_on_every_platform():
  x, w = jnp.zeros((3, 2, 8, 8, 4)), jnp.zeros((3, 3, 3, 4, 6))

  def text(lowering, platform):
    conv = functools.partial(conv_general_dilated, lowering=lowering)
    step = jax.jit(jax.vmap(gradients(functools.partial(convolve, conv=conv))))
    return export.export(step, platforms=[platform])(x, w).mlir_module()

  assert set(group_counts(text("loop", "cuda"))) == {(1, 1)}
  assert set(group_counts(text("grouped", "cpu"))) == {(1, 3), (3, 1)}
  unrolled = group_counts(text("unrolled", "tpu"))
  assert len(unrolled) == 9 and set(unrolled) == {(1, 1)}


def test_unknown_lowerings_are_refused(rejects):
  with rejects("unknown convolution lowering 'winograd'"):
    convolve(
      jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1)),
      conv=functools.partial(conv_general_dilated, lowering="winograd"),
    )  # fmt: skip


COLLECTIVE = re.compile(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(")
DEFAULTS = sorted(set(convolution.RULE.values()))


def two_layers(lowering):
  conv = functools.partial(conv_general_dilated, lowering=lowering)

  def network(x, w, v):
    y = jnp.sin(convolve(x, w, conv=conv))
    return jnp.sum(convolve(y, v, (2, 2), conv=conv) ** 2, (1, 2, 3))

  return network


def ways_to_differentiate(lowering):
  """The network, the gradient of each copy, and that of the sum of all copies."""
  network = two_layers(lowering)
  total = lambda *xwv: jnp.sum(network(*xwv))  # noqa: E731
  together = lambda *xwv: jnp.sum(jax.vmap(network)(*xwv))  # noqa: E731
  return {
    "forward": jax.vmap(network),
    "vmap of grad": jax.vmap(jax.grad(total, (0, 1, 2))),
    "grad of vmap": jax.grad(together, (0, 1, 2)),
  }


def three_copies():
  x, w, v = normal(0, 3, 8, 6, 6, 4), normal(1, 3, 3, 3, 4, 6), normal(2, 3, 3, 3, 6, 6)
  return x, 0.3 * w, 0.3 * v


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("lowering", DEFAULTS)
@pytest.mark.parametrize("placed_by", ["arguments", "in_shardings"])
def test_no_default_gathers_a_batch_that_is_divided(lowering, way, placed_by):
  """Under plain jit: on a mesh with a data axis and several copies on each device."""
  mesh = make_mesh(1, 4)
  placed = [NamedSharding(mesh, jax.P(*spec)) for spec in [(None, "data"), (), ()]]
  step, arrays = ways_to_differentiate(lowering)[way], three_copies()
  if placed_by == "arguments":
    program = jax.jit(step).lower(*jax.device_put(arrays, tuple(placed)))
  else:
    program = jax.jit(step, in_shardings=placed).lower(*arrays)
  found = {match[1] for match in COLLECTIVE.finditer(program.compile().as_text())}
  # The gradients of the kernels are sums over the whole batch; all else is local.
  assert found == (set() if way == "forward" else {"all-reduce"})


@pytest.mark.slow
@pytest.mark.parametrize("lowering", DEFAULTS)
def test_a_divided_batch_gives_the_same_values(lowering):
  mesh, arrays = make_mesh(1, 4), three_copies()
  specs = [(None, "data"), (), ()]
  placed = tuple(NamedSharding(mesh, jax.P(*spec)) for spec in specs)
  for way, step in ways_to_differentiate(lowering).items():
    got = jax.jit(step)(*jax.device_put(arrays, placed))
    assert_close(got, jax.jit(ways_to_differentiate("native")[way])(*arrays))


@pytest.mark.slow
@pytest.mark.parametrize("lowering", DEFAULTS)
@pytest.mark.parametrize("shape", [(1, 4), (2, 2)])
def test_no_default_gathers_under_map_ingredients(lowering, shape):
  network, (x, w, v) = two_layers(lowering), three_copies()
  x, w, v = (jnp.concatenate([a, a[:1]]) for a in (x, w, v))

  def step(x, w, v):
    loss = lambda w, v: jnp.sum(network(split_batch(x), w, v))  # noqa: E731
    return jax.value_and_grad(loss, (0, 1))(w, v)

  program = jax.jit(map_ingredients(step, 0, make_mesh(*shape))).lower(x, w, v).compile()
  found = {match[1] for match in COLLECTIVE.finditer(program.as_text())}
  assert found == {"all-reduce"}
  assert_close(program(x, w, v), jax.jit(jax.vmap(step))(x, w, v))


def test_devices_that_share_a_batch_sum_a_kernel_gradient_once():
  """Not in each step of the loop over its images, and to what NumPy sums them to."""
  x, y = normal(0, 1, 64, 6, 6, 3), normal(1, 1, 64, 6, 6, 4)
  geometry = lowerings.Geometry((1, 1), ONE_PAD, (6, 6), (3, 3), None)
  gradient = functools.partial(convolution.kernel_gradient, (geometry, "loop"))

  def step(x, y):
    return gradient(split_batch(x), split_batch(y))

  program = jax.jit(map_ingredients(step, 0, make_mesh(1, 2))).lower(x, y).compile()
  functions = re.split(r"\n(?=%|ENTRY)", program.as_text())
  bodies = set(re.findall(r"body=(%[\w.-]+)", program.as_text()))
  loops = [text for text in functions if text.split(" ")[0] in bodies]
  assert loops and not any(COLLECTIVE.search(text) for text in loops)
  windows = np.lib.stride_tricks.sliding_window_view(
    np.pad(x[0], ((0, 0), *ONE_PAD, (0, 0))), (3, 3), axis=(1, 2)
  )
  assert_close(program(x, y)[0], np.einsum("nhwcij,nhwo->ijco", windows, y[0]))


def test_groups_stay_where_each_device_has_copies_of_its_own():
  """In a program that is not divided, and where all axes of the mesh are manual."""
  mesh = make_mesh(2, 1)
  step, arrays = ways_to_differentiate("grouped")["forward"], three_copies()
  arrays = [jnp.concatenate([a, a[:1]]) for a in arrays]
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=jax.P("ingredient"), out_specs=jax.P("ingredient")
  )
  assert set(group_counts(jax.jit(mapped).lower(*arrays).as_text())) == {(1, 2)}
  assert set(group_counts(jax.jit(step).lower(*arrays).as_text())) == {(1, 4)}
  assert_close(jax.jit(mapped)(*arrays), jax.jit(step)(*arrays))


class OfLinen(nn.Module):
  convolution: Callable = conv_general_dilated

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), conv_general_dilated=self.convolution)(x))
    return nn.Dense(3)(x.mean((1, 2)))


class OfNNX(nnx.Module):
  def __init__(self, rngs, convolution=conv_general_dilated):
    self.conv = nnx.Conv(2, 4, (3, 3), conv_general_dilated=convolution, rngs=rngs)
    self.dense = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.dense(nnx.relu(self.conv(x)).mean((1, 2)))


def soup_examples(convolution):
  """A network of linen and one of NNX: parameters, and the function of them."""
  linen, made = OfLinen(convolution), OfNNX(nnx.Rngs(0), convolution)
  graph, state = nnx.split(made)
  params = linen.init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))
  return {
    "linen": (params, linen.apply),
    "nnx": (
      nnx.to_pure_dict(state),
      lambda p, x: nnx.merge(graph, pure_state(state, p))(x),
    ),
  }


def pure_state(state, params):
  state = jax.tree.map(lambda x: x, state)
  nnx.replace_by_pure_dict(state, params)
  return state


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_soup_of_networks_with_this_convolution(framework):
  """Equal to the one with XLA's own, in programs that have loops instead of groups."""
  x = normal(0, 8, 6, 6, 2)
  labels = jnp.arange(8) % 3

  def soup_with(convolution):
    params, apply = soup_examples(convolution)[framework]

    def retrain(key, params, masks, ingredient):
      noise = jax.random.normal(jax.random.fold_in(key, ingredient["seed"]), x.shape)

      def loss(params):
        log_p = jax.nn.log_softmax(apply(params, x + 0.1 * noise))
        return -log_p[jnp.arange(8), labels].mean()

      gradient = jax.grad(loss)(jaxsms.apply_masks(params, masks))
      return jax.tree.map(lambda p, g, m: m * (p - 0.1 * g), params, gradient, masks)

    return jaxsms.sparse_model_soup(
      jax.random.key(0), params, retrain, ingredients={"seed": jnp.arange(3)},
      goal_sparsity=0.5, phases=1,
    )  # fmt: skip

  ours = soup_with(jaxsms.convolution.conv_general_dilated)
  theirs = soup_with(lax.conv_general_dilated)
  assert_close(ours.params, theirs.params)
