"""Classes of unequal size: a prior in the loss, and training of the last layer alone."""

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


def logit_adjusted(chosen: Ingredients, labels: npt.ArrayLike, classes: int) -> Ingredients:
  """Ingredients of copies with the prior of what each trains on in its loss.

  The loss is the cross-entropy of logits plus the logarithm of each class's share. Where
  copies have shares of the data, the prior is that of each copy's own share.

  Args:
    chosen: of m copies.
    labels: int [n], of the training split.
    classes: how many there are.

  Returns:
    The same with `log_prior`.

  References:
    Menon et al., 2021, https://arxiv.org/abs/2007.07314 (logit adjustment)
    Aminbeidokhti et al., 2025, https://arxiv.org/abs/2511.10683 (for copies on subsets)

  Example:
    >>> chosen = {"steps": np.array([8, 8]), "size": np.array([2, 4]),
    ...           "examples": np.array([[0, 3, 0, 3], [0, 1, 2, 3]])}
    >>> adjusted = jaxsms.training.classifier.logit_adjusted(chosen, [0, 0, 0, 1], 2)
    >>> np.exp(adjusted["log_prior"]).round(2).tolist()
    [[0.5, 0.5], [0.75, 0.25]]
  """
  labels, m = np.asarray(labels), number_of_models(chosen, "ingredients")
  if "examples" not in chosen:
    return {**chosen, "log_prior": np.tile(log_prior(labels, classes), (m, 1))}
  shares = zip(np.asarray(chosen["examples"]), np.asarray(chosen["size"]), strict=True)
  priors = [log_prior(labels[examples[:size]], classes) for examples, size in shares]
  return {**chosen, "log_prior": np.stack(priors)}


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
