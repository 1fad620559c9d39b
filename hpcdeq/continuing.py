"""What `--resume` goes on with: what a run's folder holds, and which options of a command line may still change."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdeq.config import read_config
from hpcdeq.errors import DataError, OptionError, UsageError

BUDGETS = ("max_iterations", "max_seconds")
# Options of PETSc's that look on, and change nothing.
_LOOKS = ("monitor", "view", "converged_reason")
CONFIG, SUMMARY, HISTORY, ENVIRONMENT = "config.toml", "summary.json", "history.csv", "environment.json"
CHECKPOINTS = ("checkpoint.h5", "checkpoint-previous.h5")


@dataclass(frozen=True)
class Held:
    """What a run's folder holds.

    Attributes
    ----------
    settings
        Of the run that it holds; None: nothing that could go on, a run begins in it.
    ended
        In words, how the run ended; empty: it can go on.
    status
        Of its summary; empty where there is none.
    """

    settings: dict[str, Any] | None = None
    ended: str = ""
    status: str = ""


def held_in(folder: Path, given: Mapping[str, Any]) -> Held:
    """Return what a run's folder holds.

    Not collective: rank 0 looks.

    Parameters
    ----------
    given
        Settings of the command line, whose budgets may be larger than the former ones.

    Raises
    ------
    UsageError
        A run has come further there, and left no checkpoint.
    """
    summary = _summary(folder / SUMMARY)
    there = any((folder / name).exists() for name in CHECKPOINTS)
    if summary is None and not there and _rows(folder / HISTORY) < 2:
        return Held()  # killed between its beginning and the first checkpoint, that of iteration 0
    settings = read_config(folder / CONFIG)
    status = "" if summary is None else str(summary.get("status"))
    ended = "" if summary is None else _ended(folder, summary, {**settings, **given})
    if not ended and not there:
        raise UsageError(
            f"--resume: {folder} holds a run without a checkpoint to go on from: remove {folder} to begin again with the same"
            " command, or choose another --out"
        )
    return Held(settings, ended, status)


def is_unfinished(folder: Path) -> bool:
    """Say whether a folder holds no run that has ended. Not collective: rank 0 looks."""
    summary = _summary(folder / SUMMARY)
    return summary is None or summary.get("status") == "interrupted"


def can_go_on(folder: Path, ranks: int) -> bool:
    """Say whether a folder holds a run with a checkpoint, of as many ranks. Not collective: rank 0 looks."""
    environment = _summary(folder / ENVIRONMENT) or {}
    return environment.get("ranks") == ranks and any((folder / name).exists() for name in CHECKPOINTS)


def _summary(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove it to go on from the checkpoint") from error


def _rows(path: Path) -> int:
    """Return the rows of a history; a run that was stopped before its first left nothing."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return max(sum(1 for _ in csv.reader(file)) - 1, 0)
    except FileNotFoundError:
        return 0


def _ended(folder: Path, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Say how a run ended, or nothing where it can go on: interrupted, or with larger budgets than it had."""
    status, iterations, seconds = (
        summary.get("status"),
        summary.get("iterations", 0),
        summary.get("wall_seconds") or 0.0,
    )
    if status == "interrupted":
        return ""
    allowed = settings.get("max_seconds")
    if status == "budget":
        if settings.get("max_iterations", 100) > iterations and (allowed is None or allowed > seconds):
            return ""
    return (
        f"{folder} has ended already: {status} after {iterations} iterations and {seconds:.1f} s"
        f" ({summary.get('reason')}, {summary.get('message')})"
    )


def refuse_changes(folder: Path, former: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse options that would make another run of the one that goes on.

    Not collective.

    Parameters
    ----------
    former
        The run's settings.
    given
        Those of the command line and of a configuration file, without defaults.

    Raises
    ------
    OptionError
        Names them.
    """
    differing = []
    for name, value in given.items():
        there = former.get(name)
        if name in BUDGETS:
            continue
        if name in ("model_settings", "petsc"):
            told = {key: (there or {}).get(key) for key in value}
            differing += [
                f"{key} {_told(told[key])} there and {_told(new)} here"
                for key, new in value.items()
                if told[key] != new and not (name == "petsc" and any(word in key for word in _LOOKS))
            ]
        elif name == "data" and there is not None:
            if Path(str(there)).resolve() != Path(str(value)).resolve():
                differing.append(f"--data {there} there and {value} here")
        elif there != value:
            differing.append(f"--{name.replace('_', '-')} {_told(there)} there and {_told(value)} here")
    if differing:
        raise OptionError(
            f"--resume goes on with the run in {folder}, which has other settings: {'; '.join(differing)}. Leave them out"
            f" (only budgets may change: --max-iterations, --max-seconds), or begin another run with another --out"
        )


def _told(value: object) -> str:
    return "not set" if value is None else str(value)
