"""One copy: its loss, one step, and a chunk of steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxsms.devices.meshes import split_batch
from jaxsms.pruning import apply_masks
from jaxsms.training.averaging import add_to_average
from jaxsms.training.own_share import share_batches
from jaxsms.training.soft_labels import (
  PriorLabels,
  SoftLabels,
  mean_loss,
  prior_labels,
  soft_labels,
)
from jaxsms.training.state import Data, Ingredients, Scalar, TrainState, sgd
from jaxsms.transforms import masked
from jaxsms.trees import PyTree

Optimizer = Callable[[Scalar, Scalar], optax.GradientTransformation]
ORDER, STEP = 0, 1  # independent streams of one copy's key


class Recipe(NamedTuple):
  """How every copy trains.

  Attributes:
    module: network, called with train=True.
    optimizer: gives the optimizer for a learning rate and a weight decay.
    prepare: augments and normalizes, `prepare(key, uint8 images) -> float images`.
    micro_batches: equal parts of a batch whose gradients are accumulated one after
      another. Batch normalization sees one part at a time, and dropout draws anew.
    feedback: keeps removed entries: gradients are taken where they are 0, and move all
      entries, so that masks made anew may bring them back.
    skip_inactive: whether steps that change nothing are skipped; not under vmap.

  References:
    Lin et al., 2020, https://arxiv.org/abs/2006.07253 (feedback)
  """

  module: nn.Module
  optimizer: Optimizer = sgd
  prepare: Callable[[jax.Array, jax.Array], jax.Array] = lambda key, images: images
  micro_batches: int = 1
  feedback: bool = False
  skip_inactive: bool = False


class Copy(NamedTuple):
  """What one copy trains from.

  Attributes:
    masks: of its parameters; removed entries stay 0.
    key: of the phase, the same for all copies.
    state: its own.
    ingredient: its own, scalars.
    learning_rates: float [chunk], for the next steps.
  """

  masks: PyTree
  key: jax.Array
  state: TrainState
  ingredient: Ingredients
  learning_rates: jax.Array


def train_step(
  recipe: Recipe,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  state: TrainState,
  masks: PyTree,
  images: jax.Array,
  labels: jax.Array | SoftLabels | PriorLabels,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step of one copy.

  Args:
    recipe: how it trains.
    optimizer: its state is `state.opt_state`.
    key: for dropout.
    state: of one copy.
    masks: of its parameters; removed entries stay 0.
    images: float [batch, height, width, channels].
    labels: int [batch], or soft, or with a prior.

  Returns:
    The next state, and the loss and accuracy on this batch before the step.
  """
  feedback, parts_of_batch = recipe.feedback, recipe.micro_batches
  point = apply_masks(state.params, masks) if feedback else state.params
  gradients = functools.partial(_gradients, recipe.module, point)
  if parts_of_batch == 1:
    grads, batch_stats, metrics = gradients(key, state.batch_stats, images, labels)
  else:
    # Every part holds examples of all devices that share the batch.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, parts_of_batch, *x.shape[1:]).swapaxes(0, 1), (images, labels)
    )

    def accumulate(carry, now):
      total, batch_stats = carry
      i, part = now
      grads, batch_stats, metrics = gradients(
        jax.random.fold_in(key, i), batch_stats, *split_batch(part)
      )
      return (jax.tree.map(jnp.add, total, grads), batch_stats), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (total, batch_stats), metrics = jax.lax.scan(
      accumulate, (zeros, state.batch_stats), (jnp.arange(parts_of_batch), parts)
    )
    grads = jax.tree.map(lambda x: x / parts_of_batch, total)
    metrics = jax.tree.map(jnp.mean, metrics)
  wrap = optax.with_extra_args_support if feedback else masked
  updates, opt_state = wrap(optimizer).update(
    grads, state.opt_state, state.params, masks=masks
  )
  params = optax.apply_updates(state.params, updates)
  step = state.step + 1
  new = state._replace(
    params=params, batch_stats=batch_stats, opt_state=opt_state, step=step
  )
  return new, metrics


