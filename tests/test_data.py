import io
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsms import data
from jaxsms.data import sources, tfds_source

pytestmark = pytest.mark.usefixtures("quick_compilation")

CIFAR_DIR = pathlib.Path(__file__).parents[2] / "shared" / "data" / "tfds"
needs_cifar = pytest.mark.skipif(
  not (CIFAR_DIR / "cifar10").is_dir(), reason=f"no prepared cifar10 in {CIFAR_DIR}"
)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def random_images(*shape, seed=0, low=0):
  return np.random.default_rng(seed).integers(low, 256, shape, np.uint8)


def raw(images, mean=MEAN, std=STD):
  """The bytes that normalised images came from."""
  return np.round((np.asarray(images) * std + mean) * 255).astype(int)


augmented = jax.jit(data.training_images, static_argnums=(0, 3, 4))


# Names and imports


def test_import_loads_no_data_library_and_touches_no_device():
  code = (
    "import sys, jax, jaxsms.data; from jax._src import xla_bridge; "
    "assert not xla_bridge._backends, xla_bridge._backends; "
    "heavy = {'sklearn', 'tensorflow_datasets', 'tensorflow', 'PIL'} & set(sys.modules);"
    " assert not heavy, heavy"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_every_default_augmentation_exists():
  assert set(sources.AUGMENTATION.values()) | {"none"} <= set(data.AUGMENTATIONS)


# Normalisation


@pytest.mark.parametrize("name", sorted(sources.NORMALIZATION))
def test_normalize_against_numpy(name):
  mean, std = sources.NORMALIZATION[name]
  images = random_images(3, 5, 4, len(mean))
  want = (images / 255.0 - np.array(mean)) / np.array(std)
  got = data.normalize(images, mean, std)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_evaluation_only_normalises():
  images = random_images(4, 8, 8, 3)
  want = data.normalize(images, MEAN, STD)
  for got in (
    data.evaluation_images(images, MEAN, STD),
    data.training_images("none", jax.random.key(0), images, MEAN, STD),
  ):
    np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(raw(want), images)


def test_mean_and_std_are_measured_exactly():
  images = random_images(7, 5, 6, 2)
  images[..., 1] = 9  # constant: its standard deviation must not divide by zero
  mean, std = sources._mean_std(images)
  np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)))
  np.testing.assert_allclose(std[0], (images[..., 0] / 255).std())
  assert std[1] == 1
  assert sources._mean_std(np.zeros((1, 1, 1, 1), np.uint8)) == ((0.0,), (1.0,))


@pytest.mark.parametrize(
  ("images", "mean", "match"),
  [
    (np.zeros((2, 4, 4, 3), np.float32), MEAN, "images are float32 of shape"),
    (np.zeros((4, 4, 3), np.uint8), MEAN, r"shape \(4, 4, 3\): give uint8"),
    (np.zeros((2, 4, 4, 3), np.uint8), (0.5,), "mean has shape"),
    ([[[[1]]]], (0.5,), "images are list"),
  ],
)
@pytest.mark.parametrize("name", sorted(data.AUGMENTATIONS))
def test_wrong_images_are_refused(name, images, mean, match):
  with pytest.raises(ValueError, match=match):
    data.training_images(name, jax.random.key(0), images, mean, STD)


def test_unknown_augmentation():
  with pytest.raises(ValueError, match=r"unknown augmentation .*did you mean crop_flip"):
    data.training_images(
      "crop_flop", jax.random.key(0), random_images(1, 2, 2, 3), MEAN, STD
    )


# Augmentation


def all_crops(image, pad):
  """Every crop of the padded image, mirrored and not, by (row, column, mirrored)."""
  height, width, _ = image.shape
  padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
  for row in range(2 * pad + 1):
    for column in range(2 * pad + 1):
      crop = padded[row : row + height, column : column + width]
      yield (row, column, False), crop
      yield (row, column, True), crop[:, ::-1]


def find_crops(images, results, pad):
  """Which of all crops each result is; fails where it is none."""
  found = []
  for image, result in zip(images, results, strict=True):
    matches = [k for k, crop in all_crops(image, pad) if (crop == result).all()]
    assert len(matches) == 1
    found.append(matches[0])
  return found


