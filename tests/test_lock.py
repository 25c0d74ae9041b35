"""One process at a time on a run directory."""

import multiprocessing
import os
import signal
import time

import pytest
import store

from experiments.run import lock
from experiments.run.lock import Lock
from jaxsms.disk import storage


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.05)
  monkeypatch.setattr(lock, "WATCH", 0.5)


@pytest.fixture
def address(tmp_path):
  return store.bucket("lock", tmp_path)


def die(held):
  """Ends the signs of life of a lock, as the death of its process does."""
  held._released.set()
  held._beating.join()


def test_a_second_one_is_refused_until_the_first_is_released(tmp_path, rejects):
  first, second = Lock(tmp_path), Lock(tmp_path)
  first.acquire()
  with rejects(f"another process (pid {os.getpid()} on "):
    second.acquire()
  first.check()
  first.release()
  assert not (tmp_path / lock.HOLDER).exists()
  second.acquire()
  second.release()


def hold(path, ready):
  Lock(path).acquire()
  ready.set()
  time.sleep(60)


def test_a_killed_process_leaves_the_directory_free_at_once(tmp_path, rejects):
  context = multiprocessing.get_context("spawn")
  ready = context.Event()
  other = context.Process(target=hold, args=(tmp_path, ready))
  other.start()
  assert ready.wait(60)
  with rejects(f"another process (pid {other.pid} on "):
    Lock(tmp_path).acquire()
  os.kill(other.pid, signal.SIGKILL)
  other.join()
  mine = Lock(tmp_path)
  mine.acquire()
  mine.release()


def test_signs_of_life_protect_where_locks_do_not_hold(address, tmp_path, rejects, capsys):
  first = Lock(address)
  first.acquire()
  with rejects("another process"):
    Lock(address).acquire()
  assert "waiting 0.5 s" in capsys.readouterr().err
  die(first)
  second = Lock(address)
  second.acquire()  # after watching that nothing moves
  assert storage.read_json(storage.as_path(address) / lock.HOLDER)["token"] == second._token
  second.release()
  assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_taken_over_stops(address, rejects):
  first = Lock(address)
  first.acquire()
  document = {"host": "elsewhere", "pid": 1, "token": "another"}
  storage.write_json(storage.as_path(address) / lock.HOLDER, document)
  first._beating.join(10)
  with rejects("another process has taken", OSError):
    first.check()
  first.release()
  assert storage.read_json(storage.as_path(address) / lock.HOLDER)["token"] == "another"


def test_another_machine_is_watched_even_where_the_lock_is_free(tmp_path, capsys):
  document = {"host": "elsewhere", "pid": 1, "token": "another"}
  storage.write_json(storage.as_path(tmp_path / lock.HOLDER), document)
  mine = Lock(tmp_path)
  mine.acquire()
  assert "was last used on elsewhere" in capsys.readouterr().err
  mine.release()


def test_half_a_sign_of_life_is_none(tmp_path):
  (tmp_path / lock.HOLDER).write_bytes(b'{"host": "else')
  mine = Lock(tmp_path)
  mine.acquire()
  mine.release()
