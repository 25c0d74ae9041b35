"""Shares of the training data and long tails, against counts worked out another way."""

import jax
import numpy as np
import pytest

from jaxsms import metrics
from jaxsms.data import (
  balanced_shares,
  class_counts,
  dirichlet_shares,
  group_shares,
  head_middle_tail,
  imbalanced_shares,
  long_tail,
  oversampled_shares,
  profile_counts,
  random_shares,
)
from jaxsms.data.subsets import Shares, check_sizes

KEY = jax.random.key(3)
UNEVEN = np.random.default_rng(0).permutation(np.repeat([2, 0, 3, 1], [100, 50, 20, 5]))


def sets(shares):
  found = [shares.of(i).tolist() for i in range(len(shares.sizes))]
  assert all(len(set(one)) == len(one) for one in found), "an example comes once in a share"
  return [set(one) for one in found]


def counts_of(shares, labels):
  return [
    np.bincount(labels[shares.of(i)], minlength=4).tolist()
    for i in range(len(shares.sizes))
  ]


def test_random_shares_are_disjoint_where_they_can_be():
  labels = np.arange(40) % 2
  shares = sets(random_shares(KEY, labels, 4, 0.25))
  assert [len(one) for one in shares] == [10] * 4
  assert set().union(*shares) == set(range(40))  # so no two share an example


def test_random_halves_use_every_example_equally_often():
  shares = random_shares(KEY, np.arange(43) % 2, 5, 0.5)
  assert shares.sizes.tolist() == [round(21.5)] * 5
  sets(shares)
  times = np.bincount(np.concatenate([shares.of(i) for i in range(5)]), minlength=43)
  assert set(times) == {2, 3}
  again = random_shares(KEY, np.arange(43) % 2, 5, 0.5)
  np.testing.assert_array_equal(again.indices, shares.indices)
  other = random_shares(jax.random.key(4), np.arange(43) % 2, 5, 0.5)
  assert (other.indices != shares.indices).any()


def test_balanced_shares_have_as_many_of_each_class_as_the_smallest_has():
  shares = balanced_shares(KEY, UNEVEN, 3)
  assert counts_of(shares, UNEVEN) == [[5, 5, 5, 5]] * 3
  members = sets(shares)
  rare = set(np.flatnonzero(UNEVEN == 1).tolist())
  assert all(rare < one for one in members)
  # The other classes have enough for three shares of five.
  assert set.intersection(*members) == rare
  assert counts_of(balanced_shares(KEY, UNEVEN, 2, 0.4), UNEVEN) == [[2, 2, 2, 2]] * 2


def test_oversampled_shares_repeat_examples_up_to_the_largest_class():
  shares = oversampled_shares(KEY, UNEVEN, 3)
  assert counts_of(shares, UNEVEN) == [[100, 100, 100, 100]] * 3
  by_hand = {2: {1}, 0: {2}, 3: {5}, 1: {20}}  # 100 of 100, 50, 20 and 5 examples
  odd = np.repeat([0, 1], [7, 3])  # three examples come twice or thrice
  for i in range(3):
    times = np.bincount(shares.of(i), minlength=len(UNEVEN))
    assert {c: set(times[c == UNEVEN].tolist()) for c in by_hand} == by_hand
  thrice = set()
  for i in range(3):
    times = np.bincount(oversampled_shares(KEY, odd, 3).of(i), minlength=10)
    assert sorted(times[7:].tolist()) == [2, 2, 3]
    thrice.add(int(np.argmax(times)))
  assert len(thrice) > 1, "copies repeat others"
  equal = oversampled_shares(KEY, np.arange(12) % 3, 2)
  assert [sorted(equal.of(i).tolist()) for i in range(2)] == [list(range(12))] * 2


def test_imbalanced_shares_follow_their_ratio():
  shares = imbalanced_shares(KEY, UNEVEN, [1, 8, 20])
  # Largest first: classes 2, 0, 3, 1 with 100, 50, 20 and 5. At ratio 8 the profile is
  # n, n/2, n/4, n/8, and the 5 of class 1 allow n = 40; at 20 it is n * 20^(-c/3).
  by_hand = [[5, 5, 5, 5], [20, 5, 40, 10], [36, 5, 100, 13]]
  assert counts_of(shares, UNEVEN) == by_hand
  assert shares.sizes.tolist() == [20, 75, 154]
  halved = imbalanced_shares(KEY, UNEVEN, [8], 0.5)
  assert counts_of(halved, UNEVEN) == [[10, 2, 20, 5]]
  sets(shares)
  assert shares.indices.shape == (3, 154) and shares.indices.max() < len(UNEVEN)


def test_dirichlet_shares_divide_all_examples_by_class():
  shares = dirichlet_shares(KEY, UNEVEN, 4, 0.3, least=10)
  together = np.concatenate([shares.of(i) for i in range(4)])
  np.testing.assert_array_equal(np.sort(together), np.arange(len(UNEVEN)))
  np.testing.assert_array_equal(
    np.sum(counts_of(shares, UNEVEN), axis=0), np.bincount(UNEVEN)
  )
  assert shares.sizes.min() >= 10


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_label_skew_is_that_of_the_distribution(alpha):
  classes, each, m = 400, 50, 5
  labels = np.repeat(np.arange(classes), each)
  shares = dirichlet_shares(KEY, labels, m, alpha)
  parts = np.stack([np.bincount(labels[shares.of(i)], minlength=classes) for i in range(m)])
  # The second moment of a symmetric Dirichlet distribution in closed form.
  expected = (alpha + 1) / (m * alpha + 1)
  assert abs(np.mean(np.sum((parts / each) ** 2, axis=0)) - expected) < 0.03


