"""The run directory: its files, its history (one row an iterate, as it happens) and its summary."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hpcdeq import parallel
from hpcdeq.errors import UsageError
from hpcdeq.optim.base import Iterate, Result
from hpcdeq.problem.counts import Counts, FixedPointStatistics
from hpcdeq.problem.training import Evaluation
from hpcdeq.record.atomic import cannot_write, cut_table, replaced
from hpcdeq.record.lock import FolderLock

HISTORY_COLUMNS = (
    "iteration",
    "wall_seconds",
    "train_loss",
    "gradient_norm",
    "step_norm",
    "trust_radius",
    "validation_loss",
    "validation_metric",
    *(field.name for field in dataclasses.fields(Counts)),
    "fixed_point_iterations_mean",
    "fixed_point_iterations_max",
    "unconverged_samples",
    "memory_bytes",
    "energy_joules",
)


class RunDirectory:
    """The folder of one run; at the end of a ``with`` block other jobs may have it again.

    Parameters
    ----------
    path
        The folder; `create` makes it.

    Attributes
    ----------
    writes
        Whether this rank writes its files: rank 0 after `create`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.writes = False
        self._lock: FolderLock | None = None

    def create(self, comm: parallel.Comm, *, resume: bool = False) -> None:
        """Make the folder, and keep other jobs out of it until the ``with`` block of this object ends.

        Collective on comm.

        Parameters
        ----------
        resume
            Whether it may hold a run, which goes on.

        Raises
        ------
        UsageError
            It holds a run already, another job works in it, or it cannot be made or written.
        """
        with parallel.agreement(comm):
            if comm.rank == 0:
                self._make(resume)
        self.writes = comm.rank == 0

    def _make(self, resume: bool) -> None:
        held = next((name for name in ("summary.json", "history.csv") if (self.path / name).exists()), None)
        if held and not resume:
            raise UsageError(
                f"{self.path} holds a run already ({held}): choose another --out or remove it, or go on with --resume"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            for left in self.path.glob(".*.partial") if resume else ():  # by a process that was killed
                left.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"the run directory {self.path} cannot be written ({error.strerror}): choose another --out"
            ) from error

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Write a text file by an atomic replacement, on rank 0; do nothing on the others. Not collective.

        Raises
        ------
        HpcdeqError
            The file cannot be written; a former one is still there.
        """
        if not self.writes:
            return
        try:
            with replaced(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path / name, error) from error

    def earlier(self, name: str, known: Any) -> dict[str, Any]:
        """Return what a JSON file of a run that goes on has told so far, as ``earlier``, the latest last. Not collective."""
        path = self.path / name
        if known is None or not path.exists():
            return {}
        told = json.loads(path.read_text(encoding="utf-8"))
        return {"earlier": [*told.pop("earlier", []), told]}

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file like `write_text`; NaN and infinity become null. Not collective."""
        self.write_text(name, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Return nested mappings, sequences and numbers with None for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


class HistoryWriter:
    """Writes history.csv, a row at a time; a context manager.

    Not collective: rank 0 makes one. A value that was not measured (None or NaN) is an empty field, never zero.

    Parameters
    ----------
    path
        The file to make, with its header.
    rows
        None; or the rows of an existing file that stay, and are gone on from.

    Raises
    ------
    HpcdeqError
        The file cannot be written; also raised by `write`.
    """

    def __init__(self, path: str | os.PathLike[str], rows: int | None = None) -> None:
        self.path = Path(path)
        if rows is not None:
            cut_table(self.path, rows)
        try:
            self._file = self.path.open("w" if rows is None else "a", newline="", encoding="utf-8")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._rows = csv.writer(self._file, lineterminator="\n")
        if rows is None:
            self._append(HISTORY_COLUMNS)

    def __enter__(self) -> HistoryWriter:
        """Return the writer itself. Not collective."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file. Not collective."""
        self.close()

    def write(
        self,
        iterate: Iterate,
        validation: Evaluation | None,
        memory_bytes: int | None = None,
        energy_joules: float | None = None,
    ) -> None:
        """Append an iterate and flush it to the system.

        Not collective.

        Parameters
        ----------
        validation
            Loss and metric on the validation set; None where it was not evaluated.
        memory_bytes
            Memory held now.
        energy_joules
            Energy since the start.
        """
        found = iterate.fixed_point
        values = (
            iterate.iteration,
            iterate.seconds,
            iterate.loss,
            iterate.gradient_norm,
            iterate.step_norm,
            iterate.trust_radius,
            validation and validation.loss,
            validation and validation.metric,
            *dataclasses.astuple(iterate.counts),
            found and found.mean_iterations,
            found and found.max_iterations,
            found and found.unconverged,
            memory_bytes,
            energy_joules,
        )
        self._append([_field(value) for value in values])

    def synchronise(self) -> None:
        """Wait until all rows are on the disk: a checkpoint that counts them is never ahead of them. Not collective."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file. Not collective."""
        self._file.close()

    def _append(self, fields: Sequence[str]) -> None:
        try:
            self._rows.writerow(fields)
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _field(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else repr(float(value))


def over_run(statistics: Sequence[FixedPointStatistics]) -> FixedPointStatistics | None:
    """Return the fixed-point statistics of a run from those of its iterates; None without any.

    Not collective.
    """
    if not statistics:
        return None
    solves = sum(s.solves for s in statistics)
    return FixedPointStatistics(
        solves,
        sum(s.mean_iterations * s.solves for s in statistics) / max(solves, 1),
        max(s.max_iterations for s in statistics),
        sum(s.unconverged for s in statistics),
    )


def summary(
    result: Result,
    *,
    task: str,
    model: str,
    optimizer: str,
    metric_name: str,
    train: Evaluation | None,
    validation: Evaluation | None,
    test: Evaluation | None,
    fixed_point: FixedPointStatistics | None,
    wall_seconds: float,
    ranks: int,
    dtype: str,
    device: str,
    seed: int,
    energy_joules: float | None,
    peak_memory_bytes: int | None,
) -> dict[str, Any]:
    """Return what summary.json tells; None for what was not measured.

    Not collective.

    Parameters
    ----------
    result
        What the optimiser returned.
    train, validation, test
        Loss and metric on the three sets; None for a set that is empty or was not evaluated.
    fixed_point
        Of the whole run, from `over_run`; None for a model without fixed points.
    wall_seconds
        Wall time of the optimisation.
    energy_joules
        Energy of all hosts over the run.
    peak_memory_bytes
        Largest resident memory of a process.
    """
    sets = {"train": train, "validation": validation, "test": test}
    return {
        "task": task,
        "model": model,
        "parameters": result.x.numel(),
        "optimizer": optimizer,
        "status": result.status,
        "reason": result.reason,
        "message": result.message,
        "iterations": result.iterations,
        "wall_seconds": wall_seconds,
        "loss": {name: found and found.loss for name, found in sets.items()},
        "metric": {"name": metric_name} | {name: found and found.metric for name, found in sets.items()},
        "counts": dataclasses.asdict(result.counts),
        "fixed_point": {
            "mean_iterations": fixed_point and fixed_point.mean_iterations,
            "max_iterations": fixed_point and fixed_point.max_iterations,
            "unconverged": fixed_point and fixed_point.unconverged,
        },
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "energy_joules": energy_joules,
        "peak_memory_bytes": peak_memory_bytes,
    }
