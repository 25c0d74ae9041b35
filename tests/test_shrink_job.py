"""The main job with channels and networks that shrink."""

import itertools
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from main_job import assert_same_run, config_of, results, run
from test_report_page import Page

import jaxsms
from experiments.config import pruning_criteria
from experiments.config.run_config import NEWER
from experiments.run import checkpointing
from experiments.run.run_costs import RunCosts
from jaxsms import checkpoint
from jaxsms.disk import storage

FLAGS = (
  "--hidden=16,12", "--epochs=2", "--retrain_epochs=1", "--phases=2", "--ingredients=2",
  "--batch_size=64", "--goal_sparsity=0.6", "--chunk_steps=8", "--save_minutes=0",
  "--mesh=none", "--baselines=imp", "--criterion=channels", "--landscape=last",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  pass


@pytest.fixture
def programs(monkeypatch):
  """How many programs of copies were compiled until each phase ended, in their order."""
  found, compiled = [], []

  def listen(event, duration, **about):
    if event.endswith("backend_compile_duration"):
      compiled.append("mapped" in about["fun_name"])

  def ended(self, method, phase, end=RunCosts.phase):
    if not found or found[-1][0] != (method, phase):  # the soup's inference comes after
      found.append(((method, phase), sum(compiled)))
      compiled.clear()
    return end(self, method, phase)

  monkeypatch.setattr(RunCosts, "phase", ended)
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


def without_times(record):
  """The rest of what a run says of its costs."""
  if isinstance(record, list):
    return [without_times(one) for one in record]
  if not isinstance(record, dict):
    return record
  rest = {k: v for k, v in record.items() if "seconds" not in k and k not in SPREAD}
  return {k: without_times(v) for k, v in rest.items()}


SPREAD = ("min", "median", "max")


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "shrunk"
  assert run(*FLAGS, "--shrink", f"--workdir={workdir}") == 0
  return workdir


@pytest.mark.slow
def test_a_shrinking_run_gives_the_soup_of_masks_of_channels(shrunk, tmp_path):
  masked = tmp_path / "masked"
  assert run(*FLAGS, f"--workdir={masked}") == 0
  (cut,), (whole,) = (results(w)["seeds"] for w in (shrunk, masked))
  assert "--shrink retrains the smaller" in " ".join(Page(masked / "report.html").text)
  for a, b in zip(cut["phases"], whole["phases"], strict=True):
    assert a["sparsity"] == b["sparsity"]
    for name in ("soup", "mean_candidate", "imp"):
      assert a[name]["validation_loss"] == pytest.approx(b[name]["validation_loss"], 1e-3)
    # Counted as stored: the masked network keeps its size, the cut one does not.
    assert b["parameters"] == whole["dense"]["parameters"] > a["parameters"]
    assert b["multiply_adds"] == whole["dense"]["multiply_adds"] > a["multiply_adds"]
    assert a["imp"]["parameters"] < b["imp"]["parameters"]
  first, last = (phase["parameters"] for phase in cut["phases"])
  assert first > last
  # 64 inputs, 10 classes, and the widths that the masks of the soup leave.
  soup = checkpoint.restore(shrunk / "soup" / "seed_0")
  widths = [int(soup["masks"][f"Dense_{i}"]["bias"].sum()) for i in (0, 1)]
  sizes = [64, *widths, 10]
  expected = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
  assert last == expected
  for i in (0, 1):
    kernel = np.asarray(soup["params"][f"Dense_{i}"]["kernel"])
    assert (kernel != 0).any(0).sum() == widths[i]


@pytest.mark.slow
def test_a_run_says_what_its_phases_cost(shrunk):
  found = results(shrunk)
  costs, (seed,) = found["costs"], found["seeds"]
  methods = [(p["method"], p["phase"], p["copies"]) for p in costs["phases"]]
  assert methods == [("dense", 0, 1), *(("sms", t, 2) for t in (1, 2)),
                     *(("imp", t, 1) for t in (1, 2))]  # fmt: skip
  for phase in costs["phases"]:
    assert phase["steps"] == 16 * (1 if phase["phase"] else 2)  # 1,077 images, 64 a batch
    assert phase["seconds_per_epoch"] > 0
  by_phase = costs["inference"]["phases"]
  for cut, phase in zip(by_phase, seed["phases"], strict=True):
    for name in ("parameters", "multiply_adds"):
      assert cut[name] == phase[name] < costs["inference"]["dense"][name]
      assert costs["inference"]["dense"][name] == seed["dense"][name]
    assert cut["bytes"] == 4 * cut["parameters"]
  groups = found["sensitivity"]["groups"]
  assert [(g["channels"], g["removed"]) for g in groups] == [(16, 4), (12, 3)]
  assert [g["multiply_adds"] for g in groups] == [16 * (64 + 12), 12 * (16 + 10)]


@pytest.mark.slow
@pytest.mark.parametrize("shrink", [True, False])
def test_each_phase_compiles_once_for_its_shapes(shrink, programs, tmp_path, quick_figures):
  """Two chunks an epoch share a program, and phases do where their shapes are the same."""
  flags = (*FLAGS[:-1], "--landscape=none", *(["--shrink"] if shrink else []))
  assert run(*flags, f"--workdir={tmp_path / 'run'}") == 0
  # One trains, and one predicts for each of validation and test data: of all copies at
  # once, and of the soup alone. IMP's copy is measured once.
  new = {True: (3, 1 + 2 + 2, 1 + 2 + 2, 3, 3), False: (3, 3, 0, 0, 0)}[shrink]
  names = [("dense", 0), ("sms", 1), ("sms", 2), ("imp", 1), ("imp", 2)]
  assert programs == list(zip(names, new, strict=True))


@pytest.mark.slow
def test_lines_between_cut_candidates_end_where_they_are(shrunk):
  (seed,) = results(shrunk)["seeds"]
  phase = seed["phases"][-1]
  (line,) = phase["landscape"]["lines"]
  assert phase["landscape"]["images"] == 120  # all of them, and no batch statistics
  ends = [candidate["validation_loss"] for candidate in phase["candidates"]]
  assert [line["loss"][0], line["loss"][-1]] == pytest.approx(ends, rel=1e-4)
  ends = [candidate["validation_accuracy"] for candidate in phase["candidates"]]
  assert [line["accuracy"][0], line["accuracy"][-1]] == pytest.approx(ends)


@pytest.mark.slow
def test_the_report_shows_them(shrunk):
  page = Page(shrunk / "report.html")
  (seed,) = results(shrunk)["seeds"]
  rows = {row[0]: row for row in page.rows if row}
  for phase in seed["phases"]:
    sizes = [f"{phase[name]:,}" for name in ("parameters", "multiply_adds")]
    assert rows[f"Phase {phase['phase']}"][1:3] == sizes
  assert rows["Dense_1"][:4] == ["Dense_1", "12", "312", "312"]
  text = " ".join(page.text)
  assert "of it compiling" in text and "Compiling took" in text
  assert "--shrink retrains the smaller" not in text
  assert "Test accuracy over the multiply-adds of one image's inference, cut." in text


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_in_the_shapes_of_its_phase(
  shrunk, tmp_path, monkeypatch
):
  passed, workdir = [], tmp_path / "stopped"

  def fault_point(name):
    passed.append(name)
    if len(passed) == 9:  # in the second phase
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patched:
    patched.setattr(checkpointing, "fault_point", fault_point)
    assert run(*FLAGS, "--shrink", f"--workdir={workdir}") == 143
  assert run(*FLAGS, "--shrink", f"--workdir={workdir}") == 0
  assert_same_run(workdir, shrunk)
  for found in ("sensitivity", "costs"):
    ours, whole = (results(w)[found] for w in (workdir, shrunk))
    assert without_times(ours) == without_times(whole)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--criterion=channels", "--shrink", "--baselines=swamp"], "whose masks are its own"),
    (
      ["--criterion=channels", "--shrink", "--baselines=imp_reprune"],
      "whose masks are its own",
    ),
    (["--shrink"], "and --criterion=magnitude leaves a part of each: give"),
    (["--criterion=filters", "--shrink"], "and --criterion=filters leaves a part"),
    (["--budget=channels"], "belongs to --criterion=channels"),
    (["--round_to=4"], "--round_to=4 belongs to --criterion=channels"),
    (["--criterion=channels", "--round_to=0"], "at least 1"),
    (["--criterion=channels", "--budget=weight"], "did you mean weights"),
    (
      ["--criterion=channels", "--goal_sparsity=0.9999"],
      "sparsity 0.9999 of the weights would empty a group of channels",
    ),
  ],
)
def test_what_cannot_shrink_is_refused(tmp_path, capsys, flags, words):
  assert run(*flags, f"--workdir={tmp_path / 'run'}") == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("round_to", [1, 4])
