"""How far one seed of a run has come: all that its rest depends on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsms import checkpoint
from jaxsms.devices.meshes import fetch, params_sharding
from jaxsms.disk.by_name import by_path
from jaxsms.training import Model, Programs, TrainState, start
from jaxsms.training.engine import Record
from jaxsms.training.state import Teacher
from jaxsms.trees import PyTree


@dataclasses.dataclass
class SeedState:
  """One seed's finished parts, and the training that it is in.

  Attributes:
    seed: decides everything that is random.
    dense: the dense model, once it is trained.
    metrics: its metrics.
    method: whose phases are under way, or were last.
    phases: finished ones of each method that goes on where it was.
    baselines: of each finished baseline, phases and their metrics.
    model: what the last finished phase of `method` gave, if it has one.
    masks: its masks.
    state: of the training under way (dense, or in the phase after those); only in what is
      saved and restored.
    rungs: of the phase under way, where copies are evaluated in it, see
      `jaxsms.training.search.Rung`.
  """

  seed: int
  dense: Model | None = None
  metrics: Record | None = None
  method: str | None = None
  phases: dict[str, list[Record]] = dataclasses.field(default_factory=dict)
  baselines: dict[str, list[tuple[int, Record]]] = dataclasses.field(default_factory=dict)
  model: Model | None = None
  masks: PyTree | None = None
  state: TrainState | None = None
  rungs: list[Record] = dataclasses.field(default_factory=list)

  def begin(self, method: str) -> None:
    """Drops what belongs to another method, if that was the last one."""
    if self.method != method:
      self.method, self.model, self.masks, self.rungs = method, None, None, []

  def position(self) -> str:
    """Where it is, in words."""
    where = [f"seed {self.seed}", self.method or "dense"]
    if self.method is not None:
      done = len(self.phases.get(self.method, []))
      where.append(f"{done} phase{'' if done == 1 else 's'} finished")
    elif self.dense is not None:
      where.append("finished")
    if self.state is not None:
      where.append(f"step {int(np.max(self.state.step))}")
    return ", ".join(where)


ARRAYS = ("dense", "model", "masks", "state")
REST = ("seed", "metrics", "method", "phases", "baselines", "rungs")


def packed(seed_state: SeedState) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Arrays by name, copied to the host, and the rest, which JSON can hold.

  In a run of several processes all must call it.
  """
  parts = {name: getattr(seed_state, name) for name in ARRAYS}
  parts = {name: tree for name, tree in parts.items() if tree is not None}
  # Copies: on a CPU the host shares memory with states that the next chunk overwrites.
  arrays = {name: np.array(leaf) for name, leaf in by_path(fetch(parts)).items()}
  rest = {name: getattr(seed_state, name) for name in REST}
  return arrays, {**rest, "parts": list(parts)}


def unpacked(
  arrays: dict[str, np.ndarray],
  rest: dict[str, Any],
  model: Model,
  programs: Programs,
  copies: int,
  what: str,
  cut: bool = False,
) -> SeedState:
  """What `packed` packed, models on the devices.

  Args:
    arrays: by name.
    rest: what JSON held.
    model: shapes of the network.
    programs: of the network.
    copies: how many train at once in its methods.
    what: where it comes from, for the message.
    cut: whether the network shrinks: a state then has the shapes that were saved.

  Raises:
    ValueError: the arrays are those of another network.
  """
  parts = rest["parts"]
  masks = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool), model.params)
  like: dict[str, Any] = {"dense": model, "model": model, "masks": masks}
  like = {name: _on_devices(tree, programs, copies) for name, tree in like.items()}
  if "state" in parts:
    m = len(arrays.get("state/step", [0]))
    like["state"] = jax.eval_shape(
      lambda params, batch_stats: start(params, batch_stats, programs.optimizer(0, 0), m),
      *model,
    )
    if any(name.startswith("state/average/") for name in arrays):
      like["state"] = like["state"]._replace(average=like["state"].params)
    if "state/teacher/weights" in arrays:
      teacher = _teacher(like["state"], np.shape(arrays["state/teacher/weights"])[-1])
      like["state"] = like["state"]._replace(teacher=teacher)
    if programs.split_params:
      mesh = programs.mesh_of(m)
      like["state"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=params_sharding(mesh, x.shape, stacked=True)
        ),
        like["state"],
      )
    if cut:
      like["state"] = as_saved(like["state"], arrays)
  trees = checkpoint.fill({name: like[name] for name in parts}, arrays, what)
  if programs.mesh_of(copies) is None:  # bound to no device, as what training gives is:
    trees = jax.tree.map(jnp.array, trees)  # else every program would be compiled again
  return SeedState(**{k: v for k, v in rest.items() if k != "parts"}, **trees)


def _teacher(state, models):
  """The shapes of the teacher of a state's copies, of so many models."""

  def stacked(x):
    return jax.ShapeDtypeStruct((x.shape[0], models, *x.shape[1:]), x.dtype)

  one = jax.ShapeDtypeStruct(state.step.shape, np.float32)
  params, batch_stats = jax.tree.map(stacked, (state.params, state.batch_stats))
  return Teacher(params, batch_stats, stacked(one), one)


def as_saved(like: TrainState, arrays: dict[str, np.ndarray]) -> TrainState:
  """The shapes of a state, those of the arrays that have its names."""
  saved = {f"state/{name}": leaf for name, leaf in by_path(like).items()}
  shapes = {
    name: jax.ShapeDtypeStruct(np.shape(arrays.get(name, leaf)), leaf.dtype)
    for name, leaf in saved.items()
  }
  return jax.tree.unflatten(jax.tree.structure(like), list(shapes.values()))


def _on_devices(shapes, programs, copies):
  """The same shapes, with where a run keeps such a model."""
  mesh = programs.mesh_of(copies)

  def leaf(x):
    if mesh is None:
      sharding = None
    elif programs.split_params:
      sharding = params_sharding(mesh, x.shape, stacked=False)
    else:
      sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, shapes)