@pytest.mark.parametrize("shape", [(32, 32, 3), (9, 12, 3)])
def test_crop_flip_gives_one_of_the_padded_crops(shape):
  images = random_images(40, *shape)
  got = augmented("crop_flip", jax.random.key(1), images, MEAN, STD)
  found = find_crops(images, raw(got), 4)
  assert len(set(found)) > 20  # each image has its own draw
  assert 5 < sum(mirrored for _, _, mirrored in found) < 35


def test_crop_flip_draws_every_offset_alike():
  # Bright where row and column say: the offsets can be read off one pixel.
  image = np.zeros((1, 16, 16, 2), np.uint8)
  image[0, ..., 0], image[0, ..., 1] = np.indices((16, 16)) + 100
  images = np.repeat(image, 8100, 0)
  got = augmented("crop_flip", jax.random.key(2), images, (0.0, 0.0), (1.0, 1.0))
  got = raw(got, 0, 1)[:, 8, 7:9]
  rows, mirrored = got[:, 0, 0] - 108, got[:, 0, 1] > got[:, 1, 1]
  columns = np.where(mirrored, got[:, 1, 1], got[:, 0, 1]) - 107
  counts = np.zeros((9, 9), int)
  np.add.at(counts, (rows + 4, columns + 4), 1)
  assert counts.sum() == 8100
  chi2 = ((counts - 100) ** 2 / 100).sum()
  assert 45 < chi2 < 130  # 80 degrees of freedom, 99.9 % interval
  assert 0.47 < mirrored.mean() < 0.53
  assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.05
  assert abs(np.corrcoef(rows, mirrored)[0, 1]) < 0.05


def test_rotation_is_of_a_crop_by_at_most_15_degrees():
  # No zero bytes in the image: black is what came from outside.
  images = random_images(3, 16, 16, 3, low=1)
  got = raw(augmented("crop_flip_rotate", jax.random.key(3), images, MEAN, STD))
  y, x = np.indices((16, 16)) - 7.5
  for image, result in zip(images, got, strict=True):
    best = 0
    crops = [crop for _, crop in all_crops(image, 4)]
    for angle in np.deg2rad(np.arange(-15, 15.1, 0.75)):
      rows = np.round(np.cos(angle) * y - np.sin(angle) * x + 7.5).astype(int)
      columns = np.round(np.sin(angle) * y + np.cos(angle) * x + 7.5).astype(int)
      inside = (rows >= 0) & (rows < 16) & (columns >= 0) & (columns < 16)
      at = rows.clip(0, 15), columns.clip(0, 15)
      for crop in crops:
        want = np.where(inside[..., None], crop[at], 0)
        best = max(best, (want == result).all(-1).mean())
    # The angle is known to 0.4 degrees: a few pixels round elsewhere.
    assert best > 0.9


def test_noise_statistics():
  images = random_images(50, 16, 16, 3)
  plain = data.normalize(images, MEAN, STD)
  got = augmented("noise", jax.random.key(4), images, MEAN, STD)
  noise = np.asarray(got - plain)
  assert abs(noise.mean()) < 0.01
  assert abs(noise.std() - 1.0) < 0.02
  assert abs((noise**4).mean() / (noise**2).mean() ** 2 - 3) < 0.1  # Gaussian
  assert abs((noise[0] * noise[1]).mean()) < 0.05  # each image its own


def test_shift_noise_shifts_by_one_pixel_and_never_mirrors(monkeypatch):
  images = random_images(60, 8, 8, 1)
  key = jax.random.key(5)
  got = augmented("shift_noise", key, images, (0.3,), (0.4,))
  monkeypatch.setattr(data.augmentation, "NOISE_STD", 0.0)
  augmented.clear_cache()
  shifted = augmented("shift_noise", key, images, (0.3,), (0.4,))
  augmented.clear_cache()
  found = find_crops(images, raw(shifted, 0.3, 0.4), 1)
  assert not any(mirrored for _, _, mirrored in found)
  assert len(set(found)) == 9
  assert abs(float(jnp.std(got - shifted)) - 1.0) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(data.AUGMENTATIONS))
