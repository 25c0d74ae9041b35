import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxsms import pretrain_schedule, retrain_schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A pretraining with 4 steps of warmup, then from 0.2 to not quite 0, and not monotone.
LRS = np.concatenate(
  [np.linspace(0, 0.15, 4), 0.2 * np.cos(np.linspace(0, 1.5, 17)), [0.05, 0.04]]
).astype(np.float32)
LENGTH = 64
NAMES = ("FT", "LRW", "SLR", "CLR", "LLR", "ALLR")
DROP = {"relative_norm_drop": 0.3, "pruned_fraction": 0.5}


def options(name):
  return DROP if name == "ALLR" else {}


def reference(name, lrs, steps, fraction=0.1, skipped=0, initial_lr=None, drop=DROP):
  """Learning rates of steps 0 to `steps` - 1, in plain loops, from the definitions."""
  lrs = [float(x) for x in lrs]
  largest, smallest = max(lrs), min(lrs[skipped:])
  if name == "FT":
    return [smallest] * steps
  if name == "LRW":
    return [lrs[max(len(lrs) - steps + i, 0)] for i in range(steps)]
  warmup = int(fraction * steps)
  rest = steps - warmup
  if name == "SLR":
    whole = [largest] * skipped + lrs[skipped:]
    after = [whole[i * len(whole) // rest] for i in range(rest)]
  elif name == "CLR":
    cosine = [(1 + math.cos(math.pi * i / rest)) / 2 for i in range(rest)]
    after = [smallest + (largest - smallest) * c for c in cosine]
  else:
    first = largest if initial_lr is None else initial_lr
    if name == "ALLR":
      ratio = drop["relative_norm_drop"] / math.sqrt(drop["pruned_fraction"])
      first = largest * min(max(ratio, min(1, steps / len(lrs))), 1)
    after = [first * (1 - i / rest) for i in range(rest)]
  rise = [(1 - math.cos(math.pi * i / warmup)) / 2 for i in range(warmup)]
  return [after[0] * r for r in rise] + after


@pytest.fixture(scope="module")
def traced():
  """For each name a program in which the number of steps is an argument."""

  def program(name, skipped, fraction):
    def rates(lrs, steps):
      schedule = retrain_schedule(
        name,
        lrs,
        steps,
        pretrain_warmup_steps=skipped,
        warmup_fraction=fraction,
        **options(name),
      )
      return schedule(jnp.arange(LENGTH))

    return jax.jit(rates)

  settings = [(0, 0.1), (4, 0.1), (4, 0.0), (4, 0.3)]
  return {(name, *s): program(name, *s) for name in NAMES for s in settings}


@pytest.mark.parametrize("name", NAMES)
@given(steps=st.integers(1, LENGTH))
@example(steps=1)
@example(steps=9)
@example(steps=10)
@example(steps=LENGTH)
def test_retraining_follows_the_definition(traced, name, steps):
  for skipped, fraction in ((0, 0.1), (4, 0.1), (4, 0.0), (4, 0.3)):
    rates = traced[name, skipped, fraction](LRS, steps)
    expected = reference(name, LRS, steps, fraction, skipped)
    np.testing.assert_allclose(rates[:steps], expected, rtol=1e-5, atol=1e-7)
    # After the last step it stays at its end.
    smallest, last = min(LRS[skipped:]), LRS[-1]
    ends = {"FT": smallest, "CLR": smallest, "LRW": last, "SLR": last}
    end = ends.get(name, 0)
    np.testing.assert_allclose(rates[steps:], end, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scalar_steps_and_concrete_lengths(name):
  for steps in (1, 9, 30):
    schedule = retrain_schedule(
      name, LRS.tolist(), steps, pretrain_warmup_steps=4, **options(name)
    )
    expected = reference(name, LRS, steps, skipped=4)
    for i in {0, 1, steps // 2, steps - 1}:
      if i < steps:
        assert jnp.shape(schedule(i)) == ()
        np.testing.assert_allclose(schedule(i), expected[i], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(schedule(jnp.int32(i)), expected[i], rtol=1e-5)
    rates = schedule(np.arange(LENGTH).reshape(2, -1)).ravel()[:steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_different_lengths_share_a_program(name):
  lengths = np.array([5, 10, 23, 40, 64])

  def schedule(n):
    return retrain_schedule(name, LRS, n, **options(name))

  rates = jax.jit(jax.vmap(lambda n: schedule(n)(jnp.arange(LENGTH))))(lengths)
  for n, row in zip(lengths, rates, strict=True):
    np.testing.assert_allclose(row[:n], reference(name, LRS, n), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(row, schedule(int(n))(np.arange(LENGTH)), atol=1e-7)


def test_copies_of_different_initial_rates():
  initial, lengths = np.array([0.05, 0.1, 0.7], np.float32), np.array([20, 30, 40])
  rates = jax.vmap(
    lambda lr, n: retrain_schedule("LLR", LRS, n, initial_lr=lr)(jnp.arange(LENGTH))
  )(initial, lengths)
  for lr, n, row in zip(initial, lengths, rates, strict=True):
    expected = reference("LLR", LRS, n, initial_lr=float(lr))
    np.testing.assert_allclose(row[:n], expected, rtol=1e-5, atol=1e-7)


@given(st.floats(0, 1), st.floats(0.01, 1), st.sampled_from([1, 10, 23, 40]))
@example(0.0, 0.0, 10)
def test_adaptive_peak(d, p, steps):
  schedule = retrain_schedule(
    "ALLR", LRS, steps, relative_norm_drop=d, pruned_fraction=p, warmup_fraction=0
  )
  ratio = d / math.sqrt(p) if p else 0
  peak = float(np.max(LRS)) * np.clip(ratio, min(1, steps / len(LRS)), 1)
  assert float(schedule(0)) == pytest.approx(peak, rel=1e-5)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.25])
def test_a_traced_length_has_the_warmup_of_a_concrete_one(fraction):
  # Where the warmup ends a linear schedule has its peak.
  lengths = np.arange(1, 3000)

  def peak_at(n, i):
    return retrain_schedule("LLR", LRS, n, warmup_fraction=fraction)(i)

  ends = np.array([int(fraction * n) for n in lengths])
  peaks = jax.jit(jax.vmap(peak_at))(lengths, ends)
  np.testing.assert_array_equal(peaks, np.max(LRS))


@pytest.mark.slow
def test_long_pretraining_is_resampled_exactly():
  # Products of step and pretraining length are far beyond 32 bits here.
  lrs = np.random.default_rng(0).random(450_000).astype(np.float32)
  steps = 70_000
  at = np.random.default_rng(1).integers(0, steps, 1000)
  rates = retrain_schedule("SLR", lrs, steps, warmup_fraction=0)(at)
  np.testing.assert_array_equal(rates, lrs[at * len(lrs) // steps])


@pytest.mark.slow
def test_largest_rate_may_lie_in_the_warmup_and_the_smallest_may_not():
  lrs = np.array([0.0, 0.9, 0.3, 0.2])

  def get(name):
    return retrain_schedule(name, lrs, 10, pretrain_warmup_steps=2, warmup_fraction=0)

  assert get("FT")(0) == np.float32(0.2)
  assert get("LLR")(0) == np.float32(0.9)
  np.testing.assert_allclose(get("SLR")(np.arange(0, 10, 3)), [0.9, 0.9, 0.3, 0.2])


@pytest.mark.parametrize("name", NAMES)
def test_drives_an_optimizer(name):
  schedule = retrain_schedule(name, LRS, 8, **options(name))
  optimizer = optax.sgd(schedule)

  @jax.jit
  def run(x):
    def step(carry, _):
      x, state = carry
      updates, state = optimizer.update(jnp.ones(()), state)
      return (x + updates, state), updates

    return jax.lax.scan(step, (x, optimizer.init(x)), None, 8)[1]

  np.testing.assert_allclose(
    run(jnp.zeros(())), -np.array(reference(name, LRS, 8)), rtol=1e-5, atol=1e-7
  )


PEAK, STEPS = 0.4, 30
PRETRAIN = {
  "Linear": {},
  "Cosine": {},
  "StepLR": {"decay": 0.3, "step_size": 8},
  "MultiStepLR": {"decay": 0.2, "milestones": [9, 10, 25]},
  "ExponentialLR": {"decay": 0.9},
  "Constant": {},
}


def pretrain_rates(name, warmup, end):
  """The learning rate of every step, from the definitions."""
  i = np.arange(STEPS)
  t, given = (i - warmup) / (STEPS - warmup), PRETRAIN[name]
  main = {
    "Linear": lambda: PEAK + (end - PEAK) * t,
    "Cosine": lambda: end + (PEAK - end) * (1 + np.cos(np.pi * t)) / 2,
    "StepLR": lambda: PEAK * 0.3 ** (i // given["step_size"]),
    "MultiStepLR": lambda: PEAK * 0.2 ** np.searchsorted(given["milestones"], i, "right"),
    "ExponentialLR": lambda: PEAK * 0.9 ** (i - warmup),
    "Constant": lambda: np.full(STEPS, PEAK),
  }[name]()
  return np.where(i < warmup, PEAK * i / max(warmup, 1), main)


@pytest.mark.parametrize("name", PRETRAIN)
@pytest.mark.parametrize("warmup", [0, 1, 7, 12])
@pytest.mark.parametrize("end", [0.0, 0.02])
def test_pretraining_follows_the_definition(name, warmup, end):
  schedule = pretrain_schedule(name, PEAK, STEPS, warmup, end, **PRETRAIN[name])
  expected = pretrain_rates(name, warmup, end)
  rates = np.broadcast_to(schedule(jnp.arange(STEPS)), STEPS)
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-7)
  assert float(schedule(STEPS - 1)) == pytest.approx(expected[-1], rel=1e-4, abs=1e-7)
  jitted = jax.jit(schedule)(jnp.int32(12))
  assert float(jitted) == pytest.approx(expected[12], rel=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("name", PRETRAIN)
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("end", [0.0, 0.02])
def test_pretraining_follows_torch(name, warmup, end):
  import torch

  rates = torch.optim.lr_scheduler
  optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
  given, length = PRETRAIN[name], STEPS - warmup
  first = 1e-12  # torch's warmup cannot start at 0

  def after_warmup():
    return {
      "Linear": lambda: rates.LinearLR(optimizer, 1, end / PEAK, length),
      "Cosine": lambda: rates.CosineAnnealingLR(optimizer, length, end),
      "ExponentialLR": lambda: rates.ExponentialLR(optimizer, given["decay"]),
      "Constant": lambda: rates.ConstantLR(optimizer, 1, length),
    }[name]()

  def from_the_start():
    if name == "StepLR":
      return rates.StepLR(optimizer, given["step_size"], given["decay"])
    return rates.MultiStepLR(optimizer, given["milestones"], given["decay"])

  def warm_up():
    return rates.LinearLR(optimizer, first, 1, warmup)

  if name in ("StepLR", "MultiStepLR"):
    parts = [from_the_start()] + ([warm_up()] if warmup else [])
    scheduler = rates.ChainedScheduler(parts, optimizer)
  elif warmup:
    scheduler = rates.SequentialLR(optimizer, [warm_up(), after_warmup()], [warmup])
  else:
    scheduler = after_warmup()
  expected = []
  for _ in range(STEPS):
    expected.append(optimizer.param_groups[0]["lr"])
    optimizer.step()
    scheduler.step()
  schedule = pretrain_schedule(name, PEAK, STEPS, warmup, end, **given)
  ours = np.broadcast_to(schedule(jnp.arange(STEPS)), STEPS)
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_a_small_decay_is_exact_after_many_steps():
  schedule = pretrain_schedule("ExponentialLR", 0.1, 100_001, decay=0.9999)
  assert float(schedule(100_000)) == pytest.approx(0.1 * 0.9999**100_000, rel=1e-5)


def test_pretraining_of_rate_zero():
  assert float(pretrain_schedule("Cosine", 0.0, 5)(2)) == 0


def test_rejects(rejects):
  with rejects("unknown retraining schedule 'llr': did you mean LLR"):
    retrain_schedule("llr", LRS, 5)
  for lrs, shape in ((np.zeros(0), [0]), (np.zeros((2, 3)), [2, 3]), (0.1, [])):
    with rejects(f"pretrain_lrs has shape {shape}"):
      retrain_schedule("LLR", lrs, 5)
  for bad in (np.nan, np.inf):
    with rejects("pretrain_lrs has NaN or infinite values"):
      retrain_schedule("LLR", [0.1, bad], 5)
  for steps in (0, -3):
    with rejects(f"steps is {steps}: retraining needs at least 1 step"):
      retrain_schedule("LLR", LRS, steps)
  for fraction in (-0.1, 1.0):
    with rejects(f"warmup_fraction is {fraction}: it must be in [0, 1)"):
      retrain_schedule("LLR", LRS, 5, warmup_fraction=fraction)
  for skipped in (-1, len(LRS)):
    with rejects(f"pretrain_warmup_steps is {skipped} of {len(LRS)}"):
      retrain_schedule("LLR", LRS, 5, pretrain_warmup_steps=skipped)
  for part in ({}, {"relative_norm_drop": 0.1}, {"pruned_fraction": 0.1}):
    with rejects("ALLR needs relative_norm_drop and pruned_fraction"):
      retrain_schedule("ALLR", LRS, 5, **part)
  for name in ("FT", "CLR"):
    with rejects(f"initial_lr is the first value of LLR: {name} has its own"):
      retrain_schedule(name, LRS, 5, initial_lr=0.1)
  with rejects("unknown pretraining schedule 'cosine': did you mean Cosine?"):
    pretrain_schedule("cosine", 0.1, 5)
  for steps, warmup in ((0, 0), (5, 5), (5, -1)):
    with rejects(f"pretraining of {steps} steps with {warmup} of warmup"):
      pretrain_schedule("Linear", 0.1, steps, warmup)
  for name, part, words in (
    ("StepLR", {"decay": 0.1}, "StepLR needs step_size"),
    ("MultiStepLR", {"milestones": [2]}, "MultiStepLR needs decay"),
    ("ExponentialLR", {}, "ExponentialLR needs decay"),
    ("Linear", {"decay": 0.1}, "Linear takes no decay"),
    ("StepLR", {"decay": 0.1, "step_size": 0}, "step_size is 0"),
    ("ExponentialLR", {"decay": 1.1}, "decay is 1.1"),
    ("ExponentialLR", {"decay": 0.0}, "decay is 0.0"),
    ("MultiStepLR", {"decay": 0.1, "milestones": []}, "milestones are []"),
    ("MultiStepLR", {"decay": 0.1, "milestones": [3, 2]}, "milestones are [3, 2]"),
  ):
    with rejects(words):
      pretrain_schedule(name, 0.1, 5, **part)
