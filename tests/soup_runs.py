"""Running experiments.soup inside the process of a test."""

import main_job
from absl import flags

from experiments import soup
from experiments.config.fields import names
from experiments.merging.merge_flags import MergeFlags


def run(*words):
  """Runs it; exit status."""
  main_job.unparse(*names(MergeFlags))
  return main_job.exit_status(soup.main, flags.FLAGS(["soup", *map(str, words)]))