def test_copies_under_vmap_equal_one_at_a_time(name):
  keys = jax.random.split(jax.random.key(6), 3)
  images = random_images(3, 5, 8, 8, 3)

  @jax.jit
  def augment(key, images):
    return data.training_images(name, key, images, MEAN, STD)

  together = jax.jit(jax.vmap(augment))(keys, images)
  for m in range(3):
    # Fused differently: the last bit may differ.
    np.testing.assert_allclose(together[m], augment(keys[m], images[m]), atol=1e-5)
  np.testing.assert_array_equal(augment(keys[0], images[0]), augment(keys[0], images[0]))
  if name != "none":
    assert (augment(keys[0], images[0]) != augment(keys[1], images[0])).any()


def test_crop_inside_scan_over_copies():
  images = random_images(2, 4, 8, 8, 3)

  def step(total, key):
    keys = jax.random.split(key, 2)
    batch = jax.vmap(lambda k, x: data.training_images("crop_flip", k, x, MEAN, STD))(
      keys, images
    )
    return total + batch.sum(), batch

  keys = jax.random.split(jax.random.key(7), 3)
  _, batches = jax.jit(lambda: jax.lax.scan(step, 0.0, keys))()
  for t in range(3):
    for m in range(2):
      find_crops(images[m], raw(batches[t, m]), 4)


# Splits


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 3000), st.floats(0.001, 0.999), st.integers(0, 2**40))
def test_split_properties(n, fraction, seed):
  if not 0 < round(fraction * n) < n:
    with pytest.raises(ValueError, match="leaves none for"):
      data.train_validation_split(n, fraction, seed)
    return
  train, validation = data.train_validation_split(n, fraction, seed)
  assert len(validation) == round(fraction * n)
  np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), range(n))
  assert (np.diff(train) > 0).all()
  assert (np.diff(validation) > 0).all()
  again = data.train_validation_split(n, fraction, seed)
  np.testing.assert_array_equal(validation, again[1])


def test_split_depends_on_its_seed_alone():
  np.random.seed(1)  # noqa: NPY002
  first = data.train_validation_split(1000)[1]
  np.random.seed(2)  # noqa: NPY002
  np.testing.assert_array_equal(first, data.train_validation_split(1000, 0.1, 42)[1])
  assert (first != data.train_validation_split(1000, seed=43)[1]).any()


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    ((100, 0.0), "fraction is 0.0: give a share between 0 and 1"),
    ((100, 1.0), "fraction is 1.0"),
    ((100, -0.1), "fraction is -0.1"),
    ((100, float("nan")), "fraction is nan"),
    ((3, 0.1), "fraction 0.1 of 3 examples leaves none for validation"),
    ((3, 0.9), "fraction 0.9 of 3 examples leaves none for training"),
    ((0,), "n is 0: give an integer of at least 1"),
    ((10.5,), "n is 10.5: give an integer"),
    ((100, 0.1, -1), "seed is -1"),
  ],
)
def test_split_refuses(arguments, match):
  with pytest.raises(ValueError, match=match):
    data.train_validation_split(*arguments)


# Digits


def test_digits():
  digits = data.load("digits")
  assert digits.train_images.shape == (1197, 8, 8, 1)
  assert digits.test_images.shape == (600, 8, 8, 1)
  assert digits.train_images.dtype == np.uint8
  assert digits.train_labels.dtype == np.int32
  assert (digits.num_classes, digits.augmentation) == (10, "noise")
  assert digits.train_images.max() == 255
  share = np.bincount(digits.test_labels) / np.bincount(digits.train_labels)
  assert (abs(share - 600 / 1197) < 0.02).all()  # stratified
  mean, std = sources._mean_std(digits.train_images)
  np.testing.assert_allclose(digits.mean, mean, atol=1e-6)
  np.testing.assert_allclose(digits.std, std, atol=1e-6)
  np.testing.assert_array_equal(data.load("digits").test_images, digits.test_images)
  rows = {image.tobytes() for image in digits.train_images}
  assert sum(image.tobytes() in rows for image in digits.test_images) == 0


