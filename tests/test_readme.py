"""README and the guide run as written: snippets, commands, messages, links."""

import ast
import importlib
import json
import os
import pydoc
import re
import shlex
import socket
import subprocess
import sys

import jax
import main_job
import numpy as np
import pages
import pytest
import soup_runs
from absl import flags
from pages import ALL, CHAPTERS, PAGES, README, ROOT, blocks, snippets

import jaxsms
from experiments.config.pruning_criteria import CRITERIA
from experiments.methods import METHODS
from jaxsms import prunable
from jaxsms.disk.by_name import by_path
from jaxsms.disk.safetensors import read_safetensors


def share_removed(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  weights = np.concatenate([np.ravel(x) for path, x in leaves if prunable(path, x)])
  return np.mean(weights == 0)


N = 64 * 128 + 128 * 10
OWN_CODE = CHAPTERS["own_code"]
FIRST = 3  # the data, and the loop before and after


def test_readmes_own_code(quick_compilation):
  names = pages.run(README, {})
  assert share_removed(names["soup"].params) == pytest.approx(round(0.9 * N) / N)
  accuracy = jaxsms.accuracy(names["logits"], names["labels"][1500:])
  assert accuracy > 0.85
  sizes = [x.shape for x in jax.tree.leaves(names["small"].params) if x.ndim == 2]
  assert sizes == [(64, 32), (32, 10)]
  cut = names["small"].apply(names["small"].params, names["images"] / 16)
  masked = jaxsms.apply_masks(names["dense"], names["masks"])
  whole = names["network"].apply(masked, names["images"] / 16)
  np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def names(quick_compilation):
  """What the first snippets of the chapter define, run one after another."""
  defined = pages.run(OWN_CODE, {}, slice(FIRST))
  return {**defined, "fine_tuned": defined["params"]}


def test_one_line_prunes_in_a_loop_that_was_there(names):
  (diff,) = blocks(OWN_CODE, "diff")
  marks = [line[:1] for line in diff.splitlines()]
  assert marks.count("+") == marks.count("-") == 1
  assert share_removed(names["fine_tuned"]) == pytest.approx(round(0.9 * N) / N)
  assert names["accuracy"](names["fine_tuned"]) > 0.8


@pytest.mark.slow
def test_all_other_snippets_of_own_code(names, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # one of them writes models
  pages.run(OWN_CODE, names, slice(FIRST, None))
  assert share_removed(names["soup"].params) == pytest.approx(round(0.9 * N) / N)
  assert names["accuracy"](names["soup"].params) > 0.85
  assert share_removed(names["average"]) == pytest.approx(round(0.9 * N) / N)
  for soup in ("nnx_soup", "eqx_soup", "haiku_soup"):
    assert share_removed(names[soup].params) == pytest.approx(round(0.75 * N) / N), soup
  assert share_removed(names["own"].params) == pytest.approx(round(0.8 * N) / N)
  weighted, mean = names["weighted_soup"](names["candidates"]), names["average"]
  assert share_removed(weighted) == share_removed(mean)
  leaves = zip(jax.tree.leaves(weighted), jax.tree.leaves(mean), strict=True)
  assert any(np.any(a != b) for a, b in leaves)

  # The models on disk and their squared gradients, merged by the command that is shown.
  (command,) = (c for c in SOUPS if "model_0" in c)
  assert soup_runs.run(*shlex.split(modules(command).group(2))) == 0
  squares = [jaxsms.checkpoint.restore(f"squares_{i}") for i in range(3)]
  models = [by_path(model) for model in names["models"][:3]]
  for name, soup in read_safetensors(tmp_path / "fisher.safetensors").items():
    weights = np.stack([by_path(square)[name] for square in squares]).astype(np.float64)
    assert weights.max() > 0 and weights.min() >= 0, name
    values = np.stack([model[name] for model in models])
    total = weights.sum(0)
    average = (weights * values).sum(0) / np.where(total > 0, total, 1)
    expected = np.where(total > 0, average, values.mean(0))
    np.testing.assert_allclose(soup, expected, rtol=1e-4, atol=1e-6)

  # The baseline of one's own, with its name and title where the chapter says.
  flags = ("--epochs=3", "--retrain_epochs=1", "--phases=2", "--ingredients=2")
  workdir = f"--workdir={tmp_path / 'own'}"
  assert main_job.run(*flags, "--baselines=one_shot", "--hidden=32", workdir) == 0
  (seed,) = json.loads((tmp_path / "own" / "results.json").read_text())["seeds"]
  last = seed["phases"][-1]
  assert last["one_shot"]["sparsity"] == pytest.approx(last["sparsity"])
  assert last["one_shot"]["test_accuracy"] > 0.5
  del METHODS["one_shot"], CRITERIA["taylor"]


@pytest.mark.slow
def test_recipes():
  names = pages.run(CHAPTERS["recipes"], {})
  weights = 3 * 3 * 16 + 16 * 64 * 10
  for tree in (names["sparse"]["params"], names["nnx_soup"].params):
    assert share_removed(tree) == pytest.approx(round(0.9 * weights) / weights)
  assert share_removed(names["gradual"]) == pytest.approx(round(0.9 * N) / N)
  assert names["accuracy"](names["sparse"]) > 0.85
  assert names["nnx_accuracy"] > 0.85
  # Each candidate has batch statistics of its own weights.
  means = names["candidates"]["batch_stats"]["BatchNorm_0"]["mean"]
  assert np.ptp(means, axis=0).max() > 0
  np.testing.assert_array_less(names["sparsities"][:200:20], 0.9)


def test_jaxpruners_global_scope_normalizes(quick_compilation):
  names = pages.run(CHAPTERS["coming_from_jaxpruner"], {})
  params, masks = names["params"], names["masks"]
  scores = [np.abs(params[layer]["kernel"]) for layer in "ab"]
  scores = [x / np.sqrt(np.sum(x**2)) for x in scores]
  threshold = np.sort(np.concatenate([x.ravel() for x in scores]))[round(0.8 * 900)]
  for layer, x in zip("ab", scores, strict=True):
    np.testing.assert_array_equal(masks[layer]["kernel"], x >= threshold)


@pytest.mark.slow
def test_networks_that_shrink():
  names = pages.run(CHAPTERS["shrinking"], {})
  small, params = names["small"], names["params"]
  found = small.apply(small.params, names["images"])
  expected = names["Net"]().apply(names["pruned"], names["images"])
  np.testing.assert_allclose(found, expected, atol=1e-5)
  sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (params, small.params)]
  assert sizes[1] < 0.4 * sizes[0]
  assert names["soup"].history[-1]["sparsity"] >= 0.75
  full = jax.tree.map(np.shape, names["full"])
  assert full == jax.tree.map(np.shape, params)


def test_every_page_with_snippets_is_run():
  assert {name for name, text in PAGES.items() if snippets(text)} == {
    "README", "own_code", "recipes", "coming_from_jaxpruner", "shrinking",
  }  # fmt: skip


# Commands: each is run by a test below, or named here with the reason why not.

NOT_RUN = {
  "python3 -m venv .venv": "a new environment; .ci/run makes one",
  ".venv/bin/pip install -e '.[experiments]'": "downloads; .ci/run installs the extra test",
  ".venv/bin/pip install -e '.[docs]'": "downloads; a part of the extra test",
  ".venv/bin/pip install -e '.[test]'": "downloads; .ci/run runs it",
  ".venv/bin/pytest": "this is inside of it; .ci/run runs it",
  ".venv/bin/python -m pdoc": "tests/test_documentation.py runs it",
  "python -m experiments.report": "needs finished runs: tests/test_report_page.py",
  "python -m experiments.export": "needs a finished run: tests/test_export_job.py",
}


def commands():
  """All commands in bash blocks, without their comments, one by one."""
  text = "\n".join(blocks(ALL, "bash")).replace("\\\n", " ")
  lines = [line.split("  # ")[0].strip() for line in text.splitlines()]
  return [part for line in lines if line for part in line.split(" && ")]


def modules(command):
  return re.search(r"python -m (experiments\.\w+)(.*)", command)


RUNNABLE = [c for c in commands() if not any(c.startswith(known) for known in NOT_RUN)]
SOUPS = [c for c in RUNNABLE if c.startswith("python -m experiments.soup ")]
SMALL = {
  "experiments.sms": (
    "--epochs=4 --retrain_epochs=1 --phases=1 --seeds=1 --batch_size=16 --cpu_devices=1"
    " --landscape=none"
  ),
  "experiments.compare": (
    "--epochs=2 --retrain_epochs=1 --phases=1 --seeds=1 --batch_size=64 --baselines=imp"
    " --copies=2 --sparsities=0.5"
  ),
  "experiments.bench": "--copies=1,2 --steps=2 --rounds=1 --batch_size=4 --torch=none",
}
# What makes single commands small, by a part of them.
SMALLER = {
  "--dataset=": " --width=4 --baselines=",
  "imagenet2012": " --image_size=32 --ingredients=2 --model=resnet18",
  "--model=resnet20": " --model=resnet8",
  "--coordinator": " --baselines=",
  "--ood=all": " --ood=brightness --ood_severities=1 --ingredients=2",
  "swamp": " --epochs=4 --ingredients=2",
  "bimp": " --epochs=8 --ingredients=2",
  "--ranges": " --retrain_epochs=2 --ingredients=4",
  "--subsets=groups": " --batch_size=8",
}


def test_no_command_is_left_out():
  assert len(RUNNABLE) >= 10
  for known in NOT_RUN:
    assert any(command.startswith(known) for command in commands()), known
  for command in RUNNABLE:
    assert modules(command), command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder with prepared sets called as README's, an .npz and weights, all tiny."""
  from test_data import prepare

  folder = tmp_path_factory.mktemp("data")
  images = np.random.default_rng(0).integers(0, 256, (120, 32, 32, 3), np.uint8)
  labels = np.arange(120) % 5
  pairs = list(zip(images, labels.tolist(), strict=True))
  splits = {"train": pairs[:80], "test": pairs[80:]}
  for name in ("cifar10", "imagenet2012"):
    prepare(folder, splits, called=name)
  np.savez(
    folder / "arrays.npz",
    train_images=images[:80],
    train_labels=labels[:80],
    test_images=images[80:],
    test_labels=labels[80:],
    train_groups=np.arange(80) // 16,
  )
  return folder


def save_torch_weights(path):
  """Of a ResNet-18, in PyTorch's format and names."""
  import torch

  module = jaxsms.models.create("resnet18", 5, width=4)
  image = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.jit(module.init)(jax.random.key(0), image)
  weights = jaxsms.pretrained.to_torch(variables, module, (32, 32, 3))
  torch.save({name: torch.from_numpy(np.array(x)) for name, x in weights.items()}, path)


def unlike(commands):
  """One of those that differ in their seeds alone: all are run with one seed."""
  bare = [re.sub(r"^\.venv/bin/| --seeds?=\d+", "", command) for command in commands]
  return [*dict(zip(bare, commands, strict=True)).values()]


def run(command):
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # they compile longer than they run
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "command",
  [
    pytest.param(c, marks=pytest.mark.torch) if ".pth" in c else c
    for c in unlike([c for c in RUNNABLE if c not in SOUPS])
  ],
)
def test_command(command, data, tmp_path):
  name, flags = modules(command).groups()
  small = SMALL[name]
  if name == "experiments.sms":
    small += "".join(more for part, more in SMALLER.items() if part in flags)
  if "resnet18.pth" in flags:
    save_torch_weights(data / "resnet18.pth")
  if name in ("experiments.sms", "experiments.compare"):
    small += f" --workdir={tmp_path / 'run'} --cache_dir={tmp_path / 'cache'}"
  if "--phase_sparsities" in flags:  # it says how many phases there are
    small = small.replace("--phases=1", "")
  if "--ingredients=3" in flags:
    small = small.replace("--ingredients=2", "")
  with socket.socket() as server:
    server.bind(("localhost", 0))
    port = server.getsockname()[1]
  places = {
    "DIR": data, "RUN": tmp_path / "run", "HOST:1234": f"localhost:{port}",
    "arrays.npz": data / "arrays.npz", "=resnet18.pth": f"={data / 'resnet18.pth'}",
  }  # fmt: skip
  for word, place in places.items():
    flags = flags.replace(word, str(place))
  command = [sys.executable, "-m", name, *shlex.split(flags), *shlex.split(small)]
  processes = [run(command)]
  if "--process=0" in flags:
    processes.append(run([*command, "--process=1"]))
  for process in processes:
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    assert output or process is not processes[0]
  if name != "experiments.bench":
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", SOUPS)
def test_soup_of_models_on_disk(command, tmp_path, monkeypatch, quick_compilation):
  """With sparse networks for digits that lie where the command says."""
  from test_soup_job import make
  from test_soup_sizes import read_all, write_shards

  monkeypatch.chdir(tmp_path)
  for i, name in enumerate(("A", "B", "C", "BASE")):
    write_shards(tmp_path / name, by_path(make(i)))
  for i in range(3):
    jaxsms.checkpoint.save(f"model_{i}", make(i))
    jaxsms.checkpoint.save(f"squares_{i}", jax.tree.map(np.square, make(9 + i)))
  (tmp_path / "RUN").mkdir()
  flags = ("--dataset=digits", "--hidden=8", "--batch_size=64")
  (tmp_path / "RUN" / "flags.txt").write_text("\n".join(flags))
  words = shlex.split(modules(command).group(2))
  assert soup_runs.run(*words) == 0
  (out,) = (word.removeprefix("--out=") for word in words if word.startswith("--out="))
  found, first = read_all(out), by_path(make(0))
  assert found.keys() == first.keys()
  kernels = [name for name in first if name.endswith("kernel")]
  if "--masks=prune" in words:
    zeros, total = (
      sum(f(found[n]) for n in kernels) for f in (lambda x: (x == 0).sum(), np.size)
    )
    assert zeros == round(0.9 * total)
  else:
    for name in kernels:
      np.testing.assert_array_equal(found[name] == 0, first[name] == 0)
  for name, array in found.items():
    assert array.dtype == ("bfloat16" if "--dtype=bfloat16" in words else np.float32), name
  if out == "FOLDER":
    card = (tmp_path / "FOLDER" / "README.md").read_text()
    assert "| `A` | 0.333333 |" in card
    assert (tmp_path / "FOLDER" / "tokenizer.json").exists()


