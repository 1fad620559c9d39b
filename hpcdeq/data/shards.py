"""One file, or a folder of parts with one schema, as a single space of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from hpcdeq.data.room import Room, inputs_of, lengths_of
from hpcdeq.data.rows import SampleRows, check_rows, join_rows, read_names, read_offsets, read_rows
from hpcdeq.data.schema import REMEDY, SPLITS, Schema, open_dataset, read_schema, reading
from hpcdeq.errors import DataError

PART = re.compile(r"part-(\d{5})\.h5")
# Samples that are worked on together unless told otherwise; of graphs, as many as have so many edges: their messages, 64
# numbers an edge, then stay in the caches, which halves the time of a gradient.
CHUNK_SIZE, CHUNK_EDGES = 512, 16_384
WINDOW = 4096  # rows read at a time where the wanted ones are scattered over the file


class Shards:
    """The rows of a dataset file, or of a folder of files `part-00000.h5`, `part-00001.h5`, ..., end to end.

    Not collective. The constructor reads headers only, and every method no more than the rows that it is asked for.

    Attributes
    ----------
    paths
        The files in order.
    schema
        Common to all parts; ``count`` is the total.
    starts
        ``(parts + 1,)``: part ``p`` holds the rows ``starts[p]`` to ``starts[p + 1] - 1``.
    usual_chunk_size
        Samples that are best worked on together.

    Raises
    ------
    DataError
        A part is missing, damaged or of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.paths = _parts(path)
        schemas = []
        edges = 0
        for part in self.paths:
            with open_dataset(part) as file:
                schemas.append(read_schema(part, file))
                if schemas[-1].representation == "graph":
                    edges += file["/graph/edge_source"].shape[0]
            other = schemas[-1].difference(schemas[0])
            if other:
                first, this = getattr(schemas[0], other), getattr(schemas[-1], other)
                raise DataError(f"{part}: {other} is {this}, but {first} in {self.paths[0].name}; {REMEDY}")
        self.starts = np.concatenate([[0], np.cumsum([schema.count for schema in schemas])])
        self.schema: Schema = replace(schemas[0], count=int(self.starts[-1]))
        most = CHUNK_EDGES * self.schema.count // edges if edges else CHUNK_SIZE
        self.usual_chunk_size = min(max(most, 1), CHUNK_SIZE)

    @property
    def splits(self) -> np.ndarray:
        """The split of every row, ``(count,)`` integers: for a look at a whole file."""
        return np.concatenate([self.splits_of(a, b) for a, b in zip(self.starts, self.starts[1:], strict=False)])

    def splits_of(self, first: int, last: int) -> np.ndarray:
        """Return the splits of the rows ``first`` to ``last - 1`` of one part, ``(last - first,)`` integers. Not collective."""
        path, start, stop = self._within(first, last)
        with open_dataset(path) as file, reading(path, "/sample/split"):
            splits = file["/sample/split"][start:stop]
        unknown = np.flatnonzero((splits < 0) | (splits >= len(SPLITS)))
        if unknown.size:
            row, value = start + unknown[0], splits[unknown[0]]
            raise DataError(f"{path}: /sample/split row {row}: {value} is not 0, 1 or 2; {REMEDY}")
        return splits

    def sizes_of(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of nodes and of edges of the graphs ``first`` to ``last - 1`` of one part. Not collective."""
        path, start, stop = self._within(first, last)
        with open_dataset(path) as file:
            return tuple(np.diff(read_offsets(path, file, kind, start, stop)) for kind in ("node", "edge"))  # type: ignore[return-value]

    def read(self, rows: np.ndarray, *, names: bool = True) -> SampleRows:
        """Read and check some rows of the whole space.

        Not collective. A contiguous range in one file is read as that range and nothing else; scattered rows are
        picked from ranges of at most 4,096 rows, so that memory stays bounded.

        Parameters
        ----------
        rows
            ``(b,)`` increasing row numbers.
        names
            Whether to read the samples' names, too, which takes as long as all the rest of small samples.
        """
        found: list[SampleRows] = []
        windows = [(path, window) for path, own in self._by_part(rows) for window in _windows(own)]
        room = self._room(windows) if len(windows) > 1 else None
        for path, window in windows:
            start, stop = int(window[0]), int(window[-1]) + 1
            with open_dataset(path) as file:
                read = read_rows(path, file, self.schema, start, stop, names=names, room=room)
            picked = read if window.size == stop - start else read.take(window - start)
            check_rows(path, self.schema, picked, window)
            found.append(picked)
        return join_rows(self.schema, found, room)

    def _room(self, windows: list[tuple[Path, np.ndarray]]) -> Room | None:
        """Return memory for all windows, None where they are scattered or in files whose types differ."""
        if any(window[-1] - window[0] >= window.size for _, window in windows):
            return None
        lengths: dict[str, int] = {}
        types = None
        for path, window in windows:
            with open_dataset(path) as file, reading(path):
                own = inputs_of(file)
                types = types or own
                if own != types:
                    return None
                for name, length in lengths_of(file, own, int(window[0]), int(window[-1]) + 1).items():
                    lengths[name] = lengths.get(name, 0) + length
        with open_dataset(windows[0][0]) as file:
            return Room(lengths, file)

    def names(self, rows: np.ndarray) -> list[str]:
        """Return the names of some rows, given by increasing numbers. Not collective."""
        found: list[str] = []
        for path, own in self._by_part(rows):
            with open_dataset(path) as file:
                between = read_names(path, file, int(own[0]), int(own[-1]) + 1)
            found += between if len(between) == own.size else [between[row] for row in own - own[0]]
        return found

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[Path, np.ndarray]]:
        """Yield each part that has some of the rows, and their numbers in it."""
        bounds = np.searchsorted(rows, self.starts)
        for part in np.flatnonzero(np.diff(bounds)):
            yield self.paths[part], rows[bounds[part] : bounds[part + 1]] - self.starts[part]

    def _within(self, first: int, last: int) -> tuple[Path, int, int]:
        """Return the part that has a row, and the rows' numbers in it."""
        part = int(np.searchsorted(self.starts, first, side="right")) - 1
        return self.paths[part], int(first - self.starts[part]), int(last - self.starts[part])


def _windows(rows: np.ndarray) -> list[np.ndarray]:
    """Return rows of one file in pieces to read: all at once if they are a range, else those of some thousand rows."""
    if rows[-1] - rows[0] + 1 == rows.size:
        return [rows]
    return np.split(rows, np.flatnonzero(np.diff(rows // WINDOW)) + 1)


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
