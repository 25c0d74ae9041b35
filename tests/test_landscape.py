"""The loss on planes through models, and between the candidates of a phase."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import run_phases
from hypothesis import given
from hypothesis import strategies as st
from test_training import (
  BATCH,
  Tiny,
  ingredients,
  make_data,
  make_programs,
)

from jaxsms import (
  apply_masks,
  interpolate,
  loss_on_plane,
  make_mesh,
  model_on_plane,
  plane_coordinates,
  plane_grid,
  plane_through,
  stack,
  training,
  uniform_soup,
)
from jaxsms.training import Model, Splits, landscape

pytestmark = pytest.mark.usefixtures("quick_compilation")

DATA, VALIDATION, TEST = make_data(23), make_data(9, 1), make_data(7, 2)
SPLITS = Splits(DATA, VALIDATION, TEST)


def tree(vector):
  """A model of 9 parameters in several leaves."""
  vector = np.asarray(vector, np.float32)
  return {"kernel": vector[:6].reshape(2, 3), "bias": [vector[6:]], "n": np.int32(3)}


def flat(model):
  return np.concatenate([np.ravel(model["kernel"]), np.ravel(model["bias"][0])])


def models(seed, spread=1.0):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal(9) + spread * rng.standard_normal((4, 9))).astype("f")


def test_coordinates_by_hand():
  vectors = np.zeros((3, 9))
  vectors[:, 0], vectors[:, 7] = [1, 4, 2], [2, 2, 6]
  plane = plane_through(stack([tree(v) for v in vectors]))
  np.testing.assert_allclose(plane.coordinates, [[0, 0], [3, 0], [1, 4]], atol=1e-6)
  aside = np.zeros(9)
  aside[[0, 7, 4]] = [5, 1, -2]
  point, distance = plane_coordinates(plane, tree(aside))
  np.testing.assert_allclose(point, [4, -1], atol=1e-6)
  assert float(distance) == pytest.approx(2)
  np.testing.assert_allclose(flat(model_on_plane(plane, point))[[0, 7, 4]], [5, 1, 0])


@given(st.integers(0, 2**32 - 1), st.floats(0.03, 30))
def test_a_plane_equals_numpys(seed, spread):
  vectors = models(seed, spread)
  plane = plane_through(stack([tree(v) for v in vectors[:3]]))
  # An independent basis of the same plane: Householder's, made to point the same ways.
  sides = (vectors[1:3] - vectors[0]).astype(np.float64)
  q, r = np.linalg.qr(sides.T)
  q, r = q * np.sign(np.diag(r)), r * np.sign(np.diag(r))[:, None]
  scale = np.abs(r).max()
  np.testing.assert_allclose(plane.coordinates[1:], r.T, atol=2e-5 * scale)
  way = vectors[3].astype(np.float64) - vectors[0]
  point, distance = plane_coordinates(plane, tree(vectors[3]))
  rest = np.linalg.norm(way - q @ (q.T @ way))
  away = np.linalg.norm(way)
  height = float(plane.coordinates[2, 1]) / scale  # a flat triangle has a shaky basis
  np.testing.assert_allclose(point, q.T @ way, atol=1e-5 * away / height)
  np.testing.assert_allclose(distance, rest, atol=1e-5 * away / height)
  # Each model at its own coordinates is itself, bit by bit.
  for vector, at in zip(vectors, plane.coordinates, strict=False):
    np.testing.assert_array_equal(flat(model_on_plane(plane, at)), vector)
  # There and back again.
  given_point = np.float32([0.3, -1.7]) * scale
  found, away = plane_coordinates(plane, model_on_plane(plane, given_point))
  np.testing.assert_allclose(found, given_point, atol=1e-4 * scale / height)
  assert float(away) < 1e-4 * scale / height


def test_the_mean_of_three_lies_in_their_plane_and_of_others_aside():
  stacked = stack([tree(v) for v in models(0)])
  three = jax.tree.map(lambda x: x[:3], stacked)
  plane = plane_through(three)
  point, distance = plane_coordinates(plane, uniform_soup(three))
  np.testing.assert_allclose(point, np.mean(plane.coordinates, axis=0), rtol=1e-5)
  assert float(distance) < 1e-5
  assert float(plane_coordinates(plane, uniform_soup(stacked))[1]) > 0.1


def test_points_keep_masks_dtypes_and_other_leaves():
  base = {"w": jnp.arange(1.0, 9.0).astype(jnp.bfloat16), "n": jnp.int32(7)}
  masks = {"w": np.arange(8) % 2 == 0, "n": np.array(True)}
  three = [
    apply_masks(base | {"w": base["w"] * f.astype(jnp.bfloat16)}, masks)
    for f in (jnp.ones(8), jnp.arange(8.0), jnp.arange(8.0)[::-1])
  ]
  point = model_on_plane(plane_through(stack(three)), jnp.array([1.3, -0.4]))
  assert point["w"].dtype == jnp.bfloat16
  assert (np.asarray(point["w"], np.float32) != 0).tolist() == masks["w"].tolist()
  assert int(point["n"]) == 7


def test_a_quadratic_loss_on_the_plane():
  """|w|² at (x, y) is |foot|² + |(x, y) - foot's coordinates|²."""
  vectors = models(3)[:3]
  stacked = stack([tree(v) for v in vectors])

  def loss(model):
    return jnp.sum(model["kernel"] ** 2) + jnp.sum(model["bias"][0] ** 2)

  x, y, losses = jax.jit(lambda s: loss_on_plane(s, loss, size=5, margin=0.5))(stacked)
  assert losses.shape == (5, 5)
  origin, height = plane_coordinates(plane_through(stacked), tree(np.zeros(9)))
  expected = (
    (np.asarray(x)[None] - origin[0]) ** 2
    + (np.asarray(y)[:, None] - origin[1]) ** 2
    + height**2
  )
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  x, y, losses = loss_on_plane(stacked, loss, size=3)
  assert x.shape == y.shape == (3,)


