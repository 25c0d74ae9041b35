import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.tree_util import DictKey, GetAttrKey, SequenceKey
from x64 import enable_x64

from jaxsms import prunable, stack, unstack
from jaxsms.mask_trees import match_masks
from jaxsms.trees import (
  check_finite,
  is_parameter,
  number_of_models,
  path_names,
  path_string,
)


def keys(*names):
  return tuple(DictKey(n) for n in names)


def test_path_names_of_each_kind_of_key():
  path = (GetAttrKey("layers"), SequenceKey(2), DictKey("mlp/~/linear"), DictKey("w"))
  assert path_names(path) == ["layers", "2", "mlp", "~", "linear", "w"]
  assert path_string(path) == "layers/2/mlp/~/linear/w"
  assert path_names((DictKey("kernel"), GetAttrKey("value"))) == ["kernel"]
  assert path_names((GetAttrKey("value"),)) == ["value"]
  assert path_string(()) == "(root)"


@pytest.mark.parametrize(
  ("path", "shape", "expected"),
  [
    (keys("params", "Dense_0", "kernel"), (4, 3), True),
    (keys("params", "Conv_0", "kernel"), (3, 3, 4, 8), True),
    (keys("attention", "query", "kernel"), (8, 2, 4), True),
    (keys("attention", "query", "bias"), (2, 4), False),
    (keys("mlp/~/linear_0", "w"), (4, 3), True),
    (keys("gru", "w_i"), (4, 12), True),
    (keys("gru", "w_h"), (4, 12), True),
    ((GetAttrKey("layers"), SequenceKey(0), GetAttrKey("weight")), (3, 4), True),
    ((GetAttrKey("norm1"), GetAttrKey("weight")), (3, 4), False),
    ((GetAttrKey("layer_norm"), GetAttrKey("weight")), (3, 4), False),
    ((GetAttrKey("bn"), GetAttrKey("weight")), (3, 4), False),
    ((GetAttrKey("embedding"), GetAttrKey("weight")), (30, 4), False),
    ((GetAttrKey("token_embed"), GetAttrKey("weight")), (30, 4), False),
    ((GetAttrKey("patch_embed"), GetAttrKey("weight")), (8, 3, 4, 4), True),
    ((GetAttrKey("patch_embed"), GetAttrKey("weight")), (8, 48), True),
    ((GetAttrKey("cell"), GetAttrKey("weight_ih")), (12, 4), True),
    (keys("Embed_0", "embedding"), (30, 4), False),
    (keys("pos_embedding"), (1, 16, 8), False),
    (keys("cls"), (1, 1, 8), False),
    (keys("LayerNorm_0", "scale"), (8,), False),
    (keys("BatchNorm_0", "scale"), (8,), False),
    (keys("batch_stats", "BatchNorm_0", "kernel"), (8, 8), False),
    (keys("Dense_0", "kernel"), (8,), False),
    (keys("Dense_0", "kernel"), (), False),
  ],
)
def test_prunable_goes_by_names_and_rank(path, shape, expected):
  assert prunable(path, np.zeros(shape, np.float32)) is expected
  assert prunable(path, jax.ShapeDtypeStruct(shape, jnp.bfloat16)) is expected
  assert prunable(path, np.zeros(shape, np.int32)) is False


def test_prunable_leaves_keys_and_functions_alone():
  path = keys("dense", "kernel")
  assert not prunable(path, jax.random.split(jax.random.key(0), (2, 2)))
  assert not prunable(path, jax.nn.relu)
  assert not prunable((), np.zeros(2))


def test_is_parameter():
  leaf = np.zeros(3, np.float32)
  assert is_parameter(keys("Dense_0", "bias"), leaf)
  assert not is_parameter(keys("batch_stats", "bn", "scale"), leaf)
  assert not is_parameter(keys("bn", "mean"), leaf)
  assert not is_parameter(keys("bn", "var"), leaf)
  assert not is_parameter(keys("count"), np.int32(1))


def model(values, seed=0):
  values = np.asarray(values, np.float32)
  return {
    "half": values.astype(jnp.bfloat16),
    "rest": [values.astype(np.float16), jnp.asarray(values)],
    "steps": np.int32(seed),
    "key": jax.random.key(seed),
  }


finite_or_not = st.sampled_from([0.0, -0.0, 1.5, -3.0, 6e4, np.nan, np.inf, -np.inf])


