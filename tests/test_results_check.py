"""Results that somebody edited: read, or refused in one sentence; never a traceback."""

import contextlib
import copy
import json
import pathlib
import re
import shutil
import subprocess
import sys

import fake_runs
import hypothesis
import pytest
from hypothesis import strategies as st
from main_job import ROOT, SMALL, run

from experiments import report
from experiments.comparison import parts as comparison
from experiments.comparison import run_results
from experiments.reporting import sections
from experiments.reporting.statistics import summarize
from experiments.reporting.tables import console_table, rows
from experiments.run import run_directory
from experiments.run.metrics_file import read_lines
from experiments.schemas.results_check import check_results
from jaxsms.disk import storage

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_figures")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  """A run that was really made: its folder."""
  folder = tmp_path_factory.mktemp("real") / "run"
  flags = ("--baselines=imp", "--landscape=last", "--ingredients=3")
  assert run(*SMALL, *flags, f"--workdir={folder}") == 0
  return folder


def document(folder, name="results.json"):
  return storage.read_json(storage.as_path(folder) / name)


@pytest.fixture
def edited(real, tmp_path):
  """Writes an edited copy: `edited(change)` gives its folder; the digest is right."""

  def write(change, name="results.json"):
    folder = pathlib.Path(shutil.copytree(real, tmp_path / "edited"))
    content = document(folder, name)
    change(content)
    write_as_it_is(folder / name, content)
    return folder

  return write


def write_as_it_is(path, content):
  """With a digest, and whatever is in it: `write_json` would make it plain."""
  content = {**content, "format": storage.FORMAT}
  text = json.dumps({**content, "digest": storage._digest(content)}, allow_nan=False)
  path.write_text(text)


@pytest.mark.slow
def test_what_a_run_writes_is_right(real):
  check_results("", document(real))
  lines = list(read_lines((real / "metrics.jsonl").read_bytes()))
  assert len(lines) == len((real / "metrics.jsonl").read_bytes().splitlines()) > 10
  assert run_results.read(real)[0][0].seeds[0] == document(real)["seeds"][0]


def test_what_a_comparison_writes_is_right(tmp_path):
  path = fake_runs.write_comparison(tmp_path, (0.8, 0.9), (2, 3))
  check_results("", document(path))


@pytest.mark.slow
def test_a_digit_that_was_edited_is_told_with_its_file(real, tmp_path, capsys):
  folder = pathlib.Path(shutil.copytree(real, tmp_path / "run"))
  file = folder / "results.json"
  accuracy = str(document(folder)["seeds"][0]["dense"]["test_accuracy"])
  changed = accuracy[:-1] + str((int(accuracy[-1]) + 1) % 10)
  file.write_text(file.read_text().replace(accuracy, changed, 1))
  with pytest.raises(SystemExit, match="2"):
    report.main([str(folder)])
  error = capsys.readouterr().err
  assert error.startswith(f"error: {file} is damaged: its content does not have its digest")
  assert error.count("\n") == 1


def put(*steps):
  """Sets what lies at the end of these keys and positions."""
  *path, last, value = steps

  def change(content):
    for step in path:
      content = content[step]
    content[last] = value

  return change


def drop(*steps):
  *path, last = steps

  def change(content):
    for step in path:
      content = content[step]
    del content[last]

  return change


SEED = ("seeds", 0)
PHASE = (*SEED, "phases", 0)
DEEP: list = []
for _ in range(900):
  DEEP = [DEEP]
EDITS = {
  "flags": put("flags", None),
  "flags.ingredients": put("flags", "ingredients", 0),
  "flags.model": put("flags", "model", 3),
  "flags.phases": drop("flags", "phases"),
  "flags.hidden": put("flags", "hidden", DEEP),
  "flags.goal_sparsity": put("flags", "goal_sparsity", "0.9"),
  "environment": put("environment", ["jax"]),
  "seconds": put("seconds", "<b>"),
  "seconds ": put("seconds", True),
  "seconds  ": put("seconds", 10**400),
  "finished": put("finished", "yes"),
  "seeds": put("seeds", {"0": 1}),
  "seeds ": drop("seeds"),
  "seeds[0]": put("seeds", 0, None),
  "seeds[0].seed": put(*SEED, "seed", "zero"),
  "seeds[0].dense": put(*SEED, "dense", None),
  "seeds[0].dense.test_accuracy": drop(*SEED, "dense", "test_accuracy"),
  "seeds[0].phases": put(*SEED, "phases", "two"),
  "seeds[0].phases[0].phase": put(*PHASE, "phase", -1),
  "seeds[0].phases[0].sparsity": put(*PHASE, "sparsity", None),
  "seeds[0].phases[0].soup": put(*PHASE, "soup", [1]),
  "seeds[0].phases[0].soup.test_accuracy": put(*PHASE, "soup", "test_accuracy", "NaN"),
  "seeds[0].phases[0].imp.test_accuracy": put(*PHASE, "imp", "test_accuracy", 90),
  "seeds[0].phases[0].soup.layer_sparsities": put(*PHASE, "soup", "layer_sparsities", 1),
  "seeds[0].phases[1].soup.layer_sparsities": put(
    *SEED, "phases", 1, "soup", "layer_sparsities", {"other": 0.5}
  ),
  "seeds[0].phases[0].soup.multiply_adds": drop(*PHASE, "soup", "multiply_adds"),
  "seeds[0].phases[0].candidates": put(*PHASE, "candidates", 3),
  "seeds[0].phases[0].geometry.mean_angle": drop(*PHASE, "geometry", "mean_angle"),
  "seeds[0].phases[0].diverged": put(*PHASE, "diverged", [None]),
  "seeds[0].phases[0].averaging_failed": put(*PHASE, "averaging_failed", "no"),
  "seeds[0].phases[1].landscape.lines": put(*SEED, "phases", 1, "landscape", "lines", []),
  "seeds[0].phases[1].landscape.plane.loss": put(
    *SEED, "phases", 1, "landscape", "plane", "loss", [[1, 2], [3]]
  ),
  "costs.phases": put("costs", "phases", None),
  "costs.phases[0].copies": put("costs", "phases", 0, "copies", 0),
  "costs.compiling_seconds": put("costs", "compiling_seconds", None),
  "costs.inference": put("costs", "inference", 3),
  "sensitivity": put("sensitivity", [1]),
  "inference.models": put("inference", "models", {"dense": 3}),
  "inference.models.dense.bytes": put("inference", "models", "dense", "bytes", "many"),
  "ood_sources": put("ood_sources", [[]]),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", EDITS)
def test_edits_with_a_right_digest_are_refused_and_named(
  where, edited, capsys, monkeypatch
):
  folder = edited(EDITS[where])
  with pytest.raises(SystemExit, match="2"):
    report.main([str(folder)])
  error = capsys.readouterr().err
  assert error.startswith(f"error: {folder}")
  assert error.count("\n") == 1
  named, should = error.split(" should be ")
  assert should
  if not where.endswith("multiply_adds"):  # of two soups that differ the other is named
    assert where.strip() in named
  assert run_directory.read_results(folder) is None
  assert comparison.finished_parts(folder) == {}


@pytest.mark.slow
def test_a_run_goes_on_where_its_results_were_edited(edited, real, capsys):
  """They are set aside, and written anew from the last checkpoint."""
  folder = edited(put("flags", None))
  flags = ("--baselines=imp", "--landscape=last", "--ingredients=3")
  assert run(*SMALL, *flags, f"--workdir={folder}") == 0
  assert (folder / "results.json.damaged").exists()
  assert document(folder)["seeds"] == document(real)["seeds"]


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, [], {"model": None, "seed": [[1]]}])
def test_flags_of_a_run_file_that_are_none(edited, value, capsys):
  folder = edited(put("flags", value), "run.json")
  for checkpoint in (folder / "checkpoints").iterdir():
    shutil.rmtree(checkpoint)
  with pytest.raises(ValueError, match="is lost"):
    run_directory.read_run(folder)
  assert run(*SMALL, f"--workdir={folder}") == 2
  assert capsys.readouterr().err.count("\n") == 1


BAD_LINES = [
  b"[" * 100_000,
  b'{"seed": 0, "method": "sms", "phase": 1, "epoch": 1, "loss": ' + b"[" * 900 + b"]" * 900
  + b', "accuracy": [0.5], "learning_rate": [0.1]}',
  b'{"seed": 0, "method": [], "phase": 1, "evaluation": {}}',
  b'{"seed": null, "method": "sms", "phase": 1, "evaluation": {"phase": 1}}',
  b'{"seed": 0, "method": "imp", "phase": 1, "evaluation": {"soup": null}}',
  b'{"seed": 0, "method": "sms", "phase": 1, "epoch": 1e99, "loss": [1], "accuracy": [1], '
  b'"learning_rate": [1]}',
  b'{"seed": 0, "method": "sms", "phase": 1, "epoch": 1, "loss": [1, 2], "accuracy": [1], '
  b'"learning_rate": [1, 2]}',
  b'{"seed": 0, "method": "sms", "phase": 1, "epoch": 1, "loss": [NaN], "accuracy": [1], '
  b'"learning_rate": [1]}',
  b'{"seed": 0, "method": "sms", "phase": 1, "epoch": 9, "loss": [1], "accuracy": [1], '
  b'"learning_rate": [1]}',
]  # fmt: skip


def test_lines_of_the_metrics_that_make_no_sense_are_left_out():
  good = [json.dumps(line).encode() for line in fake_runs.epochs_of(0, m=3)]
  entry = fake_runs.entry(0)
  good += [json.dumps(line).encode() for line in fake_runs.evaluations_of(entry)]
  found = list(read_lines(b"\n".join([*good, *BAD_LINES])))
  assert found == [json.loads(line) for line in good]


ODD = st.sampled_from(
  [None, True, -1, 0, 10**400, 0.5, 1e308, "<b>", "NaN", "\x00", "$x^{$", [], {}, [[1]],
   {"": None}, [None, "a"], {"a": {"b": []}}]
)  # fmt: skip


def places(value, path=()):
  """All keys and positions in a document."""
  found = [path] if path else []
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, one in items:
    if isinstance(one, (dict, list)) and one:
      found += places(one, (*path, key))
    else:
      found.append((*path, key))
  return found


@pytest.mark.slow
@hypothesis.settings(max_examples=25)
@hypothesis.given(st.data())
def test_any_edits_are_read_or_refused_in_one_sentence(real, tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("mutated") / "run"
  folder.mkdir()
  shutil.copy(real / "run.json", folder)
  results = document(real)
  lines = [json.loads(line) for line in (real / "metrics.jsonl").read_text().splitlines()]
  target = data.draw(st.sampled_from(["results", "metrics"]))
  if target == "metrics" and data.draw(st.booleans()):
    results["seeds"] = []  # what the metrics say is drawn
  content = results if target == "results" else {"lines": lines}
  everywhere = places(content)
  for _ in range(data.draw(st.integers(1, 3))):
    *path, last = data.draw(st.sampled_from(everywhere))
    place = content
    with contextlib.suppress(KeyError, IndexError, TypeError):
      for step in path:
        place = place[step]
      change = data.draw(st.sampled_from(["set", "drop", "copy"]))
      if change == "set":
        place[last] = copy.deepcopy(data.draw(ODD))
      elif change == "drop":
        del place[last]
      elif isinstance(place, list):
        place.append(copy.deepcopy(place[last]))
  if target == "results" or not results["seeds"]:
    write_as_it_is(folder / "results.json", results)
  lines = content.get("lines", lines)
  lines = lines if isinstance(lines, list) else []
  (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  try:
    cases, origins = run_results.read(folder)
  except ValueError as error:
    assert "\n" not in str(error)
    assert str(folder) in str(error)
    return
  # All that a page says and draws; files alone are not written.
  sections.document("", "", cases, [origins])
  report.headings(cases, [origins])
  for case in cases:
    console_table(rows(summarize(case.seeds), case.m), "")


def test_the_notebook_reads_through_the_same_check():
  notebook = json.loads((ROOT / "experiments" / "paper_figures.ipynb").read_text())
  source = "".join("".join(cell["source"]) for cell in notebook["cells"])
  assert "run_directory.checked_results(" in source
  assert "json.load" not in source


def test_what_the_notebook_takes_from_here_is_there():
  notebook = json.loads((ROOT / "experiments" / "paper_figures.ipynb").read_text())
  cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
  source = "\n".join(map("".join, cells))
  lines = re.findall(r"^(?:from|import) (?:experiments|jaxsms).*$", source, re.MULTILINE)
  names: dict = {}
  exec("\n".join(lines), names)
  assert names.keys() >= {"looks", "report", "run_directory"}
  for module, name in set(re.findall(r"\b(report|run_directory)\.(\w+)", source)):
    assert hasattr(names[module], name)
  for name in ("soup", "mean_candidate", "best_candidate", "imp_mx"):
    _, colour, marker = names["looks"]()[name]
    assert re.fullmatch("#[0-9A-F]{6}", colour)
    assert marker


@pytest.mark.slow
def test_the_command_itself_ends_with_one_sentence(edited):
  folder = edited(put("seconds", "<b>"))
  command = [sys.executable, "-m", "experiments.report", str(folder)]
  found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert found.returncode == 2
  assert found.stderr.count("\n") == 1
