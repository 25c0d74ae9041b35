"""The binaries by name: `jaxsms soup A B --out=C`, or `python -m jaxsms soup A B --out=C`.

A wheel holds them as the package `jaxsms.experiments`; beside a clone's package lies the
folder experiments, whose binaries also run as `python -m experiments.soup`.
"""

import difflib
import importlib.util
import pathlib
import runpy
import sys

BINARIES = {
  "sms": "trains a dense model, makes a sparse soup of it, and compares that with IMP",
  "compare": "runs methods x sparsities x numbers of copies x seeds",
  "soup": "averages checkpoints that lie on disk into one model",
  "export": "takes the soup of a run away as one file",
  "report": "writes the report of runs or comparisons",
  "bench": "times training steps of m copies at once",
}


def main() -> None:
  """Runs the binary that the first argument names; its flags follow.

  Bad input ends it with one sentence and exit status 2.
  """
  name = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if name in ("-h", "--help"):
    print("jaxsms NAME FLAGS; jaxsms NAME --help explains the flags\n")
    print("\n".join(f"  {key:<9}{what}" for key, what in BINARIES.items()))
    return
  if name not in BINARIES:
    close = difflib.get_close_matches(name, BINARIES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    _stop(f"there is no binary {name!r}: {hint}known are {', '.join(BINARIES)}")
  module = f"{_package()}.{name}"
  del sys.argv[1]
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("jaxsms", "experiments"):
      raise
    _stop(
      f"jaxsms {name} needs {error.name}, which is not installed: run "
      "`pip install 'jaxsms[experiments]'`"
    )


def _package() -> str:
  """The name under which the binaries can be imported."""
  if importlib.util.find_spec("jaxsms.experiments"):
    return "jaxsms.experiments"
  clone = pathlib.Path(__file__).resolve().parent.parent
  if not (clone / "experiments" / "__init__.py").is_file():
    _stop(f"{clone} holds no binaries: install jaxsms anew, or run them in a clone")
  sys.path.insert(0, str(clone))  # before any other package of that name
  return "experiments"


def _stop(sentence: str) -> None:
  print(f"error: {sentence}", file=sys.stderr)
  sys.exit(2)


if __name__ == "__main__":
  main()
