"""What the channels of a network cost: cut networks, and each group of channels."""

import functools
import time
from typing import Any

import numpy as np

from jaxsms import GroupSensitivity, sensitivity
from jaxsms.channels.latency import ready, rounds_by_turns
from jaxsms.devices.meshes import fetch
from jaxsms.training import Data, Engine, Model, StreamedData
from jaxsms.training.cutting import (
  TRACED,
  cut_multiply_adds,
  cut_network,
  image_multiply_adds,
  parameter_count,
)
from jaxsms.training.engine import one_model
from jaxsms.training.landscape import evenly
from jaxsms.training.measurements import predict, score
from jaxsms.trees import PyTree

from .inference_times import filled, size
from .latency_budget import BATCH
from .timing import in_milliseconds

IMAGES = 1000  # of the validation data, for the table of groups
SHARE = 0.25  # of a group's channels, that go for it


def dense_size(module: Any, image_shape: tuple[int, ...], model: Model) -> dict[str, int]:
  """Parameters, multiply-adds and bytes of the network before it is cut."""
  apply = functools.partial(module.apply, train=False)
  costs = image_multiply_adds(apply, model._asdict(), image_shape)
  return {
    "parameters": parameter_count(model.params),
    "multiply_adds": sum(costs.values()),
    "bytes": size(model),
  }


class InferenceTimer:
  """Times the networks that phases leave, cut, beside the dense one."""

  def __init__(self, module: Any, image_shape: tuple[int, ...]):
    """Compiles nothing yet.

    Args:
      module: the network.
      image_shape: [height, width, channels].
    """
    self._module, self._image_shape = module, image_shape
    self._dense = functools.partial(module.apply, train=False)

  def phase(self, model: Model, masks: PyTree) -> dict[str, Any]:
    """Size and time of one phase's network, cut, and the time of the dense one beside it.

    Args:
      model: of full shapes, leaves [...] of the host.
      masks: of its parameters.

    Returns:
      `parameters`, `multiply_adds` (of one image), `bytes` (of parameters and batch
      statistics), `milliseconds` of a batch and `dense_milliseconds`, each with `median`,
      `min` and `max` over rounds in which both alternate.
    """
    network = cut_network(self._module, model, masks, self._image_shape)
    images = np.random.default_rng(0).standard_normal(
      (BATCH, *self._image_shape), np.float32
    )
    full = {**model._asdict(), "params": filled(model.params, masks)}
    left = network.shrink(model._asdict())
    costs = cut_multiply_adds(network, model, self._image_shape)
    calls = ready(self._dense, full, images), ready(network.apply, left, images)
    dense, cut = zip(*rounds_by_turns(calls), strict=True)
    return {
      "parameters": parameter_count(left["params"]),
      "multiply_adds": sum(costs.values()),
      "bytes": size(left),
      "milliseconds": in_milliseconds(cut),
      "dense_milliseconds": in_milliseconds(dense),
    }


def sensitivity_record(engine: Engine, groups: Any, dense: Model) -> dict[str, Any]:
  """What each group of channels of a dense model costs, and the accuracy lost without it.

  Args:
    engine: of the network and its data.
    groups: of its channels.
    dense: leaves [...].

  Returns:
    `groups`, see `jaxsms.sensitivity`, of one image: the loss is one of validation accuracy
    where `share` of one group goes, on so many `images`; and the `seconds` that it took.
  """
  started = time.monotonic()
  validation = some_of(engine.splits.validation, IMAGES)
  params, batch_stats = fetch(dense)

  def accuracy(pruned):
    models = one_model(Model(pruned, batch_stats))
    predictions = {"validation": predict(engine.programs, validation, models)}
    return score(engine.programs, predictions)[0]["validation_accuracy"]

  table = sensitivity(accuracy, params, groups, SHARE)
  return {
    "share": SHARE,
    "images": validation.size,
    "groups": [of_one_image(one) for one in table],
    "seconds": time.monotonic() - started,
  }


def of_one_image(group: GroupSensitivity) -> dict[str, Any]:
  """What is known of a group; the network was traced with `TRACED` images."""
  products = group.multiply_adds
  products = None if products is None else products // TRACED
  return group._replace(multiply_adds=products)._asdict()


def some_of(data: Data | StreamedData, most: int) -> Data | StreamedData:
  """Up to so many examples, spread evenly over the data."""
  if not isinstance(data, StreamedData):
    return evenly(data, most)
  count = min(most, data.size)
  return data._replace(indices=data.indices[np.arange(count) * data.size // count])
