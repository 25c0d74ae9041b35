"""Which lowering of the convolutions is fastest here, for the network of a run."""

import dataclasses
import functools

import jax
import numpy as np
from absl import logging

from jaxsms.convolution import CHOICES
from jaxsms.data import Dataset, StreamedDataset
from jaxsms.training import train_chunks
from jaxsms.training.state import seed_ingredients

from ..config.device_flags import MEASURE
from ..config.run_config import Config
from ..costs.timing import seconds
from .task import make_task

STEPS, ROUNDS = 4, 3


def with_fastest_lowering(
  config: Config, dataset: Dataset | StreamedDataset, before: str | None = None
) -> Config:
  """The flags with the fastest lowering in place of --convolution=measure.

  A run that is resumed keeps the one that it began with, `before`.
  """
  if config.convolution != MEASURE:
    return config
  if before is not None:
    return dataclasses.replace(config, convolution=before)
  timed = dataclasses.replace(config, init=None, ood=())  # not needed here
  step_seconds = {}
  for name in CHOICES[1:]:  # all but auto, which is one of them
    runner = _runner(dataclasses.replace(timed, convolution=name), dataset)
    next(runner)  # compiles
    round_seconds = [seconds(functools.partial(next, runner)) for _ in range(ROUNDS)]
    step_seconds[name] = min(round_seconds) / STEPS
    logging.info("convolutions lowered as %s: %.4f s a step", name, step_seconds[name])
  fastest = min(step_seconds, key=step_seconds.get)
  return dataclasses.replace(config, convolution=fastest)


def _runner(config, dataset):
  """Trains all copies, `STEPS` steps a time, and waits for them."""
  task = make_task(config, dataset)
  m, per_epoch = config.ingredients, task.steps_per_epoch
  steps = STEPS * (ROUNDS + 1)
  engine = task.engine
  model = engine.init(task.module, jax.random.key(0), task.image_shape)
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), model.params)
  state = engine.start(model, m)
  ingredients = seed_ingredients(m, config.weight_decay, steps)
  rates = np.zeros([m, steps], np.float32)
  while True:
    for _, chunk in train_chunks(
      engine.programs, engine.splits.train, masks, jax.random.key(0), state, ingredients,
      rates, min(STEPS, per_epoch),
    ):  # fmt: skip
      jax.block_until_ready(chunk.loss)
      yield
    state = engine.start(model, m)
