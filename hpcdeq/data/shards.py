"""One file, or a folder of parts with one schema, as a single space of rows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from hpcdeq.data.rows import SampleRows, check_rows, join_rows, read_rows
from hpcdeq.data.schema import REMEDY, SPLITS, Schema, open_dataset, read_schema, reading
from hpcdeq.errors import DataError

PART = re.compile(r"part-(\d{5})\.h5")
# Samples that are worked on together unless told otherwise; of graphs, as many as have so many edges: their messages, 64
# numbers an edge, then stay in the caches, which halves the time of a gradient.
CHUNK_SIZE, CHUNK_EDGES = 512, 16_384
WINDOW = 4096  # rows read at a time where the wanted ones are scattered over the file


class Shards:
    """The rows of a dataset file, or of a folder of files `part-00000.h5`, `part-00001.h5`, ..., end to end.

    Not collective: every rank looks for itself. The constructor reads headers and `/sample/split` only.

    Attributes
    ----------
    paths
        The files in order.
    schema
        Common to all parts; ``count`` is the total.
    starts
        ``(parts + 1,)``: part ``p`` holds the rows ``starts[p]`` to ``starts[p + 1] - 1``.
    splits
        ``(count,)`` uint8.
    usual_chunk_size
        Samples that are best worked on together.

    Raises
    ------
    DataError
        A part is missing, damaged or of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.paths = _parts(path)
        schemas, splits = [], []
        edges = 0
        for part in self.paths:
            with open_dataset(part) as file:
                schemas.append(read_schema(part, file))
                with reading(part, "/sample/split"):
                    splits.append(file["/sample/split"][:])
                if schemas[-1].representation == "graph":
                    edges += file["/graph/edge_source"].shape[0]
            unknown = np.flatnonzero(splits[-1] >= len(SPLITS))
            if unknown.size:
                value = splits[-1][unknown[0]]
                raise DataError(f"{part}: /sample/split row {unknown[0]}: {value} is not 0, 1 or 2; {REMEDY}")
            other = schemas[-1].difference(schemas[0])
            if other:
                first, this = getattr(schemas[0], other), getattr(schemas[-1], other)
                raise DataError(f"{part}: {other} is {this}, but {first} in {self.paths[0].name}; {REMEDY}")
        self.splits = np.concatenate(splits)
        self.starts = np.concatenate([[0], np.cumsum([schema.count for schema in schemas])])
        self.schema: Schema = replace(schemas[0], count=int(self.starts[-1]))
        most = CHUNK_EDGES * self.schema.count // edges if edges else CHUNK_SIZE
        self.usual_chunk_size = min(max(most, 1), CHUNK_SIZE)

    def read(self, rows: np.ndarray) -> SampleRows:
        """Read and check some rows of the whole space.

        Not collective. A contiguous range in one file is read as that range and nothing else; scattered rows are
        picked from ranges of at most 4,096 rows, so that memory stays bounded.

        Parameters
        ----------
        rows
            ``(b,)`` increasing row numbers.
        """
        found: list[SampleRows] = []
        for part, path in enumerate(self.paths):
            first, last = np.searchsorted(rows, self.starts[part : part + 2])
            own = rows[first:last] - self.starts[part]
            if own.size == 0:
                continue
            contiguous = own[-1] - own[0] + 1 == own.size
            windows = [own] if contiguous else np.split(own, np.flatnonzero(np.diff(own // WINDOW)) + 1)
            with open_dataset(path) as file:
                for window in windows:
                    start, stop = int(window[0]), int(window[-1]) + 1
                    read = read_rows(path, file, self.schema, start, stop)
                    picked = read if window.size == stop - start else read.take(window - start)
                    check_rows(path, self.schema, picked, window)
                    found.append(picked)
        return join_rows(self.schema, found)


def _parts(path: Path) -> list[Path]:
    """Return the files of a dataset, which have to be numbered without a gap."""
    if not path.is_dir():
        return [path]
    numbers = sorted(int(match[1]) for name in path.iterdir() if (match := PART.fullmatch(name.name)))
    if not numbers:
        raise DataError(f"{path}: a folder without part-00000.h5; give --data a file, or a folder of such parts")
    missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    if missing:
        raise DataError(f"{path}: part-{missing[0]:05d}.h5 is missing ({len(missing)} of {numbers[-1] + 1} parts)")
    return [path / f"part-{number:05d}.h5" for number in numbers]
