"""Headless Chromium through its pipe: a few words of the DevTools protocol."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--remote-debugging-pipe",
)


def executable():
  """Path of a Chromium; None where there is none."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
  """One page: `call` a method of the protocol; `events` holds what it told so far."""

  def __init__(self, to_browser, from_browser):
    self._out, self._in = to_browser, from_browser
    self._number, self._buffer, self.session, self.events = 0, b"", None, []

  def call(self, method, **params):
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if self.session:
      message["sessionId"] = self.session
    os.write(self._out, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._next()
      if answer.get("id") == self._number:
        assert "error" not in answer, answer
        return answer["result"]
      self.events.append(answer)

  def wait(self, method):
    """Until the page has told so."""
    while not any(event.get("method") == method for event in self.events):
      self.events.append(self._next())

  def told(self, method):
    return [event["params"] for event in self.events if event.get("method") == method]

  def evaluate(self, expression):
    found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
    return found["result"].get("value")

  def _next(self):
    deadline = time.monotonic() + 600
    while b"\0" not in self._buffer:
      left = deadline - time.monotonic()
      assert left > 0 and select.select([self._in], [], [], left)[0], "browser is silent"
      data = os.read(self._in, 1 << 20)
      assert data, "browser has ended"
      self._buffer += data
    text, self._buffer = self._buffer.split(b"\0", 1)
    return json.loads(text)


@contextlib.contextmanager
def tab():
  """A new browser with one empty page that tells of requests, errors and loading."""
  theirs_in, ours_out = os.pipe()
  ours_in, theirs_out = os.pipe()
  # Away from 3 and 4, which the browser reads and writes.
  high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]

  def place():
    os.dup2(high[0], 3)
    os.dup2(high[1], 4)

  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    process = subprocess.Popen(
      [executable(), *FLAGS, f"--user-data-dir={profile}"],
      preexec_fn=place,
      pass_fds=(3, 4),
      stderr=subprocess.DEVNULL,
    )
    for fd in (theirs_in, theirs_out, *high):
      os.close(fd)
    try:
      page = Tab(ours_out, ours_in)
      target = page.call("Target.createTarget", url="about:blank")["targetId"]
      attached = page.call("Target.attachToTarget", targetId=target, flatten=True)
      page.session = attached["sessionId"]
      for domain in ("Network", "Log", "Runtime", "Page"):
        page.call(f"{domain}.enable")
      yield page
    finally:
      process.kill()
      process.wait()
      os.close(ours_out)
      os.close(ours_in)
