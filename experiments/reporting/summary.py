"""What a run shows, in plain words."""

from ..methods.registry import looks
from .cases import Case
from .statistics import Results, method_title, of_phase, summarize
from .tables import ends, signed

# The models that the summary compares the soup with; the table has all.
AGAINST = {
  "mean_candidate": "the mean of its candidates",
  "imp": "IMP",
  "imp_mx": "{title}",
  "dense": "the dense network",
}
# What that cost, where all copies train equally long.
COST = {
  "imp": ", which trains as many steps as one copy",
  "imp_mx": ", which trains as many steps as all {m} together",
}
ONE_SEED = "One seed gives no interval, so differences may be chance."


def sentences(case: Case) -> list[str]:
  """What the last phase says of the soup beside what it is compared with.

  Differences are paired by seed. Where an interval holds 0, or one seed gives none, that is
  said.

  Returns:
    Sentences; the last is on how they are to be read, where any is compared.
  """
  rows = [row for row in summarize(case.seeds) if "soup" in row]
  if not rows:
    if not case.seeds:
      return ["Nothing is finished yet."]
    return [_without_soup(case)]
  row = rows[-1]
  n = row["soup"].get("seeds", len(case.seeds))
  text = (
    f"At {100 * row['sparsity']:.2f} % sparsity the soup of {case.m} has "
    f"{100 * row['soup']['mean']:.2f} % test accuracy"
    + (f", the mean of {n} seeds" if n > 1 else " with one seed")
  )
  cost = {} if case.flags.get("vary") == "epochs" else COST
  if compared := [
    _compared(
      row[name],
      (what + cost.get(name, "")).format(title=method_title(name, case.m), m=case.m)
      + _collapsed(case, row["phase"], name),
    )
    for name, what in AGAINST.items()
    if name in row
  ]:
    text += ": " + "; ".join(compared)
  found = [f"{text}."]
  if any(p.get("averaging_failed") for _, p in of_phase(row["phase"], case.seeds)):
    found.append("With some seed averaging failed: the soup is not to be trusted.")
  if with_seeds := _collapsed_seeds(case, row["phase"]):
    found.append(
      f"With {with_seeds} all its copies collapsed: the soup is not to be trusted."
    )
  how = "In brackets: 95 % intervals of the differences, paired by seed."
  return [*found, how if n > 1 else ONE_SEED]


def _without_soup(case):
  """Of a run before its first phase ends, or of a baseline's own run."""
  dense = case.seeds[0]["dense"].get("test_accuracy")
  has = "" if dense is None else f"the dense network has {100 * dense:.2f} % test accuracy"
  known = summarize(case.seeds)
  if not known:
    return "No phase is finished yet" + (f"; {has}." if has else ".")
  accuracies = [
    f"{method_title(name, case.m)} has {100 * known[-1][name]['mean']:.2f} % test accuracy"
    for name in looks()
    if name in known[-1]
  ]
  return (
    f"There is no soup in it. At {100 * known[-1]['sparsity']:.2f} % sparsity "
    + "; ".join([*accuracies, has] if has else accuracies)
    + "."
  )


def _collapsed(case, number, name):
  """What to add to the name of a method that collapsed."""
  with_seeds = _collapsed_seeds(case, number, name)
  return f", which collapsed with {with_seeds}" if with_seeds else ""


def _collapsed_seeds(case, number, name=None):
  """The seeds with which all copies of the soup, or of a method, collapsed, in words."""
  seeds = [
    str(seed["seed"])
    for seed, phase in of_phase(number, case.seeds)
    if (phase if name is None else phase.get(name) or {}).get("all_collapsed")
  ]
  return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""


def _compared(entry: Results, what: str) -> str:
  found = entry["soup_minus"]
  points = f"{abs(100 * found['mean']):.2f}"
  if points == "0.00":
    text = f"the same to two decimals as {what}"
  else:
    text = f"{points} points {'above' if found['mean'] > 0 else 'below'} {what}"
  if found["half_width"] is None:
    return text
  low, high = ends(found)
  text += f" [{signed(low)}, {signed(high)}]"
  if "seeds" in entry:
    text += f", over {entry['seeds']} seeds"
  return f"{text}, which may be chance" if low <= 0 <= high else text
