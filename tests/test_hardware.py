"""Flags that say where and how fast: what they mean, and what they refuse."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments.config.fields import define_flags
from experiments.config.run_config import Config, read_config
from experiments.setup import hardware, task, tuning
from jaxsms import convolution, data
from jaxsms.training.memory import OutOfMemory


def read(*given, model="resnet8", batch_size=8):
  values = flags.FlagValues()
  define_flags(Config, values)
  more = [f"--model={model}", f"--batch_size={batch_size}", "--ingredients=4"]
  values(["test", *more, *given])
  return read_config(values)


@pytest.mark.parametrize(
  "given, words",
  [
    (["--mesh=4"], "--mesh is 4: give devices along copies x devices along the batch"),
    (["--mesh=0x4"], "--mesh is 0x4"),
    (["--precision=float16"], "unknown precision 'float16'"),
    (["--convolution=winograd"], "unknown convolution 'winograd'"),
    (["--micro_batches=0"], "--micro_batches is 0"),
    (["--ingredients_at_once=0"], "--ingredients_at_once is 0"),
    (["--split_params"], "--split_params needs a mesh with a data axis"),
    (["--processes=2"], "go with --coordinator"),
    (["--coordinator=h:1", "--processes=2"], "needs --processes and --process"),
    (["--coordinator=h:1", "--processes=2", "--process=2"], "from 0 to below it"),
    (
      ["--coordinator=h:1", "--processes=5", "--process=0"],
      "5 processes for 4 copies x 1 shards of the batch: start at most 4",
    ),
    (["--coordinator=h:1", "--processes=9", "--process=0", "--mesh=4x2"], "at most 8"),
  ],
)
def test_flags_that_do_not_fit(given, words, rejects):
  with rejects(words):
    read(*given)


@pytest.mark.parametrize("given", ["--convolution=loop", "--remat"])
def test_what_a_network_without_convolutions_makes_no_use_of(given, rejects):
  with rejects("the mlp makes no use of it"):
    read(given, model="mlp")


def test_meshes(rejects):
  assert hardware.mesh_of(read("--mesh=none"))(3) is None
  auto = hardware.mesh_of(read())
  assert dict(auto(8).shape) == {"ingredient": 8, "data": 1}
  assert auto(8) is auto(8)
  assert dict(auto(1).shape) == {"ingredient": 1, "data": 8}
  fixed = hardware.mesh_of(read("--mesh=2x2"))
  assert dict(fixed(1).shape) == dict(fixed(5).shape) == {"ingredient": 2, "data": 2}
  with rejects("a mesh of 3 x 3 devices does not fit the number of devices, 8"):
    hardware.mesh_of(read("--mesh=3x3", batch_size=9))
  with rejects("a batch of 9 does not split over 2 devices"):
    hardware.mesh_of(read("--mesh=4x2", batch_size=9))
  with rejects("a batch of 8 in 8 micro-batches does not split over 2 devices"):
    hardware.mesh_of(read("--mesh=4x2", "--micro_batches=8"))


def test_rules_of_a_cpu():
  assert hardware.copies_at_once(read(), 10) == 1
  assert hardware.copies_at_once(read(model="mlp"), 10**5) is None
  assert hardware.copies_at_once(read(model="mlp"), 10**5 + 1) == 1
  assert hardware.copies_at_once(read("--ingredients_at_once=3"), 10) == 3
  sharing_nothing = hardware.mesh_of(read(model="mlp"))
  assert dict(sharing_nothing(1).shape) == {"ingredient": 8, "data": 1}
  assert not hardware.bfloat16("auto")
  assert hardware.bfloat16("bfloat16")


def test_the_library_names_arguments_and_the_jobs_their_flags():
  error = OutOfMemory(copies=3, fit=2)
  message = "the device is out of memory with 3 copies: about 2 of them fit at once: give "
  assert str(error) == message + "at_once=2"
  assert hardware.in_flags(error) == message + "--ingredients_at_once=2"
  assert hardware.in_flags(OSError(28, "full")) == "[Errno 28] full"


@pytest.mark.parametrize(
  "platform, capability, wanted",
  [("gpu", "7.5", False), ("gpu", "8.0", True), ("gpu", "9.0", True), ("tpu", None, True)],
)
def test_bfloat16_where_the_hardware_gains_from_it(
  platform, capability, wanted, monkeypatch
):
  class Device:
    pass

  device = Device()
  device.platform = platform
  device.compute_capability = capability
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert hardware.bfloat16("auto") == wanted


def test_options_of_a_network():
  assert hardware.network_options(read(model="mlp")) == {}
  options = hardware.network_options(read("--precision=bfloat16", "--remat"))
  assert options["dtype"] == jnp.bfloat16 and options["remat"]
  assert options["convolution"] is convolution.conv_general_dilated
  grouped = hardware.network_options(read("--convolution=grouped"))
  assert grouped["convolution"].keywords == {"lowering": "grouped"}


def test_measuring_keeps_the_fastest(monkeypatch):
  seconds = {"loop": 3.0, "grouped": 1.0, "unrolled": 2.0, "native": 5.0}
  clock = itertools.count()
  now = [0.0]

  def runner(config, dataset):
    while True:
      now[0] += seconds[config.convolution] + 0.01 * (next(clock) % 3)
      yield

  monkeypatch.setattr(tuning, "_runner", runner)
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  assert (
    tuning.with_fastest_lowering(read("--convolution=measure"), None).convolution
    == "grouped"
  )
  assert (
    tuning.with_fastest_lowering(read("--convolution=loop"), None).convolution == "loop"
  )


@pytest.mark.slow
def test_what_is_measured_is_training(monkeypatch):
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (40, 4, 4, 1), np.uint8), np.arange(40) % 2
  dataset = data.Dataset(
    "tiny", images, labels, images[:4], labels[:4], 2, (0.5,), (0.5,), "none"
  )
  small = ("--hidden=3", "--ingredients=2", "--goal_sparsity=0.5", "--augmentation=none")
  config = read(*small, model="mlp", batch_size=12)
  seen = []
  real = tuning.train_chunks

  def watched(programs, *arguments):
    for state, chunk in real(programs, *arguments):
      seen.append((chunk.copies, chunk.taken))
      yield state, chunk

  monkeypatch.setattr(tuning, "train_chunks", watched)
  runner = tuning._runner(config, dataset)
  for _ in range(tuning.ROUNDS + 2):
    next(runner)
  assert seen == [(2, 3)] * (tuning.ROUNDS + 2)
  assert task.chunk_steps(config) == 50
