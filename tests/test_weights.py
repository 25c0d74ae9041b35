"""What counts as a weight without a framework's names, and where its axes lie."""

import dataclasses
import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.example_libraries import stax
from jax.tree_util import DictKey, SequenceKey

from jaxsms import (
  Weights,
  apply_masks,
  erk_masks,
  filter_masks,
  lamp_masks,
  layer_sparsities,
  magnitude_masks,
  n_m_masks,
  prunable,
  prune_phase,
  random_masks,
  sparse_model_soup,
  sparsity,
)
from jaxsms.trees import path_string
from jaxsms.weights import prunable_flags, warn_of_unpruned_matrices

KEY = jax.random.key(0)


def path_of(*names):
  keys = {int: SequenceKey, str: DictKey}
  return tuple(keys[type(name)](name) for name in names)


@pytest.mark.parametrize(
  ("path", "shape", "expected"),
  [
    (path_of("W"), (4, 3), True),
    (path_of("w1"), (4, 3), True),
    (path_of("weights"), (3, 3, 4, 8), True),
    (path_of("hidden", "W_hh"), (4, 4), True),
    (path_of("attention", "key"), (8, 2, 4), True),
    (path_of(0, 0), (4, 3), True),
    (path_of(0, 1), (4,), False),
    ((), (4, 3), True),
    (path_of("lora_b"), (4, 3), True),
    (path_of("B"), (4, 3), True),  # of a state space
    (path_of("b"), (1, 3), False),
    (path_of("b_out"), (1, 3), False),
    (path_of("biases"), (2, 4), False),
    (path_of("attention", "bq"), (2, 4), False),
    (path_of(0, 1), (1, 1, 1, 8), False),  # a bias of stax's convolution
    (path_of("wte"), (30, 4), False),
    (path_of("position_embeddings"), (1, 16, 8), False),
    (path_of("query_embedding"), (1, 16, 8), False),
    (path_of("mask_token"), (2, 3, 8), False),
    (path_of("embedding", 0), (30, 4), False),
    (path_of("layer_norm", "gain"), (3, 4), False),
    (path_of("layer.0.conv.weight"), (8, 4, 3, 3), True),
    (path_of("layer.0.norm.weight"), (3, 4), False),
    (path_of("word_embeddings.weight"), (30, 4), False),
    (path_of("patch_embedding", "linear", "weight"), (8, 9), True),
    (path_of("embedding", "projection", "weight"), (8, 9), True),
  ],
)
def test_leaves_without_a_name_count_by_rank(path, shape, expected):
  assert prunable(path, np.zeros(shape, np.float32)) == expected


@pytest.mark.slow
def test_a_list_of_pairs_a_dict_and_stax():
  rng = np.random.default_rng(0)
  sizes = (6, 8, 3)
  pairs = [(rng.standard_normal((a, b)), np.ones(b)) for a, b in itertools.pairwise(sizes)]
  by_name = {"W": pairs[0][0], "b": np.ones((1, 8))}
  layers = stax.Conv(4, (2, 2)), stax.Relu, stax.Flatten, stax.Dense(3)
  _, of_stax = stax.serial(*layers)[0](KEY, (1, 4, 4, 2))
  counts = 6 * 8 + 8 * 3, 6 * 8, 2 * 2 * 2 * 4 + 36 * 3
  for params, weights in zip((pairs, by_name, of_stax), counts, strict=True):
    masks = magnitude_masks(params, 0.5)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert sum(int(np.sum(~m)) for m in jax.tree.leaves(masks)) == weights // 2
    assert float(sparsity(apply_masks(params, masks))) == pytest.approx(0.5)
  # The smallest of all, by the definition.
  kernels = np.concatenate([w.ravel() for w, _ in pairs])
  kept = np.concatenate([w.ravel() for w, _ in magnitude_masks(pairs, 0.5)])
  np.testing.assert_array_equal(kept, np.abs(kernels) > np.median(np.abs(kernels)))


