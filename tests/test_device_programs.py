"""What the programs for several devices are: collectives, work, memory, platforms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ingredients
from jax import export
from test_devices import CHOSEN, Small, devices
from test_training import all_true, ingredients, make_data, make_programs, train

from jaxsms import (
  magnitude_masks,
  make_mesh,
  map_ingredients,
  merge_phase,
  training,
  uniform_soup,
)
from jaxsms.devices.meshes import params_sharding
from jaxsms.training import Model, memory
from jaxsms.training.state import start

# All optimizations: these tests read what is compiled for users.
COLLECTIVE = re.compile(r"all-(reduce|gather|to-all)|reduce-scatter|collective-permute")


@pytest.fixture(scope="module")
def small():
  return Model(*training.init_variables(Small(), jax.random.key(0), (4, 4, 1)))


@pytest.fixture(scope="module")
def examples():
  return make_data(23)


def compiled_step(mesh, small, examples, m, **options):
  programs = make_programs(Small(), mesh=mesh, **options)
  state = start(*small, programs.optimizer(0.0, 0.0), m)
  return programs.train.lower(
    examples, all_true(small.params), jax.random.key(0), state,
    ingredients(range(m), 5), np.full((m, 5), 0.1, np.float32),
  ).compile()  # fmt: skip


@pytest.mark.slow
def test_the_training_step_of_one_copy_on_each_device_has_no_collective(small, examples):
  text = compiled_step(make_mesh(8), small, examples, 8).as_text()
  assert not COLLECTIVE.search(text)


@pytest.mark.slow
def test_a_batch_that_is_split_is_summed_over_its_devices(small, examples):
  parts = compiled_step(make_mesh(4, 2), small, examples, 4)
  assert {match[1] for match in COLLECTIVE.finditer(parts.as_text())} == {"reduce"}
  whole = compiled_step(make_mesh(4, 1, devices(4)), small, examples, 4)
  # Of one device: it does its part alone.
  assert parts.cost_analysis()["flops"] < 0.75 * whole.cost_analysis()["flops"]


def compiled_map(mesh, m):
  key, params, masks, _ = test_ingredients.make_work()
  ingredients = {"seed": jnp.arange(m), "lr": jnp.full(m, 0.1)}
  program = jax.jit(map_ingredients(test_ingredients.train, test_ingredients.SHARED, mesh))
  return program.lower(key, params, masks, ingredients).compile()


def test_one_copy_per_device_needs_no_collective():
  program = compiled_map(make_mesh(8), 8)
  assert not COLLECTIVE.search(program.as_text())
  shardings = jax.tree.leaves(program.output_shardings)
  assert all(len(s.device_set) == 8 and not s.is_fully_replicated for s in shardings)


def test_some_copies_per_device_need_no_collective():
  assert not COLLECTIVE.search(compiled_map(make_mesh(4), 8).as_text())


def test_merging_sums_where_the_copies_are():
  mesh = make_mesh(8)
  like = {"kernel": jnp.ones((8, 64, 64))}
  spread = jax.device_put(like, params_sharding(mesh, (8, 64, 64), stacked=True))
  text = jax.jit(uniform_soup).lower(spread).compile().as_text()
  assert {match[1] for match in COLLECTIVE.finditer(text)} == {"reduce"}
  soup, _ = merge_phase(spread)
  np.testing.assert_array_equal(soup["kernel"], 1)


def test_pruning_parameters_in_parts_gathers_no_weights():
  mesh = make_mesh(1, 8)
  params = {"a": {"kernel": jnp.zeros((64, 512))}, "b": {"kernel": jnp.zeros((512, 64))}}
  parts = jax.tree.map(
    lambda x: jax.device_put(x, params_sharding(mesh, x.shape, stacked=False)), params
  )
  program = jax.jit(lambda p: magnitude_masks(p, 0.5))
  text = program.lower(parts).compile().as_text()
  largest = max(
    (int(np.prod([int(n) for n in dims.split(",") if n]))
     for dims in re.findall(r"\w+\[([\d,]*)\][^=]* all-gather", text)),
    default=0,
  )  # fmt: skip
  assert largest < 1000, text


@pytest.mark.slow
def test_out_of_memory_names_the_copies_that_fit(small, examples, monkeypatch):
  programs = make_programs(Small())
  state = start(*small, programs.optimizer(0.0, 0.0), 3)
  arguments = (examples, all_true(small.params), jax.random.key(0), state)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
  shared, of_state, work = memory.bytes_of_copies(programs, *like, 5)
  # Independent: what a program of four copies takes.
  four = compiled_step(None, small, examples, 4).memory_analysis()
  needed = (
    four.argument_size_in_bytes + four.temp_size_in_bytes
    + four.output_size_in_bytes - four.alias_size_in_bytes
  )  # fmt: skip
  assert shared + 4 * (of_state + work) == pytest.approx(needed, rel=0.1)

  class Full:
    def memory_stats(self):
      return {"bytes_limit": shared + 3 * of_state + 2 * work}

  def fails(*arguments):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  fails.on = programs.train.on
  monkeypatch.setattr(jax, "local_devices", lambda: [Full()])
  words = "with 3 copies: about 2 of them fit at once: give at_once=2$"
  with pytest.raises(MemoryError, match=words) as caught:
    train(programs._replace(train=fails), examples, small, *CHOSEN)
  assert (caught.value.copies, caught.value.fit) == (3, 2)
  monkeypatch.setattr(Full, "memory_stats", lambda self: {"bytes_limit": shared})
  with pytest.raises(MemoryError, match="not even one of them fits"):
    train(programs._replace(train=fails), examples, small, *CHOSEN)
  monkeypatch.setattr(Full, "memory_stats", lambda self: None)
  with pytest.raises(MemoryError, match="train fewer of them at once"):
    train(programs._replace(train=fails), examples, small, *CHOSEN)


# The program lowers for platforms that are not there.


@pytest.mark.parametrize(
  "platform", ["cpu", pytest.param("cuda", marks=pytest.mark.slow), "tpu"]
)
def test_the_training_step_lowers_for_every_platform(platform, small, examples):
  programs = make_programs(Small())
  state = start(*small, programs.optimizer(0.0, 0.0), 3)
  exported = export.export(programs.train.on(None, 3), platforms=[platform])(
    examples, all_true(small.params), jax.random.key(0), state,
    ingredients([0, 1, 2], 5), np.full((3, 5), 0.1, np.float32),
  )  # fmt: skip
  text = exported.mlir_module()
  groups = set(re.findall(r"(?:batch|feature)_group_count = (\d+)", text))
  assert groups == ({"1"} if platform == "cpu" else {"1", "3"})