def test_digits_without_scikit_learn(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
  with pytest.raises(ImportError, match=r"pip install 'jaxsms\[data\]'"):
    data.load("digits")


# Arrays of one's own


def arrays(**changes):
  good = {
    "train_images": random_images(12, 4, 5, 3),
    "train_labels": np.arange(12) % 4,
    "test_images": random_images(6, 4, 5, 3, seed=1),
    "test_labels": np.arange(6) % 4,
  }
  return {k: v for k, v in (good | changes).items() if v is not None}


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.dtype(">i4")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, dtype, save):
  want = arrays(train_labels=(np.arange(12) % 4).astype(dtype))
  path = tmp_path / "mine.npz"
  save(path, **want)
  got = data.load(path)
  for name in sources.ARRAYS:
    np.testing.assert_array_equal(getattr(got, name), want[name])
  assert got.train_labels.dtype == got.test_labels.dtype == np.int32
  assert (got.name, got.num_classes, got.augmentation) == (str(path), 4, "none")
  np.testing.assert_allclose(got.mean, (want["train_images"] / 255).mean((0, 1, 2)))
  np.testing.assert_allclose(got.std, (want["train_images"] / 255).std((0, 1, 2)))


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    (
      {"train_labels": np.arange(12) % 4 * 2},
      "train_labels has 4 classes up to 6, but never 1: give at least 2, counted from 0",
    ),
    ({"train_labels": np.zeros(12, int), "test_labels": np.zeros(6, int)}, "1 classes up"),
    (
      {"train_labels": np.append(np.arange(11) % 4, 2_000_000_000)},
      "4 classes up to 2000000000|5 classes up to 2000000000",
    ),
    (
      {"train_labels": None, "test_images": None},
      "lacks train_labels, test_images and holds train_images, test_labels: give",
    ),
    ({"train_images": np.zeros((12, 4, 5, 3))}, "train_images is float64 of shape"),
    ({"test_images": np.zeros((6, 4, 5), np.uint8)}, r"test_images is uint8 of shape"),
    (
      {"test_images": np.zeros((6, 5, 5, 3), np.uint8)},
      r"training images of shape \(4, 5, 3\) and test images of shape \(5, 5, 3\)",
    ),
    ({"train_labels": np.arange(11)}, "has 11 labels for 12 images"),
    (
      {"test_images": np.zeros((0, 4, 5, 3), np.uint8), "test_labels": np.arange(0)},
      "test_images is empty",
    ),
    ({"train_labels": np.arange(12.0)}, "train_labels is float64 of shape"),
    ({"train_labels": np.ones(12, bool)}, "train_labels is bool"),
    ({"train_labels": np.zeros((12, 1), int)}, r"train_labels is int64 .*\(12, 1\)"),
    ({"train_labels": np.arange(12) - 1}, "train_labels runs from -1 to 10"),
    ({"train_labels": np.full(12, 2**40)}, "train_labels runs from 1099511627776"),
    (
      {"test_labels": np.arange(6)},
      "test label 5, but training labels run from 0 to 3",
    ),
    (
      {"train_labels": np.array([{}] * 12, object)},
      "cannot be read .*allow_pickle",
    ),
  ],
)
def test_npz_refuses(tmp_path, changes, match):
  path = tmp_path / "mine.npz"
  np.savez(path, **arrays(**changes))
  with pytest.raises(ValueError, match=match) as error:
    data.load(str(path))
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)


def test_npz_missing_directory_and_other_files(tmp_path):
  with pytest.raises(ValueError, match=r"there is no file .*mine\.npz: give an"):
    data.load(str(tmp_path / "mine.npz"))
  (tmp_path / "folder.npz").mkdir()
  with pytest.raises(ValueError, match=r"folder\.npz is no file: give an"):
    data.load(str(tmp_path / "folder.npz"))
  for content in (b"", b"text", b"\x80\x04N.", b"PK\x03\x04"):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
      data.load(str(tmp_path / "bad.npz"))
  with open(tmp_path / "array.npz", "wb") as file:
    np.save(file, np.zeros(3))
  with pytest.raises(ValueError, match="cannot be read"):
    data.load(str(tmp_path / "array.npz"))