def test_a_grid_goes_around_its_points():
  x, y = plane_grid(np.float32([[0, 0], [4, 0], [1, 2]]), size=5, margin=0.25)
  np.testing.assert_allclose(x, [-1, 0.5, 2, 3.5, 5])
  np.testing.assert_allclose(y, [-1, 0, 1, 2, 3])


def test_rejects(rejects):
  with rejects("got 2 models: a plane goes through three"):
    plane_through(stack([tree(v) for v in models(0)[:2]]))
  with rejects("no leaf is floating"):
    plane_through({"n": np.arange(3)})
  for weights in ([0, 0, 0], [0, 1, 1], [0, 0, 1], [0.0, 0.3, 1]):
    a, b = models(0)[:2]
    with rejects("the three models lie on one line"):
      plane_through(stack([tree((1 - t) * a + t * b) for t in weights]))
  with rejects("size is 1: a grid needs at least 2 points"):
    plane_grid(np.eye(2), size=1)
  with rejects("margin is -0.1: it must be 0 or above"):
    plane_grid(np.eye(2), margin=-0.1)


@pytest.fixture(scope="module")
def dense():
  return Model(*training.init_variables(Tiny(), jax.random.key(0), (4, 4, 1)))


@pytest.fixture(scope="module")
def programs():
  return make_programs(augmentation="none")


def phase(programs, dense, rates=(0.1, 0.1, 0.1, 0.1), steps=6, splits=SPLITS, **options):
  m = len(rates)
  options.setdefault("landscapes", (1,))
  return run_phases(
    programs, splits, jax.random.key(0), dense,
    lambda r: (ingredients(range(m), steps),
               np.tile(np.float32(rates)[:, None], (1, steps))),
    goal_sparsity=0.5, phases=1, **options,
  )  # fmt: skip


def loss_by_hand(params, prepared, data=VALIDATION):
  """One model's loss and accuracy, its statistics those of some batches, Flax alone."""
  statistics = []
  for images in prepared:
    _, new = Tiny(norm_momentum=0.0).apply(
      {"params": params, "batch_stats": {"BatchNorm_0": {
        "mean": jnp.zeros(6), "var": jnp.zeros(6)}}},
      images, train=True, mutable=["batch_stats"],
    )  # fmt: skip
    statistics.append(new["batch_stats"])
  statistics = jax.tree.map(lambda *x: sum(x) / len(x), *statistics)
  images = (np.asarray(data.images) / 255 - 0.5) / 0.25
  logits = Tiny().apply(
    {"params": params, "batch_stats": statistics}, images.astype(np.float32)
  )
  log_p = np.asarray(jax.nn.log_softmax(logits))
  labels = np.asarray(data.labels)
  return -log_p[np.arange(len(labels)), labels].mean(), (log_p.argmax(1) == labels).mean()


@pytest.fixture(scope="module")
def measured(programs, dense):
  """A landscape, and the candidates that it is of."""
  kept = []

  def merge(candidates):
    kept.append(jax.tree.map(np.asarray, candidates))
    return uniform_soup(candidates)

  found = phase(programs, dense, merge=merge)
  return found, kept[0], found.records[0]["landscape"]


def training_images():
  at = np.arange(2 * BATCH) * 23 // (2 * BATCH)
  images = (np.asarray(DATA.images)[at] / 255 - 0.5) / 0.25
  return images.astype(np.float32).reshape(2, BATCH, 4, 4, 1)


@pytest.mark.slow
def test_the_ends_of_lines_are_the_candidates_evaluated_alone(measured):
  _, candidates, found = measured
  assert [line["between"] for line in found["lines"]] == [[0, 1], [0, 2], [1, 2]]
  assert (found["split"], found["images"], found["batch_norm_batches"]) == (
    "validation", 9, 2,
  )  # fmt: skip
  one = [jax.tree.map(lambda x, i=i: x[i], candidates.params) for i in range(3)]
  for line in found["lines"]:
    i, j = line["between"]
    np.testing.assert_allclose(line["positions"], np.linspace(0, 1, 11))
    for at in (0, 4, 10):
      expected = loss_by_hand(
        interpolate(one[i], one[j], line["positions"][at]), training_images()
      )
      assert line["loss"][at] == pytest.approx(expected[0], rel=1e-4)
      assert line["accuracy"][at] == pytest.approx(expected[1])
    chord = np.linspace(line["loss"][0], line["loss"][-1], 11)
    assert line["barrier"] == pytest.approx(max(line["loss"] - chord), abs=1e-6)


