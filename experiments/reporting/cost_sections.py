"""Sections on what an inference costs, and how results were made."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..config.fields import flag_text
from ..costs.timing import shown
from ..schemas.results_check import models_of
from .cases import Case, Origin
from .document import Block, Code, Folded, Table, table_of_cases, titled
from .statistics import estimate


def inference_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Sizes and times."""
  groups = []
  for case in cases:
    if not case.inference:
      continue
    found = case.inference
    models = models_of(found)
    dense = models.get("dense", {})
    lines = [
      [
        name,
        f"{model['bytes'] / 1000:,.1f}",
        ratio(dense.get("bytes"), model["bytes"]),
        spread_text(model.get("milliseconds")),
        ratio(_median(dense.get("milliseconds")), _median(model.get("milliseconds"))),
      ]
      for name, model in models.items()
    ]
    title = f"{case.title}, {found['device']}, batch of {found['batch']}"
    groups.append(titled(title, lines))
  if groups:
    header = ["Measured", "Model", "kB", "times smaller", "ms a batch", "times as fast"]
    yield Table(header, groups, (0, 1))
    yield "Milliseconds: median over rounds, and the least and greatest."


def onnx_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Sizes and times of ONNX files in ONNX Runtime."""
  groups = []
  for case in cases:
    files = dict(sorted(case.onnx["files"].items())) if case.onnx else {}
    dense = files.get("dense.onnx", {})
    before = dense.get("milliseconds", {})
    lines = [
      [
        name.removesuffix(".onnx"),
        f"{found['bytes'] / 1000:,.1f}",
        batch,
        spread_text(milliseconds),
        ratio(_median(before.get(batch)), _median(milliseconds)),
      ]
      for name, found in files.items()
      for batch, milliseconds in found["milliseconds"].items()
    ]
    if lines:
      title = f"{case.title}, {case.onnx['runtime']}, {case.onnx['device']}"
      groups.append(titled(title, lines))
  if groups:
    header = ["Measured", "File", "kB", "Batch", "ms a batch", "times as fast"]
    yield Table(header, groups, (0, 1))
    yield "Milliseconds: median over alternating rounds, and the least and greatest."


def _median(value):
  return value.get("median") if isinstance(value, dict) else value


def spread_text(value: Any) -> str:
  """A median with the least and greatest, or a single number."""
  return f"{value:.3g}" if isinstance(value, (int, float)) else shown(value)


def ratio(dense: float | None, value: float | None) -> str:
  """How many times smaller or faster; empty where one of both is not known."""
  return f"{dense / value:.2f}" if dense and value else ""


COSTS = (
  ("nonzero_parameters", "Parameters left", "{:,.0f}"),
  ("sparse_multiply_adds", "Multiply-adds left", "{:,.0f}"),
  ("theoretical_speedup", "Theoretical speed-up", "{:.2f}"),
)


def cost_section(cases: Sequence[Case]) -> Iterator[Block]:
  """Arithmetic of an inference."""
  groups = []
  for case in cases:
    dense = [s["dense"] for s in case.seeds if "multiply_adds" in s["dense"]]
    if not dense:
      continue
    models = [("Dense", 0.0, dense)]
    soups = case.soups("soup")
    for number in soups if len(cases) == 1 else list(soups)[-1:]:
      share = float(np.mean([soup["sparsity"] for soup in soups[number]]))
      models.append((f"Soup of phase {number}", share, soups[number]))
    lines = [
      [name, f"{100 * share:.2f} %"]
      + [style.format(estimate([r[key] for r in records]).mean) for key, _, style in COSTS]
      for name, share, records in models
    ]
    groups.append(titled(case.title, lines))
  if groups:
    header = ["Run", "Model", "Sparsity", *(title for _, title, _ in COSTS)]
    yield table_of_cases(header, groups, (0, 1), len(cases) > 1)
    yield (
      "Of one image, mean over seeds. Theoretical speed-up: multiply-adds of the dense "
      "network over those that are left; what a device gains is another matter."
    )


def origin_section(origins: Sequence[Origin]) -> Iterator[Block]:
  """How it was made, and how to make it again."""
  for origin in origins:
    where = " Also ".join(f"{_versions(one)}." for one in origin.environments or [{}])
    took = _took(origin)
    name = f"{origin.title}: " if len(origins) > 1 else ""
    sources = sorted(set(map(str, (origin.ood_sources or {}).values())))
    ood = f" Corruptions from {', '.join(sources)}." if sources else ""
    yield (
      f"{name}{where}{took}{ood} "
      f"This command repeats it{' and fills the grid' if origin.grows else ''}:"
    )
    yield Code(origin.command)
    rows = [[key, flag_text(value)] for key, value in sorted(origin.flags.items())]
    title = "All flags" + (f" of {origin.title}" if len(origins) > 1 else "")
    yield Folded(title, Table(("Flag", "Value"), [rows], (0, 1)))


def _took(origin):
  """How long it took, and how much of that went into compiling, in words."""
  if origin.seconds is None:
    return ""
  compiling = (
    f", {duration(origin.compiling)} of it compiling"
    if origin.compiling is not None
    else ""
  )
  return f" Took {duration(origin.seconds)}{compiling}."


def _versions(environment):
  """Versions and devices in words."""
  device = f"{environment.get('devices', '?')} x {environment.get('device', '?')}"
  versions = ", ".join(
    f"{name} {environment[name]}"
    for name in ("jaxsms", "jax", "flax", "optax", "orbax", "python")
    if name in environment
  )
  return f"{versions}; {device} ({environment.get('platform', '?')})"


def duration(seconds: float) -> str:
  """Such as 1 h 5 min.

  Args:
    seconds: 0 or more.

  Returns:
    Text.
  """
  seconds = round(seconds)
  hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"
