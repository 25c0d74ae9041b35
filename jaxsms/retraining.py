"""The caller's own training of one copy, run for all copies in one program.

The training of the binaries is in `jaxsms.training.loop`. Both are the `retrain` of
`jaxsms.sms.soup_phases`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from jaxsms.checks import check_outside_jit
from jaxsms.devices.ingredients import map_ingredients
from jaxsms.devices.meshes import INGREDIENT_AXIS, gather, place
from jaxsms.mask_trees import mask_leaves
from jaxsms.pruning import apply_masks
from jaxsms.substitution import with_own_convolutions
from jaxsms.trees import (
  Arrays,
  PyTree,
  is_array,
  is_floating,
  number_of_models,
  same_structure,
  wait_on_cpu,
)

Retrain = Callable[[jax.Array, PyTree, PyTree, PyTree], Any]


def retrain_phase(
  key: jax.Array,
  params: PyTree,
  masks: PyTree,
  ingredients: PyTree,
  retrain: Retrain,
  mesh: jax.sharding.Mesh | None = None,
  at_once: int | None = None,
  keep: bool = True,
) -> tuple[PyTree, PyTree | None]:
  """Retrains one copy of a model per ingredient, all in one jitted program.

  Args:
    key: typed key, the same for all copies.
    params: the pruned model that every copy starts from.
    masks: its masks, shared by all copies.
    ingredients: tree of arrays with leading axis m.
    retrain: `retrain(key, params, masks, ingredient)` giving params or (params, report).
    mesh: None for one device, else as `jaxsms.make_mesh` gives.
    at_once: copies that one device trains at the same time. Groups of this size follow one
      another in the same program, which needs less memory. None means all copies.
    keep: keeps the compiled program, for later calls with the same `retrain`.

  Returns:
    The m retrained copies, leaves [m, ...], exactly 0 where removed, and the reports, NumPy
    leaves [m, ...] (None where there are none). In a job of several processes each one gets
    all copies and reports, on its own devices.

  Raises:
    ValueError: no ingredient, `at_once` below 1, traced values, or `retrain` gives another
      tree than it got.

  Example:
    >>> params = {"kernel": jnp.zeros((1, 2))}
    >>> masks = {"kernel": jnp.array([[True, False]])}
    >>> retrain = lambda key, params, masks, ingredient: jaxsms.apply_masks(
    ...   {"kernel": params["kernel"] + ingredient["lr"]}, masks)
    >>> ingredients = {"lr": jnp.array([0.5, 1.0])}
    >>> candidates, _ = jaxsms.retrain_phase(
    ...   jax.random.key(0), params, masks, ingredients, retrain)
    >>> candidates["kernel"].tolist()
    [[[0.5, 0.0]], [[1.0, 0.0]]]
  """
  check_outside_jit(
    "retrain_phase",
    (key, params, masks, ingredients),
    "call it outside of jit, or jax.vmap(retrain, (None, None, None, 0)) inside",
  )
  leaves = jax.tree.leaves(ingredients)
  if not leaves or any(np.shape(leaf)[:1] in ((), (0,)) for leaf in leaves):
    raise ValueError(
      "there are no ingredients with a leading axis: give arrays [m, ...], such as "
      '{"seed": jnp.arange(5)}'
    )
  ingredients = jax.tree.map(jnp.asarray, ingredients)
  number_of_models(ingredients, "ingredients")
  arguments = (key, Arrays(params), masks, ingredients)
  if mesh is not None:  # a later phase's, on the mesh already, would compile again
    arguments = place(arguments, NamedSharding(mesh, PartitionSpec()))
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  program = _retrain_program(retrain, mesh, at_once, device.platform, keep)
  candidates, report, moved = program.run(*arguments)
  candidates, report, moved = gather(wait_on_cpu((candidates, report, moved)))
  devices = 1 if mesh is None else mesh.shape[INGREDIENT_AXIS]
  if program.native.pop("convolutions", 0) and len(moved) > devices and at_once != 1:
    logging.warning(
      "retrain has convolutions that run slowly for several copies on a CPU (grouped, "
      "dilated, or not over two dimensions): give each copy a device of its own, with "
      'jax.config.update("jax_num_cpu_devices", %d) at the start and '
      "mesh=jaxsms.make_mesh()",
      len(moved),
    )
  if np.any(jax.device_get(moved)):
    logging.warning(
      "retrain moved removed weights, which were set back to 0: keep its optimizer "
      "inside the mask with jaxsms.masked"
    )
  if _all_equal(candidates):
    logging.warning(
      "all copies are equal after retraining: does retrain use its ingredient, such as "
      'fold_in(key, ingredient["seed"])?'
    )
  return candidates.tree, jax.device_get(report) if jax.tree.leaves(report) else None


def _all_equal(stacked: PyTree) -> bool:
  """Whether there are several models, and all are the same."""
  floating = [x for x in jax.tree.leaves(stacked) if is_floating(x) and len(x) > 1]
  return bool(floating) and bool(_equal_to_first(floating))


@jax.jit
def _equal_to_first(leaves: list[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.all(x == x[:1]) for x in leaves]).all()


class _Program(NamedTuple):
  """The program of a caller's function, and what was seen as it was traced."""

  run: Callable[..., Any]
  native: dict[str, int]


