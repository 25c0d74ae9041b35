"""The methods of a run: the soup, and what it is compared with."""

from .planning import (
  entry_of,
  model_steps,
  names_of,
  planned_steps,
  planned_work,
  seed_events,
)
from .registry import METHODS, Method, baselines, having
from .seeds import DENSE, SOUP, Run, Soup

__all__ = [
  "DENSE",
  "METHODS",
  "SOUP",
  "Method",
  "Run",
  "Soup",
  "baselines",
  "entry_of",
  "having",
  "model_steps",
  "names_of",
  "planned_steps",
  "planned_work",
  "seed_events",
]
