"""Trees of arrays under names, and whether two sets of them agree."""

import collections
from collections.abc import Mapping
from typing import Any

import jax

from jaxsms.trees import PyTree, is_array, path_string


def by_path(tree: PyTree) -> dict[str, jax.Array]:
  """The leaves under names such as "params/a/kernel", in the order of the tree.

  Raises:
    ValueError: a leaf is no array, or two have the same name.
  """
  arrays = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = path_string(path)
    if not is_array(leaf) or name in arrays:
      problem = "comes twice" if name in arrays else f"is {type(leaf).__name__}"
      raise ValueError(f"leaf {name} {problem}: give a tree of arrays with unique names")
    arrays[name] = leaf
  return arrays


def check_fit(
  problem: str,
  expected: Mapping[str, Any],
  found: Mapping[str, Any],
  advice: str,
) -> None:
  """Raises ValueError unless two sets of arrays agree in their names and shapes.

  Args:
    problem: begins the message.
    expected: the arrays (or anything with a shape) that there should be.
    found: those that there are.
    advice: ends the message.
  """
  missing = [name for name in expected if name not in found]
  left_over = [name for name in found if name not in expected]
  differing = [
    f"{name} is {tuple(found[name].shape)} and should be {tuple(array.shape)}"
    for name, array in expected.items()
    if name in found and tuple(found[name].shape) != tuple(array.shape)
  ]
  kinds = {"missing: ": missing, "left over: ": left_over, "": differing}
  if any(kinds.values()):
    raise ValueError(f"{problem} ({'; '.join(_examples(kinds))}): {advice}")


def nested(arrays: Mapping[str, Any]) -> Any:
  """Leaves under names such as "params/a/kernel" as dicts in dicts.

  Args:
    arrays: leaves by name.

  Returns:
    Nested dicts.

  Raises:
    ValueError: a name is that of a leaf and of a dict.

  Example:
    >>> jaxsms.export.nested({"Dense_0/kernel": 1, "Dense_0/bias": 2})
    {'Dense_0': {'kernel': 1, 'bias': 2}}
  """
  if list(arrays) == ["(root)"]:  # see `jaxsms.trees.path_string`
    return arrays["(root)"]
  tree: dict[str, Any] = {}
  for name, leaf in arrays.items():
    *folders, last = name.split("/")
    inner = tree
    for folder in folders:
      inner = inner.setdefault(folder, {})
      if not isinstance(inner, dict):
        raise ValueError(f"{name} lies in a leaf: give a template for such a tree")
    if last in inner:
      raise ValueError(f"{name} is a leaf and holds others: give a template")
    inner[last] = leaf
  return tree


def _examples(kinds: dict[str, list[str]]) -> list[str]:
  """Five in all, taken from each kind in turn, and how many more there are of each."""
  turns = sorted((i, label) for label, items in kinds.items() for i in range(len(items)))
  taken = collections.Counter(label for _, label in turns[:5])
  few = []
  for label, items in kinds.items():
    count = taken[label]
    more = f" and {len(items) - count} more" if len(items) > count else ""
    if items:
      few.append(f"{label}{', '.join(items[:count])}{more}")
  return few
