import inspect
import subprocess
import sys

import pytest

import jaxsms

REQUIRED = inspect.Parameter.empty
# What code outside relies on: positional parameters in order with their defaults, then
# keyword-only ones.
SIGNATURES = {
  "magnitude_masks": (
    {
      "params": REQUIRED,
      "sparsity": REQUIRED,
      "scope": "global",
      "prunable": None,
      "masks": None,
    },
    {},
  ),
  "random_masks": (
    {
      "key": REQUIRED,
      "params": REQUIRED,
      "sparsity": REQUIRED,
      "scope": "global",
      "prunable": None,
      "masks": None,
    },
    {},
  ),
  "prunable": ({"path": REQUIRED, "leaf": REQUIRED}, {}),
  "apply_masks": ({"params": REQUIRED, "masks": REQUIRED}, {}),
  "sparsity": ({"params": REQUIRED, "prunable": None}, {}),
  "phase_sparsity": ({"goal": REQUIRED, "phase": REQUIRED, "phases": REQUIRED}, {}),
  "masked": ({"transformation": REQUIRED, "masks": None}, {}),
  "retrain_schedule": (
    {"name": REQUIRED, "pretrain_lrs": REQUIRED, "steps": REQUIRED},
    {
      "warmup_fraction": 0.1,
      "pretrain_warmup_steps": 0,
      "relative_norm_drop": None,
      "pruned_fraction": None,
      "initial_lr": None,
    },
  ),
  "channel_groups": ({"apply": REQUIRED, "params": REQUIRED}, {}),
  "compact": (
    {"apply": REQUIRED, "params": REQUIRED, "masks": REQUIRED},
    {"convolution": None},
  ),
  "stack": ({"models": REQUIRED}, {}),
  "unstack": ({"stacked": REQUIRED}, {}),
  "masks_of_channels": (
    {"params": REQUIRED, "groups": REQUIRED, "kept": REQUIRED},
    {},
  ),
  "channel_masks": (
    {"params": REQUIRED, "sparsity": REQUIRED},
    {
      "groups": REQUIRED,
      "score": "l2",
      "scope": "global",
      "budget": "weights",
      "round_to": 1,
      "masks": None,
      "prunable": None,
    },
  ),
  "uniform_soup": ({"stacked": REQUIRED, "weights": None}, {}),
  "greedy_soup": ({"stacked": REQUIRED, "evaluate": REQUIRED}, {}),
  "soup_geometry": ({"stacked": REQUIRED}, {}),
  "calibration_error": (
    {"logits": REQUIRED, "labels": REQUIRED, "bins": 15, "norm": "l1"},
    {},
  ),
  "sparse_model_soup": (
    {"key": REQUIRED, "params": REQUIRED, "retrain": REQUIRED},
    {
      "ingredients": REQUIRED,
      "goal_sparsity": REQUIRED,
      "phases": REQUIRED,
      "prune": jaxsms.magnitude_masks,
      "merge": jaxsms.uniform_soup,
      "mesh": None,
      "on_phase": None,
      "shrink": None,
    },
  ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay_as_promised(name):
  assert name in jaxsms.__all__
  parameters = inspect.signature(getattr(jaxsms, name)).parameters
  positional, keywords = SIGNATURES[name]
  assert list(parameters)[: len(positional)] == list(positional)
  for wanted in (positional, keywords):
    for parameter, default in wanted.items():
      assert parameters[parameter].default is default or (
        parameters[parameter].default == default
      )
  for parameter in positional:
    assert parameters[parameter].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
  # Whatever else there is has a default.
  for parameter in set(parameters) - set(positional) - set(keywords):
    optional = parameters[parameter].kind == inspect.Parameter.VAR_POSITIONAL
    assert optional or parameters[parameter].default is not REQUIRED


def test_all_is_sorted_and_complete():
  assert list(jaxsms.__all__) == sorted(set(jaxsms.__all__))
  modules = {n for n, thing in vars(jaxsms).items() if inspect.ismodule(thing)}
  public = {n for n in vars(jaxsms) if not n.startswith("_")} - modules
  # A function may carry the name of a module, never the other way round.
  assert public - set(jaxsms.__all__) == set()


HEAVY = (
  "sklearn",
  "matplotlib",
  "tensorflow_datasets",
  "tensorflow",
  "torch",
  "PIL",
  "grain",
  "equinox",
  "haiku",
)


def test_import_does_no_work():
  code = f"""
import sys
import jaxsms
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