@pytest.fixture(scope="module")
def good_npz(tmp_path_factory):
  path = tmp_path_factory.mktemp("fuzz") / "mine.npz"
  small = arrays(
    train_images=random_images(12, 2, 2, 1), test_images=random_images(6, 2, 2, 1)
  )
  np.savez(path, **small)
  return path, path.read_bytes(), data.load(str(path))


@settings(deadline=None, max_examples=200)
@given(
  st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3),
  st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_npz_is_refused_or_right(good_npz, flips, keep):
  path, content, want = good_npz
  content = bytearray(content[: round(keep * len(content))])
  for where, change in flips:
    if content:
      content[min(int(where * len(content)), len(content) - 1)] ^= change
  path.write_bytes(content)
  try:
    got = data.load(str(path))
  except ValueError as error:
    assert "\n" not in str(error)
    return
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_flipped_header_byte_is_refused_or_right(good_npz):
  path, content, want = good_npz
  for i in range(0, 300):  # the first array's zip and npy headers
    path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
    try:
      got = data.load(str(path))
    except ValueError:
      continue
    jax.tree.map(np.testing.assert_array_equal, got, want)


# TFDS


def pairs_of_several_sizes():
  """60 colour images of two classes, which differ in their brightness."""
  rng = np.random.default_rng(0)
  return [
    (
      rng.integers(0, 200, (*rng.integers(9, 20, 2), 3)).astype(np.uint8) + 50 * label,
      label,
    )
    for label in rng.integers(0, 2, 60).tolist()
  ]


def prepare(
  data_dir, splits, shape=(None, None, 3), called="tiny", config=None, **features
):
  """Prepares a data set without TensorFlow: {split: [(image, label)]}."""
  import tensorflow_datasets as tfds
  from PIL import Image

  def examples(pairs):
    for i, (image, label) in enumerate(pairs):
      file = io.BytesIO()
      Image.fromarray(image).save(file, "png")
      file.seek(0)
      yield i, dict(zip(columns, (file, label), strict=True))

  columns = features or {
    "image": tfds.features.Image(shape=shape, encoding_format="png"),
    "label": tfds.features.ClassLabel(num_classes=5),
  }

  class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = called
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(columns)
      )

    def _split_generators(self, _):
      return {split: examples(pairs) for split, pairs in splits.items()}

    def _generate_examples(self):
      raise NotImplementedError

  tfds.disable_progress_bar()
  builder = Prepared(data_dir=str(data_dir))
  builder.download_and_prepare(file_format="array_record")
  return pathlib.Path(builder.data_dir)


