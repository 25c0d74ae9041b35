"""The report of a run and of several: its numbers, its words, its files."""

import re
from html import unescape
from html.parser import HTMLParser

import fake_runs
import numpy as np
import pytest
from scipy import stats

from experiments import report as binary
from experiments.comparison import run_results
from experiments.report import write_report
from experiments.reporting.cases import Case
from experiments.reporting.document import Document, Section, Table
from experiments.reporting.page import html, markdown
from experiments.reporting.statistics import summarize
from experiments.reporting.summary import sentences

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
  """Checks that tags are balanced; keeps tables, headings, attributes and text."""

  def __init__(self, path):
    super().__init__()
    self.open, self.tags, self.attributes, self.rows, self.text = [], [], [], [], []
    self.feed(path.read_text())
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    self.attributes += attributes
    if tag not in VOID:
      self.open.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_startendtag(self, tag, attributes):
    self.attributes += attributes

  def handle_data(self, data):
    self.text.append(data)
    if self.open and self.open[-1] in ("td", "th"):
      self.rows[-1][-1] += data


def headings(path):
  return [unescape(title) for title in re.findall(r"<h2[^>]*>(.*?)</h2>", path.read_text())]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  """A report with every section, of a folder with a hostile name."""
  path = tmp_path_factory.mktemp("runs") / "<b>&'run\"_x_"
  seeds = [fake_runs.entry(seed) for seed in range(3)]
  seeds[1]["phases"][0]["diverged"] = [2]
  lines = [line for seed in range(3) for line in fake_runs.epochs_of(seed)]
  flags = fake_runs.run_flags(seeds=3, init="<script>alert('x')</script>|`y`")
  milliseconds = {"median": 2.0, "min": 1.0, "max": 3.0}
  models = {
    "dense": {"bytes": 4000, "milliseconds": milliseconds},
    "soup": {"bytes": 1000, "milliseconds": {"median": 0.5, "min": 0.4, "max": 0.6}},
    "compact": {"bytes": 500},
  }
  inference = {"device": "cpu", "batch": 32, "models": models}
  of_channels = {"costs": fake_runs.costs_of(), "sensitivity": fake_runs.sensitivity_of()}
  fake_runs.write_run(path, seeds, lines, flags, inference=inference, **of_channels)
  return seeds, write_report([path])


def test_all_sections_in_their_order(full):
  assert headings(full[1]) == [
    "Results",
    "Accuracy and calibration",
    "Learning curves",
    "Sparsity of each layer",
    "Geometry of the soup",
    "Loss between the candidates",
    "Size and speed, phase by phase",
    "What each group of channels costs",
    "Size and time of an inference",
    "Cost of an inference",
    "How this was made",
  ]


def test_what_phases_and_groups_of_channels_cost(full):
  page = Page(full[1])
  rows = {row[0]: row for row in page.rows if row}
  assert ["Dense", "6,000", "60,000", "24.0", "4", "", "2 [1, 3]", ""] in page.rows
  assert rows["Phase 1"][1:] == ["3,000", "30,000", "12.0", "2", "2.00", "1 [0.1, 3]",
                                 "2.00"]  # fmt: skip
  assert rows["Phase 2"][1:] == ["2,000", "20,000", "8.0", "1.33", "3.00",
                                 "0.667 [0.1, 3]", "3.00"]  # fmt: skip
  assert rows["Conv_0"] == ["Conv_0", "8", "900", "2,000", "25.0 %", "3.7", "2", "+1.2"]
  text = " ".join("".join(page.text).split())
  assert (
    "Compiling took 1 min 5 s of 1 h 1 min in all: dense training 5 s, phase 1 7 s"
    in (text)
  )
  assert "Took 1 h 1 min, 1 min 5 s of it compiling." in text


def test_numbers_of_the_table_are_scipys(full):
  seeds, page = full
  rows = Page(page).rows
  assert rows[0][3:] == ["Test accuracy", "Soup minus it", "OOD accuracy", "Soup minus it",
                         "ECE"]  # fmt: skip

  def of(name, metric):
    return 100 * np.array([s["phases"][-1][name][metric] for s in seeds])

  names = [row[2] if len(row) > 2 else "" for row in rows]
  last = len(names) - 1 - names[::-1].index("Sparse soup")
  soup = rows[last]
  assert soup[:2] == ["2", "90.00 %"]
  imp = rows[last + names[last:].index("IMP")]
  for cells, name in ((soup, "soup"), (imp, "imp")):
    for column, metric in (
      (3, "test_accuracy"), (5, "ood_accuracy"), (7, "test_expected_calibration_error")
    ):  # fmt: skip
      values = of(name, metric)
      assert cells[column] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
  for column, metric in ((4, "test_accuracy"), (6, "ood_accuracy")):
    a, b = of("soup", metric), of("imp", metric)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert imp[column] == f"{np.mean(a - b):+.2f} [{low:+.2f}, {high:+.2f}]"


