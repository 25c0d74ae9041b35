import functools
import io
import json
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from PIL import Image
from test_crops import random_image, torchvision_box
from test_data import prepare

import jaxsms
from jaxsms import data
from jaxsms.data import placement

KEY = jax.random.key(7)
N, BATCH = 23, 4  # five batches an epoch, three examples left over
SEEDS = (5, 0, 2)


def make_arrays(n=N):
  images = np.random.default_rng(1).integers(0, 256, (n, 5, 6, 3), np.uint8)
  return images, np.arange(n) % 7


IMAGES, LABELS = make_arrays()
SOURCE = data.ArrayExamples(IMAGES, LABELS)


def noisy(rng, image):
  """A transform that shows its draws."""
  return np.concatenate([image, rng.integers(0, 256, (1, 6, 3), np.uint8)])


def start(key=KEY, seeds=SEEDS, source=SOURCE, **options):
  defaults = {
    "batch_size": BATCH,
    "steps": [13] * len(seeds),
    "chunk_steps": 3,
    "transform": noisy,
    "threads": 2,
  }
  return data.stream(source, key, seeds, **{**defaults, **options})


def by_step(chunks):
  """(step, images [m, batch, ...], labels [m, batch]) of each step."""
  steps = []
  for chunk in chunks:
    for at in range(chunk.taken):
      images, labels = np.asarray(chunk.images), np.asarray(chunk.labels)
      steps.append((chunk.step + at, images[:, at], labels[:, at]))
  assert [step for step, *_ in steps] == list(range(steps[0][0], steps[-1][0] + 1))
  return steps


