"""The benchmark's figures as tables on a terminal of 80 columns."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..costs.timing import shown

Results = dict[str, Any]
PEERS = {"eager": "eager", "compiled": "torch.compile", "ensemble": "vmap"}


def show(console: Console, results: Results) -> None:
  """Prints what was measured and how.

  Args:
    console: where to.
    results: what `experiments.bench.measure` gives.
  """
  rows = results["copies"]
  console.print(caption(results))
  console.print(time_table(rows))
  console.print(cost_table(rows))
  if any(row["torch"] for row in rows):
    console.print(torch_table(rows))
  for line in notes(results):
    console.print(line)


def caption(results: Results) -> str:
  """What was measured where."""
  chosen, environment, work = (results[k] for k in ("flags", "environment", "work"))
  height, width, channels = chosen["image"]
  return (
    f"{chosen['model']} ({work['parameters']:,} parameters, {work['multiply_adds']:,} "
    f"multiply-adds an image), {chosen['precision']}, batch {chosen['batch_size']} of "
    f"{height}x{width}x{channels}, {chosen['augmentation']}; {chosen['examples']:,} "
    f"examples; jax {environment['jax']} on {environment['devices']} x "
    f"{environment['device']}, {environment['cores']} cores. Medians of "
    f"{chosen['rounds']} alternating rounds, in brackets the least and the greatest."
  )


def time_table(rows: list[dict]) -> Table:
  """Time of m copies at once."""
  table = _table(
    "m copies at once", "m", "step, ms", "epoch, s", "per copy, of m = 1's", "images/s"
  )
  for row in rows:
    table.add_row(
      str(row["copies"]),
      shown(row["step_seconds"], 1000),
      f"{row['epoch_seconds']['median']:.4g}",
      shown(row["together_over_one_after_another"]),
      f"{row['images_per_second']:,.0f}",
    )
  return table


def cost_table(rows: list[dict]) -> Table:
  """Arithmetic, memory and compilation."""
  table = _table(
    None, "m", "devices", "GFLOP a step", "utilisation", "memory, MB", "compilation, s"
  )
  for row in rows:
    use = row["utilisation"]
    table.add_row(
      str(row["copies"]),
      str(row["devices"]),
      f"{row['flops_per_step'] / 1e9:.4g}",
      "" if use is None else f"{100 * use:.3g} %",
      f"{row['peak_bytes'] / 1e6:,.0f}",
      f"{row['trace_seconds'] + row['compile_seconds']:.1f}",
    )
  return table


def torch_table(rows: list[dict]) -> Table:
  """The same work in PyTorch."""
  table = _table("PyTorch, the same work", "m", "how", "step, ms", "jaxsms, times as fast")
  for row in rows:
    for kind, peer in row["torch"].items():
      table.add_row(
        str(row["copies"]),
        f"{PEERS[kind]}, {peer['layout']}",
        shown(peer["step_seconds"], 1000),
        shown(peer["speed_of_jaxsms"]),
      )
    table.add_section()
  return table


def notes(results: Results) -> list[str]:
  """What the numbers mean, a sentence each."""
  work, rows = results["work"], results["copies"]
  peak = work["peak_flops"]
  lines = [
    "Utilisation: 6 FLOP a multiply-add of the forward pass, relative to "
    + (f"{peak / 1e12:.4g} TFLOP/s a device " if peak else "a peak that is ")
    + f"({work['peak_source']}).",
    "Memory of a device: "
    + " and ".join(sorted({row["peak_bytes_source"] for row in rows}))
    + ". Compilation: tracing included, no cache read.",
  ]
  if any(row["torch"] for row in rows):
    environment = results["environment"]
    lines.append(
      f"PyTorch {environment['torch']} on {environment['torch_device']}, "
      f"{environment['torch_threads']} threads: eager and torch.compile train one copy, "
      "which takes m turns; under vmap its batch normalization keeps no running "
      "statistics."
    )
  return [*lines, *(f"{note}." for note in results["notes"])]


def _table(title: str | None, *names: str) -> Table:
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
  for name in names:
    table.add_column(name, justify="left" if name == "how" else "right")
  return table
