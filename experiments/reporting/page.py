"""A document as one page that needs nothing else, or as Markdown beside its figures."""

import itertools
import re
from collections.abc import Mapping
from html import escape

from .document import Code, Document, Folded, Picture, Table
from .drawing import file_of, inline_svg

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --middle: #666;
  --faint: #ddd; --warn: #fff4e5; --edge: #b85c00; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e8e8e6;
  --middle: #9a9a9a; --faint: #3a3d42; --warn: #33260f; --edge: #f0a94a; } }
@media print { :root { color-scheme: light; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--faint); }
p { max-width: 46rem; overflow-wrap: anywhere; }
.subtitle, figcaption, .caption { color: var(--middle); }
.subtitle { margin: .25rem 0 1.25rem; }
.summary { font-size: 1.1rem; }
.warnings { margin: 1.25rem 0; padding: .5rem 1rem; background: var(--warn);
  border-left: .25rem solid var(--edge); }
.warnings ul { margin: .25rem 0; padding-left: 1.2rem; }
nav { margin: 1.25rem 0 0; } nav a { margin-right: 1rem; white-space: nowrap; }
a { color: inherit; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .16rem .8rem .16rem 0; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid var(--middle); font-weight: 600; vertical-align: bottom; }
th.word, td.word { text-align: left; }
tbody + tbody td { } tbody + tbody tr:first-child td { border-top: 1px solid var(--faint); }
tr.strong td { font-weight: 600; }
.wrap td.word:last-child { white-space: normal; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .87rem; max-width: 32rem; overflow-wrap: anywhere; }
pre { padding: .75rem; border: 1px solid var(--faint); white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .87rem; }
summary { cursor: pointer; }
@media screen and (max-width: 40rem) { table { font-size: .8rem; }
  th, td { padding-right: .5rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  table { font-size: 8.5pt; } .figures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html(document: Document, drawn: Mapping[str, bytes]) -> str:
  """One page: no script, no request.

  Args:
    document: what it says.
    drawn: its figures as SVG, by name.
  """
  titles = [part.title for part in document.sections]
  anchors = {title: re.sub(r"\W+", "-", title.lower()).strip("-") for title in titles}
  links = "\n".join(f'<a href="#{a}">{escape(t)}</a>' for t, a in anchors.items())
  body = [
    f"<h1>{escape(document.title)}</h1>",
    f'<p class="subtitle">{escape(document.subtitle)}</p>',
    *(f'<p class="summary">{escape(text)}</p>' for text in document.summary),
  ]
  if document.warnings:
    items = "".join(f"<li>{escape(text)}</li>" for text in document.warnings)
    body.append(
      f'<div class="warnings" role="note"><strong>Take care</strong><ul>{items}</ul></div>'
    )
  body.append(f"<nav>{links}</nav>")
  for part in document.sections:
    body.append(f'<h2 id="{anchors[part.title]}">{escape(part.title)}</h2>')
    for are_pictures, blocks in itertools.groupby(part.blocks, _is_picture):
      if are_pictures:
        pictures = "\n".join(_figure_html(block, drawn) for block in blocks)
        body.append(f'<div class="figures">{pictures}</div>')
      else:
        body += map(_block_html, blocks)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<link rel="icon" href="data:,">\n'
    f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    + "\n".join(body)
    + "\n</body>\n</html>\n"
  )


def _is_picture(block):
  return isinstance(block, Picture)


def _figure_html(picture, drawn):
  svg = inline_svg(drawn[picture.name], picture.name, escape(picture.alt))
  return f"<figure>{svg}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def _block_html(block):
  match block:
    case Table():
      return _table_html(block)
    case Code():
      return f"<pre>{escape(block.text)}</pre>"
    case Folded():
      table = _table_html(block.table, "scroll wrap")
      return f"<details><summary>{escape(block.title)}</summary>{table}</details>"
  return f"<p>{escape(block)}</p>"


def _table_html(table, kind="scroll"):
  def cell(tag, number, text):
    word = ' class="word"' if number in table.left else ""
    scope = ' scope="col"' if tag == "th" else ""
    return f"<{tag}{word}{scope}>{escape(text)}</{tag}>"

  head = "".join(cell("th", i, text) for i, text in enumerate(table.header))
  bodies = []
  for group in table.rows:
    lines = []
    for row in group:
      strong = ' class="strong"' if _is_strong(table, row) else ""
      lines.append(
        f"<tr{strong}>" + "".join(cell("td", *pair) for pair in enumerate(row)) + "</tr>"
      )
    bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
  return (
    f'<div class="{kind}" tabindex="0" role="region" aria-label="Table"><table>'
    f"<thead><tr>{head}</tr></thead>" + "\n".join(bodies) + "</table></div>"
  )


def _is_strong(table, row):
  return table.strong is not None and any(
    text == table.strong or text.startswith(f"{table.strong} (") for text in row
  )


def markdown(document: Document) -> str:
  """The same, its figures as links into the folder figures/."""
  parts = [f"# {_plain(document.title)}", _plain(document.subtitle)]
  parts += [_plain(text) for text in document.summary]
  if document.warnings:
    parts.append("\n".join(f"- **{_plain(text)}**" for text in document.warnings))
  for section in document.sections:
    parts.append(f"## {_plain(section.title)}")
    for block in section.blocks:
      parts += _block_markdown(block)
  return "\n\n".join(parts) + "\n"


def _block_markdown(block):
  match block:
    case Table():
      return [_table_markdown(block)]
    case Picture():
      link = f"![{_plain(block.alt)}](figures/{block.name}.svg)"
      return [link, f"{_plain(block.caption)} ([PNG](figures/{block.name}.png))"]
    case Code():
      return [f"```bash\n{block.text}\n```"]
    case Folded():
      return [f"### {_plain(block.title)}", _table_markdown(block.table)]
  return [_plain(block)]


def _table_markdown(table):
  align = ["---" if i in table.left else "---:" for i in range(len(table.header))]
  lines = [[_plain(name) for name in table.header], align]
  for group in table.rows:
    for row in group:
      cells = [_plain(text) for text in row]
      if _is_strong(table, row):
        cells = [f"**{text}**" if text else "" for text in cells]
      lines.append(cells)
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text):
  """Text that Markdown takes as it is."""
  text = " ".join(str(text).split())
  text = re.sub(r"([\\`*<>|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
  return text.replace("](", "]\\(")


def files(document: Document) -> dict[str, bytes]:
  """Everything to write, by path: the page, the Markdown, and each figure twice.

  Args:
    document: as `document` gives it.

  Returns:
    The bytes of each file by its path in the folder of the report.
  """
  found, drawn = {}, {}
  for section in document.sections:
    for block in section.blocks:
      if _is_picture(block):
        drawn[block.name] = file_of(block.figure, "svg")
        found[f"figures/{block.name}.svg"] = drawn[block.name]
        found[f"figures/{block.name}.png"] = file_of(block.figure, "png")
  found["report.md"] = markdown(document).encode()
  found["report.html"] = html(document, drawn).encode()
  return found
