"""Running experiments.soup inside the process of a test."""

import main_job

from experiments import hardware, method_flags, settings, soup, soup_flags

FLAGS = settings.FLAGS


def run(*words):
  """Runs it; exit status."""
  own = [flag.name for flag in FLAGS.flags_by_module_dict()[soup_flags.__name__]]
  for fields in (settings.Settings, method_flags.MethodFlags, hardware.Hardware):
    own += fields._fields
  for name in [*own, "out", "dataset", "seed", "scope"]:
    FLAGS[name].unparse()
  return main_job.exit_status(soup.main, FLAGS(["soup", *map(str, words)]))
