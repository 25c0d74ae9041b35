"""Named places at which tests kill a run; without the variable they do nothing."""

import collections
import os
import signal

VARIABLE = "JAXSMS_FAULT"
_passed: collections.Counter[str] = collections.Counter()


def fault_point(name: str) -> None:
  """Kills this process where the environment says so: JAXSMS_FAULT=name:count.

  Args:
    name: of this place; the process dies when it comes by for the count-th time.
  """
  wanted, _, count = os.environ.get(VARIABLE, "").rpartition(":")
  if wanted != name:
    return
  _passed[name] += 1
  if _passed[name] == int(count):
    os.kill(os.getpid(), signal.SIGKILL)
