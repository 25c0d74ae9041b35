"""What a training written out by hand needs, beside its loss."""

import jax
import optax

from jaxsms.training.step import ORDER


def own_images(images):
  """Images as the tests' programs normalize them, with mean 0.5 and deviation 0.25."""
  return (images / 255 - 0.5) / 0.25


def own_optimizer(rate, decay):
  """SGD with Nesterov momentum and weight decay."""
  return optax.chain(
    optax.add_decayed_weights(decay), optax.trace(0.9, True), optax.scale(-rate)
  )


def own_batches(key, examples, batch_size, steps):
  """Indices of the examples of each step; each epoch has an order of its own."""
  for step in range(steps):
    epoch, at = divmod(step, examples // batch_size)
    of_epoch = jax.random.fold_in(jax.random.fold_in(key, ORDER), epoch)
    order = jax.random.permutation(of_epoch, examples)
    yield order[at * batch_size : (at + 1) * batch_size]
