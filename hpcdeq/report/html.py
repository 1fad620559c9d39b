"""A report as one HTML file that needs nothing else: figures inside, no scripts, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

from hpcdeq.report.document import Block, Document, Figure, Folded, Heading, Paragraph, Table
from hpcdeq.report.tables import is_numeric, shown

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.3rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd } h3 { font-size: 1.05rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4 }
th { border-bottom: 2px solid #bbb; font-weight: 600; vertical-align: bottom }
.right { text-align: right; white-space: nowrap } th.right { white-space: normal }
tr:hover td { background: #f6f8fa }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto } figcaption { color: #555; font-size: .9rem }
code, pre { font: .85rem/1.4 ui-monospace, monospace; background: #f6f8fa } pre { padding: .7rem; overflow-x: auto }
.warning { border-left: 4px solid #d1702a; background: #fdf4ec; padding: .4rem .8rem }
details { margin: .3rem 0 } summary { cursor: pointer }
"""


def document_html(document: Document, folder: Path) -> str:
    """Return a report as HTML.

    Not collective.

    Parameters
    ----------
    folder
        Where its figures are.
    """
    body = "\n".join(_html(block, folder) for block in document.blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_inline(document.title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        kind = ' class="warning"' if block.warning else ""
        return f"<p{kind}>{_inline(block.text)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        picture = base64.b64encode((folder / block.path).read_bytes()).decode("ascii")
        caption = escape(block.caption)
        return f'<figure><img alt="{caption}" src="data:image/png;base64,{picture}"><figcaption>{caption}</figcaption></figure>'
    assert isinstance(block, Folded)
    return f"<details><summary>{_inline(block.title)}</summary><pre>{escape(block.text)}</pre></details>"


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    names = list(table.rows[0])
    kinds = [' class="right"' if is_numeric(table.rows, name) else "" for name in names]
    head = "".join(f"<th{kind}>{_inline(name)}</th>" for name, kind in zip(names, kinds, strict=True))
    lines = [
        "".join(f"<td{kind}>{_inline(shown(row[name]))}</td>" for name, kind in zip(names, kinds, strict=True))
        for row in table.rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _inline(text: str) -> str:
    """Return text as HTML, with ``**bold**`` and `` `code` `` in it."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)
