"""From rows of a source to graphs in one dataset file, whatever the rows are: read, build, share out, write.

Rows are built block by block, and kept on disk until the file is complete, so that a run that was cut goes on where it
stopped, and memory is bounded by some blocks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq import parallel
from hpcdeq.builders.labelling import Labelling
from hpcdeq.builders.samples import (
    SKIPPED_LIST,
    Progress,
    Report,
    Shares,
    Skipped,
    assign_splits,
    blocks,
    in_order,
    provenance,
    refuse_if_none,
    silent,
    straddling,
)
from hpcdeq.builders.spool import BlockError, Built, Spool
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import SPLITS, Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import DataError

FOLDER_FILES = (".cif", ".csv", ".xyz")  # what a source that is a folder consists of


@dataclass(frozen=True)
class Recipe:
    """How rows of one kind become graphs.

    Attributes
    ----------
    kind
        Name of the command's kind of data, by which `hpcdeq.predict` finds the recipe again.
    rows
        ``rows(source)`` yields the rows (cheap, in order).
    build
        ``build(rows, settings, labels)`` builds some of them (slow, so that workers do it); labels are None where no
        property is asked for.
    settings
        A frozen dataclass.
    packages
        Whose versions the file tells.
    conformers
        Positions that every node has.
    """

    kind: str
    rows: Callable[[Path], Iterator[Any]]
    build: Callable[[list[Any], Any, Labelling | None], Built]
    settings: Any
    packages: tuple[str, ...]
    conformers: int = 0


def prepare_graphs(
    path: Path,
    source: Path,
    recipe: Recipe,
    labels: Labelling,
    shares: Shares,
    *,
    processes: int = 1,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Write the graphs of a source to a dataset file, ordered train, validation, test.

    Collective on comm. Rank 0 reads, writes and hands blocks of rows to the other ranks, or to ``processes`` local
    processes where it is alone. The file does not depend on the number of either.

    Parameters
    ----------
    path
        The file to make; replaced on success only.
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
    report = Report()
    with parallel.agreement(comm), ExitStack() as stack:
        executor = None
        if comm.size > 1 or processes > 1:
            executor = stack.enter_context(parallel.workers(comm, processes))
        if comm.rank == 0:
            report = Assembly(path, source, recipe, labels, shares, command).run(
                executor, 4 * max(processes, comm.size), progress
            )
    return parallel.from_root(comm, report)


class Assembly:
    """One file in the making, on the rank that writes.

    Not collective, every method. Parameters as in `prepare_graphs`.
    """

    def __init__(
        self, path: Path, source: Path, recipe: Recipe, labels: Labelling, shares: Shares, command: str
    ) -> None:
        self.path = path
        self.source = source
        self.recipe = recipe
        self.labels = labels
        self.shares = shares
        self.command = command
        self.report = Report()

    def run(self, executor: Executor | None, ahead: int, progress: Progress) -> Report:
        """Build what is missing, and write the file."""
        DatasetWriter.refuse(self.path)
        spool = Spool(Path(f"{self.path}.blocks"), self._made_of())
        if spool.found:
            self.report.notes.append(f"{spool.found} blocks of an earlier run that was cut were used")
        try:
            count = self._build(spool, executor, ahead, progress)
            self._write(spool, count, progress)
        except BlockError:
            raise
        except DataError:  # the next run will have another source, or another folder
            spool.remove()
            raise
        spool.remove()
        return self.report

    def _made_of(self) -> dict[str, Any]:
        """Return what the built rows depend on."""
        files = [self.source]
        if self.source.is_dir():  # in which the dataset and what is said about it may lie, too
            files = sorted(file for file in self.source.iterdir() if file.suffix.lower() in FOLDER_FILES)
        stamps = hashlib.sha256()
        for file in files:
            if file.is_file() and not file.name.endswith(SKIPPED_LIST):
                found = file.stat()
                stamps.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode(errors="replace"))
        versions = provenance("", "", self.recipe.packages)["versions"]
        return {
            "source": str(self.source.resolve()),
            "files": stamps.hexdigest(),
            "settings": repr(self.recipe.settings),
            "labels": repr(self.labels),
            "limit": self.shares.limit,
            "versions": versions,
        }

    def _build(self, spool: Spool, executor: Executor | None, ahead: int, progress: Progress) -> int:
        """Build the blocks that are missing and return how many there are in all."""
        numbers: deque[int] = deque()
        count = 0

        def missing() -> Iterator[list[Any]]:
            nonlocal count
            for number, block in enumerate(blocks(itertools.islice(self.recipe.rows(self.source), self.shares.limit))):
                count = number + 1
                if not spool.has(number):
                    numbers.append(number)
                    yield block

        shown = progress(missing(), "building", None)
        for _, built in in_order(executor, self.recipe.build, shown, self.recipe.settings, self.labels, ahead=ahead):
            spool.save(numbers.popleft(), built)
        return count

    def _write(self, spool: Spool, count: int, progress: Progress) -> None:
        """Share the samples out and write them, split by split."""
        report = self.report
        built = [spool.load(number, graphs=False) for number in range(count)]
        report.skipped = [row for block in built for row in block.skipped]
        keep = self._without_duplicates(built)
        values = [value for block in built for value in block.values]
        groups = [group for block in built for group in block.groups]
        splits = assign_splits(
            groups,
            [split or None for block in built for split in block.splits],
            self.shares.validation_fraction,
            self.shares.seed,
        )
        refuse_if_none(self.source, int(keep.sum()), report.skipped)
        torn = straddling([group for group, kept in zip(groups, keep, strict=True) if kept], splits[keep])
        if torn:
            report.notes.append(f"{torn} groups of relatives are in more than one split of the source, and so here")
        report.classes = self.labels.class_names([value for value, kept in zip(values, keep, strict=True) if kept])
        targets = self.labels.targets(
            [value if kept else values[int(np.argmax(keep))] for value, kept in zip(values, keep, strict=True)],
            report.classes,
        )
        starts = np.concatenate([[0], np.cumsum([len(block.ids) for block in built])])
        auxiliary = np.array([row for block in built for row in block.auxiliary], float).reshape(len(values), -1)
        self._refuse_unknown(auxiliary[keep])
        with DatasetWriter(self.path, self._schema(report.classes)) as writer:
            steps = [(split, number) for split in range(len(SPLITS)) for number in range(count)]
            for split, number in progress(steps, "writing", len(steps)):
                own = slice(int(starts[number]), int(starts[number + 1]))
                rows = np.flatnonzero(keep[own] & (splits[own] == split))
                if rows.size:
                    graphs = spool.load(number).graphs.take(rows)
                    ids = [built[number].ids[row] for row in rows]
                    samples = SampleRows(ids, targets[own][rows], graphs, auxiliary[own][rows])
                    writer.append(samples, splits[own][rows])
                    report.add(splits[own][rows], targets[own][rows])

    def _refuse_unknown(self, auxiliary: np.ndarray) -> None:
        """Raise where no sample has one of the auxiliary properties: its name must be wrong."""
        for name, known in zip(self.labels.auxiliary, np.isfinite(auxiliary).any(axis=0), strict=True):
            if not known:
                raise DataError(f"{self.source}: no row has {name}; give --auxiliary names of numbers in the source")

    def _without_duplicates(self, built: Iterable[Built]) -> np.ndarray:
        """Return ``(b,)`` whether a sample's id is new; the others go to the report."""
        seen: set[str] = set()
        keep = []
        for block in built:
            for name in block.ids:
                keep.append(name not in seen)
                if name in seen:
                    self.report.skipped.append(Skipped(name, "duplicate id: an earlier row has it"))
                seen.add(name)
        return np.array(keep, dtype=bool)

    def _schema(self, classes: tuple[str, ...]) -> Schema:
        origin = provenance(str(self.source), self.command, self.recipe.packages)
        origin |= {
            "kind": self.recipe.kind,
            "settings": self.recipe.settings.__dict__,
            "labels": self.labels.meaning,
        }
        told = self.labels.schema_fields(classes)
        return Schema(representation="graph", provenance=origin, conformers=self.recipe.conformers, **told)
