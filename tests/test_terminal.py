"""What is printed is text: brackets, colons and dollars in paths and messages stay."""

import io
import json
import os
import pathlib
import re

import main_job
import numpy as np
import pytest
from absl import flags
from rich.table import Table

from experiments import report, soup
from experiments.benchmarks import bench_tables
from experiments.reporting.tables import console_table
from experiments.run.progress import RunProgress
from experiments.run.terminal import print_line, terminal
from jaxsms import checkpoint
from jaxsms.data import tfds_corrupted
from jaxsms.training import Chunk

ROOT = pathlib.Path(__file__).parent.parent
HARD = "runs/[lr0.1] [/b] :x: [link=a]$b$_{ [red]a"


def printed(console):
  return " ".join(console.file.getvalue().split())


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def console(request):
  """One that writes to a string, as if it were a terminal or not."""
  return terminal(
    file=io.StringIO(), width=200, force_terminal=request.param, no_color=True
  )


def test_sentences_and_tables_are_printed_as_they_are(console):
  print_line(console, f"Results: {HARD}")
  table = Table(title=f"title {HARD}", caption=f"caption {HARD}")
  table.add_column(f"column {HARD}")
  table.add_row(f"cell {HARD}")
  console.print(table)
  for words in ("Results:", "title", "caption", "column", "cell"):
    assert f"{words} {HARD}" in printed(console)


def test_a_long_path_stays_on_one_line():
  console = terminal(file=io.StringIO(), width=20)
  print_line(console, "Soup: /a b/" + 30 * "[x]")
  assert console.file.getvalue() == "Soup: /a b/" + 30 * "[x]" + "\n"


@pytest.mark.parametrize("bar", [False, True], ids=["lines", "bar"])
def test_progress_shows_titles_as_they_are(bar, monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  console = terminal(file=io.StringIO(), width=200, force_terminal=bar, record=True)
  one = np.array([0.5])
  with RunProgress({1: 10}, console) as progress:
    progress.chunk(
      HARD, 1, Chunk(1, 10, 10, 10, 1, loss=one, accuracy=one, learning_rate=one)
    )
  assert HARD in console.export_text()


def test_the_table_of_a_run_is_text_on_any_console():
  from rich.console import Console

  console = Console(file=io.StringIO(), width=200)
  console.print(console_table([[["1", "", "[red]x", "y", "z"]]], "title [red]"))
  assert "title [red]" in printed(console)
  assert "[red]x" in printed(console)


def test_notes_of_the_benchmark_keep_their_brackets(console):
  results = {
    "work": {"peak_flops": None, "peak_source": "unknown"},
    "copies": [{"peak_bytes_source": "XLA", "torch": {}}],
    "notes": ["run `pip install -e '.[bench]'` to compare"],
  }
  for line in bench_tables.notes(results):
    console.print(line)
  assert "pip install -e '.[bench]'" in printed(console)


def test_nothing_else_makes_a_console():
  for path in sorted((ROOT / "experiments").rglob("*.py")):
    if path.name != "terminal.py":
      assert not re.search(
        r"\b(Console\(|TextColumn\(|rich import print)", path.read_text()
      ), path


@pytest.fixture(scope="module")
def hard_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("hard") / HARD


@pytest.fixture(scope="module")
def finished(hard_folder, quick_compilation):
  """The main job in a folder with such a name: what it printed."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    small = (*main_job.SMALL, "--phases=1", f"--workdir={hard_folder / 'run'}")
    assert main_job.run(*small) == 0, err.getvalue()
  return out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_the_main_job_names_its_folder_and_writes_its_report_there(finished, hard_folder):
  out, err = finished
  workdir = hard_folder / "run"
  assert out.splitlines()[-1].endswith(f"Results, soup, metrics and report: {workdir}")
  assert "Traceback" not in err
  for name in ("results.json", "report.html", "report.md", "accuracy.png", "accuracy.svg"):
    assert (workdir / name).stat().st_size > 0
  assert (workdir / "soup" / "seed_0").is_dir()


def test_checkpoints_and_data_are_found_there(tmp_path):
  tree = {"kernel": np.arange(6.0).reshape(2, 3)}
  checkpoint.save(tmp_path / HARD / "[a]", tree, {"step": 3})
  found = checkpoint.restore(tmp_path / HARD / "[a]")
  np.testing.assert_array_equal(found["kernel"], tree["kernel"])
  prepared = tmp_path / HARD / "some_corrupted" / "fog_3" / "1.0.0"
  prepared.mkdir(parents=True)
  (prepared / "dataset_info.json").touch()
  found = tfds_corrupted.corrupted_folders("some", str(tmp_path / HARD))
  assert {name: list(map(str, at)) for name, at in found.items()} == {
    "some_corrupted/fog_3": [str(prepared)]
  }


@pytest.mark.slow
def test_a_finished_run_is_found_there_again(finished, hard_folder, capsys):
  workdir = hard_folder / "run"
  assert main_job.run(*main_job.SMALL, "--phases=1", f"--workdir={workdir}") == 0
  said = capsys.readouterr()
  assert f"{workdir} holds this run, finished" in said.err
  assert str(workdir) in said.out


@pytest.mark.slow
def test_reports_of_it_name_the_page(finished, hard_folder, tmp_path, capsys):
  out = tmp_path / HARD
  workdir = str(hard_folder / "run")
  report.main([workdir, workdir, f"--out={out}"])
  assert capsys.readouterr().out.strip() == str(out / "report.html")
  assert list((out / "figures").glob("*.png"))


@pytest.mark.slow
def test_soups_of_what_lies_there_name_the_file(finished, hard_folder, tmp_path, capsys):
  model, out = hard_folder / "run" / "soup" / "seed_0", tmp_path / f"{HARD}.npz"
  main_job.parse()
  main_job.unparse("out", "masks", "sparsity", "weights", "greedy")
  argv = flags.FLAGS(["soup", str(model), str(model), f"--out={out}"])
  assert main_job.exit_status(soup.main, argv) == 0
  said = capsys.readouterr().out
  assert said.splitlines()[-1] == f"Soup: {out}"
  assert "[lr0.1]" in said.split("Soup:")[0]
  with np.load(out) as arrays:
    assert sum(np.sum(arrays[name] == 0) for name in arrays) > 0


@pytest.mark.slow
def test_results_name_the_folder_as_it_is(finished, hard_folder):
  results = json.loads((hard_folder / "run" / "results.json").read_text())
  assert results["flags"]["workdir"] == os.fspath(hard_folder / "run")