@pytest.fixture(scope="module")
def known_flags():
  """Of all binaries that README calls: they define their own once they are imported."""
  called = [found for command in commands() if (found := modules(command))]
  for name in {found.group(1) for found in called}:
    importlib.import_module(name)
  negated = {f"no{name}" for name in flags.FLAGS if flags.FLAGS[name].boolean}
  return {*flags.FLAGS, *negated, "helpshort", "flagfile"}


def test_commands_use_flags_that_exist(known_flags):
  given = [found.groups() for command in commands() if (found := modules(command))]
  flags = " ".join(flags for name, flags in given if name != "experiments.bench")
  assert set(re.findall(r"--([a-z_]\w*)", flags)) <= known_flags


def test_flags_named_in_the_text_exist(known_flags):
  named = set(re.findall(r"`--([a-z_]\w*)", ALL))
  assert len(named) > 20
  assert named <= known_flags


def test_ci_calls_readmes_test_command():
  script = (ROOT / ".ci" / "run").read_text()
  pattern = re.search(r"grep -E '(.*)' README.md", script).group(1)
  lines = [line for line in README.splitlines() if re.search(pattern, line)]
  assert len(lines) == 1
  assert lines[0] in blocks(README, "bash")[-1]
  assert 'eval "$test_command"' in script


