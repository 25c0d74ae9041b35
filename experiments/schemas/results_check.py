"""What results.json, run.json and metrics.jsonl must look like to be read.

A digest detects damage. These checks detect a file that another program wrote.
"""

import os
from typing import Any

from jaxsms.disk.storage import Damaged
from jaxsms.training.failures import COPY_FAULTS

from ..methods import registry, seeds
from .costs_check import MILLISECONDS, RUN_COSTS, SENSITIVITY
from .json_checks import (
  Unfit,
  check_at,
  every,
  flag,
  listing,
  mapping,
  maybe,
  not_null,
  number,
  record,
  scalar,
  scalar_or_list,
  text,
  whole,
)


def check_results(path: str | os.PathLike, results: dict[str, Any]) -> None:
  """Raises Damaged where results.json is not what a run or a comparison writes.

  Args:
    path: of the file, for the message.
    results: its content.
  """
  _checked(path, COMPARISON if "cells" in results else RUN, results)


def check_run(path: str | os.PathLike, run: dict[str, Any]) -> None:
  """Raises Damaged where run.json is not what a run or a comparison writes."""
  _checked(path, record({"flags": FLAGS, "defining": MAPPING, "environment": SCALARS}), run)


def fits_line(line: Any) -> bool:
  """Whether a line of metrics.jsonl is of an epoch, or of an evaluation."""
  try:
    record({"seed": whole(0), "method": text, "phase": whole(0)})(line)
    if "evaluation" not in line:
      EPOCH(line)
    elif line["method"] == seeds.DENSE:
      MODEL(line["evaluation"])
    elif line["method"] == seeds.SOUP:
      every(PHASE, record({"soup": SOUP}))(line["evaluation"])
    else:
      record({"soup": SOUP})(line["evaluation"])
  except Unfit:
    return False
  return True


def _checked(path, check, content):
  try:
    check(content)
  except Unfit as error:
    where = " ".join(error.where.lstrip(".").split())[-100:] or "it"
    raise Damaged(
      f"{path} is not what a run writes: {where} should be {error.expected}"
    ) from error


def _metrics(value):
  """Accuracies and sparsities are shares, losses and errors are numbers."""
  for name, one in value.items():
    if name.endswith(("accuracy", "sparsity")):
      check_at(f".{name}", SHARE, one)
    elif name.endswith(("loss", "error")):
      check_at(f".{name}", number(), one)


def _same_lengths(first, *others):
  def checked(value):
    for name in others:
      if len(value[name]) != len(value[first]):
        raise Unfit(f"as long as {first}", f".{name}")

  return checked


def _same_copies(rungs):
  """All are of as many copies, and name none beyond."""
  for i, rung in enumerate(rungs):
    m = len(rungs[0]["parents"])
    of_copies = {f".values.{name}": of for name, of in rung["values"].items()}
    for where, values in {".parents": rung["parents"], **of_copies}.items():
      if len(values) != m:
        raise Unfit(f"a list with {m}", f"[{i}]{where}")
    if any(copy is not None and copy >= m for copy in [*rung["parents"], *rung["kept"]]):
      raise Unfit(f"copies below {m}", f"[{i}].parents")


def _grid(plane):
  shape = len(plane["y"]), len(plane["x"])
  if len(plane["loss"]) != shape[0] or any(len(row) != shape[1] for row in plane["loss"]):
    raise Unfit(f"{shape[0]} lists of {shape[1]} numbers", ".loss")


def _same_layers(seeds):
  """What one soup says of its layers all of them say."""
  soups = [
    (f"[{i}].phases[{j}].soup", phase["soup"])
    for i, seed in enumerate(seeds)
    for j, phase in enumerate(seed["phases"])
    if "soup" in phase
  ]
  for where, soup in soups:
    for name in ("layer_sparsities", "multiply_adds"):
      same = soups[0][1].get(name), soup.get(name)
      names = [sorted(x) if isinstance(x, dict) else x is None for x in same]
      if names[0] != names[1]:
        raise Unfit("as in the other soups", f"{where}.{name}")
  if any("multiply_adds" in seed["dense"] for seed in seeds):
    for where, soup in soups:
      for name in ("multiply_adds", "sparsity"):
        if soup.get(name) is None:
          raise Unfit("there, as of the dense network", f"{where}.{name}")


SCALARS = mapping(scalar)
MAPPING = mapping(lambda value: None)
SHARE = number(0, 1)
COUNTS = listing(whole(0))
FLAGS = mapping(scalar_or_list)
# Of the flags of a run together with those in its results.
KNOWN_FLAGS = every(
  FLAGS,
  record(
    {
      "model": text,
      "dataset": text,
      "ingredients": whole(1, 10**6),
      "phases": whole(1, 10**6),
      "goal_sparsity": not_null(SHARE),
    },
    seeds=whole(0),
    seed=whole(0),
  ),
)
FAULTS = {name: flag if name == "all_collapsed" else COUNTS for name in COPY_FAULTS}
COSTS = dict.fromkeys(("sparse_multiply_adds", "theoretical_speedup"), number(0))


def _costs(value):
  if value.get("multiply_adds") is not None:
    record({"nonzero_parameters": number(0), **COSTS})(value)


