"""Reports of runs that are not alike, not whole, or not finite."""

import fake_runs
import pytest

from experiments.report import write_report


def drawn(page):
  return {path.stem for path in (page.parent / "figures").iterdir()}


def written(page):
  """The report's words, on one line."""
  return " ".join((page.parent / "report.md").read_text().split())


def small_run(path, goal, phases_done=2, lines=(), **flags):
  seeds = [fake_runs.entry(0, methods=(), ood=False, goal=goal)]
  seeds[0]["phases"] = seeds[0]["phases"][:phases_done]
  flags = fake_runs.run_flags(seeds=1, goal=goal) | flags
  return fake_runs.write_run(path, seeds, lines, flags, finished=phases_done == 2)


@pytest.mark.parametrize(
  "other, joined",
  [({}, True), ({"seed": 3, "baselines": []}, True), ({"epochs": 7}, False),
   ({"phases": 3}, False), ({"width": 2}, False)],
)  # fmt: skip
def test_only_runs_alike_share_a_line(tmp_path, other, joined):
  a = small_run(tmp_path / "a", 0.8, epochs=5)
  b = small_run(tmp_path / "b", 0.9, **({"epochs": 5} | other))
  found = drawn(write_report([a, b], tmp_path / "out"))
  assert ("accuracy-m3" in found) == joined
  assert ("accuracy-soups" in found) != joined


def test_a_run_before_its_goal_is_not_drawn_at_it(tmp_path):
  paths = [small_run(tmp_path / name, goal) for name, goal in (("a", 0.7), ("b", 0.8))]
  paths.append(small_run(tmp_path / "c", 0.9, phases_done=1))
  found = drawn(write_report(paths[1:], tmp_path / "two"))
  assert "accuracy-m3" not in found
  assert "accuracy-soups" in found
  from jaxsms.report import figures

  shown = []
  with pytest.MonkeyPatch.context() as patch:
    whole = figures.over_cases
    patch.setattr(figures, "over_cases", lambda c, *a: shown.append(c) or whole(c, *a))
    write_report(paths, tmp_path / "three")
  assert [[case.title for case in cases] for cases in shown] == [["a", "b"]] * 2
