"""Merges of models on disk that are killed: nothing looks whole, and inputs stay."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import main_job
import numpy as np
import orbax.checkpoint as ocp
import pytest
from soup_runs import run

from jaxsms import checkpoint
from jaxsms.disk.by_name import by_path
from jaxsms.disk.opening import open_tensors
from jaxsms.disk.safetensors import save_safetensors

OUTS = ("soup.safetensors", "shards", "soup.npz", "soup.pt", "soup")
PLACES = ("begin", "write", "finish", "rename")
# Each merge is killed in a fork of one process, which has imported everything.
PROGRAM = """
import json, os, signal, sys
from absl import flags
from experiments import soup
from jaxsms.disk import passes, writing
import jaxsms.disk.opening, orbax.checkpoint
passes.BLOCK = 2**10

def kill():
  os.kill(os.getpid(), signal.SIGKILL)

def die(place):
  write, finish, left = writing.Digests.write, writing.Digests.finish, [1, 12]
  def dying_write(self, block, values):
    write(self, block, values)
    left[place == "write"] -= 1
    if place in ("begin", "write") and not left[place == "write"]:
      kill()
  def dying_finish(self):
    finish(self)
    kill()
  writing.Digests.write = dying_write
  if place == "finish":
    writing.Digests.finish = dying_finish
  if place == "rename":
    writing.os.rename = lambda *names: kill()

models, cases = json.loads(sys.argv[1])
for place, words in cases:
  child = os.fork()
  if not child:
    die(place)
    soup.main(flags.FLAGS(["soup", *models, *words]))
    os._exit(0)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def contents(folder):
  return {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}


@pytest.mark.torch  # one of the files is PyTorch's
@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path, rejects):
  rng = np.random.default_rng(0)
  trees = [
    {"params": {n: {"kernel": rng.standard_normal((64, 96), np.float32)} for n in "abc"}}
    for _ in range(4)
  ]
  given = tmp_path / "given"
  given.mkdir()
  models = [given / name for name in ("a.safetensors", "b.npz", "own", "orbax")]
  save_safetensors(models[0], trees[0])
  np.savez(models[1], **by_path(trees[1]))
  checkpoint.save(models[2], trees[2])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(models[3], trees[3])
  before, cases = contents(given), []
  for out in OUTS:
    for place in PLACES:
      folder = tmp_path / place
      folder.mkdir(exist_ok=True)
      sharded = ["--shard_size=40KB"] if out == "shards" else []
      cases.append((place, [f"--out={folder / out}", *sharded]))
  words = [[str(model) for model in models], cases]
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, json.dumps(words)],
    cwd=main_job.ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  statuses = [line for line in done.stdout.split("\n") if line.lstrip("-").isdigit()]
  assert statuses == [str(-signal.SIGKILL)] * len(cases), done.stderr
  assert contents(given) == before
  for place in PLACES:
    left = sorted(os.listdir(tmp_path / place))
    assert len(left) >= len(OUTS)
    assert all(".partial" in name for name in left), left  # none has the name of a result
    if place in ("finish", "rename"):
      continue  # whole, but for its name
    for name in left:
      out = name.split(".partial")[0].rsplit(".", 1)[0]
      renamed = tmp_path / place / f"renamed_{out}"
      (tmp_path / place / name).rename(renamed)
      with rejects("renamed_"), contextlib.ExitStack() as stack:
        open_tensors(renamed, stack)
  expected = np.mean([tree["params"]["b"]["kernel"] for tree in trees], axis=0)
  out = tmp_path / "write" / "soup.npz"  # and begun anew it is made
  assert run(*models, f"--out={out}") == 0
  found = np.load(out)["params/b/kernel"]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
