"""What the foreign programs train on, and what is asserted of each that was made sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

GOAL, SEEDS = 0.8, {"seed": jnp.arange(2)}
KEY = jax.random.key(0)
IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = jnp.asarray(IMAGES[:512].reshape(-1, 8, 8, 1) / 16, jnp.float32)
LABELS = jnp.asarray(LABELS[:512])
# Each token follows from the one before.
TOKENS = [np.arange(64) % 16]
for _ in range(9):
  TOKENS.append((5 * TOKENS[-1] + 3) % 16)
TOKENS = jnp.asarray(np.stack(TOKENS, 1), jnp.int32)


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batches(key, ingredient, steps=30, size=32, n=512):
  """int [steps, size], by the seed of a copy."""
  key = jax.random.fold_in(key, ingredient["seed"])
  return jax.random.randint(key, (steps, size), 0, n)


def check(dense, sparse, weights, loss, goal=GOAL, share=0.9):
  """Asserts that exactly the goal is removed of these weights, and that training helped.

  Args:
    dense: the model that was made sparse.
    sparse: the result.
    weights: `weights(model)`, the list of those arrays that count as weights.
    loss: of a model.
    goal: the sparsity.
    share: of the dense model's loss that is at most left.
  """
  found = [np.asarray(x) for x in weights(sparse)]
  n = sum(x.size for x in found)
  assert sum(int(np.sum(x == 0)) for x in found) == round(goal * n)
  before = [np.asarray(x) for x in weights(dense)]
  assert not any(np.any(x == 0) for x in before)
  assert all(np.any((a != b) & (b != 0)) for a, b in zip(before, found, strict=True))
  assert len(found) > 1
  before, after = float(loss(dense)), float(loss(sparse))
  assert after < share * before, (before, after)
