"""--vary=subset, --imbalance and --phase_sparsities in the main job."""

import signal

import jax
import numpy as np
import pytest
from main_job import SMALL, assert_same_run, config_of, results, run

from experiments import methods
from experiments.methods import seeds
from experiments.reporting.cases import Case
from experiments.reporting.sections import classes_section, classes_table
from experiments.run import checkpointing
from experiments.setup.shares import (
  check_every_class,
  draw_shares,
  order_for_split,
  training_groups,
)
from experiments.setup.task import load, long_tailed, make_task, metrics_of, with_data
from jaxsms import data

SUBSET = "--vary=subset"
RATIOS = (SUBSET, "--subsets=imbalance", "--values=4,1", "--ingredients=2")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
  """An .npz of 120 images in three classes, with the group of each."""
  path = tmp_path_factory.mktemp("data") / "grouped.npz"
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 150)
  images = rng.integers(0, 100, (150, 4, 4, 1)) + 50 * labels[:, None, None, None]
  groups = np.repeat([5, 1, 8], [60, 40, 20])
  np.savez(
    path, train_images=images[:120].astype(np.uint8), train_labels=labels[:120],
    test_images=images[120:].astype(np.uint8), test_labels=labels[120:],
    train_groups=groups,
  )  # fmt: skip
  return path


def test_what_flags_of_shares_stand_for():
  config = config_of(SUBSET)
  assert (config.subsets, config.subset_fraction, config.subset_alpha) == (
    "random", 0.5, None
  )  # fmt: skip
  config = config_of(SUBSET, "--subsets=dirichlet")
  assert (config.subset_fraction, config.subset_alpha) == (None, 0.5)
  config = config_of(
    SUBSET, "--subsets=imbalance", "--values=1,10", "--ingredients=2", "--imbalance=10"
  )
  assert (config.subset_fraction, config.values, config.imbalance) == (1.0, (1, 10), 10)
  config = config_of()
  assert (config.subsets, config.subset_fraction, config.imbalance) == (None,) * 3


def test_phases_at_given_sparsities():
  config = config_of("--phase_sparsities=0.5,0.9,0.9")
  assert config.sparsity_of_phases() == {1: 0.5, 2: 0.9, 3: 0.9}
  assert (config.phases, config.goal_sparsity) == (3, 0.9)
  default = config_of()
  assert (default.phases, default.goal_sparsity) == (5, 0.95)
  for phase, sparsity in default.sparsity_of_phases().items():
    np.testing.assert_allclose(sparsity, 1 - 0.05 ** (phase / 5), rtol=1e-12)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--subsets=random"], "--subsets=random is of --vary=subset: leave it out"),
    ([SUBSET, "--subsets=rand"], "did you mean random?"),
    (["--subset_fraction=0.5"], "--subset_fraction is of random, balanced, imbalance"),
    ([SUBSET, "--subset_fraction=0"], "fraction is 0.0: it is a share of the data"),
    ([SUBSET, "--subset_fraction=1.5"], "fraction is 1.5: it is a share of the data"),
    ([SUBSET, "--subset_alpha=1"], "--subset_alpha is of --subsets=dirichlet"),
    ([SUBSET, "--subsets=dirichlet", "--subset_alpha=0"], "it must be a number above 0"),
    ([SUBSET, "--subsets=dirichlet", "--subset_fraction=1"], "--subset_fraction is of"),
    ([SUBSET, "--values=1,2,3,4,5"], "--values are the ratios of --subsets=imbalance"),
    ([SUBSET, "--subsets=imbalance"], "needs --values, a ratio for each of 5 copies"),
    ([SUBSET, "--subsets=imbalance", "--values=1,2"], "a ratio for each of 5 copies"),
    (
      [SUBSET, "--subsets=imbalance", "--values=0.5,1,1,1,1"],
      "--values: a ratio of imbalance is 0.5",
    ),
    ([SUBSET, "--ingredients=1"], "one copy has all the data, give several"),
    (["--merge=by_samples"], "give it with --vary=subset"),
    ([SUBSET, "--dataset=imagenet2012"], "takes shares of images in memory"),
    (["--imbalance=0.5"], "--imbalance is 0.5: it is examples of the largest class"),
    (["--imbalance=10", "--dataset=imagenet2012"], "it chooses among images in memory"),
    (["--phase_sparsities=0.9,0.5"], "no phase may have less"),
    (["--phase_sparsities=0.5,1"], "give a sparsity in [0, 1) for each phase"),
    (["--phase_sparsities="], "--phase_sparsities is empty: give a sparsity"),
    (["--phase_sparsities=0.5", "--phases=3"], "has 1 phase to 0.5: leave --phases=3"),
    (["--phase_sparsities=a"], "give numbers"),
    (["--phase_sparsities=0.5,0.9", "--phases=3"], "2 phases to 0.9: leave --phases=3 and"),
    (["--phase_sparsities=0.5,0.9", "--goal_sparsity=0.8"], "and --goal_sparsity=0.8 out"),
    (["--criterion=n_m", "--phase_sparsities=0.5,0.6"], "would remove 2.4 of 4 weights"),
    (["--merge=by_ratios"], "give it with --vary=subset --subsets=imbalance"),
    ([SUBSET, "--merge=by_ratios"], "give it with --vary=subset --subsets=imbalance"),
    ([*RATIOS, "--merge=by_ratios", "--retained=1"], "a share of the average, in (0, 1)"),
    ([*RATIOS, "--retained=0.5"], "--retained=0.5 is of --merge=by_ratios: leave it out"),
    (
      ["--logit_adjustment", "--dataset=imagenet2012"],
      "--logit_adjustment counts the labels of images in memory",
    ),
    (["--logit_adjustment", "--retrain_epochs=0"], "is of the loss of retraining"),
  ],
)
def test_flags_that_do_not_fit_are_refused(rejects, flags, words):
  with rejects(words):
    config_of(*flags)