def pairs(n, *shape, seed=0):
  return [(image, i % 3) for i, image in enumerate(random_images(n, *shape, seed=seed))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  splits = {"train": pairs(12, 4, 6, 3), "test": pairs(5, 4, 6, 3, seed=1)}
  prepare(data_dir, splits)
  return str(data_dir), splits


def as_set(images, labels):
  return sorted(
    (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
  )


def check_tiny(got, splits):
  train, test = (zip(*splits[split], strict=True) for split in ("train", "test"))
  # TFDS shuffles when it prepares.
  assert as_set(got.train_images, got.train_labels) == as_set(*train)
  assert as_set(got.test_images, got.test_labels) == as_set(*test)
  assert got.train_labels.dtype == np.int32
  assert (got.name, got.num_classes, got.augmentation) == ("tiny", 5, "none")


def no_decoding(monkeypatch):
  def fail(*_):
    raise AssertionError("decoded although cached")

  monkeypatch.setattr(tfds_source, "_decode", fail)


def test_tfds_and_its_cache(tiny, tmp_path, monkeypatch, capfd):
  data_dir, splits = tiny
  got = data.load("tiny", data_dir, tmp_path / "cache")
  check_tiny(got, splits)
  np.testing.assert_allclose(got.mean, (got.train_images / 255).mean((0, 1, 2)))
  with monkeypatch.context() as patch:
    no_decoding(patch)
    jax.tree.map(
      np.testing.assert_array_equal,
      got,
      data.load("tiny", data_dir, tmp_path / "cache"),
    )
    patch.setenv("JAXSMS_CACHE", str(tmp_path / "cache"))
    check_tiny(data.load("tiny", data_dir), splits)
    check_tiny(data.load("tiny:1.0.0", data_dir)._replace(name="tiny"), splits)
  files = sorted((tmp_path / "cache").iterdir())
  assert [f.suffix for f in files] == [".npz", ".npz"]  # nothing temporary is left
  assert capfd.readouterr().out == ""
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other", "folder"])
def test_damaged_cache_is_rebuilt(tiny, tmp_path, caplog, damage, monkeypatch):
  data_dir, splits = tiny
  data.load("tiny", data_dir, tmp_path)
  for file in tmp_path.iterdir():
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "truncate":
      file.write_bytes(content[:middle])
    elif damage == "flip":
      at = content.index(b"\x93NUMPY") + 140  # in the images
      file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    elif damage == "empty":
      file.write_bytes(b"")
    elif damage == "other":
      np.savez(file, images=np.zeros(3))
    else:
      file.unlink()
      file.mkdir()
  check_tiny(data.load("tiny", data_dir, tmp_path), splits)
  assert "ignoring a damaged cache" in caplog.text
  if damage != "folder":
    no_decoding(monkeypatch)
    check_tiny(data.load("tiny", data_dir, tmp_path), splits)


def test_unwritable_cache_is_a_warning(tiny, tmp_path, caplog):
  (tmp_path / "file").write_text("in the way")
  check_tiny(data.load("tiny", tiny[0], tmp_path / "file"), tiny[1])
  assert "decoded images are not cached" in caplog.text


def test_changed_data_are_not_taken_from_the_cache(tmp_path):
  for seed in (1, 2):
    for folder in ("a", "b"):
      splits = {"train": pairs(4 + seed, 4, 6, 3, seed=seed), "test": pairs(3, 4, 6, 3)}
      if folder == "b":
        splits["train"] = splits["train"][::-1][:3]
      prepare(tmp_path / f"{folder}{seed}", splits)
      here = tmp_path / folder
      if here.exists():
        here.rename(tmp_path / f"{folder}-old")
      (tmp_path / f"{folder}{seed}").rename(here)
      check_tiny(data.load("tiny", str(here), tmp_path / "cache"), splits)


def test_load_split(tiny, tmp_path):
  data_dir, splits = tiny
  images, labels = data.load_split("tiny", "test", data_dir, tmp_path)
  assert as_set(images, labels) == as_set(*zip(*splits["test"], strict=True))
  part, _ = data.load_split("tiny", "test[:2]", data_dir, tmp_path)
  np.testing.assert_array_equal(part, images[:2])
  with pytest.raises(ValueError, match=r"unknown split of tiny 'tests'.*test"):
    data.load_split("tiny", "tests", data_dir, tmp_path)


def test_corrupted_sets(tmp_path):
  assert data.corrupted_sets("cifar10", str(tmp_path)) == []
  prepare(tmp_path, {"test": pairs(2, 4, 4, 3)}, called="cifar10")
  assert data.corrupted_sets("cifar10", str(tmp_path)) == []
  splits = {c: pairs(3, 4, 4, 3, seed=i) for i, c in enumerate(("fog_2", "brightness_1"))}
  for config, examples in splits.items():
    split = {"test": examples}
    prepare(tmp_path, split, called="cifar10_corrupted", config=config)
  (tmp_path / "cifar10_corrupted" / "snow_3").mkdir()  # an unfinished one
  names = data.corrupted_sets("cifar10", str(tmp_path))
  assert names == ["cifar10_corrupted/brightness_1", "cifar10_corrupted/fog_2"]
  assert data.corrupted_sets("cifar10:3.0.2", str(tmp_path)) == names
  for name in names:
    images, labels = data.load_split(name, "test", str(tmp_path), tmp_path / "cache")
    want = splits[name.split("/")[1]]
    assert as_set(images, labels) == as_set(*zip(*want, strict=True))


@pytest.mark.parametrize("name", ["digits", "mine.npz", "../cifar10", "/cifar10", "", "."])
def test_data_without_corrupted_sets(tmp_path, name):
  (tmp_path / "data").mkdir()
  (tmp_path / "cifar10_corrupted" / "fog_1" / "1.0.0").mkdir(parents=True)
  (tmp_path / "cifar10_corrupted" / "fog_1" / "1.0.0" / "dataset_info.json").touch()
  assert data.corrupted_sets(name, str(tmp_path / "data")) == []


def test_validation_stands_in_for_test_and_grey_keeps_its_channel(tmp_path):
  splits = {"train": pairs(6, 4, 4), "validation": pairs(3, 4, 4, seed=1)}
  prepare(tmp_path, splits, shape=(4, 4, 1))
  got = data.load("tiny", str(tmp_path), tmp_path / "cache")
  assert got.train_images.shape == (6, 4, 4, 1)
  images, labels = zip(*splits["validation"], strict=True)
  assert as_set(got.test_images, got.test_labels) == as_set(images, labels)


def test_known_normalisation_only_where_the_channels_agree(tmp_path):
  splits = {"train": pairs(6, 4, 4), "test": pairs(3, 4, 4)}
  prepare(tmp_path, splits, shape=(4, 4, 1), called="cifar10")
  got = data.load("cifar10:1.0.0", str(tmp_path), tmp_path / "cache")
  np.testing.assert_allclose(got.mean, [(got.train_images / 255).mean()])
  assert got.augmentation == "crop_flip"


def test_tfds_refuses_what_is_no_classification_of_like_images(tmp_path):
  import tensorflow_datasets as tfds

  def refused(match, splits, **options):
    refused.count += 1
    folder = tmp_path / str(refused.count)
    prepare(folder, splits, **options)
    with pytest.raises(ValueError, match=match) as error:
      data.load("tiny", str(folder), tmp_path / "cache")
    assert "\n" not in str(error.value)

  refused.count = 0
  same, other = pairs(4, 4, 6, 3), pairs(4, 5, 6, 3)
  refused(r"shape \(.*\) and of shape", {"train": same + other, "test": same})
  refused(r"shape \(4, 6, 3\) and of shape \(5, 6", {"train": same, "test": other})
  refused("has only the splits test:", {"test": same})
  unlabelled = [(image, -1) for image, _ in same]
  refused("has the label -1 in test", {"train": same, "test": unlabelled})
  refused(
    "has the features label, photo, but no image:",
    {"train": same, "test": same},
    photo=tfds.features.Image(shape=(4, 6, 3)),
    label=tfds.features.ClassLabel(num_classes=3),
  )
  refused(
    r"has the label 0\.0 in train",
    {"train": same, "test": same},
    image=tfds.features.Image(shape=(4, 6, 3)),
    label=tfds.features.Scalar(np.float32),
  )


def test_integer_labels_without_class_names_are_counted(tmp_path):
  import tensorflow_datasets as tfds

  prepare(
    tmp_path,
    {"train": pairs(4, 4, 6, 3), "test": pairs(2, 4, 6, 3)},
    image=tfds.features.Image(shape=(4, 6, 3)),
    label=tfds.features.Scalar(np.int64),
  )
  assert data.load("tiny", str(tmp_path), tmp_path / "cache").num_classes == 3


def test_damaged_prepared_files(tmp_path):
  folder = prepare(tmp_path, {"train": pairs(4, 4, 6, 3), "test": pairs(2, 4, 6, 3)})
  for file in sorted(folder.iterdir()):
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b""):
      file.write_bytes(damaged)
      with pytest.raises(ValueError):
        data.load("tiny", str(tmp_path), tmp_path / "cache")
    file.write_bytes(content)
  data.load("tiny", str(tmp_path), tmp_path / "cache")


def test_other_file_format_is_named(tmp_path):
  folder = prepare(tmp_path, {"train": pairs(4, 4, 6, 3), "test": pairs(2, 4, 6, 3)})
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ValueError, match=r"as tfrecord in .*download_and_prepare"):
    data.load("tiny", str(tmp_path), tmp_path / "cache")