MODEL = every(
  record({}, layer_sparsities=mapping(not_null(SHARE)), **FAULTS),
  record({}, ood=mapping(mapping(number()))),
  _metrics,
  _costs,
)
SOUP = every(MODEL, record({"sparsity": not_null(SHARE)}))
DISTANCE = number(0)
GEOMETRY = record(
  {
    f"{kind}_{what}": DISTANCE
    for kind in ("max", "min", "mean")
    for what in ("l2_distance", "angle")
  },
  max_barycentre_distance=DISTANCE,
)
SPREAD = mapping(number())
UNCERTAINTY = record({"test": SPREAD}, validation=SPREAD, corrupted=mapping(SPREAD))
NUMBERS = listing(number(), least=2)
LINE = every(
  record(
    {
      "between": listing(whole(0), least=2),
      "barrier": number(),
      "positions": listing(not_null(number()), least=2),
      "loss": NUMBERS,
      "accuracy": listing(SHARE, least=2),
    }
  ),
  _same_lengths("positions", "loss", "accuracy"),
)
AXIS = listing(not_null(number()), least=2)
PLANE = every(
  record(
    {
      "through": COUNTS,
      "x": AXIS,
      "y": AXIS,
      "loss": listing(NUMBERS, least=2),
      "points": mapping(listing(not_null(number()), least=2)),
      "unit": text,
    },
    distance_from_plane=maybe(mapping(number())),
  ),
  _grid,
)
LANDSCAPE = record(
  {"split": text, "images": whole(0), "lines": listing(LINE, least=1)}, plane=maybe(PLANE)
)
RUNG = every(
  record(
    {
      "phase": whole(1, 10**6),
      "step": whole(0),
      "values": mapping(listing(not_null(number(0)), least=1)),
      "parents": listing(maybe(whole(0)), least=1),
      "validation_accuracy": listing(SHARE, least=1),
      "validation_loss": listing(number(), least=1),
      "kept": listing(whole(0), least=1),
    }
  ),
  _same_lengths("parents", "validation_accuracy", "validation_loss"),
)
FAILED = record(
  {
    "soup_validation_accuracy": not_null(SHARE),
    "worst_candidate_validation_accuracy": not_null(SHARE),
    "copies": COUNTS,
    "barrier": number(),
  }
)
PHASE = record(
  {"phase": whole(1, 10**6), "sparsity": not_null(SHARE)},
  candidates=listing(MODEL),
  geometry=maybe(GEOMETRY),
  uncertainty=maybe(UNCERTAINTY),
  landscape=maybe(LANDSCAPE),
  averaging_failed=maybe(FAILED),
  search=maybe(every(listing(RUNG), _same_copies)),
  **FAULTS,
  **dict.fromkeys(registry.looks(), MODEL),
)
DENSE = every(record({"test_accuracy": SHARE}), MODEL)
SEED = record({"seed": whole(0), "dense": DENSE, "phases": listing(PHASE)})
SEEDS = every(listing(SEED), _same_layers)
SIZES = record({"bytes": not_null(number(0))})


def _timed(value):
  """Sizes of a model, and its times, of which older runs have one number."""
  SIZES(value)
  times = value.get("milliseconds")
  check_at(".milliseconds", MILLISECONDS if isinstance(times, dict) else number(0), times)


def _models(value):
  """Under `models`, or in older runs beside the rest."""
  if "models" in value:
    check_at(".models", mapping(_timed), value["models"])
  found = models_of(value)
  if not found:
    raise Unfit("there", ".models")
  mapping(_timed)(found)


def models_of(inference: dict[str, Any]) -> dict[str, Any]:
  """The models that were timed; older runs have them beside the rest."""
  return inference.get("models") or {
    k: v for k, v in inference.items() if isinstance(v, dict) and "bytes" in v
  }


INFERENCE = every(record({"device": text, "batch": whole(1)}), _models)
LATENCY = record(
  {
    "runtime": text,
    "device": text,
    "files": mapping(
      record({"bytes": not_null(number(0)), "milliseconds": mapping(MILLISECONDS)})
    ),
  }
)
PART = record(
  {
    "method": text,
    "seed": whole(0),
    "goal_sparsity": SHARE,
    "ingredients": maybe(whole(1)),
  }
)


def _part(results):
  """A part has one seed, whose phases have its method's metrics."""
  if "part" not in results:
    return
  part = results["part"]
  if part.keys() != {"method", "seed", "goal_sparsity", "ingredients"}:
    raise Unfit("a method with a seed", ".part")
  if results.get("finished") and len(results["seeds"]) != 1:
    raise Unfit("a list with 1", ".seeds")
  method = "soup" if part["method"] == seeds.SOUP else part["method"]
  for i, seed in enumerate(results["seeds"]):
    for j, phase in enumerate(seed["phases"]):
      if method != seeds.DENSE and method not in phase:
        raise Unfit("there", f".seeds[{i}].phases[{j}].{method}")


SHARED = {
  "environment": SCALARS,
  "environments": listing(record({"from": text, "environment": SCALARS})),
  "ood_sources": maybe(mapping(scalar)),
  "inference": maybe(INFERENCE),
  "costs": maybe(RUN_COSTS),
  "sensitivity": maybe(SENSITIVITY),
  "finished": flag,
  "seconds": not_null(number(0)),
}
RUN = every(
  record({"flags": KNOWN_FLAGS, "seeds": SEEDS}, part=PART, **SHARED),
  _part,
)
CELL = record(
  {
    "goal_sparsity": not_null(SHARE),
    "ingredients": whole(1, 10**6),
    "seeds": every(listing(SEED, least=1), _same_layers),
  }
)
COMPARISON = record(
  {"flags": KNOWN_FLAGS, "cells": listing(CELL)},
  methods=listing(text),
  dense=mapping(MODEL),
  failed=maybe(mapping(text)),
  **SHARED,
)
EPOCH = every(
  record(
    {
      "epoch": whole(1, 10**9),
      "loss": listing(number(), least=1),
      "accuracy": listing(SHARE, least=1),
      "learning_rate": listing(number(), least=1),
    }
  ),
  _same_lengths("loss", "accuracy", "learning_rate"),
)
