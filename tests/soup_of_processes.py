"""A soup of two processes: `python soup_of_processes.py port process out`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

M, PHASES = 3, 2  # copies that do not divide evenly over the four devices
INPUTS = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)


def retrain(key, params, masks, ingredient):
  """Three noisy steps on a small regression, and the last loss."""
  key = jax.random.fold_in(key, ingredient["seed"])

  def loss(params, noise):
    return jnp.mean((jnp.tanh((INPUTS + noise) @ params["kernel"]) - 0.5) ** 2)

  for i in range(3):
    noise = 0.1 * jax.random.normal(jax.random.fold_in(key, i), INPUTS.shape)
    value, gradient = jax.value_and_grad(loss)(params, noise)
    params = jax.tree.map(lambda p, g, m: m * (p - g), params, gradient, masks)
  return params, {"loss": value}


def dense():
  return {"kernel": np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)}


def soup(params, mesh=None, **options):
  """The result as arrays by name: of every phase all that `on_phase` is called with."""
  import jaxsms

  seen = []
  result = jaxsms.sparse_model_soup(
    jax.random.key(0), params, retrain, ingredients={"seed": jnp.arange(M)},
    goal_sparsity=0.75, phases=PHASES, mesh=mesh, on_phase=seen.append, **options,
  )  # fmt: skip
  found = {"params": result.params["kernel"], "masks": result.masks["kernel"]}
  for phase in seen:
    number = phase.record["phase"]
    found[f"soup {number}"] = phase.params["kernel"]
    found[f"candidates {number}"] = phase.candidates["kernel"]
    for name in ("sparsity", "weights", "relative_norm_drop"):
      found[f"{name} {number}"] = phase.record[name]
    found[f"loss {number}"] = phase.record["retrain"]["loss"]
  return {name: np.asarray(value) for name, value in found.items()}


def main(port, process, out):
  """Makes the soup twice: of arrays of the host, and of ones that all processes share."""
  jax.config.update("jax_num_cpu_devices", 2)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", 2, int(process))
  import jaxsms
  from jaxsms.devices.meshes import place

  mesh = jaxsms.make_mesh()
  host = soup(dense(), mesh)
  spread = jax.sharding.NamedSharding(mesh, jax.P(None, "ingredient"))
  parts = place(dense(), spread)
  assert not parts["kernel"].is_fully_addressable
  shared = soup(parts, mesh, at_once=1)
  found = {"host": host, "shared": shared}
  np.savez(out, **{f"{of}: {k}": v for of, s in found.items() for k, v in s.items()})


if __name__ == "__main__":
  main(*sys.argv[1:])
