"""Seconds of phases, sizes of cut networks and the table of groups, by hand."""

import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_training import MEAN, STD, make_programs

from experiments.costs import channel_costs
from experiments.costs.channel_costs import InferenceTimer, sensitivity_record, some_of
from experiments.methods.seed_state import SeedState
from experiments.run import network_costs, run_costs
from experiments.run.run_costs import Moment, RunCosts
from jaxsms import training
from jaxsms.training import Data, Engine, Model, Splits
from jaxsms.training.cutting import groups_of


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  pass


@pytest.fixture
def at(monkeypatch):
  """`at(seconds, compiling)`: that moment is the present one from now on."""
  present = [Moment(0.0, 0.0)]
  monkeypatch.setattr(run_costs, "moment", lambda: present[0])
  monkeypatch.setattr(run_costs, "compiling_seconds", lambda: present[0].compiling)

  def move(seconds, compiling):
    present[0] = Moment(float(seconds), float(compiling))

  return move


def of_phase(found, phase):
  (one,) = (p for p in found["phases"] if p["phase"] == phase)
  return one


def test_seconds_of_a_phase_are_those_of_its_chunks_but_the_first(at):
  run = RunCosts()
  at(10, 4)  # measuring the pruned model
  run.mark()
  at(30, 15)
  run.chunk("sms", 1, 3, 8)
  at(34, 15)
  run.chunk("sms", 1, 3, 8)
  at(50, 15)  # a checkpoint
  run.resume()
  at(52, 15)
  run.chunk("sms", 1, 3, 4)
  at(60, 21)  # candidates and soup
  run.phase("sms", 1)
  at(99, 30)  # inferences
  run.skip()
  at(109, 31)
  run.chunk("sms", 2, 3, 5)
  found = run.record(steps_per_epoch=10)
  # (4 + 2) s of the 8 + 4 steps after the first chunk.
  assert of_phase(found, 1) == {
    "method": "sms", "phase": 1, "copies": 3, "steps": 20, "seconds_per_epoch": 5.0,
    "compiling_seconds": 21.0,
  }  # fmt: skip
  # One chunk alone: 10 s, one of them compiling, for 5 steps.
  assert of_phase(found, 2)["seconds_per_epoch"] == 18.0
  assert of_phase(found, 2)["compiling_seconds"] == 1.0
  assert found["compiling_seconds"] == 31.0


def test_seconds_go_on_where_a_run_was_saved(at):
  first = RunCosts()
  first.inference, first.sensitivity = {"batch": 3}, {"share": 0.25}
  at(5, 1)
  first.chunk("sms", 1, 3, 2)
  at(9, 1)
  first.chunk("sms", 1, 3, 2)
  saved = first.saved()
  second = RunCosts(saved)
  assert second.saved() == saved
  at(16, 3)
  second.chunk("sms", 1, 3, 2)
  at(18, 3)
  second.chunk("sms", 1, 3, 2)
  (phase,) = second.record(2)["phases"]
  assert phase["seconds_per_epoch"] == (4 + 2) / 4 * 2
  assert (phase["steps"], phase["compiling_seconds"]) == (8, 3.0)
  with pytest.raises((TypeError, ValueError, KeyError, AttributeError)):
    RunCosts({"phases": [{"method": "sms"}]})


def test_without_training_a_phase_has_no_seconds(at):
  run = RunCosts()
  run.phase("sms", 1)
  assert run.record(3)["phases"][0]["seconds_per_epoch"] is None


def test_models_of_one_training_are_no_rows_of_their_own(at):
  run = RunCosts()
  at(1, 0)
  run.chunk("one_shot_soup", 1, 6, 4)
  for phase in (1, 2, 3):
    run.phase("one_shot_soup", phase)
  (row,) = run.record(4)["phases"]
  assert (row["phase"], row["copies"], row["steps"]) == (1, 6, 4)


@pytest.mark.parametrize(("first_seed", "measured"), [(0, None), (1, {"groups": []})])
def test_channels_are_measured_in_the_first_seed(first_seed, measured, monkeypatch):
  monkeypatch.setattr(network_costs, "sensitivity_record", lambda *args: {"groups": []})
  task = types.SimpleNamespace(
    module=Wide(), image_shape=(4, 4, 1), engine=None, groups=lambda: None
  )
  config = types.SimpleNamespace(seed=1, criterion="channels", split_params=False)
  found = RunCosts()
  channels = network_costs.ChannelCosts(task, config, found, first_seed)
  channels.note(SeedState(1), "sms", None)
  assert found.sensitivity == measured


