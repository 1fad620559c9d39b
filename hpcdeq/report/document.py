"""A report as a sequence of blocks, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcdeq.report.tables import Row, to_markdown


@dataclass(frozen=True)
class Heading:
    """A heading below the title; level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text; ``**bold**`` and `` `code` `` are marked as in Markdown. A warning stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Rows with the same columns."""

    rows: Sequence[Row]


@dataclass(frozen=True)
class Figure:
    """A PNG, its path relative to the report's folder."""

    path: str
    caption: str


@dataclass(frozen=True)
class Folded:
    """Text as it is, shown on demand."""

    title: str
    text: str


Block = Heading | Paragraph | Table | Figure | Folded


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    blocks: Sequence[Block]


def document_markdown(document: Document) -> str:
    """Return a report as Markdown. Not collective."""
    return "\n".join([f"# {document.title}\n", *(_markdown(block) for block in document.blocks)])


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}\n"
    if isinstance(block, Paragraph):
        return f"> **Note:** {block.text}\n" if block.warning else f"{block.text}\n"
    if isinstance(block, Table):
        return to_markdown(block.rows)
    if isinstance(block, Figure):
        return f"![{block.caption}]({block.path})\n\n*{block.caption}*\n"
    # A fence longer than any in the text.
    return f"<details><summary>{block.title}</summary>\n\n````text\n{block.text.rstrip()}\n````\n\n</details>\n"
