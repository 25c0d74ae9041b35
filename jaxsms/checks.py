"""Arguments of the loop that cannot be right, refused before any work."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsms.trees import is_concrete

# Keys of phases are folded in as 32 bits, and nobody has time for more.
MOST_PHASES = 1_000_000


def check_sparsity(value: Any, what: str = "sparsity") -> None:
  """Raises ValueError unless a sparsity is one number, in [0, 1) where it is concrete."""
  dtype = getattr(value, "dtype", None)
  if dtype is None and isinstance(value, (int, float)):
    dtype = np.asarray(value).dtype
  real = dtype is not None and (
    jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
  )
  if not real or np.ndim(value):
    raise ValueError(
      f"{what} is {_brief(value)}: it is the share of weights to remove, one number in "
      "[0, 1)"
    )
  if is_concrete(value) and not 0 <= float(value) < 1:
    raise ValueError(
      f"{what} is {float(value):g}: it is the share of weights to remove, in [0, 1)"
    )


def check_phases(phases: Any, what: str = "phases") -> int:
  """A number of phases as an int; ValueError unless it is a whole number in range."""
  if not is_concrete(phases):
    raise ValueError(
      f"{what} is traced: give a Python int, or work out 1 - (1 - goal) ** (phase / phases)"
    )
  try:
    number = operator.index(phases)
  except TypeError:
    number = None
  if number is None or isinstance(phases, (bool, np.bool_)):
    raise ValueError(f"{what} is {_brief(phases)}: give a whole number")
  if number > MOST_PHASES:
    raise ValueError(f"{what} is {_brief(number)}: at most {MOST_PHASES:,} are possible")
  return number


def check_goal(goal: float, weights: int) -> None:
  """Raises ValueError where the goal removes all of `weights` weights."""
  if round(float(goal) * weights) >= weights:
    raise ValueError(
      f"goal_sparsity {float(goal):.10g} of {weights:,} weights removes all of them: give "
      f"at most {1 - 1 / weights:.10g}"
    )


def check_weights(weights: Any, m: int) -> None:
  """Raises ValueError where weights are given, but not one for each of m models."""
  if weights is not None and np.shape(weights) != (m,):
    raise ValueError(
      f"weights has shape {list(np.shape(weights))} for {m} models: give one weight each"
    )


def check_call(key: Any, mesh: Any, **functions: Any) -> None:
  """Raises ValueError where what the loop is given has a wrong kind.

  Args:
    key: of random numbers.
    mesh: of devices, or None.
    **functions: what will be called, by name; `on_phase` may be None.
  """
  is_key = hasattr(key, "dtype") and (
    jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == np.uint32
  )
  if not is_key:
    raise ValueError(f"key is {_brief(key)}: give a typed key, such as jax.random.key(0)")
  if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
    raise ValueError(
      f"mesh is {_brief(mesh)}: give None, or a mesh as jaxsms.make_mesh gives"
    )
  for name, function in functions.items():
    if not callable(function) and not (name == "on_phase" and function is None):
      raise ValueError(f"{name} is {_brief(function)}: give a function")


def check_outside_jit(call: str, tree: Any, instead: str) -> None:
  """Raises ValueError where a function that looks at values is traced.

  Args:
    call: the function's name.
    tree: what it was given.
    instead: what to do instead, for the message.
  """
  # What a program makes is traced, also where it was given values.
  if not is_concrete((tree, jnp.zeros([]))):
    raise ValueError(f"{call} needs values, and these are traced: {instead}")


def check_indices(indices: Any, candidates: int) -> list[int]:
  """The indices that a merge took; ValueError unless they are some of the candidates'."""
  try:
    numbers = [operator.index(i) for i in indices]
  except TypeError:
    numbers = None
  if not numbers or len(set(numbers)) < len(numbers):
    raise ValueError(
      f"merge gave the indices {_brief(indices)}: give each candidate that it took, once"
    )
  if not all(0 <= i < candidates for i in numbers):
    raise ValueError(
      f"merge gave the indices {numbers} of {candidates} candidates: they count from 0 to "
      f"{candidates - 1}"
    )
  return numbers


def _brief(value: Any) -> str:
  """A value in a message, cut short; of arrays only what they are."""
  if hasattr(value, "dtype") and hasattr(value, "shape"):
    return f"{value.dtype}{list(value.shape)}"
  text = repr(value).replace("\n", " ")
  return text if len(text) <= 60 else f"{text[:57]}..."
