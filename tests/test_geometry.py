import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from x64 import enable_x64

from jaxsms import interpolate, loss_along_line, loss_barrier, soup_geometry

M = 4


def reference(models):
  """Distances and angles of the rows of a matrix, in float64."""
  models = np.asarray(models, np.float64)
  distances, angles = [], []
  for a, b in itertools.combinations(models, 2):
    distances.append(np.linalg.norm(a - b))
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angles.append(
      math.degrees(2 * math.atan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))
    )
  centre = np.linalg.norm(models - models.mean(0), axis=1)
  return {
    "max_l2_distance": max(distances),
    "min_l2_distance": min(distances),
    "mean_l2_distance": np.mean(distances),
    "max_angle": max(angles),
    "min_angle": min(angles),
    "mean_angle": np.mean(angles),
    "max_barycentre_distance": max(centre),
    "min_barycentre_distance": min(centre),
  }


def assert_geometry(measured, expected, rtol=1e-4, atol=1e-5):
  assert set(measured) == set(expected)
  for name, value in expected.items():
    assert jnp.shape(measured[name]) == ()
    np.testing.assert_allclose(measured[name], value, rtol=rtol, atol=atol, err_msg=name)


def tree(models):
  return {"a": jnp.asarray(models[:, :6].reshape(-1, 2, 3)), "b": [models[:, 6:]]}


@pytest.fixture(scope="module")
def geometry():
  return jax.jit(soup_geometry)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_soup_geometry_equals_numpy(geometry, seed, spread):
  rng = np.random.default_rng(seed)
  models = (rng.standard_normal(9) + spread * rng.standard_normal((M, 9))).astype("f")
  assert_geometry(geometry(tree(models)), reference(models), atol=1e-4)


def test_large_and_small_leaves_of_several_types_count_alike(geometry):
  rng = np.random.default_rng(1)
  large = rng.standard_normal((M, 7, 10_000)).astype(np.float32)
  small = rng.standard_normal((M, 40)).astype(jnp.bfloat16)
  other = rng.standard_normal((M, 3, 2)).astype(np.float32)
  leaves = [large, small, other, np.arange(M)]
  rows = [np.asarray(x, np.float64).reshape(M, -1) for x in leaves[:3]]
  expected = reference(np.concatenate(rows, axis=1))
  assert_geometry(geometry(dict(enumerate(leaves))), expected, atol=1e-3)


def test_eager_and_vmap(geometry):
  models = np.random.default_rng(0).standard_normal((2, M, 9)).astype(np.float32)
  both = jax.vmap(soup_geometry)({"w": models})
  for i in range(2):
    one = {name: values[i] for name, values in both.items()}
    assert_geometry(one, reference(models[i]))
    assert_geometry(soup_geometry(tree(models[i])), one)


@pytest.mark.parametrize("degrees", [1e-4, 1e-2, 1.0, 90.0, 179.9])
def test_angles_small_and_large(degrees):
  angle = math.radians(degrees)
  rng = np.random.default_rng(0)
  u = rng.standard_normal(2000)
  v = rng.standard_normal(2000)
  v -= u * (u @ v) / (u @ u)
  v *= np.linalg.norm(u) / np.linalg.norm(v)
  models = np.stack([u, math.cos(angle) * u + math.sin(angle) * v]).astype(np.float32)
  measured = soup_geometry({"w": models})
  assert_geometry(measured, reference(models), rtol=5e-3, atol=2e-6)
  assert float(measured["max_angle"]) == pytest.approx(degrees, rel=2e-2)


def test_orthogonal_opposite_and_zero_models():
  measured = soup_geometry({"w": np.array([[1.0, 0], [0, 2], [-3, 0]], np.float32)})
  assert float(measured["max_angle"]) == pytest.approx(180)
  assert float(measured["min_angle"]) == pytest.approx(90)
  assert float(measured["mean_angle"]) == pytest.approx(120)
  assert float(measured["max_l2_distance"]) == pytest.approx(4)
  zero = soup_geometry({"w": np.array([[0.0, 0], [0, 1]], np.float32)})
  assert all(np.isfinite(float(x)) for x in zero.values())


