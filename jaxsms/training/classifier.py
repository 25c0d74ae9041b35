"""Training of the classifier alone: the last layer, as if all classes were equal."""

from collections.abc import Mapping

import jax
import numpy as np
import numpy.typing as npt

from jaxsms.data.long_tail import class_counts
from jaxsms.training.state import Ingredients
from jaxsms.trees import PyTree, number_of_models


def log_prior(labels: npt.ArrayLike, classes: int) -> np.ndarray:
  """The logarithm of each class's share of the examples; of an absent one as of one.

  Args:
    labels: int [n], of the training data.
    classes: how many there are.

  Returns:
    float32 [classes].

  Example:
    >>> shares = np.exp(jaxsms.training.classifier.log_prior([0, 0, 0, 1], 2))
    >>> shares.round(2).tolist()
    [0.75, 0.25]
  """
  counts = np.maximum(class_counts(labels, classes), 1)
  return np.log(counts / np.size(labels)).astype(np.float32)


def classifier_alone(
  chosen: Ingredients, params: Mapping[str, PyTree], layer: str, prior: np.ndarray
) -> Ingredients:
  """Ingredients of copies that train one layer alone, with a prior of the classes.

  Args:
    chosen: of m copies.
    params: of the network, by layer; shapes are enough.
    layer: the classifier's name in it.
    prior: float [classes], see `log_prior`.

  Returns:
    The same with `frozen` and `log_prior`.

  Raises:
    ValueError: there is no such layer.

  References:
    Kang et al., 2020, https://arxiv.org/abs/1910.09217 (the classifier apart)
    Aminbeidokhti et al., 2025, https://arxiv.org/abs/2511.10683 (after a soup)

  Example:
    >>> params = {"Dense_0": {"bias": jnp.zeros(3)}, "Dense_1": {"bias": jnp.zeros(2)}}
    >>> chosen, prior = {"steps": np.array([8, 8])}, np.log([0.75, 0.25])
    >>> alone = jaxsms.training.classifier.classifier_alone(
    ...   chosen, params, "Dense_1", prior)
    >>> alone["frozen"]["Dense_0"]["bias"].tolist(), alone["log_prior"].shape
    ([True, True], (2, 2))
  """
  if layer not in params:
    raise ValueError(f"layer is {layer!r}: the network has {', '.join(sorted(params))}")
  m = number_of_models(chosen, "ingredients")
  frozen = {name: np.full([m], name != layer) for name in params}
  return {
    **chosen,
    "log_prior": np.tile(prior, (m, 1)),
    "frozen": {k: jax.tree.map(lambda _, k=k: frozen[k], of) for k, of in params.items()},
  }