class Wide(nn.Module):
  """A hidden layer with batch normalization."""

  norm_momentum: float = 0.9

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Dense(8)(images.reshape(len(images), -1))
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.norm_momentum)(x))
    return nn.Dense(3)(x)


def test_sizes_of_a_cut_network_are_those_of_its_widths(monkeypatch):
  model = Model(*training.init_variables(Wide(), jax.random.key(0), (4, 4, 1)))
  masks = jax.tree.map(lambda x: np.ones(x.shape, bool), jax.device_get(model.params))
  masks["Dense_0"]["kernel"][:, 3:] = False
  for layer, name in (
    ("Dense_0", "bias"),
    ("BatchNorm_0", "scale"),
    ("BatchNorm_0", "bias"),
  ):
    masks[layer][name][3:] = False
  masks["Dense_1"]["kernel"][3:] = False
  shapes = []

  def ready(function, variables, images):
    shapes.append(function(variables, images).shape)

  monkeypatch.setattr(channel_costs, "ready", ready)
  rounds = [[0.003, 0.001], [0.008, 0.002], [0.004, 0.004]]
  monkeypatch.setattr(channel_costs, "rounds_by_turns", lambda calls: rounds)
  found = InferenceTimer(Wide(), (4, 4, 1)).phase(jax.device_get(model), masks)
  assert found["multiply_adds"] == 16 * 3 + 3 * 3
  assert found["parameters"] == 16 * 3 + 3 + 2 * 3 + 3 * 3 + 3
  assert found["bytes"] == 4 * (found["parameters"] + 2 * 3)
  assert shapes == [(32, 3), (32, 3)]
  assert found["dense_milliseconds"] == {"median": 4.0, "min": 3.0, "max": 8.0}
  assert found["milliseconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
  task = types.SimpleNamespace(module=Wide(), image_shape=(4, 4, 1))
  whole = channel_costs.dense_size(task.module, task.image_shape, jax.device_get(model))
  assert whole["parameters"] == 16 * 8 + 8 + 2 * 8 + 8 * 3 + 3
  assert whole["multiply_adds"] == 16 * 8 + 8 * 3
  assert whole["bytes"] == 4 * (whole["parameters"] + 2 * 8)


def test_points_lost_without_a_quarter_of_a_group():
  model = Model(*training.init_variables(Wide(), jax.random.key(3), (4, 4, 1)))
  images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1))

  def classes(params):
    x = (images.reshape(40, -1) / 255 - MEAN[0]) / STD[0]
    hidden = x @ params["Dense_0"]["kernel"] / np.sqrt(1 + 1e-5)  # fresh statistics
    return np.argmax(np.maximum(hidden, 0) @ params["Dense_1"]["kernel"], -1)

  data = Data(images.astype(np.uint8), classes(model.params).astype(np.int32))
  programs = make_programs(Wide(), augmentation="none")
  engine = Engine(programs, Splits(data, data, data))
  groups = groups_of(Wide(), model, (4, 4, 1))
  found = sensitivity_record(engine, groups, model)
  (group,) = found["groups"]
  assert (found["images"], found["share"]) == (40, 0.25)
  assert (group["channels"], group["removed"]) == (8, 2)
  assert group["weights"] == group["multiply_adds"] == 16 * 8 + 8 * 3

  params = jax.tree.map(np.array, model.params)
  # The weakest: least in the norm of all that the channel has.
  places = [params["Dense_0"]["kernel"].T, params["Dense_1"]["kernel"]]
  places += [
    x[:, None] for x in (params["Dense_0"]["bias"], *params["BatchNorm_0"].values())
  ]
  norms = np.sqrt(sum((p.astype("f8") ** 2).sum(1) for p in places))
  for channel in np.argsort(norms)[:2]:
    params["Dense_1"]["kernel"][channel] = 0  # all that it does
  lost = np.mean(classes(params) != data.labels)
  assert lost > 0
  assert group["loss"] == pytest.approx(lost)


def test_some_images_of_a_stream_lie_evenly():
  data = training.StreamedData(None, np.arange(100, 110))
  np.testing.assert_array_equal(some_of(data, 4).indices, [100, 102, 105, 107])
  assert some_of(data, 40).size == 10