@pytest.mark.parametrize("ratio", [20, 100])
def test_a_long_tail_leaves_every_class_in_training(ratio):
  """At 100 the rarest class of digits has one example, which validation would hold."""
  whole = data.load("digits")
  kept = data.long_tail(whole.train_labels, ratio)
  found = long_tailed(whole, ratio)
  train, validation = data.train_validation_split(len(kept))
  assert (set(whole.train_labels[kept[train]]) == set(range(10))) == (ratio == 20)
  assert set(found.train_labels[train]) == set(range(10))
  moved = np.flatnonzero(found.train_labels != whole.train_labels[kept])
  if ratio == 20:
    np.testing.assert_array_equal(found.train_images, whole.train_images[kept])
  else:  # one example each way
    assert len(set(moved) & set(train)) == len(set(moved) & set(validation)) == 1
  images = [
    x.reshape(len(kept), -1) for x in (found.train_images, whole.train_images[kept])
  ]
  np.testing.assert_array_equal(*(np.sort(x.sum(-1), axis=0) for x in images))


def test_a_class_that_has_no_place_in_training_is_still_refused(rejects):
  """Ten examples of ten classes: one of them is held out."""
  assert len(set(order_for_split(np.arange(10)))) == 10
  with rejects("went to validation and none is left to train on"):
    check_every_class(config_of("--imbalance=1"), np.arange(9), 10)


