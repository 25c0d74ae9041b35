"""Training steps of a cut network beside the dense one: measured, and what is refused."""

import pytest
from main_job import flag_values

from experiments.benchmarks import bench_cut
from experiments.benchmarks.usual_networks import read_training_flags
from experiments.costs.timing import spread

pytestmark = pytest.mark.usefixtures("quick_compilation")


def parse(*given):
  return read_training_flags(bench_cut.Config, flag_values(bench_cut.Config, *given))


@pytest.mark.slow
def test_a_measurement_and_what_is_said_of_it():
  config = parse("--model=mlp", "--batch_size=4", "--rounds=2", "--mesh=none")
  trainings = bench_cut.make_trainings(config)
  found = bench_cut.measure(trainings, config.rounds)
  for name in (bench_cut.DENSE, bench_cut.CUT):  # an MLP has no width to be built with
    assert found[name].min > 0 and len(found[name].rounds) == 2
  sizes = [256, 128]
  assert [t.task.multiply_adds for t in trainings.values()] == [
    64 * n + n * n + n * 10 for n in sizes
  ]
  # Rounds of 300 and 100 ms, 200 and 100, 500 and 100.
  found = {"dense": spread([0.3, 0.2, 0.5]), "cut": spread([0.1, 0.1, 0.1])}
  said = bench_cut.text(config, trainings, found).splitlines()
  assert "m = 2, batch 4, 50 % of the channels cut" in said[0]
  assert said[1].startswith("dense: 300 [200, 500] ms a step")
  assert said[1].endswith(
    f"{65 * 256 + 257 * 256 + 2570:,} parameters, 84,480 multiply-adds"
  )
  assert said[2].startswith("cut: 100 [100, 100] ms a step")
  assert said[2].endswith(
    f"{65 * 128 + 129 * 128 + 1290:,} parameters, 25,856 multiply-adds"
  )
  assert said[3] == "a step is 3 [2, 5] times as fast"


@pytest.mark.slow
def test_a_network_built_at_the_size_of_the_cut_one():
  flags = ("--model=resnet8", "--batch_size=2", "--rounds=1", "--steps=1", "--mesh=none")
  config = parse(*flags)
  trainings = bench_cut.make_trainings(config)
  cut, built = (trainings[name].task for name in (bench_cut.CUT, bench_cut.BUILT))
  assert cut.multiply_adds == built.multiply_adds
  found = {name: spread([1.0 + i]) for i, name in enumerate(trainings)}
  said = bench_cut.text(config, trainings, found).splitlines()
  assert said[-1].startswith("one built at that size takes 1.5 ")


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--model=resnet9", "unknown model"),
    ("--ingredients=0", "--ingredients is 0"),
    ("--share=1", "--share is 1"),
    ("--rounds=0", "--rounds is 0"),
    ("--steps=0", "--steps is 0"),
  ],
)
def test_bad_flags(flag, words, rejects):
  with rejects(words):
    parse(flag)
