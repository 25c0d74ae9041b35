"""Run and comparison directories with made-up numbers, in the form of real ones."""

import json

import numpy as np

from experiments.comparison.parts import Part, cells_of
from jaxsms.disk import storage

LAYERS = ("Conv_0/kernel", "Dense_0/kernel")
ENVIRONMENT = {"jaxsms": "0.1.0", "jax": "0.10.2", "device": "cpu", "devices": 1}


def metrics(rng, sparsity=0.0, ood=True):
  found = {
    "test_accuracy": float(rng.uniform(0.9, 0.99)),
    "test_loss": 0.1,
    "test_expected_calibration_error": float(rng.uniform(0.01, 0.05)),
    "validation_accuracy": 0.95,
    "sparsity": sparsity,
    "layer_sparsities": {name: sparsity for name in LAYERS},
    "parameters": 1000,
    "nonzero_parameters": round(1000 * (1 - sparsity)),
    "multiply_adds": 8000,
    "sparse_multiply_adds": round(8000 * (1 - sparsity)),
    "theoretical_speedup": 1 / (1 - sparsity),
  }
  return found | ({"ood_accuracy": float(rng.uniform(0.6, 0.9))} if ood else {})


def landscape(m):
  x = np.linspace(-1, 5, 7)
  points = {"0": [0.0, 0.0], "1": [4.0, 0.0], "2": [2.0, 3.0], "soup": [2.0, 1.0]}
  loss = 0.1 + 0.02 * ((x[None] - 2) ** 2 + (x[:, None] - 1) ** 2)
  line = {"positions": [0, 0.5, 1], "loss": [0.3, 0.2, 0.25], "accuracy": [0.9, 0.95, None]}
  return {
    "split": "validation",
    "images": 120,
    "batch_norm_batches": 0,
    "lines": [{"between": [0, j], "barrier": 0.0, **line} for j in range(1, min(m, 3))],
    "plane": {
      "through": [0, 1, 2],
      "x": x.tolist(),
      "y": x.tolist(),
      "loss": loss.tolist(),
      "accuracy": (1 - loss).tolist(),
      "points": points,
      "unit": "L2 distance of the parameters",
    }
    if m > 2
    else None,
  }


def entry(seed, phases=2, m=3, methods=("imp",), ood=True, goal=0.9):
  rng = np.random.default_rng([seed, m, round(1000 * goal)])
  found = {"seed": seed, "dense": metrics(rng, ood=ood), "phases": []}
  for t in range(1, phases + 1):
    sparsity = 1 - (1 - goal) ** (t / phases)
    names = ("soup", "mean_candidate", "best_candidate", *methods)
    phase = {"phase": t, "sparsity": sparsity, "diverged": []}
    phase |= {name: metrics(rng, sparsity, ood) for name in names}
    phase["candidates"] = [metrics(rng, sparsity, ood) for _ in range(m)]
    phase["geometry"] = {
      f"{kind}_{what}": float(rng.uniform(1, 2))
      for kind in ("max", "min", "mean")
      for what in ("l2_distance", "angle", "barycentre_distance")
    }
    if t == phases:
      phase["landscape"] = landscape(m)
    found["phases"].append(phase)
  return found


def run_flags(m=3, phases=2, seeds=2, goal=0.9, **others):
  flags = {"dataset": "digits", "model": "mlp", "ingredients": m, "phases": phases}
  flags |= {"goal_sparsity": goal, "seeds": seeds, "seed": 0, "baselines": ["imp"]}
  return flags | others


def epochs_of(seed, phases=2, m=3):
  lines = []
  for t in range(phases + 1):
    for epoch in (1, 2):
      copies = m if t else 1
      line = {"seed": seed, "method": "sms" if t else "dense", "phase": t, "epoch": epoch}
      line |= {"loss": [0.5 / epoch] * copies, "accuracy": [0.8] * copies}
      line["learning_rate"] = [None if (t, epoch) == (1, 2) else 0.1] * copies
      lines.append(line)
  return lines


