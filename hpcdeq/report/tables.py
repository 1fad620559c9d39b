"""Runs side by side, a row each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpcdeq.report.runs import Run

# Column of the table, and where the summary has it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "optimizer": ("optimizer",),
    "seed": ("seed",),
    "status": ("status",),
    "reason": ("reason",),
    "iterations": ("iterations",),
    "seconds": ("wall_seconds",),
    "train loss": ("loss", "train"),
    "metric": ("metric", "name"),
    "validation metric": ("metric", "validation"),
    "test metric": ("metric", "test"),
    "gradient samples": ("counts", "gradients"),
    "GN products": ("counts", "gauss_newton_products"),
    "Hessian products": ("counts", "hessian_products"),
    "cell evaluations": ("counts", "cell_evaluations"),
}

Row = dict[str, str | int | float | None]


def comparison_table(runs: Iterable[Run]) -> list[Row]:
    """Return a row for each run, columns as in `COLUMNS`; None for what was not measured.

    Not collective. Work is in samples, seconds are wall time.
    """
    return [{"run": run.path.name, **{name: _at(run.summary, keys) for name, keys in COLUMNS.items()}} for run in runs]


def _at(summary: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = summary
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table of Markdown, numbers to the right and to five digits. Not collective."""
    if not rows:
        return ""
    names = list(rows[0])
    numeric = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in names]
    lines = [names, ["---:" if right else "---" for right in numeric]]
    lines += [[_shown(row[name]) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(value: str | int | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return value.replace("|", "\\|")


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV with a header, numbers in full; an empty field where not measured. Not collective."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
