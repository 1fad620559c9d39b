"""Blocks of built samples on disk: what a builder that was interrupted need not do again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcdeq.builders.labelling import Value
from hpcdeq.builders.samples import Skipped
from hpcdeq.data.graphs import EDGE_FIELDS, NODE_FIELDS, GraphArrays
from hpcdeq.errors import DataError

OFFSETS = ("node_offset", "edge_offset")


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
    """

    ids: Sequence[str]
    values: Sequence[Value]
    splits: Sequence[str]
    groups: Sequence[str]
    graphs: GraphArrays
    skipped: Sequence[Skipped]


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
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]) -> None:
        self.folder = folder
        told = json.dumps(made_of, sort_keys=True, default=str)
        label = folder / "made_of.json"
        if folder.exists() and not (label.is_file() and label.read_text(encoding="utf-8") == told):
            self.remove()
        try:
            folder.mkdir(exist_ok=True)
            label.write_text(told, encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {folder}: {error}; give another --out") from error
        self.found = sum(1 for _ in folder.glob("*.npz"))

    def has(self, number: int) -> bool:
        """Return whether a block is there."""
        return self._path(number).is_file()

    def save(self, number: int, built: Built) -> None:
        """Write a block; a reader sees all of it or nothing."""
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
                np.savez(file, allow_pickle=False, values=np.array(built.values), **arrays)
            part.replace(self._path(number))
        except OSError as error:
            raise DataError(f"cannot write {self._path(number)}: {error}; the blocks before it are kept") from error

    def load(self, number: int, *, graphs: bool = True) -> Built:
        """Read a block, on request without its graphs (which are then empty)."""
        with np.load(self._path(number), allow_pickle=False) as file:
            texts = {name: file[name].tolist() for name in ("ids", "splits", "groups")}
            skipped = [Skipped(*pair) for pair in zip(file["skipped_rows"], file["skipped_reasons"], strict=True)]
            zero = np.zeros(1, np.int64)
            names = (*OFFSETS, *NODE_FIELDS, *EDGE_FIELDS) if graphs else ()
            arrays = {name: file[name] for name in names} or {
                **dict.fromkeys(OFFSETS, zero),
                **{name: np.zeros(0, kind) for name, kind in (NODE_FIELDS | EDGE_FIELDS).items()},
            }
            return Built(values=file["values"].tolist(), graphs=GraphArrays(**arrays), skipped=skipped, **texts)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"
