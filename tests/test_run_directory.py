"""Whose run a directory holds: what is compared, and what damaged files give."""

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from main_job import config_of
from test_data import pairs, prepare

from experiments.config.run_config import NEWER
from experiments.run import run_directory
from jaxsms import checkpoint, data
from jaxsms.disk import storage


def defining(dataset, *flags):
  return run_directory.defining(config_of(*flags), dataset)


@pytest.fixture
def dataset():
  images, labels = np.zeros((40, 2, 2, 3), np.uint8), np.arange(40) % 3
  return data.Dataset("a.npz", images, labels, images, labels, 3, [0.0], [1.0], None)


def assert_refused(rejects, old, new, words):
  with rejects(f"holds another run, with {words}: give what it began with"):
    run_directory.check_same("run", {"defining": old}, new)


def test_other_data_under_the_same_name_are_refused(dataset, rejects):
  wanted = defining(dataset, "--dataset=folder/a.npz")
  moved = defining(dataset, "--dataset=elsewhere/a.npz")
  run_directory.check_same("run", {"defining": wanted}, moved)
  other = dataset._replace(test_labels=dataset.test_labels[::-1])
  found = defining(other, "--dataset=folder/a.npz")
  assert_refused(rejects, wanted, found, "other data")


def test_other_weights_to_start_from_are_refused(dataset, tmp_path, rejects):
  def weights(folder, value):
    checkpoint.save(tmp_path / folder, {"params": {"w": np.full(3, value, np.float32)}})
    return defining(dataset, f"--init={tmp_path / folder}")

  first, same, other = weights("a", 1), weights("b", 1), weights("c", 2)
  run_directory.check_same("run", {"defining": first}, same)  # saved twice, the same leaves
  assert_refused(rejects, first, other, "other weights in --init")
  assert_refused(rejects, first, defining(dataset), "other weights in --init")

  file = tmp_path / "w.npz"
  np.savez(file, w=np.ones(3))
  first = defining(dataset, f"--init={file}")
  np.savez(file, w=np.zeros(3))
  found = defining(dataset, f"--init={file}")
  assert_refused(rejects, first, found, "other weights in --init")


def test_other_corrupted_data_are_refused(dataset, tmp_path, rejects):
  def prepared(folder, number):
    for config in ("fog_2", "snow_2"):  # the second one is not asked for
      examples = {"test": pairs(number if config == "fog_2" else 3, 4, 4, 3)}
      prepare(tmp_path / folder, examples, called="cifar10_corrupted", config=config)
    return named(folder)

  def named(folder):
    flags = ("--dataset=cifar10", f"--data_dir={tmp_path / folder}", "--ood_severities=2")
    return [defining(dataset, *flags, f"--ood={name}") for name in ("fog", "snow")]

  (first, snow), (other, same_snow) = prepared("one", 3), prepared("two", 4)
  assert_refused(rejects, first, other, "other data for --ood")
  assert snow == same_snow
  shutil.copytree(tmp_path / "one", tmp_path / "copy", copy_function=shutil.copyfile)
  assert named("copy") == [first, snow]  # whatever the times of its files
  (shard,) = (tmp_path / "copy").glob("*/fog_2/*/*array_record*")
  shard.write_bytes(shard.read_bytes()[:-1])
  assert_refused(rejects, first, named("copy")[0], "other data for --ood")
  assert list(first["ood_data"]) == ["fog_2"]
  assert list(snow["ood_data"]) == ["snow_2"]


def test_a_run_without_the_newest_flags_goes_on_with_their_defaults(dataset, rejects):
  for flags in ((), ("--retrain_epochs=7", "--dataset=cifar10")):
    wanted = defining(dataset, *flags)
    old = {name: value for name, value in wanted.items() if name not in NEWER}
    assert len(old) == len(wanted) - len(NEWER)
    run_directory.check_same("run", {"defining": old}, wanted)
    other = defining(dataset, *flags, "--baselines=soup_distilled", "--distill_epochs=3")
    first = wanted["retrain_epochs"]
    with rejects(f"--distill_epochs={first} and not 3: give what it began with"):
      run_directory.check_same("run", {"defining": old}, other)
    averaged = defining(dataset, *flags, "--average=ema")
    assert_refused(rejects, old, averaged, "--average=none and not ema")


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NAMES = st.sampled_from(["flags", "defining", "environment", "seeds", "finished", "format"])
DOCUMENTS = st.dictionaries(NAMES, JSON | st.dictionaries(st.text(), JSON))


@hypothesis.given(
  st.sampled_from(["run.json", "results.json"]),
  st.binary() | DOCUMENTS.map(json.dumps).map(str.encode) | DOCUMENTS,
)
def test_any_run_directory_is_read_or_refused(tmp_path_factory, name, content):
  workdir = tmp_path_factory.mktemp("fuzz")
  if isinstance(content, dict):
    storage.write_json(storage.as_path(workdir / name), content)
  else:
    (workdir / name).write_bytes(content)
  with contextlib.suppress(ValueError):
    found = run_directory.read_run(workdir)
    assert isinstance(found, dict)
    with pytest.raises(ValueError, match="holds another run, with"):
      run_directory.check_same(workdir, found, {"epochs": 1, "hidden": [1]})
  with contextlib.suppress(ValueError):
    assert isinstance(run_directory.read_results(workdir), dict | None)


def test_several_writers_of_one_file_leave_a_whole_one(tmp_path):
  path = storage.as_path(tmp_path / "results.json")
  documents = [{"writer": i, "values": list(range(500))} for i in range(4)]
  with ThreadPoolExecutor(4) as pool:  # map raises what they raise
    list(pool.map(lambda i: storage.write_json(path, documents[i % 4]), range(80)))
  found = storage.read_json(path)
  assert {name: found[name] for name in ("writer", "values")} in documents
  assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