def test_one_model_and_equal_models_have_no_extent():
  for m in (1, 3):
    measured = soup_geometry({"w": np.tile(np.float32([0.3, -0.7, 0.1]), (m, 1))})
    assert len(measured) == 8
    for name, value in measured.items():
      assert float(value) == pytest.approx(0, abs=1e-6), name


def test_only_floating_leaves_count():
  models = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
  others = {"n": np.arange(3) * 100, "key": jax.random.split(jax.random.key(0), 3)}
  assert_geometry(soup_geometry({"w": models, **others}), reference(models))


def test_half_precision_and_float64():
  models = np.random.default_rng(0).standard_normal((3, 500)) * 100
  half = models.astype(np.float16)
  assert_geometry(soup_geometry({"w": half}), reference(half))
  with enable_x64():
    measured = soup_geometry({"w": models})
    assert_geometry(measured, reference(models), rtol=1e-12, atol=1e-10)


@given(st.floats(0, 1))
def test_interpolate(weight):
  a = {"w": np.array([1.0, -2.0], np.float32), "n": np.int32(1)}
  b = {"w": np.array([5.0, 2.0], np.float32), "n": np.int32(2)}
  between = interpolate(a, b, weight)
  np.testing.assert_allclose(between["w"], [1 + 4 * weight, -2 + 4 * weight], atol=1e-6)
  assert between["n"] == 1


def test_interpolate_keeps_dtypes_and_ends():
  a, b = jnp.array([1.5, 3], jnp.bfloat16), jnp.array([2.5, -3], jnp.bfloat16)
  for weight, end in ((0, a), (1, b), (jnp.float32(0), a), (jnp.float32(1), b)):
    point = interpolate(a, b, weight)
    assert point.dtype == jnp.bfloat16
    np.testing.assert_array_equal(point, end)


def test_loss_along_line_and_barrier():
  def loss(p):
    return jnp.sum(p["w"] ** 2) ** 2 - p["w"][0]

  a, b = {"w": np.float32([1, 2])}, {"w": np.float32([-3, 0.5])}
  positions, losses = loss_along_line(a, b, loss, points=7)
  np.testing.assert_allclose(positions, np.linspace(0, 1, 7), rtol=1e-6)
  expected = []
  for t in np.linspace(0, 1, 7):
    w = (1 - t) * a["w"].astype(float) + t * b["w"]
    expected.append(np.sum(w**2) ** 2 - w[0])
  np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
  jitted = jax.jit(lambda a, b: loss_along_line(a, b, loss, points=7)[1])(a, b)
  np.testing.assert_allclose(jitted, losses, rtol=1e-5)
  assert len(loss_along_line(a, b, loss)[0]) == 11


@given(arrays(np.float64, 9, elements=st.floats(-10, 10, allow_subnormal=False)))
def test_loss_barrier_is_the_highest_rise_over_the_chord(losses):
  chord = np.linspace(losses[0], losses[-1], 9)
  expected = max(np.max(losses - chord), 0)
  assert float(loss_barrier(losses)) == pytest.approx(expected, abs=1e-4)


def test_loss_barrier_by_hand():
  assert float(loss_barrier([1.0, 5.0, 2.0])) == pytest.approx(3.5)
  assert float(loss_barrier([1.0, 0.0, 2.0])) == 0
  gradient = jax.grad(loss_barrier)(jnp.array([1.0, 5, 2]))
  np.testing.assert_allclose(gradient, [-0.5, 1, -0.5], atol=1e-6)


def test_rejects(rejects):
  with rejects("no leaf is floating"):
    soup_geometry({"n": np.arange(3)})
  with rejects("leaves disagree on the number of models"):
    soup_geometry({"a": np.ones((3, 1)), "b": np.ones((2, 1))})
  with rejects("points is 1: both ends are needed, so at least 2"):
    loss_along_line({"w": 1.0}, {"w": 2.0}, lambda p: p["w"], points=1)