def test_the_copies_of_a_run_have_the_priors_of_their_shares():
  config = config_of(*RATIOS, "--imbalance=20", "--logit_adjustment", "--merge=by_ratios")
  dataset = load(config)
  task = make_task(with_data(config, dataset), dataset)
  run = methods.Run(config, task, jax.random.key(3))
  labels = np.asarray(task.engine.splits.train.labels)
  found, shares = seeds.varied_ingredients(run, 2, 7), run.shares(2)
  for copy in range(2):
    counts = np.bincount(labels[shares.of(copy)], minlength=10)
    shared = np.maximum(counts, 1) / counts.sum()
    np.testing.assert_allclose(np.exp(found["log_prior"][copy]), shared, rtol=1e-5)
  assert np.ptp(found["log_prior"][1]) == 0 < np.ptp(found["log_prior"][0])
  alone = seeds.varied_ingredients(run, 1, 7)["log_prior"]
  np.testing.assert_allclose(
    np.exp(alone), [np.bincount(labels, minlength=10) / len(labels)], rtol=1e-5
  )
  assert "log_prior" not in seeds.varied_ingredients(
    run._replace(config=config_of(*RATIOS)), 2, 7
  )
  # The balanced copy first, then 0.7 of the one with ratio 4.
  np.testing.assert_allclose(seeds.copy_weights(run, 2), [0.7, 0.3])
  np.testing.assert_array_equal(seeds.copy_weights(run, 1), [1])


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--subsets=groups"], "--subsets=groups needs train_groups, int [n], in the .npz"),
    (["--subset_fraction=0.002", "--batch_size=2"], "has none of class"),
    (["--subset_fraction=0.1", "--batch_size=200"], "examples for batches of 200"),
    (
      ["--subsets=dirichlet", "--batch_size=216"],
      "gave each of 5 clients 216 of the 1077 examples",
    ),
    (["--subsets=balanced", "--imbalance=50"], "examples for batches of 20"),
    (["--imbalance=1000"], "leaves no example of class"),
  ],
)
def test_shares_that_cannot_be_are_refused_before_training(tmp_path, capsys, flags, words):
  workdir = tmp_path / "run"
  assert run(SUBSET, "--baselines=", *flags, f"--workdir={workdir}") == 2
  error = capsys.readouterr().err
  assert words in error and "Traceback" not in error and error.count("\n") == 1
  assert not workdir.exists()


def test_groups_come_from_the_npz_and_leave_validation_out(tmp_path, grouped, rejects):
  config = config_of(f"--dataset={grouped}", SUBSET, "--subsets=groups",
                     "--ingredients=3", "--batch_size=4")  # fmt: skip
  dataset = load(config)
  groups = training_groups(dataset)
  train, _ = data.train_validation_split(120)
  np.testing.assert_array_equal(groups, np.repeat([5, 1, 8], [60, 40, 20])[train])
  labels = dataset.train_labels[train]
  shares = draw_shares(config, labels, groups, None, 3)
  for i, group in enumerate([1, 5, 8]):
    np.testing.assert_array_equal(shares.of(i), np.flatnonzero(groups == group))
  with rejects("the training data have 3 groups for 5 copies"):
    draw_shares(config, labels, groups, None, 5)
  arrays = dict(np.load(grouped))
  for wrong in (np.zeros(7, int), np.zeros(120)):
    np.savez(tmp_path / "wrong.npz", **{**arrays, "train_groups": wrong})
    with rejects("train_groups is"):
      data.load(str(tmp_path / "wrong.npz"))


