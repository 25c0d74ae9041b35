"""Methods of the main job: baselines, what varies, criteria, given weights, OOD data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from main_job import config_of, run
from test_data import prepare
from test_experiments import SMALL

from experiments import methods
from experiments.config.pruning_criteria import CRITERIA, Criterion, classifier, pruning
from experiments.methods.epochs import bimp_epochs
from experiments.methods.registry import looks
from experiments.methods.seeds import Run, retraining_plan, varied_ingredients
from experiments.methods.within_budget import resampled
from experiments.setup.ood import corrupted_test_data
from experiments.setup.task import Task, make_task
from jaxsms import checkpoint, data, models, pretrained, prunable, training
from jaxsms.disk import safetensors

FAST = (*SMALL, "--mesh=none", "--phases=1")
FROM_SCRATCH = {"gmp", "gmp_soup", "dpf", "dpf_soup", "bimp", "bimp_soup"}


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation, quick_figures):
  pass


def results(workdir):
  return json.loads((workdir / "results.json").read_text())["seeds"][0]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
  """All baselines, in two phases."""
  workdir = tmp_path_factory.mktemp("runs") / "all"
  flags = [f"--baselines={','.join(methods.baselines())}", "--budget_epochs=4"]
  flags += ["--mask_steps=5", "--rewind_epochs=1", f"--workdir={workdir}"]
  assert run(*FAST, "--phases=2", *flags) == 0
  return workdir


def test_what_is_shown_can_be_told_apart():
  shown = looks()
  assert next(iter(shown)) == "soup"
  assert set(shown) > set(methods.baselines()) > FROM_SCRATCH
  assert len({look[1:] for look in shown.values()}) == len(shown)
  assert len({look.title for look in shown.values()}) == len(shown)


@pytest.mark.slow
def test_every_baseline_is_measured_at_its_sparsity(everything):
  first, last = results(everything)["phases"]
  config = config_of(f"--flagfile={everything / 'flags.txt'}")
  assert set(config.baselines) == set(last) & set(methods.baselines())
  for name in config.baselines:
    assert (name in first) == (name not in {*FROM_SCRATCH, *methods.having("last_alone")})
    for phase in (first, last):
      if name in phase:
        goal = 0.0 if name == "dense_soup" else phase["sparsity"]
        assert phase[name]["sparsity"] == pytest.approx(goal)
        assert set(phase[name]) == set(phase["soup"])
        assert 0 <= phase[name]["test_accuracy"] <= 1


@pytest.mark.slow
def test_training_is_as_long_as_planned(everything):
  lines = [json.loads(x) for x in (everything / "metrics.jsonl").read_text().splitlines()]
  lines = [line for line in lines if "epoch" in line]
  steps, last = {}, {}
  for line in lines:
    m, step = len(line["loss"]), line["step"]
    name = line["method"], line["phase"]
    # A training goes on from the one before where its steps do.
    before = last.get(name, 0) if step > last.get(name, 0) else 0
    steps[m] = steps.get(m, 0) + step - before
    last[name] = step
  config = config_of(f"--flagfile={everything / 'flags.txt'}")
  assert steps == methods.planned_steps(config, 1077 // 64, methods.names_of(config))


@pytest.mark.slow
def test_records_hold_what_models_are_measured_by(everything):
  seed = results(everything)
  assert seed["dense"]["sparsity"] == 0
  assert seed["dense"]["distance_to_pruned"] > 0
  assert seed["dense"]["theoretical_speedup"] == 1
  n = 64 * 16 + 16 * 10
  for phase in seed["phases"]:
    assert phase["max_candidate"]["test_accuracy"] == max(
      c["test_accuracy"] for c in phase["candidates"]
    )
    soup = phase["soup"]
    kept = round(n * (1 - phase["sparsity"]))
    assert soup["sparse_multiply_adds"] == pytest.approx(kept, abs=2)
    assert soup["multiply_adds"] == n
    assert soup["parameters"] == n + 26
    assert soup["nonzero_parameters"] == kept + 26
    assert phase["norm_drop"] > 0
  before = [seed["dense"], *(phase["soup"] for phase in seed["phases"][:-1])]
  for model, phase in zip(before, seed["phases"], strict=True):
    lost = model["test_accuracy"] - phase["pruned"]["test_accuracy"]
    share = pytest.approx(lost / model["test_accuracy"])
    assert phase["pruning_instability"] == share


@pytest.mark.slow
def test_given_weights_ood_and_copies_of_other_lengths(everything, tmp_path):
  workdir, soup = tmp_path / "run", checkpoint.restore(everything / "soup" / "seed_0")
  path = tmp_path / "soup.safetensors"
  safetensors.save_safetensors(path, {k: soup[k] for k in ("params", "batch_stats")})
  flags = [f"--init={path}", "--baselines=", "--vary=epochs", "--values=1,2"]
  flags += ["--merge=greedy", "--ood=fog,impulse_noise", "--ood_severities=1,5"]
  flags += ["--train_metrics", "--goal_sparsity=0.8", f"--workdir={workdir}"]
  assert run(*FAST, *flags) == 0
  seed = results(workdir)
  given = results(everything)["phases"][-1]["soup"]
  for name in ("test_accuracy", "validation_loss", "sparsity"):
    assert seed["dense"][name] == pytest.approx(given[name], abs=1e-5)
  phase = seed["phases"][0]
  for model in (seed["dense"], phase["soup"], phase["prediction_ensemble"]):
    by_corruption = [c["accuracy"] for c in model["ood"].values()]
    assert set(model["ood"]) == {"fog", "impulse_noise"}
    assert model["ood_accuracy"] == pytest.approx(np.mean(by_corruption))
    assert 0 <= model["train_accuracy"] <= 1
  taken = [w > 0 for w in phase["weights"]]
  chosen = [c for c, t in zip(phase["candidates"], taken, strict=True) if t]
  assert phase["selected"]["max_candidate"]["test_loss"] == max(
    c["test_loss"] for c in chosen
  )
  lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if "epoch" in line]
  assert losses[0][0] is not None and losses[1][0] is None  # done after one epoch
  assert json.loads((workdir / "results.json").read_text())["ood_sources"] == {
    "fog": "jaxsms", "impulse_noise": "jaxsms"
  }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  ("criterion", "sparsity"),
  [("random", 0.75), ("erk", 0.75), ("lamp", 0.75), ("n_m", 0.75), ("magnitude", 0.75)],
)
def test_criteria_remove_what_is_asked(criterion, sparsity):
  config = config_of(*SMALL, f"--criterion={criterion}")
  prune = pruning(config, jax.random.key(0))
  params = models.create("mlp", 10, hidden=(16,)).init(
    jax.random.key(1), jnp.zeros((1, 8, 8, 1))
  )["params"]
  half = prune(params, 0.5)
  masks = prune(params, sparsity, masks=half)
  for early, late in zip(jax.tree.leaves(half), jax.tree.leaves(masks), strict=True):
    assert not (late & ~early).any()
  kept = [masks[name]["kernel"] for name in ("Dense_0", "Dense_1")]
  assert sum(k.sum() for k in kept) == round(0.25 * (64 * 16 + 16 * 10))
  if criterion == "n_m":
    for k in kept:
      assert (np.asarray(k).reshape(-1, 4, k.shape[-1]).sum(1) == 1).all()


def test_a_criterion_from_outside_is_a_value_of_its_flag(monkeypatch, rejects):
  with rejects("unknown criterion"):
    config_of(*SMALL, "--criterion=halves")
  own = Criterion(lambda config, key, groups: lambda params, sparsity, masks=None: "halves")
  monkeypatch.setitem(CRITERIA, "halves", own)
  config = config_of(*SMALL, "--criterion=halves")
  assert pruning(config, jax.random.key(0))({}, 0.5) == "halves"
  with rejects("--scope=uniform belongs to magnitude, random, filters, channels"):
    config_of(*SMALL, "--criterion=halves", "--scope=uniform")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet8", "vit_tiny"])
def test_filters_and_groups_in_other_networks(model):
  options = {"depth": 1, "width": 24} if model == "vit_tiny" else {"width": 4}
  shapes = jax.eval_shape(
    models.create(model, 10, **options).init, jax.random.key(1), jnp.zeros((1, 8, 8, 3))
  )["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  config = config_of("--criterion=filters")
  masks = pruning(config, jax.random.key(0))(params, 0.5)
  assert masks[classifier(params)]["kernel"].all()
  config = config_of("--criterion=n_m", "--goal_sparsity=0.5", "--phases=1")
  masks = pruning(config, jax.random.key(0))(params, 0.5)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  kept = [
    float(mask.mean())
    for (path, x), mask in zip(leaves, jax.tree.leaves(masks), strict=True)
    if prunable(path, x)
  ]
  # The first convolution has three inputs, which four do not divide.
  assert sorted(kept) == [0.5] * (len(kept) - 1) + [1.0]


def seed_of(config, steps_per_epoch):
  nothing = dict.fromkeys(Task._fields)
  return Run(config, Task(**nothing | {"steps_per_epoch": steps_per_epoch}), None)


def test_what_varies():
  def of(*flags, m=3):
    config = config_of("--ingredients=3", "--weight_decay=0.5", *flags)
    return varied_ingredients(seed_of(config, 10), m, 40)

  assert of()["seed"].tolist() == [0, 1, 2]
  assert of("--values=5,7,6")["seed"].tolist() == [5, 7, 6]
  assert of("--values=5,7,6", m=1)["seed"].tolist() == [5]
  found = of("--vary=weight_decay", "--values=0,0.1,0.2")
  assert found["seed"].tolist() == [0, 0, 0]
  np.testing.assert_allclose(found["weight_decay"], [0, 0.1, 0.2], rtol=1e-6)
  assert of("--vary=weight_decay", "--values=0,0.1,0.2", m=1)["weight_decay"] == [0.5]
  assert of("--vary=epochs", "--values=1,5,3")["steps"].tolist() == [10, 50, 30]


def test_what_a_search_makes_of_its_values():
  config = config_of(
    "--ingredients=4", "--vary=learning_rate,weight_decay,seed", "--retrain_epochs=5",
    "--ranges=weight_decay:1e-5:1e-2, learning_rate:0.01:0.3", "--weight_decay=0.5",
    "--rungs=3",
  )  # fmt: skip
  run = seed_of(config, 10)
  found = config.search(50, 10)
  assert found.ranges == {"weight_decay": (1e-5, 1e-2), "learning_rate": (0.01, 0.3)}
  assert found.ends == (10, 30, 50)  # at the ends of epochs 1, 3 and 5
  run = run._replace(
    task=run.task._replace(warmup_steps=0, pretrain_lrs=np.full(30, 0.1, np.float32))
  )
  values = {
    "learning_rate": np.float32([0.4, 0.3, 0.2, 0.1]),
    "weight_decay": np.float32([1, 2, 3, 4]),
  }
  chosen, lrs = retraining_plan(run, 4, 20)({}, values)
  expected = values["learning_rate"][:, None] * (1 - np.arange(18) / 18)
  np.testing.assert_allclose(lrs[:, 2:], expected, rtol=1e-5)
  assert chosen["weight_decay"].tolist() == [1, 2, 3, 4]
  assert chosen["seed"].tolist() == [0, 1, 2, 3]
  alone, lrs = retraining_plan(run, 1, 20)({})
  assert alone["weight_decay"] == [0.5] and lrs.max() == pytest.approx(0.1)
  same = config_of("--vary=learning_rate", RATES)
  assert same.rungs == 2
  assert varied_ingredients(seed_of(same, 10), 5, 20)["seed"].tolist() == [0] * 5
  assert config_of().search(50, 10) is None


def test_learning_rates_that_vary_are_llrs_first():
  flags = ["--ingredients=2", "--vary=learning_rate", "--values=0.5,0.25"]
  config = config_of(*flags)
  run = seed_of(config, 10)
  rates = np.full(30, 0.1, np.float32)
  run = run._replace(task=run.task._replace(warmup_steps=0, pretrain_lrs=rates))
  _, lrs = retraining_plan(run, 2, 20)({})
  # A warmup of two steps, then linear to 0.
  expected = np.array([[0.5], [0.25]]) * (1 - np.arange(18) / 18)
  np.testing.assert_allclose(lrs[:, 2:], expected, rtol=1e-5)
  # A single copy keeps the schedule's own.
  _, lrs = retraining_plan(run, 1, 20)({})
  assert lrs.max() == pytest.approx(0.1)


def test_prepared_corruptions_come_before_our_own(monkeypatch):
  prepared = [f"cifar10_corrupted/{n}_{s}" for n in ("frost", "fog") for s in (1, 2, 3)]
  prepared.remove("cifar10_corrupted/fog_2")
  loaded = []

  def load_split(name, split, data_dir, cache_dir):
    loaded.append((name, split))
    return np.full((2, 32, 32, 3), len(loaded), np.uint8), np.zeros(2, np.int32)

  monkeypatch.setattr(data, "corrupted_sets", lambda name, data_dir: sorted(prepared))
  monkeypatch.setattr(data, "load_split", load_split)
  images = np.zeros((2, 32, 32, 3), np.uint8)
  labels = np.zeros(2, np.int32)
  clean = data.Dataset("cifar10", images, labels, images, labels, 10, (), (), "none")
  test = training.Data(jnp.asarray(images), jnp.asarray(labels))

  def made(*flags):
    flags = ["--dataset=cifar10", "--ood_severities=1,3", *flags]
    return corrupted_test_data(config_of(*flags), clean, test)

  sets, sources = made("--ood=fog,frost,contrast")
  assert sources == {"fog": "tfds", "frost": "tfds", "contrast": "jaxsms"}
  assert [f().images.max() for f in sets["frost"]] == [1, 2]
  assert loaded == [
    ("cifar10_corrupted/frost_1", "test"), ("cifar10_corrupted/frost_3", "test")
  ]  # fmt: skip
  assert sets["contrast"][0]().images.shape == images.shape
  assert list(made("--ood=all")[0]) == ["fog", "frost"]
  assert list(made("--ood=all", "--ood_severities=1,2")[0]) == ["frost"]
  assert made("--ood=none") == ({}, {})
  prepared.clear()
  assert list(made("--ood=all")[0]) == data.corruptions_for(3)


def test_streamed_corruptions_are_read_as_prepared(tmp_path):
  images = {
    name: [(np.full((6, 8, 3), 40 * i + 20 * j, np.uint8), j) for j in range(2)]
    for i, name in enumerate(("fog_1", "fog_2", "snow_1"))
  }
  for name, pairs in images.items():
    prepare(tmp_path, {"validation": pairs}, called="tiny_corrupted", config=name)
  flags = ["--dataset=tiny", f"--data_dir={tmp_path}", "--stream", "--image_size=4"]
  flags += ["--ood_severities=1,2"]
  assert list(corrupted_test_data(config_of(*flags, "--ood=all"), None, None)[0]) == ["fog"]
  sets, sources = corrupted_test_data(config_of(*flags, "--ood=fog"), None, None)
  assert sources == {"fog": "tfds"}
  for made, name in zip(sets["fog"], ("fog_1", "fog_2"), strict=True):
    test = made()
    assert test.size == 2
    found = [test.source[i] for i in range(2)]
    for image, label in found:
      (wanted,) = {int(x[0, 0, 0]) for x, y in images[name] if y == label}
      cropped = test.eval_transform(image)
      assert cropped.shape == (4, 4, 3)
      assert (cropped == wanted).all()


def test_streamed_corruptions_that_are_not_prepared(tmp_path, rejects):
  flags = ["--dataset=tiny", f"--data_dir={tmp_path}", "--stream"]
  with rejects("--ood has fog: streamed images are not corrupted here, prepare tiny_corr"):
    corrupted_test_data(config_of(*flags, "--ood=fog"), None, None)
  with rejects("TFDS has no tiny_corrupted prepared"):
    corrupted_test_data(config_of(*flags, "--ood=all"), None, None)


def test_budgets_resample_the_schedule():
  lrs = np.arange(6, dtype=np.float32)
  np.testing.assert_array_equal(resampled(lrs, 6), lrs)
  np.testing.assert_array_equal(resampled(lrs, 3), [0, 2, 4])
  np.testing.assert_array_equal(resampled(lrs, 12), np.repeat(lrs, 2))


def test_bimp_stays_within_its_budget():
  for budget, phases, share in ((30, 5, 0.5), (7, 3, 0.3), (100, 4, 0.75)):
    config = config_of(
      f"--budget_epochs={budget}", f"--phases={phases}", f"--fixed_after={share}"
    )
    dense, cycle = bimp_epochs(config)
    assert dense + phases * cycle == budget
    assert dense >= share * budget


def test_options_reach_their_networks():
  for flags, options in (
    (["--model=resnet8", "--width=4"], {"width": 4}),
    (["--model=resnet18", "--stem=imagenet"], {"stem": "imagenet"}),
    (["--model=wide_resnet22_10", "--dropout=0.1", "--widening=2"],
     {"dropout": 0.1, "widening": 2}),
    (["--model=vgg16"], {}),
    (["--model=mlp", "--dataset=x"], {"hidden": (512,), "dropout": 0.2}),
  ):  # fmt: skip
    config = config_of(*flags)
    assert config.model_options() == options
    models.create(config.model, 10, **options)
    assert config_of(*config.flagfile().split()) == config


RATES = "--ranges=learning_rate:0.01:0.3"


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--vary=decay"], "known are seed, weight_decay"),
    (["--vary=epochs"], "needs --values, one for each of 5 copies"),
    (["--vary=epochs", "--ingredients=1"], "needs copies that differ"),
    (["--vary=learning_rate"], "5 copies, or --ranges, such as learning_rate:0.01:0.3"),
    (["--vary=weight_decay"], "5 copies, or --ranges, such as weight_decay:1e-5:1e-2"),
    (["--vary=epochs", "--values=1"], "--values gives 1 value for --ingredients=5"),
    (["--vary=epochs", "--values=1,2"], "2 values for --ingredients=5"),
    (["--vary=epochs", "--values=0,1", "--ingredients=2"], "above 0"),
    (["--vary=epochs", "--values=1.5,1", "--ingredients=2"], "whole numbers"),
    (["--vary=weight_decay", "--values=-1,1", "--ingredients=2"], "0 or above"),
    (["--vary=weight_decay", "--values=nan,1", "--ingredients=2"], "0 or above"),
    (["--vary=weight_decay", "--values=1,1", "--ingredients=2"], "another value"),
    (["--vary=weight_decay", "--values=1", "--ingredients=1"], "needs copies that differ"),
    (["--vary=learning_rate", "--values=1,2", "--ingredients=2", "--retrain_schedule=CLR"],
     "CLR has its own"),
    (["--vary=epochs", "--values=1,2", "--ingredients=2", "--baselines=imp,swamp"],
     "swamp, whose copies share one schedule"),
    (["--vary=seed,seed", RATES], "name each variable once"),
    (["--vary=learning_rate,size", RATES], "known are seed, weight_decay"),
    (["--vary=learning_rate,weight_decay"], "needs --ranges"),
    (["--vary=learning_rate", "--ranges="], "--ranges is empty"),
    (["--vary=learning_rate", "--ranges=learning_rate:0.1"], "its greatest value"),
    (["--vary=learning_rate", "--ranges=learning_rate:a:b"], "its greatest value"),
    (["--vary=learning_rate", "--ranges=learning_rate:0.3:0.01"], "goes from 0.3 to 0.01"),
    (["--vary=learning_rate", "--ranges=learning_rate:0.1:0.1"], "goes from 0.1 to 0.1"),
    (["--vary=weight_decay", "--ranges=weight_decay:0:0.1"], "a number above 0"),
    (["--vary=weight_decay", "--ranges=weight_decay:nan:0.1"], "a number above 0"),
    (["--vary=epochs", "--ranges=epochs:1:2"], "known are learning_rate, weight_decay"),
    (["--vary=learning_rate", RATES + ",learning_rate:1:2"], "learning_rate twice"),
    (["--vary=weight_decay", RATES], "--ranges has learning_rate for --vary=weight_decay"),
    (["--vary=seed,epochs", RATES], "--vary=seed,epochs has epochs: only"),
    (["--vary=subset,learning_rate", RATES], "has subset: only learning_rate"),
    (["--vary=subset,learning_rate"], "--vary=subset,learning_rate has subset: only"),
    (["--vary=subset", RATES], "--vary=subset has subset: only"),
    ([RATES], "--ranges has learning_rate for --vary=seed"),
    (["--vary=learning_rate", RATES, "--values=1,2,3,4,5"], "both given"),
    (["--vary=learning_rate", RATES, "--ingredients=3"], "give at least 4"),
    (["--vary=learning_rate", RATES, "--rungs=3"], "give fewer rungs or more epochs"),
    (["--vary=learning_rate", RATES, "--retrain_epochs=0"], "that are not trained"),
    (["--vary=learning_rate", RATES, "--rungs=0"], "at least 1"),
    (["--rungs=2"], "--rungs=2 is of a search"),
    (["--vary=learning_rate", RATES, "--retrain_schedule=CLR"], "CLR has its own"),
    (["--vary=learning_rate", RATES, "--baselines=imp,imp_reprune"],
     "imp_reprune, whose copies are not evaluated"),
    (["--vary=seed,weight_decay", "--ranges=weight_decay:1e-5:1e-3", "--baselines=swamp"],
     "swamp, whose copies are not evaluated"),
    (["--criterion=size"], "known are magnitude"),
    (["--criterion=lamp", "--scope=uniform"], "leave it out"),
    (["--criterion=n_m"], "of 4 weights in phase 1"),
    (["--criterion=n_m", "--phases=1", "--goal_sparsity=0.5", "--baselines=gmp"],
     "smoothly"),
    (["--n_m_group=1"], "at least 2"),
    (["--fixed_after=1"], "in (0, 1)"),
    (["--fixed_after=nan"], "in (0, 1)"),
    (["--baselines=bimp", "--budget_epochs=3"], "for each of 5 cycles"),
    (["--baselines=swamp", "--budget_epochs=2"], "--rewind_epochs is 2"),
    (["--budget_epochs=0"], "at least 1"),
    (["--ood=frog"], "did you mean fog"),
    (["--ood=all,fog"], "all alone"),
    (["--ood=fog", "--ood_severities=6"], "1,2,3,4,5"),
    (["--ood=fog", "--ood_severities=a"], "whole numbers"),
    (["--ood=saturate"], "changes colours"),
    (["--width=3"], "leave it out with mlp"),
    (["--model=resnet8", "--stem=cifar"], "leave it out with resnet8"),
    (["--model=resnet18", "--stem=big"], "known are cifar, imagenet"),
    (["--model=resnet8", "--dropout=0.1"], "leave it out with --model=resnet8"),
    (["--init=nowhere"], "nowhere"),
    (["--init=nowhere.npz"], "no file nowhere.npz"),
  ],
)  # fmt: skip
def test_bad_flags_end_with_one_sentence(flags, words, tmp_path, capsys):
  assert run(f"--workdir={tmp_path / 'run'}", *flags) == 2
  message = capsys.readouterr().err.strip()
  assert words in message
  assert message.startswith("error: ")
  assert "\n" not in message


@pytest.mark.slow
def test_weights_of_another_network_are_refused(everything, tmp_path, rejects):
  mlp = models.create("mlp", 10, hidden=(17,))
  with rejects("is (64, 16) and should be (64, 17)"):
    pretrained.load_model(everything / "soup" / "seed_0", mlp, (8, 8, 1))
  with rejects("cannot be read"):
    pretrained.load_model(tmp_path, mlp, (8, 8, 1))
  mlp = models.create("mlp", 10, hidden=(16,))
  soup = checkpoint.restore(everything / "soup" / "seed_0")
  soup["params"]["Dense_0"]["bias"][0] = np.nan
  safetensors.save_safetensors(tmp_path / "bad.safetensors", {"params": soup["params"]})
  with rejects("NaN or infinite values in params/Dense_0/bias"):
    pretrained.load_model(tmp_path / "bad.safetensors", mlp, (8, 8, 1))


def test_pytorch_weights_start_a_run(tmp_path):
  module = models.create("mlp", 10, hidden=(16,))
  params = module.init(jax.random.key(4), jnp.zeros((1, 8, 8, 1)))["params"]
  path = tmp_path / "torch.npz"
  np.savez(path, **pretrained.to_torch({"params": params}, module, (8, 8, 1)))
  config = config_of(*FAST, f"--init={path}")
  task = make_task(config, data.load("digits"))
  for ours, given in zip(
    jax.tree.leaves(params), jax.tree.leaves(task.initial.params), strict=True
  ):
    np.testing.assert_array_equal(ours, given)
  assert methods.planned_steps(config, 10, methods.names_of(config)) == {
    1: 10 * 3,
    2: 10,
  }
