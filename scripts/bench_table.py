"""What the benchmarks write: tables of rows as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_table(path: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows under the names of all their columns, in the order in which they first come; without a path do nothing."""
    if path is None:
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
