"""Merges beside the mean: learned and Fisher weights, task vectors, spheres.

Each takes m models, leaves [m, ...], and gives one, so that it fits `merge=` of
`jaxsms.sparse_model_soup` once its other arguments are bound (`functools.partial`). An
entry that is 0 in all models is 0 in the result: a shared mask stays exactly as it is.
Models with values that are not finite are left out.

`MERGES`: every merge by its name, an `Entry` each.
"""

from jaxsms.merges.entries import MERGES, Entry, Means, bind
from jaxsms.merges.learned import average_by_leaf, learned_soup, learned_weights
from jaxsms.merges.precision import diagonal_fisher, fisher_soup
from jaxsms.merges.sphere import slerp
from jaxsms.merges.task_vectors import task_arithmetic, ties

__all__ = [
  "MERGES",
  "Entry",
  "Means",
  "average_by_leaf",
  "bind",
  "diagonal_fisher",
  "fisher_soup",
  "learned_soup",
  "learned_weights",
  "slerp",
  "task_arithmetic",
  "ties",
]