def assert_same(got, want):
  assert len(got) == len(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module")
def whole():
  return by_step(start())


# The order


def test_the_order_is_that_of_numpy(whole):
  words = np.ravel(jax.random.key_data(KEY)).tolist()
  for step, images, labels in whole:
    epoch, batch = divmod(step, N // BATCH)
    for copy, seed in enumerate(SEEDS):
      order = np.random.default_rng([*words, seed, 0, epoch]).permutation(N)
      indices = order[batch * BATCH : (batch + 1) * BATCH]
      np.testing.assert_array_equal(labels[copy], LABELS[indices])
      for row, index in enumerate(indices):
        rng = np.random.default_rng([*words, seed, 1, epoch, index])
        np.testing.assert_array_equal(images[copy, row], noisy(rng, IMAGES[index]))
  assert len(whole) == 13


@given(n=st.integers(1, 30), batch=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_an_epoch_has_each_example_once_but_for_the_rest(n, batch, seed):
  batch = min(batch, n)
  images, _ = make_arrays(n)
  per_epoch = n // batch
  chunks = start(
    seeds=(seed, seed ^ 1),
    source=data.ArrayExamples(images, np.arange(n)),
    batch_size=batch,
    steps=[2 * per_epoch] * 2,
    chunk_steps=4,
    transform=None,
    threads=0,
  )
  seen = np.stack([labels for *_, labels in by_step(chunks)])
  for epoch in seen.reshape(2, per_epoch, 2, batch).swapaxes(1, 2).reshape(4, -1):
    assert len(set(epoch)) == per_epoch * batch


def test_copies_epochs_and_phases_differ(whole):
  labels = np.stack([labels for *_, labels in whole])
  epochs = [labels[:5, 0], labels[5:10, 0], labels[:5, 1]]
  other = np.stack([labels for *_, labels in by_step(start(jax.random.key(8)))])
  epochs.append(other[:5, 0])
  assert len({epoch.tobytes() for epoch in epochs}) == 4


def test_a_copy_alone_sees_what_it_sees_among_others(whole):
  for copy, seed in enumerate(SEEDS):
    alone = by_step(start(seeds=[seed]))
    assert_same(alone, [(s, i[copy : copy + 1], y[copy : copy + 1]) for s, i, y in whole])


@pytest.mark.parametrize("chunk_steps", [1, 2, 5, 100])
@pytest.mark.parametrize("threads", [0, 5])
def test_chunks_and_threads_do_not_matter(whole, chunk_steps, threads):
  chunks = list(start(chunk_steps=chunk_steps, threads=threads))
  assert_same(by_step(chunks), whole)
  for chunk in chunks:
    assert chunk.images.shape == (3, chunk_steps, BATCH, 6, 6, 3)
    assert chunk.labels.shape == (3, chunk_steps, BATCH)
    assert (chunk.images.dtype, chunk.labels.dtype) == (np.uint8, np.int32)
    assert chunk.step // 5 == (chunk.step + chunk.taken - 1) // 5, "one epoch"
    assert not chunk.images[:, chunk.taken :].any()


def test_copies_of_different_lengths(whole):
  got = by_step(start(steps=[2, 7, 0]))
  assert len(got) == 7
  for (step, images, labels), (_, *want) in zip(got, whole, strict=False):
    for copy, steps in enumerate([2, 7, 0]):
      taken = step < steps
      np.testing.assert_array_equal(images[copy], want[0][copy] * taken)
      np.testing.assert_array_equal(labels[copy], want[1][copy] * taken)


def test_only_the_chosen_examples():
  training, validation = data.train_validation_split(N)
  source = data.ArrayExamples(IMAGES, np.arange(N))
  chunks = start(source=source, indices=training, steps=[40], seeds=[1])
  seen = {int(y) for *_, labels in by_step(chunks) for y in labels.ravel()}
  assert seen == set(training)
  assert not seen & set(validation)


# Resuming


@given(breaks=st.lists(st.integers(0, 13), max_size=3), chunk=st.integers(1, 6))
def test_resumed_anywhere_it_goes_on_as_if_uninterrupted(whole, breaks, chunk):
  got, state = [], None
  for stop in [*sorted(breaks), 13]:
    chunks = start(chunk_steps=chunk)
    if state is not None:
      chunks.set_state(json.loads(json.dumps(state)))
    done = chunks.get_state()["step"]
    while done < stop:
      batches = next(chunks)
      done += batches.taken
      got += by_step([batches])
      assert chunks.get_state()["step"] == done
    state = chunks.get_state()
    chunks.close()
  assert_same(got, whole)


def test_it_goes_back(whole):
  chunks = start()
  state = chunks.get_state()
  next(chunks)
  chunks.set_state({**state, "step": 9})
  next(chunks)
  chunks.set_state(state)
  assert_same(by_step(chunks), whole)


def test_the_state_fits_any_placement_of_the_same_batches():
  state = start().get_state()
  arrays = make_arrays()
  transform = functools.partial(data.random_resized_crop, size=6)
  for options in (
    {"source": data.ArrayExamples(*arrays), "copies": slice(1, 2), "threads": 0},
    {"seeds": [*SEEDS, 9], "steps": [13, 13, 13, 0]},  # filled up
  ):
    start(**options).set_state(state)
  again = [start(transform=transform).get_state() for _ in range(2)]
  assert again[0] == again[1]
  assert " at 0x" not in str(again)


def test_a_strange_state_is_refused(rejects):
  chunks = start()
  state = chunks.get_state()
  arrays = data.ArrayExamples(255 - IMAGES, LABELS)
  for options in (
    {"key": jax.random.key(8)},
    {"seeds": (5, 0, 1)},
    {"batch_size": 5},
    {"source": arrays},
    {"indices": np.arange(1, N)},
    {"transform": None},
  ):
    with rejects("give the state of a stream of the same data"):
      start(**options).set_state(state)
  with rejects("give what get_state gave"):
    chunks.set_state({"step": 3})
  with rejects("is 14 of a stream of 13 steps"):
    chunks.set_state({**state, "step": 14})
  with rejects("give an integer"):
    chunks.set_state({**state, "step": 1.5})


# Processes and devices


@pytest.mark.parametrize("copies", [[slice(3)], [slice(1), slice(1, 3)]])
@pytest.mark.parametrize("parts", [[slice(4)], [slice(0, 2), slice(2, 4)]])
def test_parts_of_processes_make_up_the_whole(whole, copies, parts):
  rows = [
    [by_step(start(copies=held, batch_part=part)) for part in parts] for held in copies
  ]
  for at, (step, *want) in enumerate(whole):
    for field, expected in enumerate(want, 1):
      got = np.concatenate(
        [np.concatenate([part[at][field] for part in row], 1) for row in rows]
      )
      np.testing.assert_array_equal(got, expected)
    assert all(part[at][0] == step for row in rows for part in row)


@pytest.mark.parametrize(("along", "across"), [(2, 4), (4, 2), (8, 1)])
def test_on_a_mesh(along, across):
  seeds = range(8)
  mesh = jaxsms.make_mesh(along, across)
  got, want = list(start(seeds=seeds, mesh=mesh)), list(start(seeds=seeds))
  for chunk in got:
    for array in (chunk.images, chunk.labels):
      assert array.sharding.spec == PartitionSpec("ingredient", None, "data")
      assert array.addressable_shards[0].data.shape[:3] == (8 // along, 3, BATCH // across)
  assert_same(by_step(got), by_step(want))


def test_the_block_of_a_process():
  def sharding(*parts):
    index_map = dict(enumerate(parts))
    return types.SimpleNamespace(addressable_devices_indices_map=lambda shape: index_map)

  everything = slice(None)
  a, b, c = slice(0, 2), slice(2, 4), slice(4, 6)
  block = placement.process_block
  assert block(None, (6, 4)) == (everything, everything)
  assert block(sharding((a, everything), (b, everything)), (6, 4)) == (
    slice(0, 4),
    slice(0, 4),
  )
  assert block(sharding((b, b), (b, b), (c, b)), (6, 4)) == (slice(2, 6), slice(2, 4))
  for parts in ([(a, everything), (c, everything)], [(a, a), (b, b)]):
    with pytest.raises(ValueError, match="scattered parts"):
      block(sharding(*parts), (6, 4))


TWO_PROCESSES = """
import sys, jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jaxsms
from jax.experimental.multihost_utils import process_allgather
from jaxsms import data

images, labels, read = np.arange(240, dtype=np.uint8).reshape(20, 2, 2, 3), range(20), []

class Counted(data.ArrayExamples):
  def __getitem__(self, index):
    read.append(index)
    return super().__getitem__(index)

def batches(mesh):
  read.clear()
  return list(data.stream(Counted(images, labels), jax.random.key(0), [3, 4],
    batch_size=4, steps=[5, 5], chunk_steps=5, mesh=mesh))

want = batches(jaxsms.make_mesh(1, 1, devices=jax.local_devices()))
assert len(read) == 1 + 40
for shape in ((2, 2), (1, 4)):
  mesh = jaxsms.make_mesh(*shape)
  got = batches(mesh)
  assert len(read) == 1 + 20, len(read)  # the first example shows the shape
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(process_allgather(a.images, tiled=True), b.images)
    np.testing.assert_array_equal(process_allgather(a.labels, tiled=True), b.labels)
  got = list(data.evaluation_batches(Counted(images, labels), batch_size=8, mesh=mesh))
  x, y, valid = (
    np.concatenate([process_allgather(part, tiled=True) for part in parts])
    for parts in zip(*got)
  )
  np.testing.assert_array_equal(valid, np.arange(24) < 20)
  np.testing.assert_array_equal(x[:20], images)
  np.testing.assert_array_equal(y[:20], labels)
print("equal")
"""


@pytest.mark.slow
def test_two_real_processes():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", TWO_PROCESSES, address, str(i)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=1800)[0] for process in processes]
  assert all(process.returncode == 0 for process in processes), outputs
  assert all(output.strip().endswith("equal") for output in outputs)


# Bad input


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"batch_size": 24}, "batch_size is 24 for 23 examples"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"chunk_steps": 0}, "chunk_steps is 0"),
    ({"chunk_steps": 2.5}, "chunk_steps is 2.5: give an integer"),
    ({"threads": -1}, "threads is -1"),
    ({"steps": [13]}, "steps has 1 entries for 3 seeds"),
    ({"steps": [1, 2, -1]}, "steps runs from -1 to 2"),
    ({"seeds": [], "steps": [1]}, "seeds is float64 of shape (0,)"),
    ({"seeds": [2**32], "steps": [1]}, "give integers from 0 to 4294967295"),
    ({"indices": [0, 1, 2, 23]}, "indices runs from 0 to 23"),
    ({"indices": [[0, 1, 2, 3]]}, "indices is int64 of shape (1, 4)"),
    ({"copies": slice(3, 4)}, "is to read 0 of 3 copies"),
    ({"batch_part": slice(0)}, "0 of 4 examples in a batch"),
    ({"transform": lambda rng, image: image / 255}, "is float64 of shape (5, 6, 3)"),
  ],
)
def test_bad_arguments(options, words, rejects):
  with rejects(words):
    start(**options)


