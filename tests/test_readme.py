"""README's snippets run as written, and its commands are those that are tested."""

import pathlib
import re

import jax
import numpy as np
import pytest

import jaxsms
from experiments import settings
from jaxsms import prunable

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def names():
  """What README's Python blocks define, run one after another."""
  defined = {}
  for block in blocks("python"):
    exec(compile(block, "README.md", "exec"), defined)
  return defined


def share_removed(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  weights = np.concatenate([np.ravel(x) for path, x in leaves if prunable(path, x)])
  return np.mean(weights == 0)


def test_snippets_give_a_sparse_soup_that_works(names):
  n = 64 * 128 + 128 * 10
  assert share_removed(names["soup"].params) == pytest.approx(round(0.9 * n) / n)
  assert share_removed(names["average"]) == pytest.approx(round(0.9 * n) / n)
  assert names["accuracy"] > 0.85


def test_main_job_commands_use_flags_that_exist():
  commands = re.findall(r"-m experiments\.sms(.*)", README)
  assert len(commands) >= 3
  for flag in re.findall(r"--(\w+)", " ".join(commands)):
    assert flag in settings.FLAGS, flag


def test_ci_calls_readmes_test_command():
  assert "bin/pytest" in "".join(blocks("bash"))
  script = (ROOT / ".ci" / "run").read_text()
  pattern = re.search(r"grep -E '(.*)' README.md", script).group(1)
  commands = [line for line in README.splitlines() if re.search(pattern, line)]
  assert len(commands) == 1
  assert commands[0] in blocks("bash")[-1]
  assert 'eval "$test_command"' in script


def test_every_name_that_readme_shows_is_there():
  for name in re.findall(r"\bjaxsms\.([\w.]+\w)", README):
    found = jaxsms
    for part in name.split("."):
      found = getattr(found, part)
