"""--budget=latency: channels by measured time, the same ones after a break."""

import jax
import numpy as np
import pytest
from main_job import SMALL, results, run

from experiments.costs import latency_budget
from experiments.costs.latency_budget import NetworkClock
from experiments.run import running
from experiments.run.run_costs import RunCosts
from jaxsms import models
from jaxsms.training import Model, init_variables
from jaxsms.training.cutting import groups_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Clocks:
  """Stands for what times networks: they take as long as their parameters are many.

  The machine is as fast as it is at the moment.
  """

  def __init__(self, speed=lambda: 1.0):
    self.speed = speed

  def ready(self, function, variables, images):
    return 1e-6 * sum(x.size for x in jax.tree.leaves(variables["params"]))

  def seconds_of(self, call):
    return call / self.speed()

  def seconds_ratio(self, call, other):
    return call / other

  def use(self, monkeypatch):
    for name in ("ready", "seconds_of", "seconds_ratio"):
      monkeypatch.setattr(latency_budget, name, getattr(self, name))


class Level(Clocks):
  """All networks take as long."""

  def ready(self, *_):
    return 1.0


def clock():
  module = models.create("mlp", 10, hidden=(6, 4), dropout=0.0)
  model = Model(*init_variables(module, jax.random.key(0), (2, 2, 1)))
  groups = groups_of(module, model, (2, 2, 1))
  return NetworkClock(module, model, lambda: groups, (2, 2, 1))


def kept(*counts):
  return [np.arange(n) < k for n, k in zip((6, 4), counts, strict=True)]


def test_a_shape_is_measured_once_in_a_run(monkeypatch):
  """After a break the machine has another speed, and what it says still fits."""
  speeds = iter([2.0, 5.0])
  Clocks(lambda: next(speeds)).use(monkeypatch)
  first = clock()
  # Weights and biases of 4, 6, 4, 10 and 4, 3, 4, 10 numbers.
  dense, cut = (1e-6 * (5 * n + (n + 1) * 4 + 50) / 2 for n in (6, 3))
  found = [first(kept(6, 4)), first(kept(3, 4)), first(kept(6, 4))]
  assert found == pytest.approx([dense, cut, dense])
  costs = RunCosts()
  costs.latencies = first.known
  again = clock()
  again.known = RunCosts(costs.saved()).latencies
  assert again([one[::-1] for one in kept(3, 4)]) == found[1]  # other channels, as many
  assert again(kept(2, 4)) == pytest.approx(1e-6 * (5 * 2 + 3 * 4 + 50) / 2)
  assert next(speeds) == 5.0


def test_what_is_measured_is_the_cut_network(monkeypatch):
  Clocks().use(monkeypatch)
  measured = clock()(kept(3, 2))
  assert measured == pytest.approx(1e-6 * ((4 + 1) * 3 + (3 + 1) * 2 + (2 + 1) * 10))


def test_a_measured_network_runs():
  assert clock()(kept(3, 2)) > 0


def test_a_goal_that_no_channels_reach(monkeypatch, rejects):
  Clocks().use(monkeypatch)
  # Of 108 numbers 5 + 2 + 20 have to stay, a quarter; a tenth more than asked is allowed.
  clock().check(0.77)
  with rejects("--goal_sparsity is 0.78 of the latency"):
    clock().check(0.78)


@pytest.mark.slow
def test_phases_take_their_share_of_the_time(tmp_path, monkeypatch, quick_figures):
  Clocks().use(monkeypatch)
  status = run(
    "--hidden=16,12", "--epochs=1", "--retrain_epochs=1", "--phases=2", "--ingredients=2",
    "--batch_size=64", "--goal_sparsity=0.6", "--mesh=none", "--baselines=",
    "--criterion=channels", "--budget=latency", "--shrink", "--landscape=none",
    f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  assert status == 0
  (seed,) = results(tmp_path / "run")["seeds"]
  for phase, share in zip(seed["phases"], (0.4**0.5, 0.4), strict=True):
    assert phase["parameters"] / seed["dense"]["parameters"] == pytest.approx(share, 0.1)


def test_a_busy_machine_keeps_no_run_from_going_on(tmp_path, monkeypatch, capsys):
  def interrupted(*args):
    raise KeyboardInterrupt

  def go_on():
    return run(
      *SMALL, "--criterion=channels", "--budget=latency", f"--workdir={tmp_path / 'run'}"
    )

  monkeypatch.setattr(running, "run_seed", interrupted)
  Level().use(monkeypatch)
  assert go_on() == 2  # a new one: no channels are faster
  assert "of the latency" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
  Clocks().use(monkeypatch)
  assert go_on() == 130
  Level().use(monkeypatch)
  assert go_on() == 130
  assert "resuming" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--baselines=gmp"], "--baselines has gmp"),
    (["--baselines=imp_reprune"], "--baselines has imp_reprune"),
    (
      ["--coordinator=localhost:1", "--processes=2", "--process=0"],
      "leave out --processes",
    ),
  ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, capsys, flags, words):
  given = ["--criterion=channels", "--budget=latency", *flags]
  assert run(*given, f"--workdir={tmp_path / 'run'}") == 2
  assert words in capsys.readouterr().err
