"""Running experiments.soup inside the process of a test."""

import main_job
from absl import flags

from experiments import soup
from experiments.merging import choice as soup_flags


def run(*words):
  """Runs it; exit status."""
  own = flags.FLAGS.flags_by_module_dict()[soup_flags.__name__]
  main_job.unparse("out", *(flag.name for flag in own))
  return main_job.exit_status(soup.main, flags.FLAGS(["soup", *map(str, words)]))
