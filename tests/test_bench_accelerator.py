"""The command that takes all figures of an accelerator."""

import json
import re

import pytest

from experiments.benchmarks import bench_accelerator as bench


def test_a_command_is_run_and_its_output_kept(tmp_path):
  said = bench.run(bench.Command("help", ("json.tool", "--help"), 1.0), tmp_path, 60)
  assert re.fullmatch(r"help finished after \d+ s", said)
  text = (tmp_path / "help.txt").read_text()
  assert text.startswith("python -m json.tool --help")
  assert "usage" in text


def test_a_command_that_fails_is_named(tmp_path):
  said = bench.run(bench.Command("none", ("json.tool", "--none"), 1.0), tmp_path, 60)
  assert "ended with status 2" in said


def test_a_command_that_takes_too_long_is_ended(tmp_path):
  waits = ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)")
  said = bench.run(bench.Command("slow", waits, 1.0), tmp_path, 0.5)
  assert "was not done in its time" in said


@pytest.mark.parametrize("part", ["convolution", "bench", "sms", "tests"])
def test_shares_of_a_part_are_its_whole_time(part, tmp_path):
  commands = bench.commands(part, tmp_path, 3.0, "DIR")
  assert sum(command.share for command in commands) == pytest.approx(1)
  assert len({command.name for command in commands}) == len(commands)


def test_binaries_are_those_of_its_own_package(monkeypatch, tmp_path):
  monkeypatch.setattr(bench, "__package__", "jaxsms.experiments.benchmarks")
  parts = ("convolution", "bench", "sms")
  first = [bench.commands(part, tmp_path, 3.0, None)[0].arguments[0] for part in parts]
  names = ("benchmarks.bench_convolution", "bench", "sms")
  assert first == [f"jaxsms.experiments.{name}" for name in names]


@pytest.mark.slow
def test_convolutions_on_this_device(tmp_path):
  minutes = 0.5
  (command,) = bench.commands("convolution", tmp_path, minutes, None)
  arguments = (*command.arguments, "--layers=1x1/2/4", "--copies=2", "--precision=float32")
  assert "finished" in bench.run(command._replace(arguments=arguments), tmp_path, 600)
  rows = json.loads((tmp_path / "convolution.json").read_text())["rows"]
  assert rows
  assert all(ms > 0 for row in rows for ms in row["milliseconds"].values())