def test_groups_are_shares_in_the_order_of_their_numbers():
  groups = np.array([9, -1, 9, 4, -1, 9])
  shares = group_shares(groups, 3)
  assert [shares.of(i).tolist() for i in range(3)] == [[1, 4], [3], [0, 2, 5]]
  assert shares.sizes.tolist() == [2, 1, 3]


def test_long_tail_is_that_of_the_literature():
  # Long-tailed CIFAR-10 at ratio 100, and CIFAR-100 at 50 by the formula, digit by digit.
  cifar10 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  assert profile_counts([5000] * 10, 100).tolist() == cifar10
  cifar100 = profile_counts([500] * 100, 50)
  assert (cifar100[0], cifar100[99], cifar100[33]) == (500, 10, int(500 * 50 ** (-1 / 3)))
  labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10), 60))
  kept = long_tail(labels, 20)
  assert len(set(kept.tolist())) == len(kept) and (np.diff(kept) > 0).all()
  expected = [int(60 * 20 ** (-c / 9) + 1e-9) for c in range(10)]
  assert np.bincount(labels[kept]).tolist() == expected
  assert expected[0] == 60 and expected[9] == 3
  np.testing.assert_array_equal(kept, long_tail(labels, 20))


def test_a_profile_asks_no_class_for_more_than_it_has():
  assert profile_counts([90, 30, 20], 9).tolist() == [90, 30, 10]
  assert profile_counts([90, 15, 20], 9).tolist() == [45, 15, 5]
  assert profile_counts([7, 6, 8], 1).tolist() == [6, 6, 6]


def test_head_middle_and_tail_are_thirds_of_the_classes():
  assert head_middle_tail([1, 9, 3, 9, 5, 2, 8, 7, 6, 4]) == {
    "head": (1, 3, 6), "middle": (4, 7, 8, 9), "tail": (0, 2, 5)
  }  # fmt: skip
  assert head_middle_tail([4, 6]) == {"head": (1,), "tail": (0,)}
  sizes = {k: len(v) for k, v in head_middle_tail(np.arange(100)).items()}
  assert sizes == {"head": 33, "middle": 34, "tail": 33}


def test_accuracy_among_some_classes():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
  right = logits.argmax(1) == labels
  for classes in [(0,), (1, 3), (0, 1, 2, 3)]:
    expected = right[np.isin(labels, classes)].mean()
    found = metrics.accuracy_among(logits, labels, classes)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert np.isnan(metrics.accuracy_among(logits, labels, (4,)))


def test_what_cannot_be_divided_is_refused(rejects):
  for fraction in (0, -0.1, 1.5, float("nan")):
    with rejects("it is a share of the data, in (0, 1]"):
      random_shares(KEY, UNEVEN, 2, fraction)
    with rejects("it is a share of the data, in (0, 1]"):
      balanced_shares(KEY, UNEVEN, 2, fraction)
  for alpha in (0, -1.0, float("nan"), float("inf")):
    with rejects("the concentration is a number above 0"):
      dirichlet_shares(KEY, UNEVEN, 2, alpha)
  for ratio in (0.5, 0, -3, float("nan"), float("inf")):
    with rejects("give a number of at least 1"):
      imbalanced_shares(KEY, UNEVEN, [2, ratio])
    with rejects("give a number of at least 1"):
      long_tail(UNEVEN, ratio)
  with rejects("leaves no example of class 2 in the order of the profile"):
    long_tail(UNEVEN, 1000)
  with rejects("the share of copy 0, 4 examples, has none of class"):
    random_shares(KEY, UNEVEN, 2, 0.02)
  with rejects("the share of copy 0, 1 example, has none of class"):
    random_shares(KEY, UNEVEN, 2, 0.001)
  with rejects("has none of class 0"):
    balanced_shares(KEY, UNEVEN, 2, 0.1)
  with rejects("gave each of 5 clients 40 of the 175 examples"):
    dirichlet_shares(KEY, UNEVEN, 5, 0.5, least=40)
  with rejects("the training data have 3 groups for 4 copies"):
    group_shares(np.array([0, 1, 2]), 4)
  with rejects("the share of copy 1 has 3 examples for batches of 4"):
    check_sizes(Shares(np.zeros([2, 5], int), np.array([5, 3])), 4)
  with rejects("the share of copy 1 has 1 example for batches of 4"):
    check_sizes(Shares(np.zeros([2, 5], int), np.array([5, 1])), 4)
  with rejects("the training data have 1 group for 4 copies: give a copy for each group"):
    group_shares(np.zeros(3, int), 4)
  assert class_counts(UNEVEN, 6).tolist() == [50, 5, 100, 20, 0, 0]


def test_rare_classes_of_one_size_give_shares_of_any_ratio():
  """The exact profile would ask the last class for less than one example."""
  labels = np.repeat([0, 1, 2, 3], [40, 10, 1, 1])
  shares = imbalanced_shares(jax.random.key(0), labels, [1, 3, 27, 40])
  found = [np.bincount(labels[shares.of(i)]).tolist() for i in range(4)]
  # floor(n * n^(-c / 3)) for n = 3, 27 and 40, and no more than there are.
  assert found == [[1, 1, 1, 1], [3, 2, 1, 1], [27, 9, 1, 1], [40, 10, 1, 1]]
  with pytest.raises(ValueError, match="leaves no example of class 3"):
    imbalanced_shares(jax.random.key(0), labels, [41])