def test_the_page_asks_for_nothing_and_has_no_script(full):
  page = Page(full[1])
  text = full[1].read_text()
  assert "script" not in page.tags
  links = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "srcset")]
  assert links
  assert all(v.startswith(("#", "data:")) for v in links)
  assert all(v.startswith("#") for v in re.findall(r"url\((.*?)\)", text))
  assert "http" not in text.replace("http-equiv", "")
  assert "@import" not in text


def test_ids_are_unique_and_links_lead_to_them(full):
  page = Page(full[1])
  ids = [v for k, v in page.attributes if k == "id"]
  assert len(ids) == len(set(ids))
  used = [v[1:] for k, v in page.attributes if k == "href" and v.startswith("#")]
  used += re.findall(r"url\(#(.*?)\)", full[1].read_text())
  assert used
  assert set(used) <= set(ids)


def test_every_figure_says_what_it_shows(full):
  page = Page(full[1])
  labels = [v for k, v in page.attributes if k == "aria-label" and v != "Table"]
  assert len(labels) == page.tags.count("figure") == 13
  assert all(len(label) > 15 for label in labels)


def test_names_and_flags_are_escaped(full):
  text = full[1].read_text()
  assert "<b>" not in text
  assert "<script" not in text
  everything = "".join(Page(full[1]).text)
  assert "<b>&'run\"_x_" in everything
  assert "<script>alert('x')</script>|`y`" in everything
  written = (full[1].parent / "report.md").read_text()
  shown = re.sub(r"```bash.*?```", "", written, flags=re.DOTALL)
  assert "<script" not in shown.replace(r"\<script", "")


def test_markdown_has_the_same_figures_as_files(full):
  folder = full[1].parent
  text = (folder / "report.md").read_text()
  links = re.findall(r"\]\((.*?)\)", text)
  assert len(links) == 26
  for link in links:
    data = (folder / link).read_bytes()
    assert data.startswith(b"\x89PNG") or b"<svg" in data
    assert len(data) < 300_000
  counts = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
  assert len(counts) == 4  # as many tables, none with a ragged row


def test_warnings_and_costs(full):
  everything = " ".join(Page(full[1]).text)
  assert "Seed 1, phase 1: 1 of 3 copies diverged" in everything
  rows = Page(full[1]).rows
  assert ["Soup of phase 2", "90.00 %", "100", "800", "10.00"] in rows
  device = "<b>&'run\"_x_, cpu, batch of 32"
  assert [device, "dense", "4.0", "1.00", "2 [1, 3]", "1.00"] in rows
  assert ["", "soup", "1.0", "4.00", "0.5 [0.4, 0.6]", "4.00"] in rows
  assert ["", "compact", "0.5", "8.00", "", ""] in rows


def test_the_command_is_in_it(full):
  command = re.search(r"<pre>(.*?)</pre>", full[1].read_text())[1]
  assert unescape(command).startswith("python -m experiments.sms ")
  assert "--baselines=imp" in command
  assert "--seeds=3" in command
  assert "1 h 1 min" in full[1].read_text()


def case_of(soups, candidates, imps, failed=False):
  seeds = []
  for number, (soup, candidate, imp) in enumerate(
    zip(soups, candidates, imps, strict=True)
  ):
    phase = {"phase": 1, "sparsity": 0.95, "candidates": []}
    if failed:
      phase["averaging_failed"] = {"barrier": 1}
    values = {"soup": soup, "mean_candidate": candidate, "imp": imp}
    phase |= {name: {"test_accuracy": value} for name, value in values.items()}
    dense = {"test_accuracy": soup}
    seeds.append({"seed": number, "dense": dense, "phases": [phase]})
  flags = {"model": "mlp", "dataset": "digits", "ingredients": 5}
  return Case("run", flags, seeds)


