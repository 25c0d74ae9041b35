import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsms import make_mesh, map_ingredients, pad_ingredients, stack
from jaxsms.devices.ingredients import repeat_model, take_ingredients

pytestmark = pytest.mark.usefixtures("quick_compilation")

M = 5
MESHES = [(2, 1), (4, 1), (8, 1), (4, 2)]
INPUTS = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)


def train(key, params, masks, ingredient):
  """Some steps of noisy descent, with a loop, matmuls, randomness and a report."""
  key = jax.random.fold_in(key, ingredient["seed"])

  def loss(params, noise):
    return jnp.mean(jnp.tanh((INPUTS + noise) @ params["kernel"] + params["bias"]) ** 2)

  def step(params, key):
    noise = 0.1 * jax.random.normal(key, INPUTS.shape)
    value, gradient = jax.value_and_grad(loss)(params, noise)
    params = jax.tree.map(lambda p, g: p - ingredient["lr"] * g, params, gradient)
    return jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, masks), value

  return jax.lax.scan(step, params, jax.random.split(key, 4))


def make_work():
  """Arguments of `train`: those for one model, and the ingredients of M copies."""
  rng = np.random.default_rng(1)
  params = {"kernel": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)}
  params["bias"] = jnp.zeros(4)
  masks = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape) > 0.4), params)
  ingredients = {"seed": jnp.arange(M), "lr": jnp.linspace(0.1, 0.5, M)}
  return jax.random.key(3), params, masks, ingredients


@pytest.fixture(scope="module")
def work():
  return make_work()


@pytest.fixture(scope="module")
def one_by_one(work):
  """The results of a Python loop over the copies, stacked."""
  key, params, masks, ingredients = work
  alone = jax.jit(train)
  return stack(
    [alone(key, params, masks, take_ingredients(ingredients, i)) for i in range(M)]
  )


SHARED = (None, None, None, 0)


def test_without_a_mesh_it_is_vmap(work, one_by_one, assert_trees_equal):
  mapped = jax.jit(map_ingredients(train, SHARED))(*work)
  assert_trees_equal(mapped, jax.jit(jax.vmap(train, SHARED))(*work))
  assert_trees_equal(mapped, one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", MESHES)
def test_on_a_mesh_it_equals_a_loop(shape, work, one_by_one, assert_trees_equal):
  # Five copies divide evenly on none of these.
  mapped = jax.jit(map_ingredients(train, SHARED, make_mesh(*shape)))(*work)
  assert_trees_equal(mapped, one_by_one, rtol=1e-5, atol=1e-6)


def test_masks_and_models_may_differ_between_copies(work, assert_trees_equal):
  key, params, masks, ingredients = work
  rng = np.random.default_rng(2)
  own_params = jax.tree.map(lambda x: jnp.stack([x + i for i in range(M)]), params)
  own_masks = jax.tree.map(lambda x: jnp.asarray(rng.random((M, *x.shape)) > 0.5), masks)
  arguments = key, own_params, own_masks, ingredients
  axes = (None, 0, 0, 0)
  mapped = jax.jit(map_ingredients(train, axes))(*arguments)
  alone = jax.jit(train)
  loop = [alone(key, *(take_ingredients(a, i) for a in arguments[1:])) for i in range(M)]
  assert_trees_equal(mapped, stack(loop), rtol=1e-5, atol=1e-6)
  meshed = jax.jit(map_ingredients(train, axes, make_mesh(4)))(*arguments)
  assert_trees_equal(meshed, mapped, rtol=1e-5, atol=1e-6)
  kernel = np.asarray(mapped[0]["kernel"])
  np.testing.assert_array_equal(kernel[~np.asarray(own_masks["kernel"])], 0)


@pytest.mark.parametrize("mesh", [None, (2, 1)])
def test_keys_integers_and_numpy_arrays(mesh, assert_trees_equal):
  mesh = mesh and make_mesh(*mesh)
  keys = jax.random.split(jax.random.key(0), 3)
  counts = np.arange(3)

  def function(key, count):
    return {"key": jax.random.fold_in(key, count), "next": count + 1}

  result = map_ingredients(function, mesh=mesh)(keys, counts)
  for i in range(3):
    one = take_ingredients(result, i)
    assert_trees_equal(one, {"key": jax.random.fold_in(keys[i], i), "next": one["next"]})
  np.testing.assert_array_equal(result["next"], [1, 2, 3])
  # One in_axes for all, and results that do not depend on the copy.
  constant = map_ingredients(lambda key: jnp.ones(2), 0, mesh)(keys)
  np.testing.assert_array_equal(constant, np.ones((3, 2)))


def test_gradient_through_the_map(work):
  values = jnp.arange(3.0)

  def square(x):
    return jnp.sum(map_ingredients(lambda v: v**2, mesh=None)(x))

  np.testing.assert_allclose(jax.grad(square)(values), 2 * values)
  meshed = map_ingredients(lambda v: v**2, mesh=make_mesh(2))
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(meshed(x))))(values)
  np.testing.assert_allclose(gradient, 2 * values)


