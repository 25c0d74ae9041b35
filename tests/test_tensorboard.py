"""Event files, read back by a reader of their format that knows nothing of the writer."""

import json
import struct

import numpy as np
import pytest
from main_job import config_of, parse, run

from experiments.config import keeping_flags
from experiments.run.tensorboard import Board

SMALL = (
  "--hidden=8", "--epochs=2", "--retrain_epochs=1", "--phases=2", "--ingredients=2",
  "--batch_size=128", "--baselines=", "--landscape=none", "--mesh=none",
)  # fmt: skip


def crc32c(data):
  """Castagnoli's, bit by bit."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked_crc(data):
  crc = crc32c(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(data):
  """The frames of a TFRecord file, their checksums checked."""
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    assert struct.unpack("<I", data[8:12])[0] == masked_crc(data[:8])
    body, data = data[12 : 12 + length], data[12 + length :]
    assert struct.unpack("<I", data[:4])[0] == masked_crc(body)
    data = data[4:]
    yield body


def fields(message):
  """Number and value of each field of a protocol buffer."""

  def varint():
    nonlocal message
    value = shift = 0
    while True:
      byte, message = message[0], message[1:]
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  sizes = {1: 8, 5: 4}
  while message:
    number, kind = divmod(varint(), 8)
    if kind == 0:
      yield number, varint()
      continue
    size = varint() if kind == 2 else sizes[kind]
    yield number, message[:size]
    message = message[size:]


def read_events(folder):
  """(run, tag, step) -> value of all event files below a folder; nothing twice."""
  found = {}
  for path in folder.rglob("events.out.tfevents.*"):
    for record in records(path.read_bytes()):
      event = dict(fields(record))
      for number, value in fields(event.get(5, b"")):  # the summary
        assert number == 1
        scalar = dict(fields(value))
        name = str(path.parent.relative_to(folder))
        key = name, scalar[1].decode(), event.get(2, 0)
        assert key not in found
        found[key] = struct.unpack("<f", scalar[2])[0]
  return found


def test_the_checksum_by_its_published_value():
  assert crc32c(b"123456789") == 0xE3069283


def epoch(method="sms", phase=1, number=1, loss=(0.5, 0.25)):
  return {
    "seed": 3, "method": method, "phase": phase, "epoch": number, "step": 8,
    "loss": np.array(loss), "accuracy": [0.5, 1.0], "learning_rate": [0.1, 0.05],
  }  # fmt: skip


def evaluation(phase=1):
  record = {"phase": phase, "soup": {"test_accuracy": 0.75, "layer_sparsities": {}},
            "candidates": [{"test_accuracy": 0.5}, {"test_accuracy": float("nan")}],
            "weights": [0.5, 0.5]}  # fmt: skip
  return {"seed": 3, "method": "sms", "phase": phase, "evaluation": record}


def test_what_lines_become(tmp_path):
  board = Board(tmp_path)
  dense = {"seed": 3, "method": "dense", "phase": 0, "evaluation": {"test_accuracy": 0.875}}
  board.add(dense)
  for phase in (1, 2):
    for number in (1, 2):
      board.add(epoch(phase=phase, number=number, loss=(phase, number)))
    board.add(evaluation(phase))
  board.close()
  found = read_events(tmp_path / "tensorboard")
  assert found["seed_3/dense/copy_0", "evaluation/test_accuracy", 0] == 0.875
  # Epochs count on from phase to phase, evaluations by phase.
  losses = [found["seed_3/sms/copy_0", "training/loss", i] for i in (1, 2, 3, 4)]
  assert losses == [1, 1, 2, 2]
  assert found["seed_3/sms/copy_1", "training/loss", 4] == 2
  assert found["seed_3/sms/copy_1", "training/learning_rate", 1] == np.float32(0.05)
  assert found["seed_3/sms/copy_1", "training/accuracy", 3] == 1
  assert found["seed_3/sms/soup", "evaluation/test_accuracy", 2] == 0.75
  assert found["seed_3/sms/copy_0", "evaluation/test_accuracy", 1] == 0.5
  # A copy that diverged has no point, and nothing else is there.
  assert len(found) == 1 + 4 * 2 * 3 + 2 * 2


def test_a_run_that_goes_on_has_nothing_twice_and_nothing_that_was_lost(tmp_path):
  board = Board(tmp_path)
  board.add(epoch(number=1))
  board.add(epoch(number=2, loss=(9, 9)))  # after the last save: metrics.jsonl loses it
  board.close()
  kept = json.dumps(epoch() | {"loss": [0.5, None]}).encode() + b"\n"
  board = Board(tmp_path, kept)
  board.add(epoch(number=2, loss=(0.125, 2)))
  board.close()
  found = read_events(tmp_path / "tensorboard")
  losses = {key[::2]: v for key, v in found.items() if key[1] == "training/loss"}
  assert losses == {
    ("seed_3/sms/copy_0", 1): 0.5,
    ("seed_3/sms/copy_0", 2): 0.125,
    ("seed_3/sms/copy_1", 2): 2,
  }


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_writes_what_its_metrics_say(tmp_path):
  assert run(*SMALL, "--tensorboard", f"--workdir={tmp_path / 'run'}") == 0
  found = read_events(tmp_path / "run" / "tensorboard")
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  for phase in results["seeds"][0]["phases"]:
    for name in ("test_accuracy", "validation_loss", "sparsity"):
      tag, number = f"evaluation/{name}", phase["phase"]
      assert found["seed_0/sms/soup", tag, number] == np.float32(phase["soup"][name])
      for i, candidate in enumerate(phase["candidates"]):
        at = f"seed_0/sms/copy_{i}", tag, number
        assert found[at] == np.float32(candidate[name])
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  lines = [line for line in map(json.loads, lines) if "epoch" in line]
  epochs = [line for line in lines if line["method"] == "sms"]
  assert len(epochs) == 2
  for step, line in enumerate(epochs, 1):
    for i in range(2):
      at = f"seed_0/sms/copy_{i}", "training/loss", step
      assert found[at] == np.float32(line["loss"][i])
  assert ("seed_0/dense/copy_0", "training/accuracy", 2) in found


def test_refused_before_any_work(rejects, monkeypatch):
  with rejects("gs://bucket/run is an object store"):
    config_of("--tensorboard", "--workdir=gs://bucket/run")
  monkeypatch.setattr(keeping_flags.util, "find_spec", lambda name: None)
  with rejects("--tensorboard needs tensorboardX, which is not installed"):
    config_of("--tensorboard")
  assert not config_of().tensorboard


@pytest.fixture(autouse=True, scope="module")
def forget_flags():
  yield
  parse()
