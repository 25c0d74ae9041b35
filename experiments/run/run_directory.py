"""The folder of one run: what is in it, and whose run it is."""

import contextlib
import hashlib
import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsms import checkpoint
from jaxsms.data import Dataset, StreamedDataset
from jaxsms.devices.meshes import fetch
from jaxsms.disk import storage

from ..config.device_flags import DeviceFlags
from ..config.fields import names
from ..config.run_config import Config, newer_flags
from ..reporting.statistics import dataset_title
from ..schemas.results_check import check_results, check_run
from ..setup.hardware import bfloat16
from ..setup.ood import prepared_digests

RUN_FILE = "run.json"
FLAGS_FILE = "flags.txt"
METRICS_FILE = "metrics.jsonl"
RESULTS_FILE = "results.json"
CHECKPOINTS = "checkpoints"
# What is compared by its content, and how that is named where it differs.
OTHER = {
  "data": "other data",
  "init": "other weights in --init",
  "ood_data": "other data for --ood",
}
# Where a run finds its data, where it computes, and how often the host looks, change no
# result, but for rounding.
NOT_OF_THE_RUN = ("data_dir", "cache_dir", "chunk_steps", *names(DeviceFlags))


def is_writer() -> bool:
  """Whether this process is the one that writes and shows."""
  return jax.process_index() == 0


def agreed(wanted: bool) -> bool:
  """Whether any process wants it; all of them learn so."""
  if jax.process_count() == 1:
    return wanted
  return bool(multihost_utils.process_allgather(np.array(wanted)).any())


def defining(config: Config, dataset: Dataset | StreamedDataset) -> dict[str, Any]:
  """Everything that the numbers of a run depend on, but for rounding."""
  values = {k: v for k, v in config.flags().items() if k not in NOT_OF_THE_RUN}
  values["dataset"] = dataset_title(config.dataset)
  values["precision"] = "bfloat16" if bfloat16(config.precision) else "float32"
  values["micro_batches"] = config.micro_batches
  values["data"] = fingerprint(dataset)
  values["init"] = config.init and weights_digest(config.init)
  values["ood_data"] = prepared_digests(config)
  return storage.plain(values)