def test_unprepared_data_set_says_how_to_prepare_it(tmp_path):
  want = (
    f"data set 'mnist' is not prepared in {tmp_path}: give the data_dir that holds it, "
    "or run `pip install tensorflow && python -c 'import tensorflow_datasets as tfds; "
    f'tfds.builder("mnist", data_dir="{tmp_path}")'
    '.download_and_prepare(file_format="array_record")\'`'
  )
  with pytest.raises(ValueError) as error:
    data.load("mnist", str(tmp_path))
  assert str(error.value) == want


@pytest.mark.parametrize(
  ("name", "match"),
  [
    ("cifr10", r"unknown data set 'cifr10': did you mean cifar10"),
    ("digit", r"unknown data set 'digit': did you mean digits"),
    ("cifar10/nope", r"unknown data set 'cifar10/nope': did you mean cifar10"),
    ("cifar10_corrupted/fog_9", r"did you mean cifar10_corrupted/fog_"),
    ("cifar10_corrupted/fog_1", r"'cifar10_corrupted/fog_1' is not prepared"),
    ("cifar10:9.9.9", "'cifar10:9.9.9' is not prepared"),
  ],
)
def test_unknown_names(tmp_path, name, match):
  with pytest.raises(ValueError, match=match):
    data.load(name, str(tmp_path))


