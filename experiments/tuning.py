"""Which lowering of the convolutions is fastest here, for the network of a run."""

import time

import jax
import numpy as np
from absl import logging

from experiments.hardware import MEASURE, Hardware
from experiments.method_flags import MethodFlags
from experiments.methods.seeds import ingredients
from experiments.settings import Settings
from experiments.task import make_task
from jaxsms.convolution import CHOICES
from jaxsms.data import Dataset, StreamedDataset
from jaxsms.training import train_chunks

STEPS, ROUNDS = 4, 3


def measured(
  settings: Settings,
  chosen: Hardware,
  method: MethodFlags,
  dataset: Dataset | StreamedDataset,
  before: str | None = None,
) -> Hardware:
  """The flags with the fastest lowering in place of --convolution=measure.

  A run that is resumed keeps the one that it began with, `before`.
  """
  if chosen.convolution != MEASURE:
    return chosen
  if before is not None:
    return chosen._replace(convolution=before)
  method = method._replace(init=None, ood=())  # not needed here
  seconds = {}
  for name in CHOICES[1:]:  # all but auto, which is one of them
    runner = _runner(settings, chosen._replace(convolution=name), method, dataset)
    next(runner)  # compiles
    times = []
    for _ in range(ROUNDS):
      started = time.perf_counter()
      next(runner)
      times.append(time.perf_counter() - started)
    seconds[name] = min(times) / STEPS
    logging.info("convolutions lowered as %s: %.4f s a step", name, seconds[name])
  fastest = min(seconds, key=seconds.get)
  return chosen._replace(convolution=fastest)


def _runner(settings, chosen, method, dataset):
  """Trains all copies, `STEPS` steps a time, and waits for them."""
  task = make_task(settings, chosen, method, dataset)
  m, per_epoch = settings.ingredients, task.steps_per_epoch
  steps = STEPS * (ROUNDS + 1)
  engine = task.engine
  model = engine.init(task.module, jax.random.key(0), task.image_shape)
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), model.params)
  state = engine.start(model, m)
  varied = ingredients(m, settings.weight_decay, steps)
  rates = np.zeros([m, steps], np.float32)
  while True:
    for _, chunk in train_chunks(
      engine.programs, engine.splits.train, masks, jax.random.key(0), state, varied, rates,
      min(STEPS, per_epoch),
    ):  # fmt: skip
      jax.block_until_ready(chunk.loss)
      yield
    state = engine.start(model, m)
