"""The main job inside the process of the tests."""

from experiments import hardware, keeping, method_flags, settings, sms

FLAGS = (
  *settings.Settings._fields,
  *method_flags.MethodFlags._fields,
  *hardware.Hardware._fields,
  *keeping.Retention._fields,
  "workdir",
)


def parse(*flags):
  """Parses flags anew: what earlier tests gave is forgotten."""
  for name in FLAGS:
    settings.FLAGS[name].unparse()
  return settings.FLAGS(["sms", *flags])


def run(*flags):
  """Runs it: exit status (0 if it returned)."""
  try:
    sms.main(parse(*flags))
  except SystemExit as stop:
    return stop.code
  return 0
