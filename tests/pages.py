"""README and the chapters of the guide, as texts and as what can be run of them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHAPTERS = {
  path.stem: path.read_text() for path in sorted((ROOT / "jaxsms/guide").glob("*.md"))
}
PAGES = {"README": README, **CHAPTERS}
ALL = "\n".join(PAGES.values())


def blocks(text, language):
  return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def snippets(text):
  """What is run of each Python block, and of both sides of a diff, in order."""
  found = []
  for kind, block in re.findall(
    r"^```(python|diff)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
  ):
    if kind == "python":
      found.append(block)
    else:
      for added in ("+", "-"):  # before, then after
        lines = [line[1:] for line in block.splitlines() if line[:1] != added]
        found.append("\n".join(lines))
  return found


def run(text, names, only=slice(None)):
  """Runs a page's snippets, one after another; `names` has what they define."""
  for block in snippets(text)[only]:
    exec(compile(block, "guide", "exec"), names)
  return names