@given(arrays(np.float32, (3, 2, 2), elements=finite_or_not))
def test_stack_and_unstack_are_inverse(assert_trees_equal, values):
  models = [model(v, i) for i, v in enumerate(values)]
  stacked = stack(models)
  assert number_of_models(stacked) == 3
  np.testing.assert_array_equal(stacked["rest"][1], values)
  for original, back in zip(models, unstack(stacked), strict=True):
    assert_trees_equal(original, back)
  assert_trees_equal(stack(unstack(stacked)), stacked)


def test_stack_and_unstack_under_transformations(assert_trees_equal):
  a, b = model(np.ones((2, 2))), model(np.zeros((2, 2)), 1)

  def swap(a, b):
    return stack(unstack(stack([a, b]))[::-1])

  expected = stack([b, a])
  assert_trees_equal(jax.jit(swap)(a, b), expected)
  both = jax.vmap(swap)(stack([a, a]), stack([b, b]))
  assert_trees_equal(unstack(both)[1], expected)
  gradient = jax.grad(lambda x: unstack(stack([x, 2 * x]))[1].sum())(jnp.ones(3))
  np.testing.assert_array_equal(gradient, [2, 2, 2])


def test_stack_keeps_float64(assert_trees_equal):
  with enable_x64():
    models = [{"w": np.array([1 + 1e-12, i])} for i in range(2)]
    stacked = stack(models)
    assert stacked["w"].dtype == np.float64
    assert_trees_equal(unstack(stacked)[0], models[0])


def test_stack_rejects(rejects):
  with rejects("no models to stack"):
    stack([])
  with rejects("model 1 has another tree structure"):
    stack([{"w": np.ones(2)}, {"v": np.ones(2)}])
  with rejects("leaf w is float32[3] in model 1 but float32[2] in model 0"):
    stack([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}])
  with rejects("shapes and dtypes must agree"):
    stack([{"w": jnp.ones(2)}, {"w": jnp.ones(2, int)}])
  with rejects("leaf f is function in model 1 but ArrayImpl in model 0"):
    stack([{"f": jnp.ones(2)}, {"f": test_is_parameter}])


def test_number_of_models_rejects(rejects):
  with rejects("leaves disagree on the number of models: a has 2, b has 3"):
    unstack({"a": np.ones((2, 1)), "b": np.ones((3, 1))})
  with rejects("leaf a has no leading axis"):
    unstack({"a": jnp.float32(1)})
  with rejects("no leaves"):
    unstack({})
  with rejects("length 0"):
    unstack({"a": np.ones((0, 2))})


def test_check_finite(rejects):
  good = {"w": np.ones(2, np.float32), "n": 3, "key": jax.random.key(0), "f": jnp.sin}
  check_finite(good)
  for bad in (np.nan, np.inf, -np.inf):
    for dtype in (np.float16, jnp.bfloat16, np.float32):
      tree = {**good, "layer": {"kernel": np.array([1, bad], dtype)}}
      with rejects("NaN or infinite values in layer/kernel"):
        check_finite(tree)
  with rejects("the soup has NaN"):
    check_finite({"w": np.array([np.nan])}, "the soup")

  not_a_number = jnp.array(jnp.nan)

  def looks_at_concrete_values_only(x):
    check_finite({"traced": x, **good})
    with rejects("NaN"):
      check_finite({"traced": x, "w": not_a_number})
    return x

  jax.jit(looks_at_concrete_values_only)(not_a_number)


def test_match_masks(rejects):
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}
  masks = {"a": jnp.ones((2, 3), bool), "b": jnp.ones(4, bool)}
  assert match_masks(params, masks) == masks
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
  assert match_masks(stacked, masks) == masks  # masks of one model serve all of them
  with rejects("different tree structures"):
    match_masks(params, {"a": masks["a"]})
  with rejects("differ in shape at b: [4] and [3]"):
    match_masks(params, {**masks, "b": jnp.ones(3, bool)})
  with rejects("differ in shape at a: [2, 3] and [1, 3]"):
    match_masks(params, {**masks, "a": jnp.ones((1, 3), bool)})
  with rejects("differ in shape"):
    match_masks(params, jax.tree.map(lambda x: jnp.stack([x, x]), masks))
  with rejects("the mask of a is float32"):
    match_masks(params, {**masks, "a": jnp.ones((2, 3))})
