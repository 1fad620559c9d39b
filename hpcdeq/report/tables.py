"""Runs side by side, a row each."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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

# What stands for a median that is infinite: a time at which something never happened.
NEVER = "not reached"


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes
    ----------
    median, low, high
        Of the seeds that have it; infinite where it did not happen.
    count, total
        For how many seeds it is finite, and how many there are.
    best
        Whether it is the best of its column.
    """

    median: float
    low: float
    high: float
    count: int
    total: int
    best: bool = False

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return median and range of the values that are not NaN; None without any. Not collective."""
        given = list(values)
        known = sorted(value for value in given if not math.isnan(value))
        if not known:
            return None
        finite = sum(math.isfinite(value) for value in known)
        return cls(float(np.median(known)), known[0], known[-1], finite, len(given))

    def marked(self) -> Spread:
        """Return it as the best of its column. Not collective."""
        return replace(self, best=True)

    def __str__(self) -> str:
        """Return median and range, and how many seeds reached it where not all did."""
        text = _digits(self.median)
        if self.low != self.high:
            text += f" ({_digits(self.low)} – {_digits(self.high)})"
        if 0 < self.count < self.total:
            text += f", {self.count} of {self.total} seeds"
        return f"**{text}**" if self.best else text


def _digits(value: float) -> str:
    return digits(value, 4) if math.isfinite(value) else NEVER


def digits(value: float, count: int) -> str:
    """Return a number with so many significant digits, large ones in full with commas. Not collective."""
    text = f"{value:.{count}g}"
    return f"{float(text):,.0f}" if 1000 <= abs(value) < 1e8 else text


Row = dict[str, str | int | float | Spread | None]


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
    lines = [names, ["---:" if is_numeric(rows, name) else "---" for name in names]]
    lines += [[shown(row[name]).replace("|", "\\|") for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def is_numeric(rows: Sequence[Row], name: str) -> bool:
    """Say whether a column holds numbers only. Not collective."""
    return all(isinstance(row[name], (int, float, Spread, type(None))) for row in rows)


def shown(value: str | int | float | Spread | None) -> str:
    """Return a value of a table as text: numbers to five digits, a dash for None. Not collective."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value)


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV with a header, numbers in full; an empty field where not measured. Not collective."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