def test_shares_are_of_the_seed():
  config, labels = config_of(SUBSET), np.arange(400) % 10
  one, again, other = (
    draw_shares(config, labels, None, jax.random.key(seed), 5).indices for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


def test_imbalance_cuts_training_data_alone_and_groups_go_along(grouped):
  config = config_of("--imbalance=20")
  dataset, whole = load(config), data.load("digits")
  np.testing.assert_array_equal(dataset.test_images, whole.test_images)
  counts = np.bincount(dataset.train_labels)
  largest = min(n * 20 ** (c / 9) for c, n in enumerate(np.bincount(whole.train_labels)))
  expected = [int(largest * 20 ** (-c / 9) + 1e-6) for c in range(10)]
  assert counts.tolist() == expected and expected[0] // expected[9] >= 20
  assert {"head_accuracy", "middle_accuracy", "tail_accuracy"} < set(
    metrics_of(config, dataset)
  )
  assert metrics_of(config_of(), whole).keys() == metrics_of(config, dataset).keys() - {
    "head_accuracy", "middle_accuracy", "tail_accuracy"
  }  # fmt: skip
  small = data.load(str(grouped))
  cut = long_tailed(small, 4)
  kept = data.long_tail(small.train_labels, 4)
  np.testing.assert_array_equal(cut.train_groups, small.train_groups[kept])
  np.testing.assert_array_equal(cut.train_images, small.train_images[kept])


def test_the_report_shows_head_and_tail():
  def metrics(head, tail):
    parts = {"head": head, "middle": 0.5, "tail": tail}
    return {"test_accuracy": 0.5} | {f"test_{k}_accuracy": v for k, v in parts.items()}

  def seed(number, tail):
    phase = {"phase": 1, "sparsity": 0.75, "soup": metrics(0.9, tail)}
    return {
      "seed": number,
      "dense": metrics(0.8, 0.25),
      "phases": [{**phase, "imp": metrics(0.7, None)}],
    }

  case = Case("a", {"ingredients": 2}, [seed(0, 0.5), seed(1, 0.25)])
  table = classes_table(case)
  assert table.header[3:6] == ["Head", "Middle", "Tail"]
  ((soup, dense),) = table.rows  # IMP has no example of the tail, and so no row
  assert soup[:3] == ["1", "75.00 %", "Sparse soup"]
  assert soup[3] == "90.00 ± 0.00" and soup[5].startswith("37.50 ± 17.68")
  assert dense[3] == "80.00 ± 0.00" and dense[-1].startswith("+12.50 [")
  plain = {"phase": 1, "sparsity": 0.75, "soup": {"test_accuracy": 0.5}}
  without = case._replace(seeds=[{"seed": 0, "dense": {}, "phases": [plain]}])
  assert list(classes_section([without])) == []
  assert len(list(classes_section([case, without]))) == 2


JOBS = {
  "random": ["--subset_fraction=0.4", "--mesh=2x1"],
  "balanced": ["--subsets=balanced"],
  "oversampled": ["--subsets=oversampled", "--imbalance=20"],
  "imbalance": ["--subsets=imbalance", "--values=1,20", "--imbalance=20"],
  "dirichlet": ["--subsets=dirichlet", "--subset_alpha=0.3", "--merge=by_samples",
                "--phase_sparsities=0.75,0.75", "--baselines=imp_reprune"],
  "adjusted": ["--subsets=imbalance", "--values=1,20", "--imbalance=20",
               "--merge=by_ratios", "--logit_adjustment", "--baselines=imp,soup_distilled"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("subsets", JOBS)
@pytest.mark.usefixtures("quick_compilation")
def test_the_main_job_on_shares(tmp_path, subsets):
  workdir = tmp_path / "run"
  flags = [*SMALL, "--batch_size=16", SUBSET, *JOBS[subsets], f"--workdir={workdir}"]
  assert run(*flags) == 0
  found = results(workdir)
  for phase in found["seeds"][0]["phases"]:
    assert phase["soup"]["test_accuracy"] > 0.3
    assert abs(phase["sparsity"] - phase["soup"]["sparsity"]) < 1e-6
    if subsets == "imbalance":
      head, tail = (phase["soup"][f"test_{part}_accuracy"] for part in ("head", "tail"))
      assert 0 <= tail < head <= 1
  report = (workdir / "report.md").read_text()
  assert ("Tail" in report) == ("--imbalance=20" in flags)
  if subsets == "adjusted":
    np.testing.assert_allclose(phase["weights"], [0.3, 0.7])
  if subsets == "dirichlet":
    assert phase["weights"][0] != phase["weights"][1] and phase["sparsity"] == 0.75


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation", "quick_figures")
def test_a_stopped_run_on_groups_goes_on_bit_by_bit(tmp_path, grouped, monkeypatch):
  flags = [*SMALL, f"--dataset={grouped}", "--model=mlp", SUBSET, "--subsets=groups",
           "--ingredients=3", "--batch_size=4", "--merge=by_samples"]  # fmt: skip
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  assert run(*flags, f"--workdir={whole}") == 0
  passed = []

  def fault_point(name):
    passed.append(name)
    if len(passed) == 9:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patched:
    patched.setattr(checkpointing, "fault_point", fault_point)
    assert run(*flags, f"--workdir={stopped}") == 143
  assert run(*flags, f"--workdir={stopped}") == 0
  assert_same_run(stopped, whole)
  weights = results(whole)["seeds"][0]["phases"][0]["weights"]
  groups = np.repeat([5, 1, 8], [60, 40, 20])[data.train_validation_split(120)[0]]
  np.testing.assert_allclose(weights, [np.mean(groups == g) for g in (1, 5, 8)])
