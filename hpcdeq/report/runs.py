"""Read a run directory."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq.errors import DataError
from hpcdeq.record.monitor import HISTORY_COLUMNS


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Attributes
    ----------
    path
        Its folder.
    config
        Text of config.toml.
    summary
        Content of summary.json.
    history
        Columns of history.csv by name, ``(iterates,)`` float64 each; NaN where not measured.
    """

    path: Path
    config: str
    summary: dict[str, Any]
    history: dict[str, np.ndarray]


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run directory.

    Not collective.

    Raises
    ------
    DataError
        It is no run directory, the run has not ended, or a file in it is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory")
    if not (path / "summary.json").exists():
        begun = (path / "history.csv").exists()
        state = "the run has not finished, or was killed" if begun else "this is no run directory"
        raise DataError(f"{path} has no summary.json: {state}")
    try:
        summary = json.loads(_text(path / "summary.json"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path / 'summary.json'} is damaged: {error}") from error
    if not isinstance(summary, dict):
        raise DataError(f"{path / 'summary.json'} is damaged: not an object")
    return Run(path, _text(path / "config.toml"), summary, _history(path / "history.csv"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _history(path: Path) -> dict[str, np.ndarray]:
    rows = list(csv.reader(_text(path).splitlines()))
    header = rows[0] if rows else []
    missing = [name for name in HISTORY_COLUMNS if name not in header]
    if missing:
        raise DataError(f"{path} has no column {missing[0]}")
    values = np.empty((len(rows) - 1, len(header)))
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise DataError(f"{path} line {number + 2}: {len(row)} fields, and the header has {len(header)}")
        try:
            values[number] = [float(field) if field else np.nan for field in row]
        except ValueError as error:
            raise DataError(f"{path} line {number + 2}: {error}") from error
    return dict(zip(header, values.T, strict=True))
