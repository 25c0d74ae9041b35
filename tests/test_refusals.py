"""Bad input to the loop and to masks: one sentence, before any program runs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsms import (
  erk_masks,
  filter_masks,
  lamp_masks,
  magnitude_masks,
  merge_phase,
  n_m_masks,
  phase_sparsity,
  prune_phase,
  random_masks,
  sparse_model_soup,
  stack,
  uniform_soup,
)

KEY = jax.random.key(0)
PARAMS = {"kernel": np.arange(1.0, 13, dtype=np.float32).reshape(3, 4), "bias": np.ones(4)}
MASKS = {"kernel": np.arange(12).reshape(3, 4) > 2, "bias": np.ones(4, bool)}


def never(*args):
  raise RuntimeError("work was done")


def start(**changed):
  given = {
    "key": KEY,
    "params": PARAMS,
    "retrain": never,
    "ingredients": {"seed": np.arange(2)},
    "goal_sparsity": 0.5,
    "phases": 1,
  } | changed
  return sparse_model_soup(**given)


NOT_A_SHARE = "it is the share of weights to remove, one number in [0, 1)"
SHARES = {
  "a word": ("0.5", f"is '0.5': {NOT_A_SHARE}"),
  "nothing": (None, f"is None: {NOT_A_SHARE}"),
  "a flag": (True, f"is True: {NOT_A_SHARE}"),
  "another flag": (np.False_, f"is bool[]: {NOT_A_SHARE}"),
  "a complex number": (0.5 + 0j, f"is (0.5+0j): {NOT_A_SHARE}"),
  "a list": ([0.5], f"is [0.5]: {NOT_A_SHARE}"),
  "an array": (np.array([0.5]), f"is float64[1]: {NOT_A_SHARE}"),
  "percent": (50, "is 50: it is the share"),
  "infinite": (math.inf, "is inf: it is the share"),
  "no number": (np.float32(np.nan), "is nan: it is the share"),
  "below": (-1e-9, "is -1e-09: it is the share"),
}


@pytest.mark.parametrize("share", SHARES)
def test_sparsities_that_are_none(rejects, share):
  value, words = SHARES[share]
  for prune in (magnitude_masks, erk_masks, lamp_masks, n_m_masks, filter_masks):
    with rejects(f"sparsity {words}"):
      prune(PARAMS, value)
  with rejects(f"sparsity {words}"):
    random_masks(KEY, PARAMS, value)
  with rejects(f"goal sparsity {words}"):
    phase_sparsity(value, 1, 1)
  with rejects(f"goal_sparsity {words}"):
    start(goal_sparsity=value)
  with rejects(f"sparsity {words}"):
    prune_phase(PARAMS, None, value)


@pytest.mark.parametrize(
  "share", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.bfloat16(0.5)]
)
def test_sparsities_of_any_number(share):
  assert np.sum(magnitude_masks(PARAMS, share)["kernel"]) == 6
  assert np.all(magnitude_masks(PARAMS, 0)["kernel"])


CALLS = {
  "phases of 10^20": ({"phases": 10**20}, "phases is 1" + 20 * "0" + ": at most 1,000,000"),
  "phases in a word": ({"phases": "3"}, "phases is '3': give a whole number"),
  "part of a phase": ({"phases": 2.5}, "phases is 2.5: give a whole number"),
  "a flag": ({"phases": True}, "phases is True: give a whole number"),
  "fewer than one": ({"phases": -1}, "phases is -1: at least 1 phase is needed"),
  "a mesh in a word": ({"mesh": "2x1"}, "mesh is '2x1': give None, or a mesh"),
  "a mesh of numbers": ({"mesh": (2, 1)}, "mesh is (2, 1): give None, or a mesh"),
  "devices": ({"mesh": jax.devices()}, "give None, or a mesh as jaxsms.make_mesh gives"),
  "a seed for a key": ({"key": 0}, "key is 0: give a typed key, such as jax.random.key(0)"),
  "floats for a key": ({"key": np.ones(2)}, "key is float64[2]: give a typed key"),
  "no training": ({"retrain": None}, "retrain is None: give a function"),
  "a name": ({"prune": "magnitude"}, "prune is 'magnitude': give a function"),
  "another name": ({"merge": "greedy"}, "merge is 'greedy': give a function"),
  "a list": ({"on_phase": []}, "on_phase is []: give a function"),
  "all weights": (
    {"goal_sparsity": 0.999999},
    "goal_sparsity 0.999999 of 12 weights removes all of them: give at most 0.9166666667",
  ),
  "complex": (
    {"params": {"kernel": np.ones((2, 2), np.complex64)}},
    "kernel is complex64[2, 2]: weights are real",
  ),
  "integers": (
    {"params": {**PARAMS, "dense": {"kernel": np.ones((2, 2), int)}}},
    "dense/kernel is int64[2, 2]: weights are floating",
  ),
  "no entries": (
    {"params": {**PARAMS, "dense": {"kernel": np.ones((2, 0))}}},
    "dense/kernel is float64[2, 0]: there is nothing in it to prune",
  ),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_the_loop_that_cannot_be_right(rejects, call):
  changed, words = CALLS[call]
  with rejects(words):
    start(**changed)


def test_phases_of_a_schedule(rejects):
  for phases in ("3", 2.5, True, None, 10**400):
    with rejects("phases is "):
      phase_sparsity(0.5, 1, phases)
  with rejects("phase is '1': give a whole number"):
    phase_sparsity(0.5, "1", 3)
  assert phase_sparsity(0.5, np.int64(3), np.int32(3)) == 0.5


def test_a_goal_that_leaves_one_weight():
  def keep(key, params, masks, ingredient):
    return params

  soup = start(goal_sparsity=1 - 1 / 12, retrain=keep)
  assert int(np.sum(soup.masks["kernel"])) == 1


def regrowing(params, sparsity, masks=None):
  """Forgets the masks, and so lets weights grow back."""
  return magnitude_masks({**params, "kernel": params["kernel"][::-1, ::-1]}, sparsity)


def test_prune_that_lets_weights_grow_back(rejects):
  first, masks, _ = prune_phase(PARAMS, None, 0.25)
  with rejects("prune keeps 3 weights that were removed before: let it hand on the masks"):
    prune_phase(first, masks, 0.25, regrowing_params(PARAMS))
  _, grown, record = prune_phase(first, masks, 0.25, regrowing_params(PARAMS), regrow=True)
  assert record["sparsity"] == 0.25 and np.any(grown["kernel"] & ~masks["kernel"])


def regrowing_params(params):
  """Prunes other weights than the smallest, whatever was removed before."""
  return lambda _, sparsity, masks=None: regrowing(params, sparsity)


def test_the_loop_allows_regrowth_where_it_is_asked_for(rejects):
  calls = []

  def prune(params, sparsity, masks=None):
    calls.append(sparsity)
    turned = PARAMS if len(calls) == 1 else {"kernel": -PARAMS["kernel"][::-1], "bias": 0}
    turned = {**turned, "bias": PARAMS["bias"]}
    return magnitude_masks(turned, sparsity)

  def keep(key, params, masks, ingredient):
    return params

  with rejects("weights that were removed before"):
    start(prune=prune, phases=2, retrain=keep)
  calls.clear()
  soup = start(prune=prune, phases=2, retrain=keep, regrow=True)
  assert soup.history[-1]["sparsity"] == 0.5


def test_prune_that_removes_nothing_is_allowed():
  def nothing(params, sparsity, masks=None):
    return MASKS

  for masks in (None, MASKS):
    pruned, new, record = prune_phase(PARAMS, masks, 0.5, nothing)
    np.testing.assert_array_equal(new["kernel"], MASKS["kernel"])
    assert record["sparsity"] == 0.25
    assert record["pruned_fraction"] == (0.25 if masks is None else 0)
    np.testing.assert_array_equal(pruned["kernel"] != 0, MASKS["kernel"])


def test_prune_that_removes_all(rejects):
  def everything(params, sparsity, masks=None):
    return {"kernel": np.zeros((3, 4), bool), "bias": np.ones(4, bool)}

  with rejects("prune removed all 12 prunable weights at sparsity 0.5: ask for less"):
    prune_phase(PARAMS, None, 0.5, everything)


INDICES = {
  "beyond": (
    [0, 3],
    "merge gave the indices [0, 3] of 3 candidates: they count from 0 to 2",
  ),
  "negative": ([-1], "merge gave the indices [-1] of 3 candidates"),
  "none": ([], "merge gave the indices []: give each candidate that it took, once"),
  "nothing": (None, "merge gave the indices None"),
  "twice": ([1, 1], "merge gave the indices [1, 1]: give each candidate"),
  "no whole numbers": ([0.5], "merge gave the indices [0.5]: give each candidate"),
  "a number": (1, "merge gave the indices 1: give each candidate that it took"),
}


@pytest.mark.parametrize("indices", INDICES)
def test_merges_that_give_no_indices(rejects, indices):
  given, words = INDICES[indices]
  stacked = {"w": jnp.ones((3, 2))}
  with rejects(words):
    merge_phase(stacked, lambda c: ({"w": c["w"][0]}, given))


def test_merges_may_give_indices_of_any_kind():
  stacked = {"w": jnp.array([[1.0], [jnp.nan], [3.0]])}
  for indices in ([1], (1,), np.array([1]), jnp.array([1]), {1}):
    soup, weights = merge_phase(stacked, lambda c, i=indices: ({"w": c["w"][1]}, i))
    assert soup["w"] == 3 and weights.tolist() == [0, 0, 1]


def test_stacks_and_soups_of_other_things(rejects):
  with rejects("leaf a is float in model 1 but ndarray in model 0: all must be arrays"):
    stack([{"a": np.ones(2)}, {"a": 1.0}])
  with rejects("has no leaves"):
    uniform_soup({"f": never})
