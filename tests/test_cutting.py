"""Networks that are cut between the phases of the engine."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine import run_phases
from test_training import BATCH, assert_close, ingredients, make_data, make_programs

from jaxsms import Phase, channel_groups, channel_masks, make_mesh, training
from jaxsms.data import ArrayExamples
from jaxsms.training import Engine, Model, Splits
from jaxsms.training.cutting import CutModule, cut_engine

KEY = jax.random.key(2)
SPLITS = Splits(make_data(23), make_data(7, 1), make_data(9, 2))


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compilation):
  pass


class Wide(nn.Module):
  """Two hidden layers, the first with batch normalization."""

  norm_momentum: float = 0.9

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Dense(12)(images.reshape(len(images), -1))
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.norm_momentum)(x))
    return nn.Dense(3)(nn.relu(nn.Dense(10)(x)))


def programs_of(module, **options):
  return make_programs(module, augmentation="none", **options)


def setting():
  dense = Model(*training.init_variables(Wide(), jax.random.key(0), (4, 4, 1)))

  def apply(params, images):
    return Wide().apply({"params": params, "batch_stats": dense.batch_stats}, images)

  groups = channel_groups(apply, dense.params, jnp.ones((2, 4, 4, 1)))
  return dense, functools.partial(channel_masks, groups=groups)


CUT = {"module": Wide(), "programs_of": programs_of, "image_shape": (4, 4, 1)}


def soups(shrink, start=None, splits=SPLITS, program_options=None, **options):
  dense, prune = setting()
  chosen = ingredients([0, 1], 7)
  make = functools.partial(programs_of, **(program_options or {}))
  programs, cuts = make(Wide()), []
  rates = np.full((2, 7), 0.1, np.float32)

  def cut(engine, model, masks):
    cuts.append(cut_engine(engine, model, masks, **{**CUT, "programs_of": make}))
    return cuts[-1]

  found = run_phases(
    programs, splits, KEY, start or dense, lambda record: (chosen, rates),
    goal_sparsity=0.6, phases=2, prune=prune, shrink=cut if shrink else None, **options,
  )  # fmt: skip
  return found, cuts


@pytest.fixture(scope="module")
def both():
  return soups(True), soups(False)


@pytest.mark.slow
def test_the_soup_is_that_of_masks_of_channels_without_cutting(both):
  (cut, _), (masked, _) = both
  assert_close(cut.model.params, masked.model.params, 2e-5)
  for a, b in zip(*(jax.tree.leaves(x.masks) for x in (cut, masked)), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(cut.records, masked.records, strict=True):
    assert a["sparsity"] == b["sparsity"]
    assert a["soup"] == pytest.approx(b["soup"], abs=1e-4)


@pytest.mark.slow
def test_every_phase_trains_what_is_left(both):
  (found, cuts), _ = both
  shapes = [
    jax.tree.map(jnp.shape, cut.shrink(found.model).params["Dense_0"]["kernel"])
    for cut in cuts
  ]
  assert 12 > shapes[0][1] > shapes[1][1] >= 1
  masks = found.masks["Dense_0"]["kernel"]
  assert shapes[1][1] == np.asarray(masks).any(0).sum()


def streamed(split):
  source = ArrayExamples(np.asarray(split.images), np.asarray(split.labels))
  return training.StreamedData(source, np.arange(split.size), threads=0)


@pytest.mark.slow
def test_streamed_data_give_the_same_soup_cut_and_masked():
  splits = Splits(*map(streamed, SPLITS[:3]))
  (cut, cuts), (masked, _) = (soups(shrink, splits=splits) for shrink in (True, False))
  assert_close(cut.model.params, masked.model.params, 2e-5)
  for a, b in zip(cut.records, masked.records, strict=True):
    assert a["soup"] == pytest.approx(b["soup"], abs=1e-4)
  assert cuts[1].shrink(cut.model).params["Dense_0"]["kernel"].shape[1] < 12


@pytest.mark.slow
def test_parameters_in_parts_give_the_same_soup(both):
  """Each copy's parameters over two devices; widths that are odd after a cut stay whole."""
  mesh = make_mesh(1, 2, devices=jax.devices()[:2])
  programs = programs_of(Wide(), mesh=mesh, split_params=True)
  dense, _ = setting()
  parts = Engine(programs, SPLITS).start(dense, 1)
  start = jax.tree.map(lambda x: x[0], Model(parts.params, parts.batch_stats))
  options = {"mesh": mesh, "split_params": True}
  found, cuts = soups(True, start=start, program_options=options)
  assert cuts[0].engine.programs.split_params
  assert_close(found.model.params, both[0][0].model.params, 2e-5)
  for a, b in zip(found.records, both[0][0].records, strict=True):
    assert a["sparsity"] == b["sparsity"]
    assert a["soup"] == pytest.approx(b["soup"], abs=1e-4)


@pytest.mark.slow
def test_a_kept_state_goes_on_in_the_shapes_of_its_phase(both):
  done, states = [], []

  def keep(event):
    if isinstance(event, Phase):
      done.append(event)
    if isinstance(event, training.TrainState):
      states.append(jax.tree.map(np.array, event))

  whole, _ = soups(True, chunk_steps=3, wants_state=lambda: True, on_event=keep)
  last = next(s for s in states[len(states) // 2 :] if 0 < s.step[0] < 7)
  again, _ = soups(
    True, chunk_steps=3, done=1, masks=done[0].masks, state=last, start=done[0].params
  )
  assert again.records == whole.records[1:]
  assert_close(again.model, whole.model, 0)


def test_a_cut_module_stands_where_its_module_does():
  dense, prune = setting()
  masks = prune(dense.params, 0.5)
  engine = Engine(programs_of(Wide()), SPLITS)
  cut = cut_engine(engine, dense, masks, **CUT)
  module, small = CutModule(Wide(), cut.network), cut.shrink(dense)
  images = jax.random.normal(KEY, (BATCH, 4, 4, 1))
  pruned = jax.tree.map(lambda x, m: x * m, dense.params, masks)
  full = {"params": pruned, "batch_stats": dense.batch_stats}
  small = small._asdict() | {"params": cut.shrink(Model(pruned, {})).params}
  np.testing.assert_allclose(
    module.apply(small, images), Wide().apply(full, images), atol=1e-5
  )
  logits, updated = module.apply(small, images, train=True, mutable=["batch_stats"])
  expected, of_full = Wide().apply(full, images, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  mean = updated["batch_stats"]["BatchNorm_0"]["mean"]
  kept = np.asarray(masks["Dense_0"]["kernel"]).any(0)
  np.testing.assert_allclose(
    mean, of_full["batch_stats"]["BatchNorm_0"]["mean"][kept], atol=1e-5
  )