def test_a_mesh_that_does_not_divide(rejects):
  with rejects("does not divide over the 2 devices along 'ingredient'"):
    start(mesh=jaxsms.make_mesh(2, 4))
  with rejects("does not divide over the 4 devices along 'data'"):
    data.evaluation_batches(SOURCE, batch_size=6, mesh=jaxsms.make_mesh(2, 4))


def test_bad_arrays(rejects):
  with rejects("give uint8 [n, height, width, channels] and one label each"):
    data.ArrayExamples(IMAGES / 255, LABELS)
  with rejects("labels of shape (22,)"):
    data.ArrayExamples(IMAGES, LABELS[1:])
  with rejects("holds no examples"):
    start(source=data.ArrayExamples(IMAGES[:0], LABELS[:0]))


class OneBad(data.ArrayExamples):
  def __getitem__(self, index):
    image, label = super().__getitem__(index)
    return (image[:1, :1] if index == 17 else image), label


def test_an_error_of_a_thread_reaches_the_caller_and_ends_the_stream(rejects):
  chunks = start(source=OneBad(IMAGES, LABELS), transform=None)
  with rejects("images of shape (1, 1, 3) and of shape (5, 6, 3)"):
    list(chunks)
  with rejects("the stream is closed"):
    next(chunks)


def test_a_closed_stream(rejects):
  chunks = start()
  next(chunks)
  for _ in range(2):
    chunks.close()
    with rejects("the stream is closed"):
      next(chunks)
  ended = start()
  list(ended)
  assert list(ended) == []