@pytest.mark.parametrize(("m", "multiple", "k"), [(5, 2, 6), (5, 5, 5), (1, 8, 8)])
def test_pad_ingredients(m, multiple, k):
  keys = jax.random.split(jax.random.key(0), m)
  stacked = {"x": np.arange(m * 2).reshape(m, 2), "key": keys}
  padded, valid = pad_ingredients(stacked, multiple)
  assert valid.tolist() == [True] * m + [False] * (k - m)
  expected = np.concatenate([stacked["x"]] + [stacked["x"][-1:]] * (k - m))
  np.testing.assert_array_equal(padded["x"], expected)
  assert padded["key"].shape == (k,)


def test_make_mesh():
  devices = jax.devices()
  assert dict(make_mesh().shape) == {"ingredient": 8, "data": 1}
  assert dict(make_mesh(data=2).shape) == {"ingredient": 4, "data": 2}
  assert dict(make_mesh(3).shape) == {"ingredient": 3, "data": 1}
  mesh = make_mesh(2, 1, devices[4:])
  assert list(mesh.devices.ravel()) == devices[4:6]
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_repeat_and_take():
  stacked = repeat_model({"w": np.arange(3), "n": np.int32(2)}, 4)
  assert stacked["w"].shape == (4, 3)
  assert stacked["n"].tolist() == [2] * 4
  taken = take_ingredients({"w": np.arange(6).reshape(3, 2)}, [2, 0])
  np.testing.assert_array_equal(taken["w"], [[4, 5], [0, 1]])


def test_rejects(rejects):
  def add(a, b):
    return a + b

  with rejects("in_axes (0,) for 2 arguments: give 0 or None for each of them"):
    map_ingredients(add, (0,))(jnp.ones(2), jnp.ones(2))
  for axes in ((0, 1), (0, "x"), 1):
    with rejects("give 0 or None for each of them"):
      map_ingredients(add, axes)(jnp.ones((2, 2)), jnp.ones((2, 2)))
  with rejects("at least one must be 0"):
    map_ingredients(add, None)(jnp.ones(2), jnp.ones(2))
  with rejects("leaves disagree on the number of ingredients"):
    map_ingredients(add)(jnp.ones(2), jnp.ones(3))
  with rejects("it needs one named 'ingredient'"):
    map_ingredients(add, 0, jax.make_mesh((8,), ("copies",)))
  with rejects("multiple is 0: at least 1 is needed"):
    pad_ingredients({"x": np.ones(2)}, 0)
  with rejects("leaves disagree"):
    pad_ingredients({"x": np.ones(2), "y": np.ones(3)}, 2)
  for ingredient, data in ((9, 1), (4, 4), (0, 1), (None, 0), (None, 9)):
    with rejects("devices does not fit the number of devices, 8"):
      make_mesh(ingredient, data)
