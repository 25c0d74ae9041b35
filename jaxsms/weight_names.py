"""What a parameter is, from the names along its path."""

import re
from collections.abc import Sequence

# The name of the leaf says it in Flax ("kernel") and Haiku ("w", "w_i", "w_h").
WEIGHT_NAMES = frozenset({"kernel", "w", "w_i", "w_h"})
# Equinox and PyTorch call every weight "weight": its owner's name has to tell.
OWNED_WEIGHT_NAMES = frozenset(
  {"weight", "weight_ih", "weight_hh", "in_proj_weight", "kernel_weight"}
)
_NORM_WORDS = ("norm", "bn", "ln", "gn")
_EMBEDDING_WORDS = ("embed", "embeds", "emb", "wte", "wpe")
# What any of these words is in the name of is no weight of a layer, whatever its rank.
_OTHER_WORDS = frozenset(
  {"scale", "scales", "gamma", "beta", "offset", "shift"}
  | {"mean", "var", "variance", "std", "average", "running", "moving"}
  | {"pos", "position", "positions", "positional", "pe", "cls", "token", "tokens", "mask"}
)
# Attention layers by hand have one for each projection.
_BIASES = frozenset({"bq", "bk", "bv", "bo", "bqkv"})


def is_weight(names: Sequence[str], shape: Sequence[int]) -> bool:
  """Whether a parameter is a weight of a dense, convolution or attention layer.

  Args:
    names: along its path, from the root to the leaf.
    shape: of the parameter.
  """
  if len(shape) < 2:
    return False
  # PyTorch's names hold whole paths.
  names = [word for name in names for word in name.split(".")]
  name, owner = names[-1] if names else "", names[-2] if len(names) > 1 else ""
  if name in WEIGHT_NAMES:
    return not _is_norm(owner)
  if name in OWNED_WEIGHT_NAMES:
    return not _is_norm(owner) and not _is_embedding_table(owner, shape)
  # No name that says it: a number in a list, or a name of one's own.
  if is_bias(name) or _is_vector(shape) or _OTHER_WORDS & set(_words(name)):
    return False
  if _is_norm(name) or _is_embedding(name):
    return False
  layer = next((n for n in reversed(names[:-1]) if not n.isdigit()), "")
  return not _is_norm(layer) and not _is_embedding_table(layer, shape)


def is_bias(name: str) -> bool:
  """Whether a leaf's name says that it is a bias: "bias", "b", "b1", "b_out", "fc_b"."""
  words = _words(name)
  if not words or "lora" in words:
    return False
  by_letter = "b" in (words[0], words[-1]) and "B" not in name
  return by_letter or name in _BIASES or any(w in ("bias", "biases") for w in words)


def is_attention_projection(names: Sequence[str], shape: Sequence[int]) -> bool:
  """Whether a leaf is Flax's [inputs, heads, features] of queries, keys or values."""
  if len(names) < 2 or len(shape) != 3 or names[-1] != "kernel":
    return False
  words = set(_words(names[-2]))
  return bool(words & {"query", "key", "value", "q", "k", "v"}) and "conv" not in words


def _is_vector(shape: Sequence[int]) -> bool:
  """Whether a shape is a vector's that was made to broadcast, as biases of stax."""
  return len(shape) > 2 and sum(n > 1 for n in shape) < 2


def _words(name: str) -> list[str]:
  """The words of an identifier: "layerNorm_2" -> ["layer", "norm"]."""
  return [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _is_norm(name: str) -> bool:
  return any(w.endswith("norm") or w in _NORM_WORDS for w in _words(name))


def _is_embedding(name: str) -> bool:
  words = _words(name)
  embedding = any(
    w in _EMBEDDING_WORDS or w.endswith(("embedding", "embeddings")) for w in words
  )
  # A patch embedding is a convolution or a dense layer, whatever it is called.
  return embedding and "patch" not in words


def _is_embedding_table(layer: str, shape: Sequence[int]) -> bool:
  return _is_embedding(layer) and len(shape) == 2
