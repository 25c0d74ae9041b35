"""Orbax's checkpointer for one process, and its log kept quiet."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

_one_at_a_time = threading.Lock()  # saves of two threads break one another in orbax


@contextlib.contextmanager
def open_checkpointer() -> Iterator[Any]:
  """A checkpointer of this process alone, whose errors are raised and not logged.

  Reading and writing end when all arrays are done or have failed, and not with the first
  failure: what is still under way then finds its event loop closed, prints so, and goes on
  making files in a folder that is being removed.
  """
  import orbax.checkpoint as ocp

  class Handler(ocp.type_handlers.NumpyHandler):
    async def _open_and_write(self, *arguments, **options):
      try:
        await super()._open_and_write(*arguments, **options)
      except Exception as error:  # raised below
        failures.append(error)

    async def deserialize(self, infos, args=None):
      args = args or [ocp.RestoreArgs()] * len(infos)
      one_by_one = map(super().deserialize, [[i] for i in infos], [[a] for a in args])
      found = await asyncio.gather(*one_by_one, return_exceptions=True)
      arrays = []
      for one in found:
        if isinstance(one, BaseException):
          raise one
        arrays.extend(one)
      return arrays

  failures: list[Exception] = []
  kept = ocp.type_handlers.get_type_handler
  registry = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, Handler()),
    (jax.Array, kept(jax.Array)),  # typed keys
    *((kind, kept(kind)) for kind in (np.number, int, float)),  # of older checkpoints
  )
  me = jax.process_index()
  options = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=registry, multiprocessing_options=options
  )
  checkpointer = ocp.Checkpointer(handler, multiprocessing_options=options)
  with quiet(), checkpointer:
    try:
      yield checkpointer
    except Exception:
      if not failures:
        raise
    if failures:
      raise failures[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences orbax's log, and lets one thread at a time use orbax.

  Example:
    >>> import orbax.checkpoint, tempfile
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> with jaxsms.checkpoint.quiet(), orbax.checkpoint.StandardCheckpointer() as saver:
    ...   saver.save(folder, {"kernel": np.ones((2, 3))})
  """

  def from_elsewhere(record):
    return "orbax" not in record.pathname

  logger = logging.getLogger("absl")
  with _one_at_a_time:
    logger.addFilter(from_elsewhere)
    try:
      yield
    finally:
      logger.removeFilter(from_elsewhere)
