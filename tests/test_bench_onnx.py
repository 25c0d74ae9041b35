"""Times of ONNX files of the benchmark: what is said of them, and what is refused."""

import subprocess
import sys

import pytest
from main_job import ROOT, flag_values

from experiments.benchmarks import bench_onnx
from experiments.config.fields import read_fields


def parse(*given):
  return read_fields(bench_onnx.Config, flag_values(bench_onnx.Config, *given))


def test_what_is_said_of_times():
  def of(size, median):
    times = {"1": {"median": median, "min": median, "max": median}}
    return {"bytes": size, "milliseconds": times}

  files = {"dense": of(4000, 6.0), "cut": of(1000, 1.5)}
  said = bench_onnx.text({"runtime": "ONNX Runtime 1", "device": "x86", "files": files})
  assert said.splitlines() == [
    "ONNX Runtime 1 x86",
    "bytes 4,000 -> 1,000",
    "batch 1: 6.0 -> 1.5 ms, 4.00 times as fast",
  ]
  assert parse("--batches=2,8").batches == (2, 8)
  assert parse().batches == (1, 32)


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--model=foo", "unknown model"),
    ("--model=mlp", "unknown model 'mlp'"),
    ("--share=2", "--share is 2"),
    ("--size=0", "--size is 0"),
    ("--batches=1,x", "--batches is 1,x: give whole numbers"),
    ("--batches=0", "--batches is (0,): give numbers from 1 on"),
    ("--width=0", "--width is 0"),
  ],
)
def test_bad_flags(flag, words, rejects):
  with rejects(words):
    parse(flag)


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (["--model=vgg16", "--size=16"], "give at least 32x32"),
    (["--model=wide_resnet22_10", "--width=4"], "does not take these options"),
    (["--model=vit_tiny", "--width=5"], "5"),
  ],
)
def test_what_does_not_fit_the_network(given, words, rejects):
  with rejects(words):
    bench_onnx.measure(parse(*given))


@pytest.mark.slow
def test_its_command_refuses_in_one_sentence():
  command = [sys.executable, "-m", "experiments.benchmarks.bench_onnx", "--share=2"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.strip() == "error: --share is 2.0: give a share between 0 and 1"
