"""The benchmark: its figures, what it refuses, its program."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from experiments import bench
from experiments.benchmarks import bench_jax, bench_settings
from experiments.config.fields import define_flags
from experiments.costs.timing import Contender, alternate, calls_for, ratio, spread
from jaxsms import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parent.parent
HAS_TORCH = importlib.util.find_spec("torch") is not None


def parse(*given):
  values = flags.FlagValues()
  define_flags(bench_settings.Config, values)
  return values(["bench", *given]), values


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The smallest benchmark, by its command."""
  path = tmp_path_factory.mktemp("bench") / "figures.json"
  command = [sys.executable, "-m", "experiments.bench", "--copies=2,1", "--rounds=2"]
  done = subprocess.run(
    [*command, "--steps=2", f"--json={path}"], cwd=ROOT, capture_output=True, text=True,
    env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return json.loads(path.read_text()), done.stdout


@pytest.mark.slow
def test_figures_agree_with_one_another(finished):
  results, _ = finished
  work, rows = results["work"], results["copies"]
  assert work["parameters"] == 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
  assert work["multiply_adds"] == 64 * 256 + 256 * 256 + 256 * 10
  assert work["steps_per_epoch"] == 1077 // 20
  assert [row["copies"] for row in rows] == [1, 2]
  one = rows[0]["step_seconds"]["rounds"]
  for row in rows:
    m, step = row["copies"], row["step_seconds"]
    assert len(step["rounds"]) == 2
    assert 0 < step["min"] <= step["median"] <= step["max"]
    assert row["epoch_seconds"]["median"] == pytest.approx(53 * step["median"])
    assert row["images_per_second"] == pytest.approx(20 * m / step["median"])
    assert row["flops_per_step"] == 6 * work["multiply_adds"] * 20 * m
    assert row["utilisation"] * work["peak_flops"] == pytest.approx(
      row["flops_per_step"] / step["median"]
    )
    shares = [a / b / m for a, b in zip(step["rounds"], one, strict=True)]
    assert row["together_over_one_after_another"]["rounds"] == pytest.approx(shares)
    # Parameters and momentum of m copies, and the images: all must be there at once.
    assert row["peak_bytes"] > 8 * m * work["parameters"] + 1077 * 64
    assert row["trace_seconds"] > 0
    assert row["compile_seconds"] > 0
    assert row["steps_per_round"] == row["chunk_steps"] == 2
    assert HAS_TORCH or not row["torch"]


@pytest.mark.torch
def test_one_copy_in_pytorch_takes_m_turns(finished):
  rows = finished[0]["copies"]
  assert [set(row["torch"]) for row in rows] == [{"eager"}, {"eager", "ensemble"}]
  assert "vmap, contiguous" in " ".join(finished[1].split())
  one, two = (row["torch"]["eager"]["step_seconds"]["rounds"] for row in rows)
  assert two == pytest.approx([2 * x for x in one])
  for row in rows:
    for peer in row["torch"].values():
      steps = zip(
        peer["step_seconds"]["rounds"], row["step_seconds"]["rounds"], strict=True
      )
      assert peer["speed_of_jaxsms"]["rounds"] == pytest.approx([a / b for a, b in steps])


@pytest.mark.slow
def test_what_is_printed(finished):
  text = " ".join(finished[1].split())
  for words in ("mlp (85,002 parameters", "m copies at once", "utilisation", "measured"):
    assert words in text
  assert HAS_TORCH or "pip install -e '.[bench]'" in text
  assert max(map(len, finished[1].splitlines())) <= 80


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (["--dataset=cifar"], "did you mean cifar10"),
    (["--model=resnet9"], "did you mean resnet"),
    (["--precision=float16"], "did you mean"),
    (["--augmentation=crop"], "known are none"),
    (["--torch=all"], "known are none, sequential"),
    (["--copies=1,0"], "--copies is '1,0'"),
    (["--copies=1,two"], "such as 1,2,4,8"),
    (["--copies="], "--copies is ''"),
    (["--image=8x8"], "such as 64x64x3"),
    (["--mesh=2"], "such as 4x2"),
    (["--mesh=9x9"], "does not fit"),
    (["--mesh=1x8"], "does not split over 8 devices"),
    (["--model=resnet8", "--hidden=3"], "--hidden belongs to the mlp"),
    (["--batch_size=0"], "--batch_size is 0"),
    (["--batch_size=9", "--examples=8"], "of 8 examples"),
    (["--rounds=0"], "--rounds is 0"),
    (["--steps=0"], "--steps is 0"),
    (["--ingredients_at_once=0"], "--ingredients_at_once is 0"),
    (["--cpu_devices=-1"], "--cpu_devices is -1"),
    (["--peak_tflops=nan"], "--peak_tflops is nan"),
    (["--json=/nowhere/at/all.json"], "cannot be written"),
    (["--model=vgg16"], "at least 32x32"),
    (["extra"], "unexpected argument 'extra'"),
    pytest.param(
      ["--model=vit_tiny", "--torch=both", "--examples=40"],
      "--model=vit_tiny is not there in PyTorch",
      marks=pytest.mark.torch,
    ),
  ],
)
def test_bad_flags_end_with_one_sentence(given, words, capsys):
  with pytest.raises(SystemExit) as stop:
    bench.main(*parse(*given))
  assert stop.value.code == 2
  captured = capsys.readouterr()
  message = captured.err.strip()
  assert words in message
  assert message.startswith("error: ")
  assert "\n" not in message
  assert not captured.out


