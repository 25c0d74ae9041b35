"""Sparse parameters taken away: compact files, safetensors elsewhere, sparse matrices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental import sparse

import jaxsms
from jaxsms import checkpoint, models, pretrained
from jaxsms.disk.safetensors import (
  digest_of,
  read_safetensors,
  read_with_metadata,
  save_safetensors,
  write_safetensors,
)
from jaxsms.export import apply_bcoo, load_compact, nested, save_compact, to_bcoo


@pytest.fixture(scope="module")
def mlp():
  """A small network, images for it, and sparse parameters."""
  module = models.create("mlp", 3, hidden=(4,), dropout=0.0)
  images = jax.random.normal(jax.random.key(0), (5, 4, 4, 1))
  params = module.init(jax.random.key(1), images)["params"]
  return module, images, jaxsms.apply_masks(params, jaxsms.magnitude_masks(params, 0.8))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return tmp_path_factory.mktemp("export") / "a.safetensors"


def same_bits(a, b):
  """Whether two arrays have one dtype, shape and memory."""
  a, b = np.asarray(a), np.asarray(b)
  return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


DTYPES = [*map(np.dtype, ("f4", "f2", "f8", "i4", "u1", "?", "i8"))]
DTYPES.append(np.dtype(jnp.bfloat16))


@st.composite
def masked_arrays(draw):
  """Any bits, NaN and -0.0 among them, and a mask whose removed entries are +0."""
  dtype = draw(st.sampled_from(DTYPES))
  shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
  size = int(np.prod(shape)) * dtype.itemsize
  data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
  array = (data % 2 if dtype.kind == "b" else data).view(dtype).reshape(shape).copy()
  if draw(st.booleans()) and array.dtype.kind in "fV":
    array.reshape(-1)[:1] = -0.0
  mask = draw(st.just(np.ones(shape, bool)) | hnp.arrays(bool, shape))
  array[~mask] = 0
  return array, mask


NAMES = st.lists(
  st.text("ab#/ä", min_size=1, max_size=4).filter(lambda name: name != "__metadata__"),
  max_size=4,
  unique=True,
)


@given(NAMES, st.data())
def test_what_is_saved_is_loaded_bit_for_bit(path, names, data):
  pairs = {name: data.draw(masked_arrays()) for name in names}
  tree = {"list": [pairs[name][0] for name in names]}
  masks = {"list": [pairs[name][1] for name in names]}
  save_compact(path, tree, masks)
  for template in (tree, None):
    loaded, their_masks = load_compact(path, template)
    if template is None:
      by_number = loaded.get("list", {})
      assert list(by_number) == sorted(by_number, key=str) or len(names) < 11
      loaded = {"list": [by_number[str(i)] for i in range(len(names))]}
      found = their_masks.get("list", {})
      their_masks = {"list": [found[str(i)] for i in range(len(names))]}
    assert all(map(same_bits, loaded["list"], tree["list"]))
    assert all(map(same_bits, their_masks["list"], masks["list"]))


@given(NAMES, st.data())
def test_any_names_come_back_or_are_refused(path, names, data):
  tree = {name: data.draw(masked_arrays())[0] for name in names}
  masks = {name: data.draw(st.just(True)) for name in names}
  save_compact(path, tree, masks)
  loaded, _ = load_compact(path, tree)
  assert all(same_bits(loaded[name], tree[name]) for name in names)


def test_a_name_that_is_taken_by_a_mask_is_refused(path, rejects):
  tree = {"a": jnp.zeros(2), "a#mask": jnp.zeros(2)}
  with rejects("leaf a#mask comes twice"):
    save_compact(path, tree, {"a": jnp.zeros(2, bool), "a#mask": True})
  save_compact(path, tree, {"a": True, "a#mask": True})  # no mask is written
  assert load_compact(path, tree)[0].keys() == tree.keys()


def test_bits_and_values_lie_as_the_format_says(path):
  kernel = np.zeros((3, 4), np.float32)
  kernel[0, 1], kernel[2, 3], kernel[1, 0] = 2, np.nan, -0.0
  save_compact(path, {"kernel": kernel, "bias": np.zeros(2, np.float32)})
  arrays = read_safetensors(path)
  assert arrays.keys() == {"kernel", "kernel#mask", "bias"}
  np.testing.assert_array_equal(arrays["kernel"], [2, -0.0, np.nan])
  assert np.signbit(arrays["kernel"][1])
  assert arrays["kernel#mask"].tolist() == [0b00010010, 0b00001000]
  (loaded, masks) = load_compact(path)
  assert same_bits(loaded["kernel"], kernel)
  assert masks["kernel"].sum() == 3 and masks["bias"].all()


@pytest.mark.parametrize(("name", "sparsity"), [("mlp", 0.9), ("resnet20", 0.5)])
def test_size_is_a_bit_for_each_entry_and_the_kept_values(path, name, sparsity):
  module = models.create(name, 10, **({"hidden": (512, 256)} if name == "mlp" else {}))
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 28, 28, 1)))
  rng = np.random.default_rng(0)
  masks = jax.tree_util.tree_map_with_path(
    lambda path, x: rng.random(x.shape) >= sparsity * jaxsms.prunable(path, x), shapes
  )
  tree = jax.tree.map(lambda m: np.where(m, rng.random(m.shape), 0).astype("f4"), masks)
  save_compact(path, tree, masks)
  leaves = jax.tree.leaves(tree)
  dense = sum(x.nbytes for x in leaves)
  density = sum(np.count_nonzero(x) for x in leaves) / sum(x.size for x in leaves)
  assert dense > 1e6
  assert path.stat().st_size <= (1 / 32 + density + 0.02) * dense
  loaded, their_masks = load_compact(path, tree)
  assert all(map(same_bits, jax.tree.leaves(loaded), leaves))
  assert all(map(same_bits, jax.tree.leaves(their_masks), jax.tree.leaves(masks)))


TREE = {"params": {"Dense_0": {"kernel": np.eye(4, 6, dtype=np.float32)}, "b": np.ones(3)}}


def test_damage_anywhere_is_found(path, rejects):
  save_compact(path, TREE)
  whole = path.read_bytes()
  for byte in range(len(whole)):
    damaged = bytearray(whole)
    damaged[byte] ^= 1 << byte % 8
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.safetensors") as raised:
      load_compact(path)
    assert "\n" not in str(raised.value)
  for size in range(0, len(whole), 7):
    path.write_bytes(whole[:size])
    with rejects("a.safetensors cannot be read"):
      load_compact(path)
  path.write_bytes(whole)
  loaded, _ = load_compact(path, TREE)
  assert same_bits(loaded["params"]["b"], TREE["params"]["b"])


def hostile(path, arrays, leaves, **metadata):
  """A file with a digest that is right, whatever it holds."""
  text = leaves if isinstance(leaves, str) else json.dumps(leaves)
  digest = digest_of(arrays, text)
  metadata = {"format": jaxsms.export.FORMAT, "leaves": text, "sha256": digest, **metadata}
  write_safetensors(path, arrays, metadata)


VALUES, BITS = np.ones(2, np.float32), np.array([3], np.uint8)


@pytest.mark.parametrize(
  ("arrays", "leaves", "words"),
  [
    ({"a": VALUES, "a#mask": BITS}, [], "no shapes by name"),
    ({"a": VALUES, "a#mask": BITS}, "{", "cannot be read"),
    ({"a": VALUES, "a#mask": BITS}, "[" * 100_000, "cannot be read"),
    ({"a": VALUES, "a#mask": BITS}, {"a": 2}, "'a' has no shape"),
    ({"a": VALUES, "a#mask": BITS}, {"a": [-2, -1]}, "'a' has no shape"),
    ({"a": VALUES, "a#mask": BITS}, {"a": [2.0]}, "'a' has no shape"),
    ({"a": VALUES, "a#mask": BITS}, {"a": [True, 2]}, "'a' has no shape"),
    ({"a": VALUES, "a#mask": BITS}, {"a": [9]}, "no bit for each of its 9"),
    ({"a": VALUES, "a#mask": BITS}, {"a": [2**62, 2**62]}, "no bit for each"),
    ({"a": VALUES, "a#mask": BITS}, {"a": [0, 2**70]}, "no bit for each"),
    ({"a": VALUES[:0], "a#mask": BITS[:0]}, {"a": [0, 2**70]}, "cannot be read"),
    ({"a": VALUES[:0], "a#mask": BITS[:0]}, {"a": [0] * 99}, "cannot be read"),
    ({"a": VALUES, "a#mask": BITS.astype("i1")}, {"a": [2]}, "no bit for each"),
    ({"a": VALUES}, {"a": [2]}, "no bit for each"),
    ({"a": VALUES, "a#mask": BITS}, {"a": [1]}, "not as many values as bits"),
    ({"a": VALUES[:1], "a#mask": BITS}, {"a": [2]}, "not as many values as bits"),
    ({"a": VALUES[None], "a#mask": BITS}, {"a": [2]}, "not as many values as bits"),
    ({"a#mask": BITS}, {"a": [2]}, "it lacks 'a'"),
  ],
)
def test_hostile_files_are_refused(path, rejects, arrays, leaves, words):
  hostile(path, arrays, leaves)
  with rejects(words):
    load_compact(path)
  with pytest.raises(ValueError, match=r"a\.safetensors"):
    pretrained.load_weights(path)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
  max_leaves=4,
)


@given(JSON | st.fixed_dictionaries({"a": st.lists(st.integers(), max_size=3) | JSON}))
def test_any_leaves_give_one_error_or_arrays_of_those_shapes(path, leaves):
  hostile(path, {"a": VALUES, "a#mask": BITS}, leaves)
  try:
    loaded, masks = load_compact(path)
  except ValueError as error:
    assert "\n" not in str(error) and str(path) in str(error)
  else:
    shape = leaves.get("a", [2])
    assert list(loaded["a"].shape) == list(masks["a"].shape) == shape


def test_what_does_not_fit_is_refused(path, rejects):
  kernel = np.array([[1, 0], [2, -0.0]], np.float32)
  masks = {"kernel": kernel != 0}
  with rejects("kernel has entries other than +0"):
    save_compact(path, {"kernel": kernel}, masks)
  with rejects("make the masks from these params"):
    save_compact(path, {"other": kernel}, masks)
  with rejects("'kernel' is key<fry>"):
    save_compact(path, {"kernel": jax.random.key(0)}, {"kernel": True})
  with rejects("none of the 1 leaves of params is prunable"):
    save_compact(path, {"bias": kernel})
  save_compact(path, {"kernel": kernel})
  with rejects("(kernel is (2, 2) and should be (2,))"):
    load_compact(path, {"kernel": kernel[0]})
  with rejects("kernel is float32 in"):
    load_compact(path, {"kernel": kernel.astype("f8")})
  save_safetensors(path, {"kernel": kernel})
  with rejects("is no compact file"):
    load_compact(path)
  with rejects("a/b lies in a leaf"):
    nested({"a": 1, "a/b": 2})
  with rejects("a is a leaf and holds others"):
    nested({"a/b": 2, "a": 1})


def test_a_compact_file_is_read_as_weights(path, mlp):
  module, _, params = mlp
  save_compact(path, {"params": params})
  model = pretrained.load_model(path, module, (4, 4, 1))
  assert all(map(same_bits, jax.tree.leaves(model["params"]), jax.tree.leaves(params)))


def test_the_public_safetensors_package_reads_what_is_written(path):
  public = pytest.importorskip("safetensors")
  from safetensors import numpy as public_numpy

  kernel = np.eye(3, dtype=np.float32)
  tree = {"params": {"kernel": kernel, "none": np.zeros((0, 2), np.int32)}}
  save_safetensors(path, tree)
  arrays = public_numpy.load_file(path)
  assert arrays.keys() == {"params/kernel", "params/none"}
  assert same_bits(arrays["params/kernel"], kernel)
  assert same_bits(arrays["params/none"], tree["params"]["none"])
  save_compact(path, tree)
  with public.safe_open(path, "np") as file:
    assert file.metadata() == read_with_metadata(path)[1]
    assert file.get_tensor("params/kernel").tolist() == [1, 1, 1]
    bits = file.get_tensor("params/kernel#mask")
  mask = np.unpackbits(bits, bitorder="little")[:9].reshape(3, 3)
  np.testing.assert_array_equal(mask, kernel)


@pytest.mark.slow
def test_dense_layers_as_sparse_matrices_give_the_same_products(mlp):
  module, images, params = mlp
  layers = to_bcoo(params)
  kernel, dense = layers["Dense_0"]["kernel"], np.asarray(params["Dense_0"]["kernel"])
  assert isinstance(kernel, sparse.BCOO) and kernel.nse == np.count_nonzero(dense)
  theirs = sparse.BCOO.fromdense(dense)
  assert same_bits(kernel.indices, theirs.indices) and same_bits(kernel.data, theirs.data)
  assert kernel.indices_sorted and kernel.unique_indices
  assert layers["Dense_0"]["bias"] is params["Dense_0"]["bias"]
  rows = images.reshape(5, -1)
  expected = np.asarray(rows, np.float64) @ dense
  for product in (lambda x, k: x @ k, jax.jit(lambda x, k: x @ k)):
    np.testing.assert_allclose(product(rows, kernel), expected, rtol=1e-4, atol=1e-6)
  logits = jax.jit(lambda p: apply_bcoo(module, {"params": p}, images, train=False))
  wanted = module.apply({"params": params}, images, train=False)
  for p in (layers, params):  # dense kernels pass through
    np.testing.assert_allclose(logits(p), wanted, rtol=1e-4, atol=1e-5)


def test_empty_layers_and_other_leaves_stay_what_they_are():
  params = {
    "a": {"kernel": jnp.zeros((3, 2))},
    "conv": {"kernel": jnp.zeros((1, 1, 3, 2))},
    "embedding": jnp.ones((3, 2)),
  }
  layers = to_bcoo(params)
  assert (jnp.ones((4, 3)) @ layers["a"]["kernel"]).tolist() == [[0, 0]] * 4
  assert layers["conv"]["kernel"] is params["conv"]["kernel"]
  assert layers["embedding"] is params["embedding"]


def test_what_cannot_be_made_sparse_is_refused(rejects):
  with rejects("no weight has two axes"):
    to_bcoo({"kernel": jnp.zeros((1, 1, 3, 2))})
  with rejects("call it outside of jit"):
    jax.jit(to_bcoo)({"kernel": jnp.zeros((3, 2))})


def test_models_are_read_from_orbaxs_own_folders(tmp_path, rejects, mlp):
  import orbax.checkpoint as ocp

  module, _, params = mlp
  state = {"params": params, "opt_state": [jnp.ones(3)], "step": 7}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.save(tmp_path / "params", params)
  with ocp.CheckpointManager(tmp_path / "steps") as manager:
    manager.save(7, args=ocp.args.StandardSave(state))
  checkpoint.save(tmp_path / "ours", {"params": params, "masks": params})
  for folder in ("state", "params", "steps/7", "ours"):
    model = pretrained.load_model(tmp_path / folder, module, (4, 4, 1))
    assert all(map(same_bits, jax.tree.leaves(model["params"]), jax.tree.leaves(params)))
  (tmp_path / "empty").mkdir()
  with rejects("holds no whole checkpoint"):
    pretrained.load_arrays(tmp_path / "empty")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "file").write_text("text")
  with rejects("other cannot be read"):
    pretrained.load_arrays(tmp_path / "other")
  with rejects("steps cannot be read"):
    pretrained.load_arrays(tmp_path / "steps")