class PatchEmbedding(eqx.Module):
  linear: eqx.nn.Linear
  table: eqx.nn.Embedding

  def __init__(self):
    self.linear = eqx.nn.Linear(4, 8, key=KEY)
    self.table = eqx.nn.Embedding(5, 8, key=KEY)


class PositionalEmbedding(eqx.Module):
  table: jax.Array


def test_an_embedding_is_known_by_its_own_layer():
  model = {
    "patch_embedding": PatchEmbedding(),
    "blocks": [PositionalEmbedding(jnp.ones((5, 8)))],
  }
  flags = prunable_flags(model)
  paths = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(model)]
  chosen = [path for path, flag in zip(paths, flags, strict=True) if flag]
  assert chosen == ["patch_embedding/linear/weight"]


def test_what_is_left_out_is_said_once(caplog):
  params = {
    "dense": {"kernel": np.ones((4, 4)), "bias": np.ones((2, 2))},
    "embedding": np.ones((7, 3)),
  }
  for _ in range(2):
    magnitude_masks(params, 0.5)
    erk_masks(params, 0.5)
    n_m_masks(params, 0.5)
  (record,) = caplog.records
  assert "not pruned are embedding [7, 3]: pass prunable=" in record.message
  caplog.clear()
  own = Weights(prunable=lambda path, leaf: leaf.ndim > 1)
  for again in ({"dense": params["dense"]}, {**params, "embedding": np.ones((8, 3))}):
    magnitude_masks(again, 0.5, prunable=own)
    warn_of_unpruned_matrices(again, None)
  (record,) = caplog.records
  assert "embedding [8, 3]" in record.message


# Both choices, given once.


@pytest.mark.slow
def test_weights_goes_wherever_prunable_does():
  params = {"W": np.arange(1.0, 9).reshape(2, 4), "kernel": np.ones((4, 4))}
  own = Weights(lambda path, leaf: path[-1].key == "W", inputs=1, outputs=0)
  for prune in (magnitude_masks, erk_masks, lamp_masks, n_m_masks):
    masks = prune(params, 0.5, prunable=own)
    assert np.all(masks["kernel"]) and np.sum(masks["W"]) == 4
  np.testing.assert_array_equal(
    n_m_masks(params, 0.5, prunable=own)["W"], [[False, False, True, True]] * 2
  )
  masks = filter_masks(params, 0.5, prunable=own)
  np.testing.assert_array_equal(masks["W"], [[False] * 4, [True] * 4])
  assert sparsity(apply_masks(params, masks), own) == 0.5
  assert np.sum(random_masks(KEY, params, 0.5, prunable=own)["W"]) == 4
  assert list(layer_sparsities(params, own)) == ["W"]
  assert prune_phase(params, None, 0.5, n_m_masks, own)[2]["sparsity"] == 0.5
  soup = sparse_model_soup(
    KEY,
    params,
    lambda key, params, masks, ingredient: params,
    ingredients={"seed": jnp.arange(1)},
    goal_sparsity=0.5,
    phases=1,
    prune=filter_masks,
    prunable=own,
  )
  np.testing.assert_array_equal(soup.masks["W"], masks["W"])


def test_weights_falls_back_to_the_default():
  params = {"norm": {"weight": np.ones((4, 4))}, "head": {"weight": np.arange(16.0)}}
  params["head"]["weight"] = params["head"]["weight"].reshape(4, 4)
  masks = n_m_masks(params, 0.5, prunable=Weights(inputs=1))
  assert np.all(masks["norm"]["weight"])
  np.testing.assert_array_equal(masks["head"]["weight"], [[False, False, True, True]] * 4)
  layers = eqx.nn.Sequential([eqx.nn.LayerNorm((4, 4)), eqx.nn.Linear(4, 4, key=KEY)])
  assert prunable_flags(layers, Weights()) == prunable_flags(layers)
  assert hash(Weights(inputs=1)) == hash(Weights(inputs=1))
  with pytest.raises(dataclasses.FrozenInstanceError):
    Weights().inputs = 1


