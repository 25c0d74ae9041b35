"""Sparse Model Soups in JAX: prune, retrain m copies at once, average, phase after phase.

- Masks: `magnitude_masks`, `random_masks`, `apply_masks`, `sparsity`, `prunable`.
- Whole channels: `channel_groups`, `channel_masks`, `compact`, `sensitivity`.
- Training: `masked` around any optax optimizer, `pruned` with a schedule of sparsity in it,
  `assert_sparse`, `retrain_schedule`, `recalibrate` for batch statistics.
- Soups: `stack`, `uniform_soup`, `greedy_soup`, `soup_geometry`.
- The loop: `sparse_model_soup`; its parts `prune_phase`, `retrain_phase`, `merge_phase`.
- Networks, data, training and disk: `jaxsms.models`, `.data`, `.training`, `.checkpoint`.
- For your own network on a CPU: `jaxsms.convolution`.
- How all this goes together: `jaxsms.guide`.
"""

import importlib

from jaxsms.channels import (
  ChannelGroup,
  ChannelGroups,
  Compact,
  channel_groups,
  compact,
  compact_from,
)
from jaxsms.channels.budgets import channel_masks
from jaxsms.channels.places import masks_of_channels
from jaxsms.channels.scores import (
  batch_norm_scores,
  l2_scores,
  random_scores,
  taylor_scores,
)
from jaxsms.channels.table import GroupSensitivity, sensitivity
from jaxsms.criteria import erk_masks, lamp_masks
from jaxsms.devices.ingredients import map_ingredients, pad_ingredients
from jaxsms.devices.meshes import fit_mesh, make_mesh
from jaxsms.flops import (
  layer_sparsities,
  multiply_adds,
  sparse_multiply_adds,
  theoretical_speedup,
)
from jaxsms.geometry import (
  interpolate,
  loss_along_line,
  loss_barrier,
  soup_geometry,
)
from jaxsms.gradual import PrunedState, pruned
from jaxsms.landscape import (
  Plane,
  loss_on_plane,
  model_on_plane,
  plane_coordinates,
  plane_grid,
  plane_through,
)
from jaxsms.metrics import (
  accuracy,
  agreement,
  auroc,
  balanced_accuracy,
  calibration_error,
  class_accuracies,
  cross_entropy,
  disagreement,
  mutual_information,
  predictive_entropy,
  worst_class_accuracy,
)
from jaxsms.patterns import filter_masks, n_m_masks
from jaxsms.phases import Weighted, merge_phase, prune_phase
from jaxsms.pruning import (
  apply_masks,
  magnitude_masks,
  masks_from_keys,
  phase_sparsity,
  random_masks,
  sparsity,
)
from jaxsms.recalibration import recalibrate
from jaxsms.retraining import retrain_phase
from jaxsms.schedules import pretrain_schedule, retrain_schedule
from jaxsms.sms import Phase, SparseSoup, sparse_model_soup
from jaxsms.soups import greedy_soup, prediction_ensemble, uniform_soup
from jaxsms.transforms import assert_sparse, masked
from jaxsms.trees import prunable, stack, unstack
from jaxsms.weights import Weights

__version__ = "0.1.0"

__all__ = [
  "ChannelGroup",
  "ChannelGroups",
  "Compact",
  "GroupSensitivity",
  "Phase",
  "Plane",
  "PrunedState",
  "SparseSoup",
  "Weighted",
  "Weights",
  "accuracy",
  "agreement",
  "apply_masks",
  "assert_sparse",
  "auroc",
  "balanced_accuracy",
  "batch_norm_scores",
  "calibration_error",
  "channel_groups",
  "channel_masks",
  "class_accuracies",
  "compact",
  "compact_from",
  "cross_entropy",
  "disagreement",
  "erk_masks",
  "filter_masks",
  "fit_mesh",
  "greedy_soup",
  "interpolate",
  "l2_scores",
  "lamp_masks",
  "layer_sparsities",
  "loss_along_line",
  "loss_barrier",
  "loss_on_plane",
  "magnitude_masks",
  "make_mesh",
  "map_ingredients",
  "masked",
  "masks_from_keys",
  "masks_of_channels",
  "merge_phase",
  "model_on_plane",
  "multiply_adds",
  "mutual_information",
  "n_m_masks",
  "pad_ingredients",
  "phase_sparsity",
  "plane_coordinates",
  "plane_grid",
  "plane_through",
  "prediction_ensemble",
  "predictive_entropy",
  "pretrain_schedule",
  "prunable",
  "prune_phase",
  "pruned",
  "random_masks",
  "random_scores",
  "recalibrate",
  "retrain_phase",
  "retrain_schedule",
  "sensitivity",
  "soup_geometry",
  "sparse_model_soup",
  "sparse_multiply_adds",
  "sparsity",
  "stack",
  "taylor_scores",
  "theoretical_speedup",
  "uniform_soup",
  "unstack",
  "worst_class_accuracy",
]

_ROOMS = (
  "baselines", "checkpoint", "convolution", "data", "dynamic", "export", "guide", "merges",
  "models", "pretrained", "training",
)  # fmt: skip


def __getattr__(name: str):
  """Rooms that pull in more than JAX and optax are imported when they are asked for."""
  if name in _ROOMS:
    return importlib.import_module(f"jaxsms.{name}")
  raise AttributeError(f"module 'jaxsms' has no attribute {name!r}")