def _gradients(module, params, key, batch_stats, images, labels):
  """Gradients of the mean loss, new batch statistics, and loss and accuracy."""

  def loss_fn(params):
    logits, updated = module.apply(
      {"params": params, "batch_stats": batch_stats},
      images,
      train=True,
      rngs={"dropout": key},
      mutable=["batch_stats"],
    )
    logits = logits.astype(jnp.float32)
    return mean_loss(logits, labels), (logits, updated.get("batch_stats", {}))

  (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  true = labels.labels if isinstance(labels, SoftLabels | PriorLabels) else labels
  accuracy = jnp.mean(jnp.argmax(logits, -1) == true)
  return grads, batch_stats, {"loss": loss, "accuracy": accuracy}


def train_chunk(
  recipe: Recipe, batch_size: int, data: Data, copy: Copy
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Some steps of one copy, within one epoch.

  The copy's seed decides its batch order, augmentation and dropout, whatever the length of
  the chunks. Steps beyond the end of the epoch, or beyond the copy's own number of steps,
  change nothing.

  Args:
    recipe: how it trains.
    batch_size: examples in a step; what is left of an epoch is dropped.
    data: the whole training split.
    copy: what it trains from. Where its ingredient has `examples`, batches come from those
      alone, see `share_batches`; an epoch is as many steps as for all copies.

  Returns:
    The next state, and mean `loss` and `accuracy` over the steps taken (NaN if none was).
  """
  n, chunk = len(data.labels), len(copy.learning_rates)
  steps_per_epoch, step = n // batch_size, copy.state.step
  epoch, first = step // steps_per_epoch, step % steps_per_epoch
  seed_key = jax.random.fold_in(copy.key, copy.ingredient["seed"])
  order_key = jax.random.fold_in(seed_key, ORDER)
  if "examples" in copy.ingredient:
    examples, size = (jnp.asarray(copy.ingredient[name]) for name in ("examples", "size"))
    order = share_batches(order_key, examples, size, step, chunk, batch_size)
  else:
    order_key = jax.random.fold_in(order_key, epoch)
    positions = first * batch_size + jnp.arange(chunk * batch_size)
    order = jax.random.permutation(order_key, n)[positions % n]
  return _scan(
    recipe,
    copy,
    lambda indices: (data.images[indices], data.labels[indices]),
    order.reshape(chunk, batch_size),
    first + jnp.arange(chunk) < steps_per_epoch,
  )


def train_batches(
  recipe: Recipe, images: jax.Array, labels: jax.Array, taken: jax.Array, copy: Copy
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Some steps of one copy, on batches that come from the host.

  Args:
    recipe: how it trains.
    images: uint8 [chunk, batch, height, width, channels].
    labels: int [chunk, batch].
    taken: int [], how many of the steps there are batches for.
    copy: what it trains from.

  Returns:
    The next state, and mean `loss` and `accuracy` over the steps taken.
  """
  exists = jnp.arange(len(copy.learning_rates)) < taken
  return _scan(recipe, copy, lambda batch: batch, (images, labels), exists)


def _scan(recipe: Recipe, copy: Copy, take: Callable, batches: Any, exists: jax.Array):
  """A step for each of `batches`, of which `take` gives the images and labels."""
  masks, key, state, ingredient, learning_rates = copy
  teacher, state = state.teacher, state._replace(teacher=())  # no step changes it
  key = jax.random.fold_in(key, ingredient["seed"])
  steps = jnp.arange(len(learning_rates))
  active = exists & (state.step + steps < ingredient["steps"])

  def step(state, batch, learning_rate):
    augment_key, dropout_key = jax.random.split(
      jax.random.fold_in(jax.random.fold_in(key, STEP), state.step)
    )
    images, labels = take(batch)
    optimizer = recipe.optimizer(learning_rate, ingredient["weight_decay"])
    images = recipe.prepare(augment_key, split_batch(images))
    if teacher:
      labels = soft_labels(recipe.module, teacher, images, labels)
    elif "log_prior" in ingredient:
      labels = prior_labels(labels, jnp.asarray(ingredient["log_prior"]))
    new, metrics = train_step(
      recipe,
      optimizer,
      dropout_key,
      state,
      masks,
      images,
      labels,
    )
    if "frozen" not in ingredient:
      return add_to_average(new, ingredient), metrics
    keep = functools.partial(jax.tree.map, jnp.where, ingredient["frozen"], state.params)
    new = add_to_average(new._replace(params=keep(new.params)), ingredient)
    if jax.tree.leaves(new.average):  # a mean of equal numbers would round
      new = new._replace(average=keep(new.average))
    return new, metrics

  def rest(state, batch, learning_rate):
    zero = jnp.zeros((), jnp.float32)
    return state, {"loss": zero, "accuracy": zero}

  def body(state, now):
    active, *arguments = now
    if recipe.skip_inactive:
      return jax.lax.cond(active, step, rest, state, *arguments)
    new = step(state, *arguments)
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, rest(state, *arguments))

  state, metrics = jax.lax.scan(body, state, (active, batches, learning_rates))
  # A copy whose loss was not finite even once is lost: NaN says so to all that follows.
  healthy = jnp.isfinite(metrics["loss"].sum())
  params, average = jax.tree.map(
    lambda x: jnp.where(healthy, x, jnp.nan), (state.params, state.average)
  )
  state = state._replace(params=params, average=average, teacher=teacher)
  # 0 / 0 is NaN: a copy that took no step has no loss.
  return state, jax.tree.map(lambda x: x.sum() / active.sum(), metrics)
