"""Merges of candidates by name, with what they need from a network and its data."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
import numpy.typing as npt
import optax

from jaxsms.merges import MERGES, Entry, Means, bind, diagonal_fisher
from jaxsms.names import check_name
from jaxsms.phases import Merge, Weighted
from jaxsms.training.engine import Engine, Model, Record, one_model
from jaxsms.training.landscape import evenly
from jaxsms.training.measurements import predict, recalibrated, score
from jaxsms.training.programs import Programs
from jaxsms.training.state import Data
from jaxsms.training.streamed import StreamedData
from jaxsms.trees import PyTree

LEARNING_IMAGES = 1000  # of the validation data, for learned weights
FISHER_IMAGES = 500  # of the training data
_GRADIENTS = 8  # of single images that are held at once
BY_SAMPLES, BY_RATIOS = "by_samples", "by_ratios"


class Given(NamedTuple):
  """A merge by weights that are known before training.

  Attributes:
    title: what it does, for people.
    weights: what the weights of the copies are.
    may_collapse: see `Merging`.
  """

  title: str
  weights: str
  may_collapse: bool


GIVEN = {
  BY_SAMPLES: Given(
    "the mean, weighted by the number of training examples of each copy",
    "training examples",
    may_collapse=False,
  ),
  BY_RATIOS: Given(
    "the mean, weighted towards the copies with less balanced classes",
    "weight",
    may_collapse=True,
  ),
}


def candidate_merges() -> dict[str, Entry | Given]:
  """Every merge of candidates by its name, with its title."""
  return {name: entry for name, entry in MERGES.items() if entry.of_candidates} | GIVEN


class Merging(NamedTuple):
  """How the candidates of a phase become one model.

  Attributes:
    of: `of(engine, key, base)` giving the merge of `Model` leaves [m, ...], see
      `jaxsms.merge_phase`. The key estimates batch statistics; `base` is the pruned model
      that the candidates were trained from, None where there is none.
    selects: whether it leaves candidates out, so that those taken are worth a record.
    check: `check(engine)` raises ValueError where it cannot be, before anything is trained.
    weights: float [m], of the copies, where the merge is their weighted mean instead. They
      need not sum to 1.
    may_collapse: whether copies that predict badly are left out. False where copies that
      know few classes are normal.
    choose: `choose(scores, copies)` giving those of the copies that are merged, from the
      metrics of all m.
  """

  of: Callable[[Engine, jax.Array, Model | None], Merge]
  selects: bool = False
  check: Callable[[Engine], None] = lambda engine: None
  weights: np.ndarray | None = None
  may_collapse: bool = True
  choose: Callable[[Sequence[Record], list[int]], list[int]] = lambda scores, copies: copies

  def among(
    self, copies: list[int], engine: Engine, key: jax.Array, base: Model | None
  ) -> Merge:
    """The merge where only these copies are left."""
    if self.weights is None:
      return self.of(engine, key, base)
    return mean_by_weights(np.asarray(self.weights)[copies])


def mean_by_weights(weights: np.ndarray) -> Merge:
  """The weighted mean of models, such as by the examples that each was trained on.

  Args:
    weights: float [m], above 0. They need not sum to 1.

  Returns:
    A merge of leaves [m, ...], with its weights, which sum to 1.

  References:
    McMahan et al., 2017, https://arxiv.org/abs/1602.05629 (federated averaging)

  Example:
    >>> merge = mean_by_weights(np.array([30, 10]))
    >>> merge({"w": jax.numpy.array([1.0, 5.0])}).params["w"].item()
    2.0
  """
  weights = np.asarray(weights, np.float64) / np.sum(weights)
  mean = bind("weighted", Means(weights=weights))
  return lambda models: Weighted(mean(models), weights)


def weights_by_ratios(ratios: npt.ArrayLike, retained: float) -> np.ndarray:
  """Weights of copies that trained on shares of different imbalance.

  They are those of an interpolation that begins with the most balanced copies and goes on
  with rising ratios: each time `retained` of the average so far stays, and the rest is the
  next copy. Copies of one ratio count as their mean.

  Args:
    ratios: float [m], of the largest class to the smallest in each copy's share.
    retained: in (0, 1).

  Returns:
    float64 [m], summing to 1.

  References:
    Aminbeidokhti et al., 2025, https://arxiv.org/abs/2511.10683 (LT-Soups, stage 1; their
    code begins the interpolation with the pretrained model)

  Example:
    >>> weights_by_ratios([4, 1, 2], 0.5).tolist()
    [0.5, 0.25, 0.25]
  """
  levels, level, copies = np.unique(ratios, return_inverse=True, return_counts=True)
  weights = (1 - retained) * retained ** np.arange(len(levels) - 1.0, -1.0, -1.0)
  weights[0] /= 1 - retained
  return (weights / copies)[level]


def merging_of(
  name: str, prior: float = 1e-4, weights: np.ndarray | None = None
) -> Merging:
  """The merging of a phase by its name.

  Args:
    name: one of `candidate_merges`.
    prior: the L2 coefficient of training, for inverse variances.
    weights: float [m], of the copies: the training examples of each for "by_samples", or
      such as `weights_by_ratios` gives for "by_ratios".

  Raises:
    ValueError: an unknown name, or one of these two without them.
  """
  check_name("merge", name, candidate_merges())
  if name in GIVEN:
    given = GIVEN[name]
    if weights is None:
      raise ValueError(
        f"merge {name} needs the {given.weights} of each copy: give weights, one number "
        "for each"
      )
    merge = mean_by_weights(weights)
    return Merging(
      lambda engine, key, base: merge, weights=weights, may_collapse=given.may_collapse
    )
  return Merging(
    functools.partial(named_merge, name, prior=prior),
    selects="evaluate" in MERGES[name].needs,
    check=functools.partial(check_images, name),
  )


def on_validation(engine: Engine, key: jax.Array, model: Model) -> dict[str, float]:
  """Metrics of one model on validation data, its batch statistics estimated anew."""
  model = recalibrated(engine, key, one_model(model))
  predictions = predict(engine.programs, engine.splits.validation, model)
  return score(engine.programs, {"validation": predictions})[0]


def check_images(name: str, engine: Engine) -> None:
  """Raises ValueError where a merge takes gradients, and the images are streamed."""
  if MERGES[name].in_memory and isinstance(engine.splits.train, StreamedData):
    raise ValueError(
      f"merge {name} needs images in memory, and these are streamed: load them as a "
      "jaxsms.data.Dataset, or give another merge"
    )


def named_merge(
  name: str,
  engine: Engine,
  key: jax.Array,
  base: Model | None,
  prior: float = 1e-4,
  weights: np.ndarray | None = None,
) -> Merge:
  """A merge of candidates by its name.

  Args:
    name: one of `jaxsms.merges.MERGES`.
    engine: the network, and its data: validation images for what is chosen or learned,
      training images for squared gradients.
    key: of the phase.
    base: the pruned model that the candidates were trained from, leaves [...].
    prior: the L2 coefficient of training.
    weights: float [m], of the models where entries have weights of their own; None means
      equal ones.

  Returns:
    A function of `Model` leaves [m, ...].

  Raises:
    ValueError: an unknown name, or data that are streamed where images are needed.
  """
  programs, splits, needs = engine.programs, engine.splits, MERGES[name].needs
  check_images(name, engine)
  means = Means(base=base, prior=prior, weights=weights)
  if "evaluate" in needs:
    means = means._replace(
      evaluate=lambda model: on_validation(engine, key, model)["validation_accuracy"]
    )
  if "loss" in needs:
    held_out = evenly(cast(Data, splits.validation), LEARNING_IMAGES)
    data = held_out.images, held_out.labels
    means = means._replace(loss=loss_of(programs), data=data)
  if "squared_gradients" in needs:
    images = evenly(cast(Data, splits.train), FISHER_IMAGES).images
    means = means._replace(squared_gradients=squares_of(programs), data=(key, images))
  return bind(name, means)


# Cached: what is compiled for a function serves in all phases.


@functools.lru_cache(maxsize=8)
def loss_of(programs: Programs) -> Callable[..., jax.Array]:
  """`loss(model, images, labels)`, batch statistics as they are."""

  def loss(model, images, labels):
    logits = _logits(programs, model, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  return loss


@functools.lru_cache(maxsize=8)
def squares_of(programs: Programs) -> Callable[..., PyTree]:
  """`squares(model, key, images)`, the diagonal of its Fisher matrix."""

  def squares(model, key, images):
    return diagonal_fisher(
      key, functools.partial(_logits, programs), model, images, batch_size=_GRADIENTS
    )

  return squares


def _logits(programs, model, images):
  one = jax.tree.map(lambda x: x[None], model)
  return programs.predict.on(None, 1)(images, *one)[0]