def test_groups_keep_a_multiple_of_round_to(round_to):
  def apply(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]

  params = {"a": jax.random.normal(jax.random.key(0), (5, 20)), "b": jnp.ones((20, 3))}
  groups = jaxsms.channel_groups(apply, params, jnp.ones((1, 5)))
  config = config_of("--criterion=channels", f"--round_to={round_to}")
  prune = pruning_criteria.channels(config, jax.random.key(1), lambda: groups)
  masks = prune(params, 0.3)
  # 30 % of 20 channels are 6, and 14 stay; with blocks of 4 only 12 do.
  assert int(masks["a"].any(0).sum()) == {1: 14, 4: 12}[round_to]


@pytest.mark.slow
def test_a_run_from_before_these_flags_goes_on(shrunk, tmp_path):
  config = config_of()
  assert not config.shrink
  assert config.budget == "weights"
  workdir = tmp_path / "run"
  shutil.copytree(shrunk, workdir)
  file = storage.as_path(workdir / "run.json")
  old = storage.read_json(file)
  for flags in (old["flags"], old["defining"]):
    for name in set(NEWER) - {"shrink"}:
      del flags[name]
  storage.write_json(file, old)
  assert run(*FLAGS, "--shrink", f"--workdir={workdir}") == 0
  assert run(*FLAGS, "--shrink", "--average=swa", f"--workdir={workdir}") == 2