def test_without_grain(monkeypatch, rejects):
  monkeypatch.setitem(sys.modules, "grain", None)
  for work in (start, lambda: data.evaluation_batches(SOURCE, batch_size=2)):
    with rejects("run `pip install 'jaxsms[data]'`", ImportError):
      work()


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 4, 23, 30])
def test_evaluation_sees_all_in_order(batch_size):
  batches = list(data.evaluation_batches(SOURCE, batch_size=batch_size, threads=2))
  assert {len(b.images) for b in batches} == {batch_size}
  images, labels, valid = (np.concatenate(x) for x in zip(*batches, strict=True))
  assert valid.tolist() == [True] * N + [False] * (len(valid) - N)
  np.testing.assert_array_equal(images[valid], IMAGES)
  np.testing.assert_array_equal(labels[valid], LABELS)
  assert not images[~valid].any()


def test_evaluation_on_a_mesh_of_a_part():
  indices = [4, 2, 22, 9, 9]
  mesh = jaxsms.make_mesh(4, 2)
  batches = data.evaluation_batches(
    SOURCE, lambda image: image[:2], batch_size=4, indices=indices, mesh=mesh
  )
  images, labels, valid = (np.concatenate(x) for x in zip(*batches, strict=True))
  assert valid.tolist() == [True] * 5 + [False] * 3
  np.testing.assert_array_equal(images[:5], IMAGES[indices, :2])
  np.testing.assert_array_equal(labels[:5], LABELS[indices])


# TFDS


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
  """Images of many sizes, each with its own label, and the folder they are in."""
  data_dir = tmp_path_factory.mktemp("tfds")
  sizes = np.random.default_rng(3).integers(17, 60, (12, 2))
  pairs = [(random_image(w, h, seed=i), i % 5) for i, (w, h) in enumerate(sizes)]
  prepare(data_dir, {"train": pairs, "validation": pairs[:3]})
  return str(data_dir), pairs


def test_tfds_images_of_any_size_arrive_cropped(varied):
  data_dir, pairs = varied
  source = data.TfdsExamples("tiny", "train", data_dir)
  assert (len(source), source.num_classes) == (12, 5)
  decoded = [
    (np.asarray(image), label) for image, label in map(source.__getitem__, range(12))
  ]
  as_set = [
    sorted((image.shape, image.tobytes(), label) for image, label in x)
    for x in (decoded, pairs)
  ]
  assert as_set[0] == as_set[1]  # TFDS shuffles when it prepares

  transform = functools.partial(data.random_resized_crop, size=16)
  chunks = start(source=source, transform=transform, steps=[6, 6], seeds=[1, 2])
  words = np.ravel(jax.random.key_data(KEY)).tolist()
  for step, images, labels in by_step(chunks):
    epoch, batch = divmod(step, 3)
    for copy, seed in enumerate((1, 2)):
      order = np.random.default_rng([*words, seed, 0, epoch]).permutation(12)
      for row, index in enumerate(order[batch * BATCH : (batch + 1) * BATCH]):
        image, label = decoded[index]
        rng = np.random.default_rng([*words, seed, 1, epoch, index])
        left, top, w, h = torchvision_box(
          rng, *image.shape[1::-1], (0.08, 1), (3 / 4, 4 / 3)
        )
        part = Image.fromarray(image[top : top + h, left : left + w])
        want = np.asarray(part.resize((16, 16), Image.BILINEAR))
        want = want[:, ::-1] if rng.random() < 0.5 else want
        np.testing.assert_array_equal(images[copy, row], want)
        assert labels[copy, row] == label

  centre = functools.partial(data.resize_centre_crop, size=16, resize=20)
  batches = list(data.evaluation_batches(source, centre, batch_size=8))
  images = np.concatenate([b.images for b in batches])
  np.testing.assert_array_equal(images[:12], [centre(image) for image, _ in decoded])


