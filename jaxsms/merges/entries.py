"""Every merge by its name: what it is, what it needs, and how it is made."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxsms.merges.learned import weighted_by_learning
from jaxsms.merges.precision import fisher_soup
from jaxsms.merges.sphere import slerp
from jaxsms.merges.task_vectors import task_arithmetic, ties
from jaxsms.names import check_name
from jaxsms.soups import greedy_soup, uniform_soup
from jaxsms.trees import PyTree


class Means(NamedTuple):
  """What merges may need beside the models.

  Attributes:
    weights: float [m], summing to 1.
    base: the model that all were trained from, leaves [...].
    evaluate: a score of one model on validation data, higher is better.
    loss: `loss(params, *data)` of one model on validation data, differentiable.
    data: of the loss, or of the function of squared gradients.
    squared_gradients: leaves [m, ...], or a function `f(model, *data)` of one model.
    prior: of inverse variances, the L2 coefficient of training.
    scale: of what task vectors add.
    density: share of a task vector that TIES keeps.
    t: where between two models, from 0 to 1.
  """

  weights: jax.Array | np.ndarray | None = None
  base: PyTree | None = None
  evaluate: Callable[[PyTree], float] | None = None
  loss: Callable[..., jax.Array] | None = None
  data: Sequence[Any] = ()
  squared_gradients: PyTree | Callable[[PyTree], PyTree] | None = None
  prior: float = 1e-4
  scale: float = 1.0
  density: float = 0.2
  t: float = 0.5


class Entry(NamedTuple):
  """A merge.

  Attributes:
    title: what it does, for people.
    needs: fields of `Means` without which it cannot be.
    bind: gives the function of models [m, ...].
    two: whether it is of two models.
    weighted: whether the models may have weights that are given.
    of_candidates: whether it merges the candidates of a phase, which have one base.
  """

  title: str
  needs: tuple[str, ...]
  bind: Callable[[Means], Callable[[PyTree], Any]]
  two: bool = False
  weighted: bool = False
  of_candidates: bool = True

  @property
  def in_memory(self) -> bool:
    """Whether it takes gradients, of images that are in memory."""
    return bool({"loss", "squared_gradients"} & set(self.needs))


def _learned(by):
  return lambda means: functools.partial(
    weighted_by_learning, loss=means.loss, data=means.data, by=by
  )


def _fisher(means):
  return functools.partial(
    fisher_soup,
    squared_gradients=means.squared_gradients,
    weights=means.weights,
    data=means.data,
  )


MERGES = {
  "uniform": Entry("the mean", (), lambda means: uniform_soup, weighted=True),
  "weighted": Entry(
    "the mean with weights that are given",
    ("weights",),
    lambda means: functools.partial(uniform_soup, weights=means.weights),
    weighted=True,
    of_candidates=False,
  ),
  "greedy": Entry(
    "from the best one on, each that does not lower the validation accuracy of the average",
    ("evaluate",),
    lambda means: functools.partial(greedy_soup, evaluate=cast(Any, means.evaluate)),
  ),
  "learned": Entry(
    "the mean with a weight for each model, learned on validation data",
    ("loss",),
    _learned("model"),
  ),
  "learned_by_layer": Entry(
    "the mean with a weight for each model and layer, learned on validation data",
    ("loss",),
    _learned("layer"),
  ),
  "fisher": Entry(
    "each entry weighted by its squared gradient",
    ("squared_gradients",),
    _fisher,
    weighted=True,
  ),
  "inverse_variance": Entry(
    "each entry weighted by its squared gradient and the prior",
    ("squared_gradients",),
    lambda means: functools.partial(_fisher(means), prior=means.prior),
    weighted=True,
  ),
  "task_arithmetic": Entry(
    "the base model and the mean difference from it, scaled",
    ("base",),
    lambda means: functools.partial(
      task_arithmetic, base=means.base, weights=means.weights, scale=means.scale
    ),
    weighted=True,
    of_candidates=False,  # whose mean it is
  ),
  "ties": Entry(
    "the base model and the largest differences from it on whose sign most agree",
    ("base",),
    lambda means: functools.partial(
      ties, base=means.base, density=means.density, scale=means.scale
    ),
  ),
  "slerp": Entry(
    "a point on the arc between two models",
    (),
    lambda means: functools.partial(slerp, t=means.t),
    two=True,
    weighted=True,
  ),
}


def bind(name: str, means: Means) -> Callable[[PyTree], Any]:
  """A merge by its name, as `merge=` of `jaxsms.sparse_model_soup` takes it.

  Args:
    name: one of `MERGES`.
    means: what it needs.

  Returns:
    A function of models, leaves [m, ...].

  Raises:
    ValueError: an unknown name, or something that it needs is missing.

  Example:
    >>> merge = bind("slerp", Means(t=0.5))
    >>> print(merge({"w": jax.numpy.eye(2)})["w"].round(3))
    [0.707 0.707]
  """
  check_name("merge", name, MERGES)
  entry = MERGES[name]
  missing = [need for need in entry.needs if getattr(means, need) is None]
  if missing:
    given = ", ".join(f"{need}=..." for need in missing)
    raise ValueError(f"merge {name} needs {' and '.join(missing)}: give Means({given})")
  return entry.bind(means)