def fingerprint(dataset: Dataset | StreamedDataset) -> str:
  """Tells other data under the same name: a digest, or of streamed data their number."""
  if isinstance(dataset, StreamedDataset):
    return f"{len(dataset.train)} + {len(dataset.test)} examples"
  digest = hashlib.sha256()
  for name in (
    "train_images",
    "train_labels",
    "test_images",
    "test_labels",
    "train_groups",
  ):
    if getattr(dataset, name) is None:
      continue
    array = np.ascontiguousarray(getattr(dataset, name))
    digest.update(f"{array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def weights_digest(path: str | os.PathLike) -> str:
  """Tells other weights under the same name: a digest of a model's leaves, or of a file."""
  path = storage.as_path(path)
  try:
    if not path.is_dir():
      return storage.content_digest(path)
    leaves = checkpoint.read_manifest(path)["leaves"]
  except (OSError, ValueError):
    return "unreadable"  # whoever loads them says why
  return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()


def read_run(path: str | os.PathLike) -> dict[str, Any] | None:
  """What a run directory says about its run: `flags`, `defining` and `environment`.

  Where that file is damaged or gone, the newest checkpoint that has a copy is asked.

  Returns:
    None where the directory is missing or holds no run.

  Raises:
    ValueError: the run is of another version, or nothing says what run it is.
  """
  path = storage.as_path(path)
  if path.exists() and not path.is_dir():
    raise ValueError(f"--workdir {path} is a file: give a folder")
  try:
    run = storage.read_json(path / RUN_FILE)
    check_run(path / RUN_FILE, run)
    return run
  except (storage.Damaged, FileNotFoundError):
    pass
  except OSError as error:
    raise ValueError(f"--workdir {path} cannot be read ({error.strerror})") from error
  folders = list((path / CHECKPOINTS).iterdir()) if (path / CHECKPOINTS).is_dir() else []
  traces = (RUN_FILE, FLAGS_FILE, RESULTS_FILE)
  if not folders and not any((path / name).exists() for name in traces):
    return None
  for folder in sorted(folders, key=lambda f: f.name, reverse=True):
    with contextlib.suppress(ValueError):
      run = checkpoint.read_manifest(folder)["meta"].get("run")
      check_run(folder, run)
      return run
  raise ValueError(
    f"{path} holds a run of another version of jaxsms, or its {RUN_FILE} is lost: choose "
    "another --workdir"
  )


def check_same(
  path: str | os.PathLike, run: dict[str, Any], wanted: dict[str, Any]
) -> None:
  """Raises ValueError where a directory's run is not the wanted one, naming what differs.

  Args:
    path: the directory.
    run: what `read_run` gave.
    wanted: what `defining` gives for the flags of this start.
  """
  old = run.get("defining")
  old = old if isinstance(old, dict) else {}
  if old.get("kind") != wanted.get("kind"):
    what = old.get("kind") or "run of experiments.sms"
    raise ValueError(f"{path} holds a {what}: choose another --workdir")
  newer = storage.plain(newer_flags(old))
  old = {**{k: v for k, v in newer.items() if k in wanted}, **old}
  names = [k for k in old.keys() | wanted.keys() if old.get(k) != wanted.get(k)]
  differing = [
    OTHER[name]
    if name in OTHER
    else f"--{name}={_text(old.get(name))} and not {_text(wanted.get(name))}"
    for name in sorted(names)
  ]
  if differing:
    raise ValueError(
      f"{path} holds another run, with {', '.join(differing)}: give what it began with, or "
      "choose another --workdir"
    )


def _text(value):
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def begin(path: str | os.PathLike, run: dict[str, Any], flagfile: str) -> None:
  """Writes down whose run it is, where that is missing or damaged.

  Args:
    path: the folder, which exists.
    run: `flags`, `defining` and `environment`.
    flagfile: all flags, one to a line, to be given to `--flagfile`.

  Raises:
    OSError: it cannot be written.
  """
  path = storage.as_path(path)
  try:
    check_run(path / RUN_FILE, storage.read_json(path / RUN_FILE))
  except FileNotFoundError:
    storage.write_json(path / RUN_FILE, run)
  except storage.Damaged:
    storage.set_aside(path / RUN_FILE)
    storage.write_json(path / RUN_FILE, run)
  if not (path / FLAGS_FILE).exists():
    storage.write_bytes(path / FLAGS_FILE, flagfile.encode())


def read_results(path: str | os.PathLike) -> dict[str, Any] | None:
  """results.json; None where there is none that is whole and holds seeds.

  Raises:
    ValueError: it is of another version.
  """
  try:
    results = checked_results(path)
  except (storage.Damaged, OSError):
    return None
  return results if results and "seeds" in results else None


def checked_results(path: str | os.PathLike) -> dict[str, Any] | None:
  """results.json, for readers who want to know what is wrong with it.

  Args:
    path: the folder of a run or a comparison.

  Returns:
    Its content, in the form that `results_check` describes; None where there is none.

  Raises:
    Damaged: a ValueError; it does not have its digest, or another form.
    ValueError: it is of another version.
    OSError: it cannot be read.
  """
  path = storage.as_path(path) / RESULTS_FILE
  try:
    results = storage.read_json(path)
  except (FileNotFoundError, NotADirectoryError):
    return None
  check_results(path, results)
  return results


def write_results(path: str | os.PathLike, results: dict[str, Any]) -> None:
  """Writes results.json: the old file stays whole until the new one is.

  Raises:
    OSError: it cannot be written.
  """
  if not is_writer():
    return
  path = storage.as_path(path)
  try:
    checked_results(path)
  except storage.Damaged:
    storage.set_aside(path / RESULTS_FILE)
  storage.write_json(path / RESULTS_FILE, results)


def soups_folder(path: str | os.PathLike, phase: int | None = None) -> storage.epath.Path:
  """Where the last soups of all seeds lie, or the one-shot soups of a phase's sparsity."""
  folder = storage.as_path(path) / "soup"
  return folder if phase is None else folder / "one_shot" / f"phase_{phase}"


def soup_folder(
  path: str | os.PathLike, seed: int, phase: int | None = None
) -> storage.epath.Path:
  """Where such a soup of one seed lies."""
  return soups_folder(path, phase) / f"seed_{seed}"


def candidate_folder(path: str | os.PathLike, seed: int, number: int) -> storage.epath.Path:
  """Where one copy of the last phase of one seed lies."""
  return storage.as_path(path) / "candidates" / f"seed_{seed}" / str(number)


def save_model(path: storage.epath.Path, model: dict[str, Any]) -> None:
  """Saves a model; one that lies there already, from before a break, is replaced.

  Raises:
    OSError: it cannot be written.
  """
  model = fetch(model)
  if not is_writer():
    return
  if path.exists():
    try:
      if not checkpoint.is_unfinished(path):
        checkpoint.restore(path)
      checkpoint.remove(path)
    except storage.Damaged:
      storage.set_aside(path)
  checkpoint.save(path, model)
