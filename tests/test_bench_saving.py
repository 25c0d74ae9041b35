"""What saving costs: that it is measured, and what is refused."""

import pytest
from absl import flags
from main_job import flag_values

from experiments.benchmarks import bench_saving
from experiments.benchmarks.usual_networks import read_training_flags
from experiments.config import keeping_flags  # noqa: F401, whose flag it is
from experiments.costs.timing import spread

pytestmark = pytest.mark.usefixtures("quick_compilation")


def parse(*given):
  return flag_values(bench_saving.Config, *given)


@pytest.mark.slow
def test_a_measurement(monkeypatch):
  monkeypatch.setattr(bench_saving, "ROUND_SECONDS", 0.01)
  values = parse("--ingredients=2", "--rounds=2", "--mesh=none")
  config = read_training_flags(bench_saving.Config, values)
  cost = bench_saving.measure(bench_saving.make_training(config), 2, None)
  parameters = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
  # Two float32 models, the masks, and of both copies parameters and momentum.
  arrays = parameters * (2 * 4 + 1 + 2 * 2 * 4)
  assert cost.megabytes == pytest.approx(arrays / 1e6, rel=1e-3)
  assert len(cost.cpu.rounds) == len(cost.held_up.rounds) == 2
  assert cost.blocked.min > 0
  assert cost.training.min > 0


def test_shares_are_of_the_interval_and_of_all_cores(monkeypatch):
  monkeypatch.setattr(bench_saving, "cores", lambda: 4)
  config = read_training_flags(bench_saving.Config, parse("--save_minutes=2"))
  some = {name: spread([1.0]) for name in ("training", "blocked")}
  cost = bench_saving.Cost(1.0, held_up=spread([0.6, 1.2, 2.4]), cpu=spread([4.8]), **some)
  last = bench_saving.text(config, cost).splitlines()[-1]
  assert last == ("saved every 120 s: 1 [0.5, 2] % of the time, 1 [1, 1] % of the cores")


def test_the_interval_is_that_of_the_main_job():
  default = parse()["save_minutes"].default
  assert default == flags.FLAGS["save_minutes"].default


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--model=resnet9", "unknown model"),
    ("--ingredients=0", "--ingredients is 0"),
    ("--rounds=0", "--rounds is 0"),
    ("--batch_size=0", "--batch_size is 0"),
    ("--save_minutes=0", "--save_minutes is 0"),
    ("--folder=/no/such", "/no/such cannot be written"),
  ],
)
def test_bad_flags(flag, words, rejects):
  with rejects(words):
    read_training_flags(bench_saving.Config, parse(flag))