def test_summary_above_below_equal_and_unclear():
  # Differences 4 and 4.2 points: 4.1 ± 12.706 * 0.1; -1 and 1 to IMP: 0 ± 12.7.
  text = " ".join(sentences(case_of((0.94, 0.96), (0.90, 0.918), (0.90, 0.98))))
  assert text.startswith(
    "At 95.00 % sparsity the soup of 5 has 95.00 % test accuracy, the mean of 2 seeds: "
    "4.10 points above the mean of its candidates [+2.83, +5.37]; 1.00 points above IMP, "
    "which trains as many steps as one copy ["
  )
  assert "], which may be chance; the same to two decimals as the dense network" in text
  text = " ".join(sentences(case_of((0.90, 0.92), (0.95, 0.971), (0.9, 0.9))))
  assert "5.05 points below the mean of its candidates [-5.69, -4.41]; " in text


def test_summary_with_one_seed_promises_nothing():
  text = " ".join(sentences(case_of((0.95,), (0.9,), (0.96,))))
  assert (
    "with one seed: 5.00 points above the mean of its candidates; 1.00 points below IMP"
    in text
  )
  assert "may be chance" in text
  assert "[" not in text


def test_summary_of_failed_averaging_and_of_nothing():
  assert "averaging failed" in " ".join(sentences(case_of((0.5,), (0.9,), (0.9,), True)))
  case = case_of((0.95,), (0.9,), (0.96,))
  case.seeds[0]["phases"] = []
  assert sentences(case) == [
    "No phase is finished yet; the dense network has 95.00 % test accuracy."
  ]
  assert sentences(case._replace(seeds=[])) == ["Nothing is finished yet."]


def test_methods_missing_from_some_seeds():
  seeds = [fake_runs.entry(seed, phases=1) for seed in range(3)]
  del seeds[1]["phases"][0]["imp"]
  (row,) = summarize(seeds)
  of = [s["phases"][0] for s in (seeds[0], seeds[2])]
  assert row["imp"]["seeds"] == 2
  assert row["imp"]["mean"] == pytest.approx(
    np.mean([p["imp"]["test_accuracy"] for p in of])
  )
  gains = [p["soup"]["test_accuracy"] - p["imp"]["test_accuracy"] for p in of]
  assert row["imp"]["soup_minus"]["mean"] == pytest.approx(np.mean(gains))
  assert "seeds" not in row["soup"]


@pytest.mark.slow
def test_a_run_under_way(tmp_path):
  seeds = [fake_runs.entry(seed, methods=("imp", "bimp")) for seed in range(2)]
  evaluations = fake_runs.evaluations_of(seeds[1])
  cut = [e for e in evaluations if e["phase"] < 2]  # bimp of phase 1 is not its last
  flags = fake_runs.run_flags(seeds=4)
  fake_runs.write_run(tmp_path / "run", seeds[:1], cut, flags, finished=False)
  with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
    file.write('{"seed": 1, "method": "sms", "pha')
  page = write_report([tmp_path / "run"], tmp_path / "out")
  assert not (tmp_path / "run" / "report.html").exists()
  everything = " ".join(Page(page).text)
  assert "Not finished: 1 of 4 seeds are, and 1 of 2 phases of seed 1." in everything
  rows = [row for row in Page(page).rows if len(row) > 3]
  values = [100 * s["phases"][0]["soup"]["test_accuracy"] for s in seeds]
  assert rows[1][3] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
  assert [row[2] for row in rows].count("BIMP (1 seed)") == 2
  assert "Learning curves" not in headings(page)


def test_before_the_first_seed_ends(tmp_path):
  seed = fake_runs.entry(0)
  lines = fake_runs.evaluations_of(seed)
  fake_runs.write_run(tmp_path, [], lines[:1] + fake_runs.epochs_of(0)[:2])
  page = write_report([tmp_path])
  assert "No phase is finished yet" in page.read_text()
  assert headings(page) == ["Learning curves", "Cost of an inference", "How this was made"]


def test_sections_without_data_are_left_out(tmp_path):
  case = case_of((0.94, 0.96), (0.90, 0.918), (0.90, 0.98))
  flags = fake_runs.run_flags()
  fake_runs.write_run(tmp_path, case.seeds, flags=flags)
  page = write_report([tmp_path])
  assert headings(page) == ["Results", "Accuracy and calibration", "How this was made"]
  assert Page(page).tags.count("figure") == 1
  assert "OOD" not in page.read_text()