def test_tfds_state_is_the_same_wherever_the_data_are_opened(varied):
  states = [
    start(
      source=data.TfdsExamples("tiny", "train", varied[0]),
      transform=functools.partial(data.random_resized_crop, size=16),
    ).get_state()
    for _ in range(2)
  ]
  assert states[0] == states[1]
  assert " at 0x" not in str(states)
  assert "tiny/1.0.0" in str(states)


def test_images_of_several_sizes_need_a_transform(varied, rejects):
  source = data.TfdsExamples("tiny", "train", varied[0])
  chunks = start(source=source, transform=None)
  with rejects("give a transform that makes them alike"):
    list(chunks)


def test_grey_tfds_images_keep_their_channel(tmp_path):
  pairs = [(random_image(8, 8, seed=i)[..., 0], 0) for i in range(4)]
  prepare(tmp_path, {"train": pairs}, shape=(None, None, 1))
  source = data.TfdsExamples("tiny", "train", str(tmp_path))
  assert next(start(source=source, transform=None)).images.shape[3:] == (8, 8, 1)
  transform = functools.partial(data.random_resized_crop, size=6)
  assert next(start(source=source, transform=transform)).images.shape[3:] == (6, 6, 1)


def test_unprepared_imagenet_says_how_to_prepare_it(tmp_path, rejects):
  with rejects('tfds.builder("imagenet2012"'):
    data.TfdsExamples("imagenet2012", "train", str(tmp_path))


def test_bad_tfds(varied, tmp_path, rejects):
  with rejects("unknown split of tiny 'test'"):
    data.TfdsExamples("tiny", "test", varied[0])
  pairs = [(random_image(8, 8), -1)] * 4
  folder = prepare(tmp_path, {"train": pairs})
  with rejects("has the label -1 in train"):
    start(source=data.TfdsExamples("tiny", "train", str(tmp_path)))
  for file in folder.glob("*array_record*"):
    file.write_bytes(file.read_bytes()[:100])
  with rejects("cannot be read"):
    start(source=data.TfdsExamples("tiny", "train", str(tmp_path)))


def encoded(width, height):
  """A stand-in for a data set: one smooth image as JPEG bytes, decoded again and again."""
  small = Image.fromarray(random_image(width // 8, height // 8))
  file = io.BytesIO()
  small.resize((width, height), Image.BICUBIC).save(file, "jpeg", quality=90)

  class Decoded(data.ArrayExamples):
    def __getitem__(self, index):
      image = Image.open(io.BytesIO(file.getvalue()))
      image.load()
      return image, 0

  return Decoded(np.zeros((20_000, 1, 1, 3), np.uint8), np.zeros(20_000, int))


def print_speed(name, chunks, images_each):
  jax.block_until_ready(next(chunks))
  wall, cpu, n = time.perf_counter(), time.process_time(), 0
  for images in chunks:
    jax.block_until_ready(images)
    n += images_each
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  print(f"{name}: {n / wall:.0f} images/s, {cpu / n * 1e6:.1f} us of CPU each")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 1, 16])
@pytest.mark.parametrize("kind", ["arrays", "jpeg 32x32", "jpeg 500x375, crop 224"])
def test_images_per_second(kind, threads):
  m, batch, chunk, chunks, transform = 2, 64, 4, 12, None
  source = data.ArrayExamples(np.zeros((20_000, 32, 32, 3), np.uint8), [0] * 20_000)
  if "32x32" in kind:
    source = encoded(32, 32)
  if "224" in kind:
    source, transform, chunks = encoded(500, 375), data.random_resized_crop, 4
  batches = start(
    source=source, seeds=range(m), batch_size=batch, steps=[chunk * chunks] * m,
    chunk_steps=chunk, transform=transform, threads=threads,
  )  # fmt: skip
  name = f"{kind}, {threads} threads"
  print_speed(name, (batch.images for batch in batches), m * batch * chunk)


@pytest.mark.slow
def test_images_per_second_resident():
  n, m, taken = 45_000, 2, 50 * 128
  images = jax.device_put(np.zeros((n, 32, 32, 3), np.uint8))
  take = jax.jit(jax.vmap(lambda key: images[jax.random.permutation(key, n)[:taken]]))
  chunks = (take(jax.random.split(jax.random.key(i), m)) for i in range(6))
  print_speed("resident 32x32", chunks, m * taken)
