"""The same training in PyTorch: one copy after another, and all of them under vmap."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from jaxsms.pretrained import to_torch

from ..costs.timing import ROUND_SECONDS, Contender, calls_for, cores, seconds
from .bench_jax import (
  LEARNING_RATE,
  MOMENTUM,
  WEIGHT_DECAY,
  Task,
)
from .torch_batches import Batches, resident
from .torch_models import Dense, make_network


class Recipe(NamedTuple):
  """What all copies share.

  Attributes:
    weights: by name, as `jaxsms.pretrained.to_torch` gives them.
    masks: bool, by name; those of kernels are used.
    learning_rate: of SGD with Nesterov momentum.
    momentum: in (0, 1).
    weight_decay: L2 coefficient, on all parameters.
    bfloat16: whether activations are, by autocast.
    device: "cpu" or "cuda".
  """

  weights: Mapping[str, np.ndarray]
  masks: Mapping[str, np.ndarray]
  learning_rate: float
  momentum: float
  weight_decay: float
  bfloat16: bool
  device: str

  def load(self, network: nn.Module) -> nn.Module:
    """The network with the weights, on the device; buffers it has not are left out."""
    known = network.state_dict()
    state = {k: torch.tensor(v) for k, v in self.weights.items() if k in known}
    network.load_state_dict(state)
    return network.to(self.device)

  def optimizer(self, parameters) -> torch.optim.Optimizer:
    """The optimizer in its fastest form."""
    return torch.optim.SGD(
      parameters,
      self.learning_rate,
      self.momentum,
      weight_decay=self.weight_decay,
      nesterov=True,
      fused=True,
    )

  def autocast(self):
    """Under which the network runs."""
    return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)


class Totals:
  """Loss and right answers, summed on the device as jaxsms does."""

  def __init__(self, shape, device):
    self.loss = torch.zeros(shape, device=device)
    self.correct = torch.zeros(shape, dtype=torch.long, device=device)

  def add(self, loss, logits, labels):
    """Counts a step: loss [...], logits [..., batch, classes], labels [..., batch]."""
    self.loss += loss.detach()
    self.correct += (logits.detach().argmax(-1) == labels).sum(-1)


class Alone:
  """One copy in training, as scripts in PyTorch do it; m of them take m times as long."""

  def __init__(
    self, network: nn.Module, recipe: Recipe, channels_last: bool, compiled: bool = False
  ):
    """`compiled`: by torch.compile, with CUDA graphs where there is CUDA."""
    network = recipe.load(network).train()
    if channels_last:
      network = network.to(memory_format=torch.channels_last)
    self.network, self.recipe, self.compiled = network, recipe, compiled
    self.forward = network
    if compiled:
      self.forward = torch.compile(network, mode="reduce-overhead")
    self.optimizer = recipe.optimizer(network.parameters())
    named = dict(network.named_parameters())
    self.kernels = [p for p in named.values() if p.dim() > 1]
    self.masks = _masks(recipe, named)
    self.totals = Totals((), recipe.device)

  def step(self, images, labels) -> None:
    """One step on images [1, batch, channels, height, width] and labels [1, batch]."""
    images, labels = images[0], labels[0]
    if self.compiled:
      torch.compiler.cudagraph_mark_step_begin()
    with self.recipe.autocast():
      logits = self.forward(images)
    loss = F.cross_entropy(logits.float(), labels)
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch._foreach_mul_([p.grad for p in self.kernels], self.masks)
    self.optimizer.step()
    self.totals.add(loss, logits, labels)

  def parameters(self) -> dict[str, torch.Tensor]:
    """By name, with a leading axis of 1."""
    return {name: p.detach()[None] for name, p in self.network.named_parameters()}


class Ensemble:
  """m copies of a network in training at once, under vmap.

  References:
    https://pytorch.org/tutorials/intermediate/ensembling.html
  """

  def __init__(self, network: nn.Module, recipe: Recipe, copies: int):
    """`network`: one that vmap can train."""
    network = recipe.load(network).train()
    self.recipe = recipe
    self.params, _ = stack_module_state([network] * copies)
    self.optimizer = recipe.optimizer(list(self.params.values()))
    self.kernels = [p for p in self.params.values() if p.dim() > 2]
    # As large as the gradients: the fused product takes no others.
    masks = _masks(recipe, dict(network.named_parameters()))
    self.masks = [mask.expand(copies, *mask.shape).contiguous() for mask in masks]
    self.totals = Totals((copies,), recipe.device)
    base = copy.deepcopy(network).to("meta")

    def loss_of(params, images, labels):
      with recipe.autocast():
        logits = functional_call(base, params, (images,))
      return F.cross_entropy(logits.float(), labels), logits

    self.gradients = vmap(grad_and_value(loss_of, has_aux=True))

  def step(self, images, labels) -> None:
    """One step on images [m, batch, channels, height, width] and labels [m, batch]."""
    params = {name: p.detach() for name, p in self.params.items()}
    grads, (loss, logits) = self.gradients(params, images, labels)
    for name, p in self.params.items():
      p.grad = grads[name]
    torch._foreach_mul_([p.grad for p in self.kernels], self.masks)
    self.optimizer.step()
    self.totals.add(loss, logits, labels)

  def parameters(self) -> dict[str, torch.Tensor]:
    """By name, with leading axis m."""
    return {name: p.detach() for name, p in self.params.items()}


def _masks(recipe, named):
  return [
    torch.tensor(recipe.masks[name], dtype=p.dtype, device=p.device)
    for name, p in named.items()
    if p.dim() > 1
  ]


def train(training: Alone | Ensemble, batches: Batches, steps: int) -> None:
  """Trains so many steps and waits for them."""
  for _ in range(steps):
    training.step(*batches.next())
  if training.recipe.device == "cuda":
    torch.cuda.synchronize()


def prepare(device: str) -> dict[str, str | int]:
  """One thread per core that this process may use, and TF32 where JAX has it.

  Args:
    device: "cpu" or "cuda".

  Returns:
    What the numbers depend on: version, threads and device.
  """
  torch.set_num_threads(cores())
  if device == "cuda":
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
  return {
    "torch": torch.__version__,
    "torch_threads": torch.get_num_threads(),
    "torch_device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
  }


def make_contenders(
  task: Task,
  kinds: Sequence[str],
  copies: Sequence[int],
  *,
  augmentation: str,
  bfloat16: bool,
  device: str,
  steps: int | None,
) -> tuple[dict[tuple[str, int], Contender], list[str]]:
  """Everything of PyTorch that takes part, warmed up and in its faster memory layout.

  Args:
    task: of jaxsms; network, weights and data are taken over.
    kinds: of "sequential" and "ensemble".
    copies: for which an ensemble is made; sequential ones are one copy, once and for all.
    augmentation: none, crop_flip or noise.
    bfloat16: whether activations are.
    device: "cpu" or "cuda".
    steps: of a round; None means as many as fill `ROUND_SECONDS`.

  Returns:
    Contenders by kind ("eager", "compiled" or "ensemble") and copies, and a sentence on
    each that failed.

  Raises:
    ValueError: PyTorch has no such network here.
  """
  image_shape = task.data.images.shape[1:]
  variables = {"params": task.params, "batch_stats": task.batch_stats}
  weights = to_torch(jax.device_get(variables), task.module, image_shape)
  recipe = Recipe(
    weights,
    {name: np.ones(x.shape, bool) for name, x in weights.items()},
    LEARNING_RATE,
    MOMENTUM,
    WEIGHT_DECAY,
    bfloat16,
    device,
  )
  data = resident(*jax.device_get(task.data), augmentation, device)

  def begin(kind, m, channels_last):
    network = make_network(task.module, image_shape, vmapped=kind == "ensemble")
    if kind == "ensemble":
      training = Ensemble(network, recipe, m)
    else:
      training = Alone(network, recipe, channels_last, compiled=kind == "compiled")
    batch_size = task.programs.batch_size
    return training, Batches(data, batch_size, m, augmentation, channels_last)

  wanted = []
  if "sequential" in kinds:
    wanted += [("eager", 1)] + [("compiled", 1)] * (device == "cuda")
  if "ensemble" in kinds:
    wanted += [("ensemble", m) for m in copies if m > 1]
  flat = isinstance(make_network(task.module, image_shape, vmapped=False), Dense)
  found, failures = {}, []
  for kind, m in wanted:
    try:
      found[kind, m] = min(
        (
          contender(functools.partial(begin, kind, m, last), last, device, steps)
          for last in ([False] if flat else [True, False])
        ),
        key=lambda one: one.facts["warm_up_step_seconds"],
      )
    except RuntimeError as error:  # the compiler's, or out of memory
      reason = str(error).strip().partition("\n")[0]
      failures.append(f"PyTorch, {kind}, {m} at once failed: {reason}")
  return found, failures


def contender(
  begin: Callable[[], tuple[Alone | Ensemble, Batches]],
  channels_last: bool,
  device: str,
  steps: int | None,
) -> Contender:
  """Warms a training up, and chooses how long a round is."""
  cuda = device == "cuda"
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  training, batches = begin()
  first = seconds(lambda: train(training, batches, 1))
  # CUDA graphs are recorded in the second and the third step.
  train(training, batches, 2)
  step_seconds = min(seconds(lambda: train(training, batches, 1)) for _ in range(5))
  steps = steps or calls_for(ROUND_SECONDS, step_seconds)
  return Contender(
    lambda: train(training, batches, steps),
    steps,
    {
      "layout": "channels_last" if channels_last else "contiguous",
      "first_step_seconds": first,
      "warm_up_step_seconds": step_seconds,
      "steps_per_round": steps,
      "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    },
  )
