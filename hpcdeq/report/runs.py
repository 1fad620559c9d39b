"""Read a run directory."""

from __future__ import annotations

import csv
import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq.errors import DataError
from hpcdeq.record.evaluations import EVALUATION_COLUMNS
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
    evaluations
        Columns of evaluations.csv in the same way; empty where there is none.
    environment
        Content of environment.json; empty where there is none.
    """

    path: Path
    config: str
    summary: dict[str, Any]
    history: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration, names as in config.toml."""
        try:
            return tomllib.loads(self.config)
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{self.path / 'config.toml'} is damaged: {error}") from error


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
    evaluations, environment = path / "evaluations.csv", path / "environment.json"
    return Run(
        path,
        _text(path / "config.toml"),
        _object(path / "summary.json"),
        _columns(path / "history.csv", HISTORY_COLUMNS),
        _columns(evaluations, EVALUATION_COLUMNS) if evaluations.exists() else {},
        _object(environment) if environment.exists() else {},
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is damaged: not an object")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _columns(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    rows = list(csv.reader(_text(path).splitlines()))
    header = rows[0] if rows else []
    missing = [name for name in wanted if name not in header]
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
