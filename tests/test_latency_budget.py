"""--budget=latency: channels by measured time, the same ones after a break."""

import jax
import numpy as np
import pytest
from main_job import SMALL, results, run

from experiments.run import latency_budget, running
from experiments.run.costs import RunCosts
from experiments.run.latency_budget import NetworkClock
from jaxsms import models
from jaxsms.training import Model, init_variables
from jaxsms.training.cutting import groups_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


def size(function, variables, images):
  """A clock that goes by the numbers in the parameters."""
  return 1e-6 * sum(x.size for x in jax.tree.leaves(variables["params"]))


def clock():
  module = models.create("mlp", 10, hidden=(6, 4), dropout=0.0)
  model = Model(*init_variables(module, jax.random.key(0), (2, 2, 1)))
  groups = groups_of(module, model, (2, 2, 1))
  return NetworkClock(module, model, lambda: groups, (2, 2, 1))


def kept(*counts):
  return [np.arange(n) < k for n, k in zip((6, 4), counts, strict=True)]


def test_a_shape_is_measured_once_in_a_run(monkeypatch):
  answers = iter([3.0, 2.0])
  monkeypatch.setattr(latency_budget, "seconds_per_call", lambda *_: next(answers))
  first = clock()
  assert [first(kept(6, 4)), first(kept(3, 4)), first(kept(6, 4))] == [3.0, 2.0, 3.0]
  costs = RunCosts()
  costs.latencies = first.known
  again = clock()
  again.known = RunCosts(costs.saved()).latencies
  assert again([one[::-1] for one in kept(3, 4)]) == 2.0  # other channels, as many


def test_what_is_measured_is_the_cut_network(monkeypatch):
  monkeypatch.setattr(latency_budget, "seconds_per_call", size)
  measured = clock()(kept(3, 2))
  assert measured == pytest.approx(1e-6 * ((4 + 1) * 3 + (3 + 1) * 2 + (2 + 1) * 10))


def test_a_measured_network_runs():
  assert clock()(kept(3, 2)) > 0


def test_a_goal_that_no_channels_reach(monkeypatch, rejects):
  monkeypatch.setattr(latency_budget, "seconds_per_call", size)
  # Of 108 numbers 5 + 2 + 20 have to stay, a quarter; a tenth more than asked is allowed.
  clock().check(0.77)
  with rejects("--goal_sparsity is 0.78 of the latency"):
    clock().check(0.78)


@pytest.mark.slow
def test_phases_take_their_share_of_the_time(tmp_path, monkeypatch, quick_figures):
  monkeypatch.setattr(latency_budget, "seconds_per_call", size)
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
  monkeypatch.setattr(latency_budget, "seconds_per_call", lambda *_: 1.0)
  assert go_on() == 2  # a new one: no channels are faster
  assert "of the latency" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
  monkeypatch.setattr(latency_budget, "seconds_per_call", size)
  assert go_on() == 130
  monkeypatch.setattr(latency_budget, "seconds_per_call", lambda *_: 1.0)
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