def _retrain_program(
  retrain: Retrain,
  mesh: jax.sharding.Mesh | None,
  at_once: int | None,
  platform: str,
  keep: bool,
) -> _Program:
  """The mapped, jitted program of a caller's function, kept so that phases share it."""
  if not keep:
    return _hashed_retrain_program.__wrapped__(retrain, mesh, at_once, platform)
  try:
    hash(retrain)
  except TypeError:
    raise ValueError(
      f"retrain is a {type(retrain).__name__} that cannot be hashed, so its compiled "
      "program cannot be kept: wrap it in a function"
    ) from None
  return _hashed_retrain_program(retrain, mesh, at_once, platform)


@functools.lru_cache(maxsize=16)
def _hashed_retrain_program(
  retrain: Retrain, mesh: jax.sharding.Mesh | None, at_once: int | None, platform: str
) -> _Program:
  native: dict[str, int] = {}

  def one(key, arrays, masks, ingredient):
    params = arrays.tree
    structure = jax.tree.structure(params)
    if platform == "cpu":
      result, native["convolutions"] = with_own_convolutions(
        retrain, key, params, masks, ingredient
      )
    else:
      result = retrain(key, params, masks, ingredient)
    report: PyTree = {}
    if not same_structure(result, params):
      if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(_wrong_tree(structure, result))
      result, report = result
      if not same_structure(result, params):
        raise ValueError(_wrong_tree(structure, result))
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(result), strict=True):
      if not is_array(old):
        continue
      if (jnp.shape(old), jnp.result_type(old)) != (jnp.shape(new), jnp.result_type(new)):
        raise ValueError(
          f"retrain turned a leaf {jnp.result_type(old)}{list(jnp.shape(old))} into "
          f"{jnp.result_type(new)}{list(jnp.shape(new))}: it must keep shapes and dtypes"
        )
    pairs = zip(jax.tree.leaves(result), mask_leaves(result, masks), strict=True)
    moved = [
      jnp.any(~mask & (leaf != 0) & jnp.isfinite(leaf))
      for leaf, mask in pairs
      if is_floating(leaf) and mask is not None
    ]
    return Arrays(apply_masks(result, masks)), report, jnp.stack(moved).any()

  mapped = map_ingredients(one, (None, None, None, 0), mesh, at_once)
  return _Program(jax.jit(mapped), native)


def _wrong_tree(structure, result) -> str:
  return (
    "retrain must give params of the structure it got, or (params, report): it got "
    f"{structure} and gave {jax.tree.structure(result)}"
  )
