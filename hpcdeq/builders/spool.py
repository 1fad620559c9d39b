"""Blocks of built samples on disk: what a builder that was interrupted need not do again."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq.builders.labelling import Value
from hpcdeq.builders.samples import Skipped
from hpcdeq.data.graphs import EDGE_FIELDS, NODE_FIELDS, GraphArrays, no_graphs
from hpcdeq.errors import DataError

OFFSETS = ("node_offset", "edge_offset")
LABEL = "made_of.json"


@dataclass(frozen=True)
class Built:
    """What becomes of a block of source rows.

    Attributes
    ----------
    ids, values, splits, groups
        One each a sample: its name, its property (NaN where none was asked for), the split that the source puts it in
        (``""`` where it does not say), and the name of its relatives.
    graphs
        The samples' graphs.
    skipped
        The other rows.
    auxiliary
        A row of numbers each, to be learned beside the property; none where none were asked for.
    """

    ids: Sequence[str]
    values: Sequence[Value]
    splits: Sequence[str]
    groups: Sequence[str]
    graphs: GraphArrays
    skipped: Sequence[Skipped]
    auxiliary: Sequence[Sequence[float]] = ()


class BlockError(DataError):
    """A block that cannot be written; those before it stay, for the same command once there is room."""


class Spool:
    """A folder of blocks.

    Not collective: one rank writes and reads.

    Parameters
    ----------
    folder
        The folder; made with the first block.
    made_of
        What the blocks depend on. A folder of other blocks is emptied.

    Attributes
    ----------
    found
        Blocks that were there already.

    Raises
    ------
    DataError
        The folder cannot be made, or holds something else.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]) -> None:
        self.folder = folder
        told = json.dumps(made_of, sort_keys=True, default=str)
        label = folder / LABEL
        if folder.is_dir() and any(folder.iterdir()) and not label.is_file():
            raise DataError(f"{folder} is in the way, and not of hpcdeq's making; move it, or give another --out")
        try:
            if not label.is_file() or label.read_text(encoding="utf-8", errors="replace") != told:
                self.remove()
                folder.mkdir(exist_ok=True)
                label.write_text(told, encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {folder}: {error}; give another --out") from error
        self.found = sum(1 for _ in folder.glob("*.npz"))

    def has(self, number: int) -> bool:
        """Return whether a block is there."""
        return self._path(number).is_file()

    def save(self, number: int, built: Built) -> None:
        """Write a block; a reader sees all of it or nothing. `BlockError` where it cannot be written."""
        graphs = {name: getattr(built.graphs, name) for name in (*OFFSETS, *NODE_FIELDS, *EDGE_FIELDS)}
        texts = {
            "ids": built.ids,
            "splits": built.splits,
            "groups": built.groups,
            "skipped_rows": [row.row for row in built.skipped],
            "skipped_reasons": [row.reason for row in built.skipped],
        }
        part = self.folder / f"{number}.part"
        try:
            with part.open("wb") as file:
                arrays = {name: np.array(list(text), dtype=np.str_) for name, text in texts.items()} | graphs
                arrays |= {"values": np.array(built.values), "auxiliary": np.array(built.auxiliary, float)}
                np.savez(file, allow_pickle=False, **arrays)
            part.replace(self._path(number))
        except OSError as error:
            raise BlockError(
                f"cannot write {self._path(number)}: {error}; the blocks before it are kept: make room, and type the same"
                " command again"
            ) from error

    def load(self, number: int, *, graphs: bool = True) -> Built:
        """Read a block, on request without its graphs (which are then empty). `DataError` where it is damaged."""
        try:
            with self._path(number).open("rb") as data, np.load(data, allow_pickle=False) as file:
                texts = {name: file[name].tolist() for name in ("ids", "splits", "groups", "values", "auxiliary")}
                rows, reasons = file["skipped_rows"].tolist(), file["skipped_reasons"].tolist()
                arrays = {name: file[name] for name in ((*OFFSETS, *NODE_FIELDS, *EDGE_FIELDS) if graphs else ())}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._path(number)}: damaged ({error}); type the same command again") from error
        skipped = [Skipped(*pair) for pair in zip(rows, reasons, strict=True)]
        return Built(graphs=GraphArrays(**arrays) if graphs else no_graphs(), skipped=skipped, **texts)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"
