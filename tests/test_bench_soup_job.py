"""What the soup job takes: that it is measured, and what is refused."""

import json
import os
import sys

import numpy as np
import pytest
from main_job import flag_values

from experiments.benchmarks import bench_soup_job
from experiments.config.fields import read_fields
from jaxsms.disk.safetensors import read_safetensors


def parse(*given):
  return flag_values(bench_soup_job.Config, *given)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_measurement(tmp_path, monkeypatch, dtype):
  given = ("--megabytes=1", "--rounds=1", f"--dtype={dtype}", f"--folder={tmp_path}")
  results = {}
  launch = bench_soup_job.launch

  def keep(command):
    found = launch(command)
    for path in tmp_path.glob("*/out/*.safetensors"):
      results.setdefault(command[-1], {}).update(read_safetensors(path))
    return found

  monkeypatch.setattr(bench_soup_job, "launch", keep)
  costs = bench_soup_job.measure(read_fields(bench_soup_job.Config, parse(*given)))
  assert list(costs) == [
    "cat of all and cp of one", "imports alone", "uniform", "pruned to 90 %",
  ]  # fmt: skip
  copied, uniform, pruned = results.values()
  assert len(copied) == 16
  for name, array in uniform.items():
    assert array.dtype == dtype and array.nbytes == 15 * 1024 * array.itemsize
    # The mean of five independent standard normal numbers.
    assert np.std(array.astype(float)) == pytest.approx(5**-0.5, rel=0.05), name
  zeros = sum((x == 0).sum() for x in pruned.values())
  assert zeros == pytest.approx(0.9 * 16 * 15 * 1024, abs=1)
  for wall, cpu, memory in costs.values():
    assert wall.median > 0 and cpu.median >= 0 and memory.median > 0
  assert costs["uniform"][2].median > costs["imports alone"][2].median / 2
  assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_memory_is_that_of_the_process_alone():
  """Not that of the one which measures it, nor of one that it has measured before."""
  held = np.ones(2**26, np.uint8)  # 64 MiB of this process
  large = "import time; x = b'1' * 2**28"
  peaks = [
    bench_soup_job.launch([sys.executable, "-c", code])[2] for code in (large, "pass")
  ]
  assert peaks[0] > 256 > 64 > peaks[1]
  assert held.all()


def test_models_are_in_shards(tmp_path):
  config = read_fields(bench_soup_job.Config, parse("--megabytes=1"))
  for seed in range(2):
    bench_soup_job.write_model(tmp_path / str(seed), seed, config)
  index = json.loads((tmp_path / "0" / "model.safetensors.index.json").read_text())
  files = index["weight_map"]
  assert len(files) == 16 and len(set(files.values())) == 4
  for name, file in files.items():
    a, b = (read_safetensors(tmp_path / seed / file)[name] for seed in "01")
    assert a.shape == b.shape == (15, 1024) and (a != b).any()


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--megabytes=0", "--megabytes is 0"),
    ("--rounds=0", "--rounds is 0"),
    ("--dtype=float16", "unknown dtype 'float16'"),
    ("--folder=/no/such", "--folder is /no/such: it cannot be written, choose another"),
  ],
)
def test_bad_flags(flag, words, rejects):
  with rejects(words):
    read_fields(bench_soup_job.Config, parse(flag))


def test_models_larger_than_the_disk_are_refused(monkeypatch, capsys):
  monkeypatch.setattr(bench_soup_job.flags, "FLAGS", parse("--megabytes=1000000000"))
  with pytest.raises(SystemExit) as stop:
    bench_soup_job.main(["bench_soup_job"])
  assert stop.value.code == 2
  message = capsys.readouterr().err
  assert message.startswith("error: --megabytes is 1000000000: that takes 6,000,000,000 MB")
  assert message.count("\n") == 1