@pytest.mark.slow
def test_the_plane_and_where_the_models_are_on_it(measured):
  phases, candidates, found = measured
  plane = found["plane"]
  assert plane["through"] == [0, 1, 2]
  assert set(plane["points"]) == {"0", "1", "2", "soup"}
  loss = np.array(plane["loss"])
  assert loss.shape == (len(plane["y"]), len(plane["x"])) == (11, 11)
  vectors = [
    np.concatenate([np.ravel(x[i]) for x in jax.tree.leaves(candidates.params)])
    for i in range(3)
  ]
  soup = np.concatenate([np.ravel(x) for x in jax.tree.leaves(phases.model.params)])
  at = {k: np.array(v) for k, v in plane["points"].items()}
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert np.linalg.norm(at[str(i)] - at[str(j)]) == pytest.approx(
      np.linalg.norm(vectors[i] - vectors[j]), rel=1e-4
    )
  # Pythagoras, from each of the three.
  distance = plane["distance_from_plane"]["soup"]
  for i in range(3):
    seen = np.hypot(np.linalg.norm(at[str(i)] - at["soup"]), distance)
    assert seen == pytest.approx(np.linalg.norm(vectors[i] - soup), rel=1e-4)
  # A point of the grid by hand: its weights from the coordinates, solved by NumPy.
  row, column = 2, 7
  corners = np.stack([at[str(i)] for i in range(3)])
  weights = np.linalg.solve(
    np.vstack([corners.T, np.ones(3)]), [plane["x"][column], plane["y"][row], 1]
  )
  params = jax.tree.map(
    lambda x: np.tensordot(weights, x[:3], 1).astype("f"), candidates.params
  )
  expected = loss_by_hand(params, training_images())
  assert loss[row, column] == pytest.approx(expected[0], rel=1e-3)
  assert plane["accuracy"][row][column] == pytest.approx(expected[1])


@pytest.mark.slow
def test_a_mesh_changes_nothing(measured, dense):
  mesh = make_mesh(2, 2, devices=jax.devices()[:4])
  found = phase(make_programs(augmentation="none", mesh=mesh), dense)
  found, expected = found.records[0]["landscape"], measured[2]
  for line, other in zip(found["lines"], expected["lines"], strict=True):
    assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
  assert found["plane"]["points"] == {
    name: pytest.approx(point, rel=1e-3, abs=1e-4)
    for name, point in expected["plane"]["points"].items()
  }
  np.testing.assert_allclose(found["plane"]["loss"], expected["plane"]["loss"], rtol=1e-2)


@pytest.mark.slow
def test_copies_that_diverged_are_left_out(programs, dense):
  four = phase(programs, dense, (0.1, 1e38, 0.1, 0.1)).records[0]["landscape"]
  assert four["plane"]["through"] == [0, 2, 3]
  assert [line["between"] for line in four["lines"]] == [[0, 2], [0, 3], [2, 3]]
  assert np.isfinite(four["plane"]["loss"]).all()
  two = phase(programs, dense, (0.1, 1e38, 0.1, 1e38)).records[0]["landscape"]
  assert [line["between"] for line in two["lines"]] == [[0, 2]]
  assert two["plane"] is None
  alone = phase(programs, dense, (0.1, 1e38, 1e38, 1e38)).records[0]
  assert "landscape" not in alone


@pytest.mark.slow
def test_equal_copies_one_copy_and_other_phases_have_no_plane(programs, dense):
  equal = phase(programs, dense, steps=0).records[0]["landscape"]
  assert equal["plane"] is None
  for line in equal["lines"]:
    assert line["loss"] == pytest.approx([line["loss"][0]] * 11)
  assert "landscape" not in phase(programs, dense, (0.1,)).records[0]
  assert "landscape" not in phase(programs, dense, landscapes=(2,)).records[0]


def test_many_images_are_thinned_out_evenly(monkeypatch):
  monkeypatch.setattr(landscape, "IMAGES", 4)
  some = landscape.evenly(DATA, 4)
  np.testing.assert_array_equal(some.images, np.asarray(DATA.images)[[0, 5, 11, 17]])
  np.testing.assert_array_equal(some.labels, np.asarray(DATA.labels)[[0, 5, 11, 17]])
  assert landscape.evenly(DATA, 23) is DATA


def test_little_training_makes_a_coarser_grid():
  sizes = [landscape.grid_size(100, allowed) for allowed in (1e6, 11_500, 8_300, 0)]
  assert sizes == [11, 9, 7, 5]