def test_flags_of_cifar10_and_overrides():
  config = bench_settings.read_config(parse("--dataset=cifar10")[1])
  assert (config.model, config.batch_size, config.examples) == (
    "resnet20",
    128,
    50_000,
  )
  assert config.image == (32, 32, 3)
  given = ["--dataset=cifar10", "--image=4x5x6", "--copies=4,1,4"]
  config = bench_settings.read_config(parse(*given, "--model=mlp", "--hidden=3")[1])
  assert config.image == (4, 5, 6)
  assert config.copies == (1, 4)
  assert (config.model, config.hidden) == ("mlp", (3,))


def test_without_pytorch(monkeypatch, rejects):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  read = bench_settings.read_config
  kinds, note = bench.torch_kinds(read(parse()[1]))
  assert kinds == ()
  assert "pip install -e '.[bench]'" in note
  assert bench.torch_kinds(read(parse("--torch=none")[1])) == ((), None)
  with rejects("PyTorch is not installed", ImportError):
    bench.torch_kinds(read(parse("--torch=ensemble")[1]))


def test_peaks_of_known_devices():
  peaks = {
    ("NVIDIA H200", "bfloat16"): 989e12,
    ("NVIDIA H200", "float32"): 494e12,
    ("NVIDIA H100 PCIe", "bfloat16"): 756e12,
    ("NVIDIA H100 80GB HBM3", "bfloat16"): 989e12,
    ("NVIDIA A100-SXM4-80GB", "float32"): 156e12,
    ("TPU v5 lite", "bfloat16"): 197e12,
    ("TPU v5p", "bfloat16"): 459e12,
    ("TPU v6 lite", "bfloat16"): 918e12,
  }
  for (kind, precision), peak in peaks.items():
    assert bench_jax.sheet_flops(kind, precision)[0] == peak
  # An L40S is no L4; a T4 has no bfloat16.
  assert bench_jax.sheet_flops("NVIDIA L40S", "float32") is None
  assert bench_jax.sheet_flops("Tesla T4", "bfloat16") is None
  assert bench_jax.peak_flops("float32", 2.5) == (2.5e12, "--peak_tflops")


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9))
def test_spread_holds_its_rounds(rounds):
  value = spread(rounds)
  assert value.min <= value.median <= value.max
  assert value.median == pytest.approx(np.median(rounds))
  assert ratio(value, value, 3.0).rounds == pytest.approx([3.0] * len(rounds))
  assert calls_for(2.0, rounds[0]) * rounds[0] >= 2.0 * (1 - 1e-12)


def test_rounds_alternate():
  seen = []
  contenders = {n: Contender(lambda n=n: seen.append(n), 2, {}) for n in "abc"}
  times = alternate(contenders, 3)
  assert "".join(seen) == "abccbaabc"
  assert all(len(times[name].rounds) == 3 for name in "abc")


def test_chunks_are_short_where_steps_are_long():
  assert bench_jax.most_chunk_steps(10**9, 1e12, 7) == 7
  assert bench_jax.most_chunk_steps(10**9, 1e12, 700) == 50
  assert bench_jax.most_chunk_steps(10**6, 1e12, None) == 50
  assert bench_jax.most_chunk_steps(10**15, 1e12, None) == 10
  assert bench_jax.most_chunk_steps(10**15, None, None) == 50


@pytest.mark.slow
def test_the_program_is_compiled_once_and_trains():
  module = models.create("mlp", 10, hidden=(4,), dropout=0.0)
  task = bench_jax.make_task(
    module, (3, 3, 1), examples=10, batch_size=2, augmentation="none"
  )
  assert task.flops(3) == 6 * (9 * 4 + 4 * 10) * 2 * 3
  training = bench_jax.Training(task, 2, 50)
  assert training.chunk_steps == 5
  assert training.steps_per_chunk == 5
  training.run(1)
  program = training.train.compiled
  training.run(2)
  training.stop()
  training.run(1)
  assert training.train.compiled is program
  assert training.memory()[0] > 2 * 8 * (9 * 4 + 4 * 10)
  assert bench_jax.Training(task, 2, 3).steps_per_chunk == 2.5  # of 3, the last is filled
  assert jnp.isfinite(bench_jax.matmul_flops(8, 1))
