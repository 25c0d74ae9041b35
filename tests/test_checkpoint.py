"""Trees on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsms import checkpoint


def test_what_is_saved_is_restored(tmp_path):
  tree = {
    "params": {"a": {"kernel": jnp.linspace(0, 1, 6).reshape(2, 3)}},
    "batch_stats": {},
    "masks": {"a": {"kernel": jnp.array([[True, False, True], [False, True, True]])}},
    "half": jnp.ones(3, jnp.bfloat16),
    "count": jnp.int32(3),
  }
  checkpoint.save(tmp_path / "new" / "model", tree)
  for like in (None, tree, jax.eval_shape(lambda: tree)):
    again = checkpoint.restore(tmp_path / "new" / "model", like)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(a, b)


def test_nothing_is_overwritten_and_nothing_is_not_restored(tmp_path):
  with pytest.raises(ValueError, match="exists already"):
    checkpoint.save(tmp_path, {"a": jnp.ones(2)})
  with pytest.raises(ValueError, match="there is no checkpoint"):
    checkpoint.restore(tmp_path / "missing")