def evaluations_of(seed):
  """Lines of metrics.jsonl for what an entry of results.json holds."""
  lines = [
    {"seed": seed["seed"], "method": "dense", "phase": 0, "evaluation": seed["dense"]}
  ]
  for phase in seed["phases"]:
    at = {"seed": seed["seed"], "phase": phase["phase"]}
    own = {k: v for k, v in phase.items() if k not in ("imp", "bimp")}
    lines.append({**at, "method": "sms", "evaluation": own})
  for phase in seed["phases"]:
    for name in ("imp", "bimp"):
      if name in phase:
        record = {"phase": phase["phase"], "soup": phase[name]}
        at = {"seed": seed["seed"], "phase": phase["phase"]}
        lines.append({**at, "method": name, "evaluation": record})
  return lines


def write_run(path, seeds, lines=(), flags=None, finished=True, **others):
  path.mkdir(parents=True, exist_ok=True)
  flags = flags or run_flags(seeds=len(seeds))
  run = {"flags": flags, "defining": {}, "environment": ENVIRONMENT}
  storage.write_json(storage.as_path(path / "run.json"), run)
  if seeds:
    results = {"flags": {**flags, "workdir": str(path)}, "environment": ENVIRONMENT}
    results |= {"seeds": seeds, "seconds": 3700.0, "finished": finished, "ood_sources": {}}
    storage.write_json(storage.as_path(path / "results.json"), results | others)
  if lines:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
  return path


def write_comparison(path, goals, copies, seeds=2):
  parts = {}
  for goal in goals:
    for m in copies:
      for seed in range(seeds):
        one = {"seeds": [entry(seed, m=m, methods=(), goal=goal)], "seconds": 1.0}
        parts[Part("sms", seed, goal, m)] = one
        other = entry(seed + 100, m=m, methods=("imp",), goal=goal)
        parts[Part("imp", seed, goal)] = {"seeds": [other], "seconds": 1.0}
  results = {"kind": "comparison", "flags": run_flags(seeds=seeds), "seconds": 9.0}
  results |= {"environment": ENVIRONMENT, "methods": ["imp", "sms"], "finished": True}
  path.mkdir(parents=True, exist_ok=True)
  document = storage.plain(results | {"cells": cells_of(parts)})
  storage.write_json(storage.as_path(path / "results.json"), document)
  return path


def costs_of(phases=2, m=3):
  """What a run of channels says of them: a phase has 1 / (t + 1) of the dense network."""
  of_phases = [{"method": "dense", "phase": 0, "copies": 1, "steps": 8,
                "seconds_per_epoch": 4.0, "compiling_seconds": 5.0}]  # fmt: skip
  cut = []
  for t in range(1, phases + 1):
    of_phases.append(
      {
        "method": "sms",
        "phase": t,
        "copies": m,
        "steps": 4,
        "seconds_per_epoch": 4.0 * m / (t + 1),
        "compiling_seconds": 7.0,
      }
    )
    times = {"median": 2.0 / (t + 1), "min": 0.1, "max": 3.0}
    cut.append({"phase": t, "parameters": 6000 // (t + 1), "bytes": 24000 // (t + 1),
                "multiply_adds": 60000 // (t + 1), "milliseconds": times,
                "dense_milliseconds": {"median": 2.0, "min": 1.0, "max": 3.0}})  # fmt: skip
  dense = {"parameters": 6000, "multiply_adds": 60000, "bytes": 24000}
  inference = {"device": "cpu", "batch": 32, "dense": dense, "phases": cut}
  return {"compiling_seconds": 65.0, "phases": of_phases, "inference": inference}


def sensitivity_of():
  group = {"name": "Conv_0/bias", "channels": 8, "weights": 900, "multiply_adds": 2000,
           "bytes": 3700, "removed": 2, "loss": 0.0125}  # fmt: skip
  return {"share": 0.25, "images": 500, "groups": [group], "seconds": 1.5}
