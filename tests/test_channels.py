"""Channels of a traced function: groups worked by hand, and what is left alone."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_networks import NETWORKS

from jaxsms import channel_groups, models

KEY = jax.random.key(0)


def ones(**shapes):
  return {name: jnp.ones(shape) for name, shape in shapes.items()}


def places(groups):
  """(size, {(path, axis): positions of the first channel}) of each group."""
  return [
    (
      g.size,
      {p: np.atleast_1d(i[0]).tolist() for p, i in zip(g.places, g.indices, strict=True)},
    )
    for g in groups
  ]


def sizes(apply, params, *inputs):
  return [group.size for group in channel_groups(apply, params, *inputs)]


def test_a_dense_network_by_hand():
  params = ones(a=(3, 5), bias=(5,), c=(5, 2))
  groups = channel_groups(
    lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]) @ p["c"], params, jnp.ones((4, 3))
  )
  assert len(groups) == 1
  assert groups[0].size == 5
  assert groups[0].places == (("a", 1), ("bias", 0), ("c", 0))
  for indices in groups[0].indices:
    np.testing.assert_array_equal(indices, np.arange(5))
  assert dict(groups.left_alone) == {
    "a, axis 0": "it is an input of the function",
    "c, axis 1": "it is an output of the function",
  }


def test_a_padded_shortcut_has_channels_that_are_shared_and_some_that_are_not():
  params = ones(a=(3, 4), b=(4, 6), c=(6, 2))

  def apply(p, x):
    x = jax.nn.relu(x @ p["a"])
    return (jnp.pad(x, ((0, 0), (1, 1))) + jnp.tanh(x) @ p["b"]) @ p["c"]

  shared, alone = sorted(
    places(channel_groups(apply, params, jnp.ones((1, 3)))), reverse=True
  )
  assert shared == (4, {("a", 1): [0], ("b", 0): [0], ("b", 1): [1], ("c", 0): [1]})
  assert alone == (2, {("b", 1): [0], ("c", 0): [0]})


def test_concatenation_and_split():
  params = ones(a=(3, 4), b=(3, 4), c=(8, 6), d=(3, 2))

  def apply(p, x):
    x = jnp.concatenate([x @ p["a"], x @ p["b"]], -1) @ p["c"]
    first, second = jnp.split(x, 2, -1)
    return (jax.nn.silu(first) * second) @ p["d"]

  assert places(channel_groups(apply, params, jnp.ones((1, 3)))) == [
    (4, {("a", 1): [0], ("c", 0): [0]}),
    (4, {("b", 1): [0], ("c", 0): [4]}),
    (3, {("c", 1): [0, 3], ("d", 0): [0]}),
  ]


def test_heads_and_their_columns_in_a_fused_projection():
  params = ones(qkv=(6, 24), out=(8, 6))

  def apply(p, x):
    q, k, v = (y.reshape(5, 2, 4) for y in jnp.split(x @ p["qkv"], 3, -1))
    weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(5, 8) @ p["out"]

  q = {i: [j + 8 * i for j in range(4)] for i in range(3)}
  assert places(channel_groups(apply, params, jnp.ones((5, 6)))) == [
    (2, {("out", 0): [0, 1, 2, 3], ("qkv", 1): q[0] + q[1] + q[2]}),
    (4, {("out", 0): [0, 4], ("qkv", 1): [16, 20]}),
    (4, {("qkv", 1): [0, 4, 8, 12]}),
  ]


def test_flattened_images_and_depthwise_convolutions():
  params = ones(a=(3, 3, 2, 4), depth=(3, 3, 1, 8), c=(32, 2))

  def apply(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=numbers)
    x = jax.lax.conv_general_dilated(
      x, p["depth"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
    )
    return x.reshape(1, -1) @ p["c"]

  # Each of the 4 channels has two outputs; either may go from all, or a channel with both.
  assert places(channel_groups(apply, params, jnp.ones((1, 2, 2, 2)))) == [
    (4, {("a", 3): [0], ("c", 0): [0, 1, 8, 9, 16, 17, 24, 25], ("depth", 3): [0, 1]}),
    (2, {("c", 0): [2 * i for i in range(16)], ("depth", 3): [0, 2, 4, 6]}),
  ]


def test_a_scan_ties_its_layers():
  params = ones(w=(3, 4, 4), b=(3, 4), a=(2, 4), c=(4, 2))

  def apply(p, x):
    def layer(x, layer):
      return jnp.tanh(x @ layer["w"] + layer["b"]), None

    x, _ = jax.lax.scan(layer, x @ p["a"], {"w": p["w"], "b": p["b"]})
    return x @ p["c"]

  assert places(channel_groups(apply, params, jnp.ones((1, 2)))) == [
    (4, {("a", 1): [0], ("b", 1): [0], ("c", 0): [0], ("w", 1): [0], ("w", 2): [0]})
  ]


REASONS = {
  "a mean over it": lambda h: h - h.mean(-1, keepdims=True),
  "a sum over it, of numbers that are not 0": lambda h: jax.nn.sigmoid(h).sum(-1)[:, None],
  "a maximum over it": lambda h: h * h.max(-1, keepdims=True),
  "it is sorted": lambda h: jnp.sort(h, -1),
  "cumsum over it": lambda h: jnp.cumsum(h, -1),
  "an argmax over it": lambda h: h + jnp.argmax(h, -1)[:, None],
  "a top_k over it": lambda h: jax.lax.top_k(h, 5)[0],
  "one position alone is taken": lambda h: h[:, 2],
  "positions are taken from it by index": lambda h: h[:, np.array([4, 1, 0, 2, 3])],
  "positions of it are replaced by index": lambda h: h.at[:, 0].set(1.0),
  "it is an output of the function": lambda h: h,
  "a mean over it after a": lambda h: jax.nn.standardize(h),
  "fft over it": lambda h: jnp.fft.fft(h).real,
  "cholesky cannot be followed": lambda h: jnp.linalg.cholesky(h.T @ h),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_is_left_alone_and_why(reason):
  params = ones(a=(3, 5), c=(5, 2))

  def apply(p, x):
    h = x @ p["a"]
    return h @ p["c"], (REASONS[reason](h) ** 2).sum()

  if reason == "it is an output of the function":
    groups = channel_groups(lambda p, x: x @ p["a"], params, jnp.ones((1, 3)))
  else:
    groups = channel_groups(apply, params, jnp.ones((4, 3)))
  if reason == "one position alone is taken":  # the others may go
    assert [g.indices[0].tolist() for g in groups] == [[0, 1, 3, 4]]
  else:
    assert len(groups) == 0
  assert reason in dict(groups.left_alone)["a, axis 1"]


def test_leaves_that_are_not_used():
  params = ones(a=(3, 5), b=(5, 2), c=(5, 2), d=(4,))

  @jax.jit
  def apply(p, x):
    return jnp.sin(x @ p["a"]) @ p["b"]

  groups = channel_groups(apply, params, jnp.ones((4, 3)))
  assert places(groups) == [(5, {("a", 1): [0], ("b", 0): [0]})]
  assert dict(groups.left_alone)["c, axis 0"] == "the function does not use it"


def recurrence(h):
  """Sums over the first axis, by slices, some of which have length 0."""

  def step(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]

  return jax.lax.associative_scan(step, (jnp.ones(h.shape), h), axis=0)[1]


def test_what_passes():
  """Zeros keep a sum, a norm and a product what they were."""
  params = ones(a=(3, 5), b=(5,), c=(5, 2))
  ways = [
    lambda p, h: (h * p["b"]).sum(-1),
    lambda p, h: h / (jnp.sqrt((h * h).sum(-1, keepdims=True)) + 1) @ p["c"],
    lambda p, h: jax.nn.sigmoid(h) @ p["c"],
    lambda p, h: h[:, ::-1][:, ::-1] @ p["c"],
    lambda p, h: jnp.stack([h, h]).sum(0) @ p["c"],
    lambda p, h: jnp.repeat(h, 2, 0) @ p["c"],
    lambda p, h: jnp.where(h > 0, h, jnp.arange(5.0)) @ p["c"],
    lambda p, h: jax.vmap(lambda h: h @ p["c"])(h),
    lambda p, h: jax.lax.cond(h.shape[0] > 3, jnp.sin, jnp.cos, h) @ p["c"],
    lambda p, h: jax.lax.fori_loop(0, 3, lambda i, h: h * i, h) @ p["c"],
    lambda p, h: jax.lax.stop_gradient(h).astype(jnp.bfloat16) @ p["c"],
    lambda p, h: jnp.cumsum(h, 0) @ p["c"],
    lambda p, h: jnp.einsum("bi,io->ob", h, p["c"]),
    lambda p, h: (jax.random.uniform(KEY, h.shape) < 0.5) * h @ p["c"],
    lambda p, h: jnp.concatenate([h[:, :0], h], -1) @ p["c"],
    lambda p, h: recurrence(h) @ p["c"],
  ]
  for number, way in enumerate(ways):
    found = channel_groups(
      lambda p, x, way=way: way(p, x @ p["a"]), params, jnp.ones((4, 3))
    )
    assert [g.size for g in found][:1] == [5], number


def test_an_axis_split_where_only_one_part_has_labels():
  """Repeated, grouped, normalized and tiled: all of it stays, and what it meets."""
  params = ones(a=(3, 4), scale=(16,), c=(32, 2))

  def apply(p, x):
    x = x @ p["a"]
    x = jnp.repeat(jnp.concatenate([x, -x], -1), 2, -1)
    groups = x.reshape(-1, 2, 8)
    x = (groups - groups.mean(-1, keepdims=True)).reshape(x.shape) * p["scale"]
    return jnp.tile(x, (1, 2)) @ p["c"]

  groups = channel_groups(apply, params, jnp.ones((2, 3)))
  # Older versions of JAX repeat by an axis of its own, whose copies may go.
  assert {path for group in groups for path, _ in group.places} <= {"c"}
  left = {"a, axis 0", "a, axis 1", "scale, axis 0", "c, axis 1"}
  assert set(dict(groups.left_alone)) >= left


def test_group_norm_goes_by_the_group():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.GroupNorm(3)(nn.Dense(12, name="a")(x))
      return nn.Dense(2, name="c")(nn.relu(x))

  x = jnp.ones((2, 5))
  groups = channel_groups(Network().apply, jax.eval_shape(Network().init, KEY, x), x)
  assert [(g.size, g.indices[0].shape) for g in groups] == [(3, (3, 4))]


@pytest.mark.parametrize(
  ("name", "options", "expected"),
  [
    ("mlp", {"hidden": (16, 12)}, [16, 12]),
    # The first stage's 4 reach all shortcuts; 4 and 8 new ones are in the middle of those.
    ("resnet8", {"width": 4}, [4, 4, 4, 8, 8, 16]),
    ("resnet18", {"width": 4}, [4] * 3 + [8] * 3 + [16] * 3 + [32] * 3),
    ("vgg16", {"width": 4}, [4] * 2 + [8] * 2 + [16] * 3 + [32] * 6),
    ("vit_tiny", {"depth": 2, "width": 24}, [3, 3, 8, 8, 8, 8, 96, 96]),
  ],
)
@pytest.mark.parametrize("train", [False, True])
def test_our_networks(name, options, expected, train):
  module = models.create(name, 10, **options)
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(module.init, KEY, x)
  key = jax.eval_shape(lambda: KEY)

  def apply(variables, x, key):
    if not train:
      return module.apply(variables, x)
    return module.apply(
      variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )

  found = sizes(apply, variables, x, key)
  assert sorted(found) == sorted(expected)


# By hand, sizes in any order.
FOREIGN = {
  "by_hand": [8, 7, 6, 9],
  # Both blocks: 12 inside and 5 of squeeze and excite; the stem's 8; then the 10 channels
  # at the end of the second as 5 groups of 2, with two outputs and three.
  "mobile": [12, 12, 5, 5, 8, 5, 2, 2, 3],
  "densenet": [6, 5, 4, 5, 4, 7, 5, 4, 5, 4, 7],
  "unet": [4, 6, 8, 6, 6, 4, 4],
  "decoder": [3, 4, 4, 10],
  "nnx_network": [8, 6],
  "equinox": [6, 2, 3, 3, 6, 8, 8],
  "haiku": [6, 8, 7],
  "haiku_state": [6, 8],
  "recurrent": [6, 5],
  "equinox_state": [6],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others(name):
  network = NETWORKS[name]()
  found = sizes(network.apply, network.params, *network.inputs)
  assert sorted(found) == sorted(FOREIGN[name])


def test_resnet50_takes_no_time_and_computes_nothing():
  module = models.create("resnet50", 1000, stem="imagenet")
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(module.init, KEY, images)
  groups = channel_groups(module.apply, variables, images)
  # Two inside each of 16 blocks, the four stages' sums, and the stem.
  assert len(groups) == 2 * 16 + 4 + 1
  assert sum(g.size for g in groups) == 64 + (256 + 512 + 1024 + 2048) + 2 * (
    3 * 64 + 4 * 128 + 6 * 256 + 3 * 512
  )


@pytest.mark.slow
def test_a_billion_parameters_from_shapes_alone():
  layers, width, heads, hidden, vocabulary = 24, 2048, 16, 5632, 32_000
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
  block = {
    "qkv": shape(width, 3 * width), "out": shape(width, width), "scale": shape(width),
    "up": shape(width, 2 * hidden), "down": shape(hidden, width),
  }  # fmt: skip
  params = {
    "blocks": [block] * layers, "embed": shape(vocabulary, width),
    "head": shape(width, vocabulary),
  }  # fmt: skip
  total = sum(x.size for x in jax.tree.leaves(params))
  assert total > 1e9

  def apply(params, tokens):
    x = params["embed"][tokens]
    batch, length, _ = x.shape
    for p in params["blocks"]:
      y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)) * p["scale"]
      q, k, v = (
        z.reshape(batch, length, heads, -1) for z in jnp.split(y @ p["qkv"], 3, -1)
      )
      weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
      y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1)
      x = x + y @ p["out"]
      gate, up = jnp.split(x @ p["up"], 2, -1)
      x = x + (jax.nn.silu(gate) * up) @ p["down"]
    return x @ params["head"]

  start = time.perf_counter()
  groups = channel_groups(apply, params, jax.ShapeDtypeStruct((1, 512), jnp.int32))
  print(f"{total:,} parameters: {time.perf_counter() - start:.1f} s")
  assert sorted(g.size for g in groups) == sorted(layers * [heads, 128, 128, hidden])


def test_refuses_what_cannot_be_traced(rejects):
  params = ones(a=(3, 5))
  with rejects("apply cannot be traced"):
    channel_groups(lambda p, x: x @ p["a"], params, jnp.ones((1, 4)))
  with rejects("apply cannot be traced"):
    channel_groups(lambda p, x: x if x.sum() > 0 else -x, params, jnp.ones(3))
