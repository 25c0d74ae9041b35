import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxsms.trace import WeightUse, weight_uses

KEY = jax.random.key(0)


def uses(module, *shape, dtype=jnp.float32):
  inputs = jax.ShapeDtypeStruct(shape, dtype)
  return weight_uses(module.apply, jax.eval_shape(module.init, KEY, inputs), inputs)


def test_outputs_of_layers():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.MultiHeadDotProductAttention(2, name="attention")(x + self.variable_place(x))
      x = nn.Conv(4, (3,), name="conv")(x)
      x = nn.Conv(8, (3,), feature_group_count=4, name="depthwise")(x)
      x = nn.ConvTranspose(6, (3,), name="transposed")(nn.BatchNorm(True)(x))
      return nn.DenseGeneral((3, 5), axis=(-2, -1), name="general")(x)

    def variable_place(self, x):
      return self.param("position", nn.initializers.normal(), x.shape)

  found = uses(Net(), 1, 6, 8)
  axes = {name.split("/", 1)[1]: use.outputs for name, use in found.items()}
  assert axes == {
    **{f"attention/{p}/kernel": {1, 2} for p in ("query", "key", "value")},
    "attention/out/kernel": {2},
    "conv/kernel": {2},
    "depthwise/kernel": {2},
    "transposed/kernel": {2},
    "general/kernel": {2, 3},
  }


def test_embedding_and_tied_logits():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      embed = nn.Embed(11, 4)
      return embed.attend(nn.Dense(4)(embed(tokens)))

  found = uses(Net(), 2, 3, dtype=jnp.int32)
  # Rows by their number cost nothing; [2, 3, 4] to [2, 3, 11].
  assert found["params/Embed_0/embedding"] == (2 * 3 * 4 * 11, {0, 1})
  assert found["params/Dense_0/kernel"] == (2 * 3 * 4 * 4, {1})


@pytest.mark.parametrize("batch", [1, 3])
def test_a_weight_stays_what_it_is_however_it_was_made(batch):
  params = {
    "v": jnp.ones((4, 3)), "g": jnp.ones(4), "bias": jnp.ones(4), "w": jnp.ones((4, 6)),
    "square": jnp.ones((6, 6)), "queries": jnp.ones((2, 5)), "keys": jnp.ones((5, 6)),
  }  # fmt: skip

  def apply(p, x):
    v = p["v"] / jnp.linalg.norm(p["v"], axis=1, keepdims=True) * p["g"][:, None]
    x = jnp.tanh(x @ v.T + p["bias"]) * p["g"]  # of one image a bias is as large as it
    w = p["w"].reshape(2, 2, 2, 3).transpose(3, 0, 1, 2).reshape(6, 4) @ jnp.eye(4)
    x = (w.astype(jnp.bfloat16) @ x.T).T
    queries = jnp.tanh(p["queries"]) @ p["keys"]  # no input is in them
    return jax.jit(lambda w, x: x @ w)(p["square"], x) @ p["square"] @ queries.T

  assert weight_uses(apply, params, jnp.ones((batch, 3))) == {
    "v": WeightUse(batch * 12, frozenset({0})),
    "w": WeightUse(batch * 24, frozenset({0, 1})),
    "square": WeightUse(2 * batch * 36, frozenset({1})),
    "keys": WeightUse(2 * 30, frozenset({1})),
  }


def test_scan_over_layers_and_products_of_activations():
  params = {"layers": jnp.ones((5, 4, 4)), "out": jnp.ones((4, 2))}

  def apply(p, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])
    return (x @ x.T) @ x @ p["out"]

  assert weight_uses(apply, params, jnp.ones((3, 4))) == {
    "layers": WeightUse(5 * 3 * 16, frozenset({2})),
    "out": WeightUse(3 * 8, frozenset({1})),
  }
