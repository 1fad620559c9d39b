"""Crystals as graphs, with a property as class or number: source rows in, one dataset file out."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcdeq import parallel
from hpcdeq.builders.neighbours import graph_block
from hpcdeq.builders.samples import (
    BLOCK,
    Progress,
    Report,
    Skipped,
    assign_splits,
    blocks,
    in_order,
    provenance,
    refuse_if_none,
    silent,
    straddling,
)
from hpcdeq.builders.structures import StructureRecord, read_block, source_rows
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import OptionError


@dataclass(frozen=True)
class CrystalOptions:
    """How crystals become samples.

    Attributes
    ----------
    property_name
        The property to learn.
    thresholds
        ``t`` increasing numbers: a value below the first is class 0, one from the last on is class ``t``.
    classes
        ``t + 1`` names.
    units
        Unit of the property.
    regression
        Keep the value itself instead of a class.
    neighbours
        Edges an atom.
    validation_fraction
        Of the train groups (reduced formulas) of a source with splits, else of all groups.
    seed
        Of the hash that shares groups out.
    limit
        Use the first rows of the source only; None for all.
    """

    property_name: str = "band_gap"
    thresholds: tuple[float, ...] = (0.01, 3.0)
    classes: tuple[str, ...] = ("metal", "semiconductor", "insulator")
    units: str = "eV"
    regression: bool = False
    neighbours: int = 12
    validation_fraction: float = 0.1
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if not self.regression:
            if not self.thresholds or any(np.diff(self.thresholds) <= 0):
                raise OptionError(f"--thresholds {self.thresholds} are not increasing; e.g. --thresholds 0.01,3.0")
            if len(self.classes) != len(self.thresholds) + 1:
                wanted = len(self.thresholds) + 1
                raise OptionError(f"{len(self.classes)} class names for {wanted} classes; say --classes with {wanted}")
        if self.neighbours < 1:
            raise OptionError(f"--neighbours {self.neighbours}: at least 1")
        if not 0 <= self.validation_fraction <= 0.5:
            raise OptionError(f"--validation-fraction {self.validation_fraction}: from 0 to 0.5")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"--limit {self.limit}: at least 1")

    def targets(self, values: np.ndarray) -> np.ndarray:
        """Return ``(b,)`` labels or ``(b, 1)`` numbers for ``(b,)`` values of the property. Not collective."""
        if self.regression:
            return values[:, None]
        return np.searchsorted(np.array(self.thresholds), values, side="right").astype(np.int64)

    def schema(self, source: object, command: str) -> Schema:
        """Return the schema of the file to be written. Not collective."""
        origin = provenance(str(source), command, ["pymatgen"])
        origin["neighbours"] = self.neighbours
        if self.regression:
            return Schema(
                "regression", "graph", target_names=(self.property_name,), target_units=(self.units,), provenance=origin
            )
        origin["thresholds"] = f"{self.property_name} at {', '.join(map(str, self.thresholds))} {self.units}"
        return Schema("classification", "graph", classes=self.classes, provenance=origin)


def prepare_crystals(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    options: CrystalOptions | None = None,
    *,
    processes: int = 1,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Write the crystals of a source to a dataset file, ordered train, validation, test.

    Collective on comm. Rank 0 reads, writes and hands blocks of rows to the other ranks, or to ``processes`` local
    processes where it is alone. The file does not depend on the number of either.

    Parameters
    ----------
    path
        The file to make; replaced on success only.
    source
        See `hpcdeq.builders.structures.source_rows`.
    options
        How crystals become samples.
    progress
        Wraps a stream of blocks to show how far it is; called with stream, label and number of blocks if known.

    Returns
    -------
    Report
        The same on all ranks.

    Raises
    ------
    DataError
        The source is missing or damaged, none of its rows can be used, or the file cannot be written.
    """
    options = options or CrystalOptions()
    report = Report()
    with parallel.agreement(comm), ExitStack() as stack:
        executor = None
        if comm.size > 1 or processes > 1:
            executor = stack.enter_context(parallel.workers(comm, processes))
        if comm.rank == 0:
            ahead = 4 * max(processes, comm.size)
            report = _build(Path(path), Path(source), options, executor, ahead, command, progress)
    return parallel.from_root(comm, report)


def _build(
    path: Path,
    source: Path,
    options: CrystalOptions,
    executor: Executor | None,
    ahead: int,
    command: str,
    progress: Progress,
) -> Report:
    report = Report(classes=() if options.regression else options.classes)
    with DatasetWriter(path, options.schema(source, command)) as writer:
        records = _read(source, options, executor, ahead, report, progress)
        formulas = [record.formula for record in records]
        splits = assign_splits(
            formulas, [record.split for record in records], options.validation_fraction, options.seed
        )
        torn = straddling(formulas, splits)
        if torn:
            report.notes.append(f"{torn} formulas are in more than one split of the source, and so here")
        order = np.argsort(splits, kind="stable")
        splits = splits[order]
        stream = list(blocks(records[row] for row in order))
        shown = progress(stream, "neighbours", len(stream))
        start = 0
        for block, (kept, graphs, skipped) in in_order(executor, graph_block, shown, options.neighbours, ahead=ahead):
            own_splits = splits[start + np.array(kept, np.int64)]
            start += len(block)
            targets = options.targets(np.array([block[place].value for place in kept]))
            writer.append(SampleRows([block[place].id for place in kept], targets, graphs), own_splits)
            report.add(own_splits, targets)
            report.skipped += skipped
        refuse_if_none(source, writer.count, report.skipped)
    return report


def _read(
    source: Path,
    options: CrystalOptions,
    executor: Executor | None,
    ahead: int,
    report: Report,
    progress: Progress,
) -> list[StructureRecord]:
    """Parse the source; what cannot be read goes to the report."""
    rows = blocks(itertools.islice(source_rows(source), options.limit))
    total = None if options.limit is None else -(-options.limit // BLOCK)
    shown = progress(rows, "reading", total)
    records: list[StructureRecord] = []
    for _, answers in in_order(executor, read_block, shown, options.property_name, ahead=ahead):
        records += [answer for answer in answers if isinstance(answer, StructureRecord)]
        report.skipped += [answer for answer in answers if isinstance(answer, Skipped)]
    refuse_if_none(source, len(records), report.skipped)
    return records