# What the text says.


def test_every_name_that_is_shown_is_there():
  text = ALL.replace("jaxsms/", "")
  for name in re.findall(r"\bjaxsms\.([\w.]+\w)", text):
    assert pydoc.locate(f"jaxsms.{name}") is not None, name
  table = OWN_CODE.split("## What there is")[1].split("## ")[0]
  for name in re.findall(r"`([a-z_]+_[a-z_]+)`", table.split("| networks")[0]):
    assert hasattr(jaxsms, name), name


def source_messages():
  """The strings of the sources as patterns: what is filled in may be anything."""
  for folder in ("jaxsms", "experiments"):
    for path in sorted((ROOT / folder).rglob("*.py")):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
          parts = [
            re.escape(part.value) if isinstance(part, ast.Constant) else ".+?"
            for part in node.values
          ]
          yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
          yield re.escape(node.value)


# Of JAX itself.
FOREIGN = ("An NVIDIA GPU may be present on this machine",)


def test_messages_are_those_that_the_code_prints():
  found = re.findall(
    r"^(?:- |  )(?:``(.+?) ``|`([^`]{40,})`)", CHAPTERS["troubleshooting"], re.MULTILINE
  )
  items = [quoted or plain for quoted, plain in found]
  assert len(items) >= 14
  patterns = [re.compile(pattern) for pattern in source_messages() if len(pattern) > 30]
  for item in items:
    message = item.removeprefix("error: ")
    known = any(pattern.fullmatch(message) for pattern in patterns)
    assert known or message.startswith(FOREIGN), message


def test_links_lead_somewhere():
  headings = {
    re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
    for line in README.splitlines()
    if line.startswith("#")
  }
  for link in re.findall(r"\]\(([^)]+)\)", README):
    if link.startswith("#"):
      assert link[1:] in headings, link
    elif not link.startswith("https://"):
      assert (ROOT / link).exists(), link
  for name in CHAPTERS:
    assert f"](jaxsms/guide/{name}.md)" in README, name
    # A chapter is a page of the reference, too, from where files cannot be reached.
    for link in re.findall(r"\]\(([^)]+)\)", CHAPTERS[name]):
      assert link.startswith("https://"), link


def test_readme_is_short():
  assert len(README.splitlines()) <= 250
