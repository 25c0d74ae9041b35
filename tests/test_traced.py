"""What cannot be traced says so in one sentence, and what to do instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsms

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
PARAMS = {"kernel": jnp.arange(1.0, 13).reshape(3, 4), "bias": jnp.ones(4)}
STACKED = jaxsms.stack([PARAMS, jax.tree.map(lambda x: 2 * x, PARAMS)])
SEEDS = {"seed": jnp.arange(2)}


def retrain(key, params, masks, ingredient):
  return params


def soup(params, *, key=KEY, goal_sparsity=0.5, ingredients=SEEDS):
  return jaxsms.sparse_model_soup(
    key, params, retrain, ingredients=ingredients, goal_sparsity=goal_sparsity, phases=1
  )


def size(model):
  return model["kernel"].sum()


def dense(params, x):
  return jnp.tanh(x @ params["kernel"] + params["bias"]).sum(-1)


def traced_masks(share):
  return jax.tree.map(lambda x: x > share, PARAMS)


def removed(share, **options):
  groups = jaxsms.channel_groups(dense, PARAMS, jnp.ones((1, 3)))
  return jaxsms.channel_masks(PARAMS, share, groups=groups, **options)


# Each of a traced share in [0, 1); what the message has to say.
REFUSED = {
  "soup of traced params": (
    lambda x: soup({"kernel": PARAMS["kernel"] * x}),
    "sparse_model_soup needs values, and these are traced: call it outside",
  ),
  "soup of a traced goal": (lambda x: soup(PARAMS, goal_sparsity=x), "outside of jit"),
  "soup of traced ingredients": (
    lambda x: soup(PARAMS, ingredients={"lr": jnp.array([0.1, 0.2]) * x}),
    "outside of jit",
  ),
  "soup of a traced key": (
    lambda x: soup(PARAMS, key=jax.random.fold_in(KEY, x.astype(int))),
    "outside of jit",
  ),
  "soup of constants": (lambda x: soup(PARAMS).params, "outside of jit"),
  "prune_phase": (
    lambda x: jaxsms.prune_phase(PARAMS, None, x),
    "or magnitude_masks and apply_masks inside",
  ),
  "retrain_phase": (
    lambda x: jaxsms.retrain_phase(KEY, PARAMS, None, {"lr": x[None]}, retrain),
    "or jax.vmap(retrain, (None, None, None, 0)) inside",
  ),
  "merge_phase": (
    lambda x: jaxsms.merge_phase(jax.tree.map(lambda leaf: leaf * x, STACKED)),
    "or uniform_soup inside",
  ),
  "greedy_soup": (
    lambda x: jaxsms.greedy_soup(STACKED, size),
    "or uniform_soup(stacked, weights) inside",
  ),
  "phase_sparsity": (
    lambda x: jaxsms.phase_sparsity(0.9, (4 * x).astype(int), 4),
    "phase is traced: give a Python int",
  ),
  "layer_sparsities": (
    lambda x: jaxsms.layer_sparsities({"kernel": PARAMS["kernel"] * x}),
    "or sparsity inside",
  ),
  "assert_sparse": (
    lambda x: jaxsms.assert_sparse({"kernel": x[None]}, {"kernel": np.ones(1, bool)}),
    "call it outside of jit",
  ),
  "compact": (
    lambda x: jaxsms.compact(dense, PARAMS, traced_masks(x), jnp.ones((1, 3))).params,
    "masks are traced: call compact outside of jit",
  ),
  "channel_masks": (lambda x: removed(0.5 * x), "sparsity is traced"),
  "channel_masks of traced masks": (
    lambda x: removed(0.5, masks=traced_masks(x)),
    "masks are traced: channels are chosen before the program runs",
  ),
  "erk_masks": (lambda x: jaxsms.erk_masks(PARAMS, x), "sparsity is traced"),
  "n_m_masks": (lambda x: jaxsms.n_m_masks(PARAMS, x), "sparsity is traced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, rejects):
  function, words = REFUSED[name]
  with rejects(words):
    jax.jit(function)(jnp.float32(0.5))


@pytest.mark.parametrize("writer", ["checkpoint.save", "export.save_compact"])
def test_nothing_is_written_of_traced_values(writer, rejects, tmp_path):
  room, name = writer.split(".")
  save = getattr(getattr(jaxsms, room), name)
  with rejects("save needs values, and these are traced: call it outside of jit"):
    jax.jit(lambda x: save(tmp_path / "model", {"kernel": PARAMS["kernel"] * x}))(0.5)
  assert not list(tmp_path.iterdir())


ALLOWED = {
  "magnitude_masks": lambda x: jaxsms.magnitude_masks(PARAMS, x),
  "random_masks": lambda x: jaxsms.random_masks(KEY, PARAMS, x),
  "lamp_masks": lambda x: jaxsms.lamp_masks(PARAMS, x),
  "filter_masks": lambda x: jaxsms.filter_masks(PARAMS, x),
  "n_m_masks": lambda x: jaxsms.n_m_masks({"kernel": jnp.arange(8.0)[:, None] * x}, 0.5),
  "phase_sparsity": lambda x: jaxsms.phase_sparsity(x, 1, 2),
  "unstack": lambda x: jaxsms.unstack(jax.tree.map(lambda leaf: leaf * x, STACKED)),
  "uniform_soup": lambda x: jaxsms.uniform_soup(STACKED, jnp.stack([x, 1 - x])),
  "soup_geometry": lambda x: jaxsms.soup_geometry(
    jax.tree.map(lambda leaf: leaf * x, STACKED)
  ),
  "pretrain_schedule": lambda x: jaxsms.pretrain_schedule("Cosine", x, 9, 2, 0.1)(5),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_traced_gives_the_same(name):
  function, share = ALLOWED[name], jnp.float32(0.4)
  for a, b in zip(
    jax.tree.leaves(jax.jit(function)(share)), jax.tree.leaves(function(share)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_candidates_of_the_last_phase_are_kept_where_asked(assert_trees_equal):
  def train(key, params, masks, ingredient):
    moved = jax.tree.map(lambda x: x + ingredient["seed"], params)
    return jaxsms.apply_masks(moved, masks)

  seen = []
  run = lambda **options: jaxsms.sparse_model_soup(  # noqa: E731
    KEY, PARAMS, train, ingredients=SEEDS, goal_sparsity=0.5, phases=2,
    on_phase=lambda phase: seen.append(phase.candidates), **options,
  )  # fmt: skip
  assert run().candidates is None
  kept = run(keep_candidates=True)
  assert_trees_equal(kept.candidates, seen[-1])
  assert_trees_equal(jaxsms.uniform_soup(kept.candidates), kept.params)
  assert jaxsms.SparseSoup(1, 2, []).candidates is None
