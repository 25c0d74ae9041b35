"""Labels of positions: which positions of which axes can only go together.

Every position of an axis carries labels, and goes as soon as one of them goes. Operations
tie labels together (union-find), freeze them, or find that a label stands for several:
where an axis of heads times columns is split, position (h, d) goes with head h or with
column d.
"""

from typing import Any, NamedTuple

import numpy as np

# What the masked network has at positions that go: exact zeros, some number, or NaN.
ZERO, FINITE, BROKEN = 0, 1, 2

LONGEST = 2**22  # positions of an axis that is followed


class Axis(NamedTuple):
  """An axis some of whose positions may go.

  Attributes:
    labels: int [k, n]; position p goes as soon as one of labels[:, p] does. 0 is none.
    values: uint8 [k, n]; what the masked network has there if that label goes.
  """

  labels: np.ndarray
  values: np.ndarray


class Fixed(NamedTuple):
  """An axis all of whose positions stay, and the index of the reason."""

  reason: int


class Labels:
  """Union-find over labels, with reasons why some must stay."""

  def __init__(self):
    self._parent = np.arange(1024)
    self._reason = np.zeros(1024, np.int32)  # 0: may go
    self._composite = np.zeros(1024, bool)
    self._members: dict[int, np.ndarray] = {}
    self._used = 1
    self.reasons = ["", "it meets positions that stay"]  # 0 is no reason to stay
    self._reason_ids = {self.reasons[1]: 1}
    self._reason[0] = 1  # label 0 is none

  def reason(self, text: str) -> int:
    """The index of a reason."""
    if text not in self._reason_ids:
      self._reason_ids[text] = len(self.reasons)
      self.reasons.append(text)
    return self._reason_ids[text]

  def fixed(self, text: str) -> Fixed:
    """An axis that stays for that reason."""
    return Fixed(self.reason(text))

  def fresh(self, n: Any, value: int) -> Axis | Fixed:
    """An axis of n new labels, all with one value where they go; n may be symbolic."""
    if not isinstance(n, int | np.integer):
      return self.fixed("an axis of any length is not cut")
    if n <= 1:
      return self.fixed("an axis of length 1 is not cut")
    if n > LONGEST:
      return self.fixed(f"an axis of more than {LONGEST:,} positions is not followed")
    first, self._used = self._used, self._used + n
    if self._used > len(self._parent):
      size, old = 2 * self._used, len(self._parent)
      self._parent = np.concatenate([self._parent, np.arange(old, size)])
      self._reason = np.concatenate([self._reason, np.zeros(size - old, np.int32)])
      self._composite = np.concatenate([self._composite, np.zeros(size - old, bool)])
    return Axis(np.arange(first, first + n)[None], np.full((1, n), value, np.uint8))

  @property
  def number(self) -> int:
    """How many labels there are; the last is one less."""
    return self._used

  def find(self, labels: np.ndarray) -> np.ndarray:
    """The representative of each label."""
    roots = self._parent[labels]
    while not np.array_equal(above := self._parent[roots], roots):
      roots = above
    self._parent[labels] = roots
    return roots

  def may_go(self, roots: np.ndarray) -> np.ndarray:
    """Whether each representative is free to go."""
    return self._reason[roots] == 0

  def why(self, axis: Axis | Fixed) -> str:
    """Why positions of a (normal) axis stay; one reason of perhaps several."""
    if isinstance(axis, Fixed):
      return self.reasons[axis.reason]
    return self.reasons[max(self._reason[axis.labels].max(), 1)]

  def normal(self, axis: Axis | Fixed) -> Axis | Fixed:
    """The axis in representatives, each of one label; Fixed if all stay."""
    if isinstance(axis, Fixed):
      return axis
    if not axis.labels.shape[-1]:
      return self.fixed("an axis of length 0 is not cut")
    labels, values = self.find(axis.labels), axis.values
    while self._composite[labels].any():
      labels, values = self._expanded(labels, values)
    if not self.may_go(labels).any():
      return Fixed(int(self._reason[labels].max()))
    return Axis(*_without_repeats(labels, values))

  def _expanded(self, labels, values):
    rows, row_values = [], []
    for row, value in zip(labels, values, strict=True):
      composite = self._composite[row]
      if not composite.any():
        rows.append(row)
        row_values.append(value)
        continue
      unique, inverse = np.unique(row[composite], return_inverse=True)
      members = [self._members[int(root)] for root in unique]
      for i in range(max(map(len, members))):
        column = np.array([m[i] if i < len(m) else 0 for m in members])
        new = row.copy() if i == 0 else np.zeros_like(row)
        new[composite] = column[inverse]
        rows.append(new)
        row_values.append(value)
    return self.find(np.stack(rows)), np.stack(row_values)

  def freeze(self, axis: Axis | Fixed, text: str, where: np.ndarray | None = None) -> None:
    """Positions of an axis, or those labels of it where `where` [k, n] says so, stay."""
    axis = self.normal(axis)
    if isinstance(axis, Axis):
      roots = axis.labels if where is None else axis.labels[where]
      self._freeze(roots.ravel(), self.reason(text))

  def _freeze(self, roots, reasons):
    free = self.may_go(roots)
    self._reason[roots[free]] = reasons if np.isscalar(reasons) else reasons[free]

  def _union(self, a, b):
    while True:
      a, b = self.find(a), self.find(b)
      differ = a != b
      if not differ.any():
        return
      a, b = a[differ], b[differ]
      np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
      both = np.concatenate([a, b])
      np.maximum.at(self._reason, self.find(both), self._reason[both])

  def tie(self, a: Axis | Fixed, b: Axis | Fixed) -> None:
    """Makes two axes of one length go together, position by position."""
    while True:
      a, b = self.normal(a), self.normal(b)
      for one, other in ((a, b), (b, a)):
        if isinstance(one, Fixed):
          if isinstance(other, Axis):
            self._freeze(other.labels.ravel(), one.reason)
          return
      assert isinstance(a, Axis) and isinstance(b, Axis)
      if len(a.labels) == len(b.labels) == 1 and a.labels.all() and b.labels.all():
        self._union(a.labels[0], b.labels[0])
        return
      if not self._tie_sets(a.labels, b.labels):
        return

  def _tie_sets(self, a, b):
    """One step towards equal sets of labels at each position; whether there was one."""
    p, q = self._rest(a, b), self._rest(b, a)
    np_, nq = (p > 0).sum(0), (q > 0).sum(0)
    alone = (np_ == 0) != (nq == 0)
    if alone.any():
      for rest, other in ((p, b), (q, a)):
        reasons = np.broadcast_to(self._reason[other].max(0), rest.shape)
        chosen = alone & (rest > 0)
        self._freeze(rest[chosen], np.maximum(reasons[chosen], 1))
      return True
    if (same := (np_ == nq) & (np_ > 0)).any():
      for i in range(np_[same].max()):
        pairs = same & (np_ > i)
        self._union(p[i, pairs], q[i, pairs])
      return True
    if (ragged := (np_ > 1) & (nq > 1)).any():
      self._union_all(np.concatenate([p, q])[:, ragged])
      return True
    for one, several, number in ((p, q, np_), (q, p, nq)):
      if (single := (number == 1)).any():
        self._define(one[0, single], several[:, single])
        return True
    return False

  def _rest(self, labels, others):
    """The labels that may go and are not among the others, compressed to the front."""
    kept = self.may_go(labels)
    for row in others:
      kept &= labels != row
    labels = np.where(kept, labels, 0)
    return np.take_along_axis(labels, np.argsort(~kept, 0, kind="stable"), 0)

  def _union_all(self, sets):
    for row in sets[1:]:
      some = (row > 0) & (sets[0] > 0)
      self._union(sets[0, some], row[some])

  def _define(self, labels, sets):
    """Label i stands for the labels sets[:, i], where nothing stands for itself."""
    labels, first = np.unique(labels, return_index=True)
    sets = sets[:, first]
    clean = ~np.isin(labels, sets)
    if not clean.any():
      self._union_all(np.concatenate([labels[None], sets]))
      return
    for label, column in zip(labels[clean], sets.T[clean], strict=True):
      self._members[int(label)] = column[column > 0]
    self._composite[labels[clean]] = True

  def values(self, axis: Axis | Fixed, labels: np.ndarray) -> np.ndarray:
    """What the masked network has along `axis` if `labels` [k, n] go: uint8 [k, n]."""
    axis = self.normal(axis)
    found = np.full(labels.shape, FINITE, np.uint8)
    if isinstance(axis, Fixed):
      return found
    if axis.labels.shape == labels.shape and np.array_equal(axis.labels, labels):
      return axis.values
    for i, row in enumerate(labels):
      for other, value in zip(axis.labels, axis.values, strict=True):
        same = row == other
        found[i, same] = value[same]
    return found


def _without_repeats(labels, values):
  """Each label at most once at each position, and no layer without labels."""
  if len(labels) == 1:
    return labels, values
  labels, values = labels.copy(), values.copy()
  for i in range(len(labels)):
    for j in range(i + 1, len(labels)):
      same = labels[i] == labels[j]
      values[i, same] = np.minimum(values[i, same], values[j, same])
      labels[j, same] = 0
  some = (labels > 0).any(1)
  return labels[some], values[some]