@pytest.mark.slow
def test_several_runs_and_a_comparison_share_a_report(tmp_path, rejects):
  small = [fake_runs.entry(0, ood=False)]
  for name in ("a", "b"):
    fake_runs.write_run(tmp_path / name / "run", small)
  paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
  with rejects("--out"):
    write_report(paths)
  page = write_report(paths, tmp_path / "both")
  firsts = [row[0] for row in Page(page).rows]
  assert {"run (1)", "run (2)"} <= set(firsts)
  assert (tmp_path / "both" / "figures" / "accuracy-soups.svg").exists()


@pytest.mark.slow
def test_a_comparison(tmp_path):
  fake_runs.write_comparison(tmp_path, (0.8, 0.9), (2, 3))
  page = write_report([tmp_path])
  drawn = {path.name for path in (tmp_path / "figures").iterdir()}
  assert {"accuracy-m2.svg", "accuracy-m3.png", "accuracy-goal80.svg"} <= drawn
  assert {"accuracy-4.png", "plane-2.svg", "geometry-angle.svg"} <= drawn
  assert "plane-1.svg" not in drawn  # two copies span no plane
  assert page.read_text().count("paired by seed.</p>") == 1
  command = re.search(r"<pre>(.*?)</pre>", page.read_text())[1]
  assert command.startswith("python -m experiments.compare ")
  for word in ("--sparsities=0.8,0.9", "--copies=2,3", "--baselines=imp", "--seeds=2"):
    assert word in command.split()
  assert "80 %, m = 2" in [row[0] for row in Page(page).rows]


def test_commands_name_the_package_that_is_there(tmp_path, monkeypatch):
  monkeypatch.setattr(run_results, "__package__", "jaxsms.experiments.reporting")
  fake_runs.write_run(tmp_path / "run", [fake_runs.entry(0)])
  fake_runs.write_comparison(tmp_path / "grid", (0.8,), (2,))
  for name, job in (("run", "sms"), ("grid", "compare")):
    _, origin = run_results.read(tmp_path / name)
    assert origin.command.startswith(f"python -m jaxsms.experiments.{job} ")


@pytest.mark.slow
def test_all_versions_that_did_a_part_are_named(tmp_path):
  here, there = ({**fake_runs.ENVIRONMENT, "jax": jax} for jax in ("0.9.1", "0.10.2"))
  listed = [{"from": "the start", "environment": here}]
  listed.append({"from": "seed 0, dense, step 8", "environment": there})
  path = tmp_path / "run"
  fake_runs.write_run(path, [fake_runs.entry(0)], environments=listed)
  text = "".join(Page(write_report([path])).text)
  assert re.search(r"jax 0\.9\.1; 1 x cpu \(\?\)\. Also .*jax 0\.10\.2; 1 x cpu", text)


def test_bad_directories(tmp_path, rejects, capsys):
  with rejects("there is no"):
    write_report([tmp_path / "missing"])
  with rejects("holds no run"):
    write_report([tmp_path])
  (tmp_path / "file").write_text("x")
  with rejects("file"):
    write_report([tmp_path / "file"])
  fake_runs.write_run(tmp_path / "new", [])
  with rejects("nothing is finished yet"):
    write_report([tmp_path / "new"])
  run = (tmp_path / "new" / "run.json").read_text()
  (tmp_path / "new" / "run.json").write_text(run.replace("mlp", "x"))
  with rejects("another version"):
    write_report([tmp_path / "new"])
  with pytest.raises(SystemExit, match="2"):
    binary.main([str(tmp_path / "missing")])
  assert capsys.readouterr().err.count("\n") == 1
  fake_runs.write_run(tmp_path / "run", [fake_runs.entry(0, phases=0)])
  with pytest.raises(SystemExit, match="2"):
    binary.main([str(tmp_path / "run"), f"--out={tmp_path / 'file'}"])
  assert "cannot be written" in capsys.readouterr().err


def test_tables_in_both_languages():
  table = Table(
    ("Model", "A|B"), [[["Sparse soup", "1_a_"]], [["x", "<y>"]]], (0,), "Sparse soup"
  )
  document = Document("T", "S", ["s"], [], [Section("R", [table])])
  text = html(document, {})
  assert '<tr class="strong"><td class="word">Sparse soup</td><td>1_a_</td></tr>' in text
  assert "<td>&lt;y&gt;</td>" in text
  assert markdown(document).splitlines()[-4:] == [
    "| Model | A\\|B |",
    "| --- | ---: |",
    "| **Sparse soup** | **1_a\\_** |",
    "| x | \\<y\\> |",
  ]