@pytest.mark.parametrize(
  "name",
  [
    "../tiny",
    "/tiny",
    "tiny/..",
    "tiny/../../tiny",
    "tiny/a/b",
    "tiny\n",
    "huggingface:tiny",
    "tiny/a=1",
    "tiny:*.*.*",
    "gs://bucket/tiny",
    "",
    "data.npy",
  ],
)
def test_names_cannot_leave_the_data_directory(tiny, tmp_path, name):
  with pytest.raises(ValueError, match="is no data set: give digits, a TFDS name"):
    data.load(name, tiny[0], tmp_path)
  assert not list(tmp_path.iterdir())


def test_missing_decoder_says_what_to_install(tiny, tmp_path, monkeypatch):
  def fail(*_):
    raise ImportError("requires either OpenCV\nor PIL")

  monkeypatch.setattr(tfds_source, "_decode", fail)
  with pytest.raises(ImportError, match=r"OpenCV or PIL\): run `pip install 'jaxsms"):
    data.load("tiny", tiny[0], tmp_path)


def test_file_error_inside_tfds_is_not_blamed_on_tensorflow(tiny, tmp_path, monkeypatch):
  def fail(*_):
    try:
      raise PermissionError("no entry")
    except PermissionError:
      raise ImportError("No module named 'tensorflow'")  # noqa: B904

  monkeypatch.setattr(tfds_source, "_decode", fail)
  with pytest.raises(ValueError, match=r"'tiny' cannot be read \(no entry\)"):
    data.load("tiny", tiny[0], tmp_path)


@needs_cifar
def test_cifar10_slice(tmp_path):
  images, labels = data.load_split("cifar10", "test[:200]", str(CIFAR_DIR), tmp_path)
  assert images.shape == (200, 32, 32, 3)
  assert images.dtype == np.uint8
  assert labels.dtype == np.int32
  assert set(labels) == set(range(10))


@needs_cifar
@pytest.mark.slow
def test_all_of_cifar10(tmp_path, monkeypatch):
  got = data.load("cifar10", str(CIFAR_DIR), tmp_path)
  assert got.train_images.shape == (50000, 32, 32, 3)
  assert got.test_images.shape == (10000, 32, 32, 3)
  assert (np.bincount(got.train_labels) == 5000).all()
  assert (np.bincount(got.test_labels) == 1000).all()
  assert (got.num_classes, got.augmentation) == (10, "crop_flip")
  assert (got.mean, got.std) == (MEAN, STD)
  measured, _ = sources._mean_std(got.train_images)
  np.testing.assert_allclose(measured, MEAN, atol=2e-3)  # light JPEG artefacts
  no_decoding(monkeypatch)
  again = data.load("cifar10", str(CIFAR_DIR), tmp_path)
  np.testing.assert_array_equal(got.train_images, again.train_images)