# Attention's [inputs, heads, features].


def attention(framework):
  if framework == "linen":
    layer = nn.MultiHeadDotProductAttention(2, qkv_features=8)
    return layer.init(KEY, jnp.ones((1, 3, 8)))["params"]
  layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
  return nnx.state(layer, nnx.Param)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize(
  ("prune", "words"),
  [
    (
      n_m_masks,
      "the default axis -2 would group over heads: pass axis=",
    ),
    (filter_masks, "that gives 1 (whole heads) or 2 (a feature of all heads) there and -1"),
  ],
)
def test_no_default_axis_groups_over_heads(rejects, framework, prune, words):
  params = attention(framework)
  with rejects(words):
    prune(params, 0.5)
  with rejects("key/kernel is [8, 2, 4], [inputs, heads, features] of an attention"):
    prune(params, 0.5)
  # Of the output [heads, features, out] the default axes are those of its inputs, outputs.
  assert not np.all(prune({"out": params["out"]}, 0.5)["out"]["kernel"])
  # So they are of a convolution in one dimension.
  prune({"conv_key": {"kernel": np.ones((3, 4, 4))}}, 0.5)


def test_axes_of_attention_that_are_given():
  params = attention("linen")
  inputs = Weights(inputs=lambda path, leaf: -2 if "out" in path_string(path) else 0)
  for name, mask in n_m_masks(params, 0.5, prunable=inputs).items():
    kernel = np.abs(params[name]["kernel"])
    if name == "out":  # groups along the features of a head
      kernel, kept = kernel.reshape(-1, 4, 8).transpose(0, 2, 1), mask["kernel"]
      kept = np.asarray(kept).reshape(-1, 4, 8).transpose(0, 2, 1)
    else:
      kernel = kernel.reshape(2, 4, -1).transpose(0, 2, 1)
      kept = np.asarray(mask["kernel"]).reshape(2, 4, -1).transpose(0, 2, 1)
    order = np.argsort(kernel, axis=-1, kind="stable")
    expected = np.ones_like(kept)
    np.put_along_axis(expected, order[..., :2], False, axis=-1)
    np.testing.assert_array_equal(kept, expected)


# What cannot be pruned.


@pytest.mark.parametrize(
  ("leaf", "words"),
  [
    (np.ones((2, 2), np.complex64), "dense/kernel is complex64[2, 2]: weights are real"),
    (np.ones((2, 2), np.int8), "dense/kernel is int8[2, 2]: weights are floating"),
    (np.ones((0, 3), np.float32), "dense/kernel is float32[0, 3]: there is nothing in it"),
  ],
)
def test_weights_of_other_kinds_are_refused(rejects, leaf, words):
  params = {"dense": {"kernel": leaf}, "last": {"kernel": np.ones((4, 4), np.float32)}}

  def everything(path, leaf):
    return leaf.ndim > 1

  prunings = (magnitude_masks, erk_masks, lamp_masks, n_m_masks, filter_masks)
  for prune in prunings:
    for choice in (None, everything, Weights(everything), Weights()):
      with rejects(words):
        prune(params, 0.5, prunable=choice)
  with rejects(words):
    sparsity(params)
  with rejects(words):
    random_masks(KEY, params, 0.5)
  with rejects(words):
    prune_phase(params, None, 0.5)


def test_other_leaves_of_any_kind_are_left_alone():
  params = {
    "kernel": np.array([[1.0, 2.0]]),
    "table": np.ones((2, 2), np.int32),
    "phase": np.ones(3, np.complex64),
    "empty": np.ones(0),
    "embedding": np.ones((3, 3), np.int8),
  }
  masks = magnitude_masks(params, 0.5)
  np.testing.assert_array_equal(masks.pop("kernel"), [[False, True]])
  assert all(np.all(mask) for mask in masks.values())
