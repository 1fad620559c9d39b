"""Rows of a dataset as numpy arrays: read as hyperslabs, checked value by value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcdeq.data.graphs import BONDS, EDGE_FIELDS, NODE_FIELDS, NONE, GraphArrays, Rows, join_graphs, no_graphs
from hpcdeq.data.room import Room
from hpcdeq.data.schema import AUXILIARY, REMEDY, Schema, reading
from hpcdeq.errors import DataError

HEAVIEST = 118  # oganesson


@dataclass(frozen=True)
class SampleRows:
    """Samples ``0 .. b-1`` of some stretch of a dataset.

    Attributes
    ----------
    ids
        ``b`` names; none where they were not asked for.
    targets
        ``(b,)`` int64 labels, or ``(b, T)`` float64.
    inputs
        ``(b, ...)`` floating numbers, or the graphs.
    auxiliary
        ``(b, A)`` float64, NaN for what a sample has not; by default A = 0.
    finite
        Whether all numbers of the inputs are known to be finite.
    """

    ids: Sequence[str]
    targets: np.ndarray
    inputs: np.ndarray | GraphArrays
    auxiliary: np.ndarray = field(default_factory=lambda: NONE)
    finite: bool = False

    def __post_init__(self) -> None:
        """Fill in what is not given."""
        if self.auxiliary is NONE:
            object.__setattr__(self, "auxiliary", np.empty((len(self.targets), 0)))

    def take(self, rows: Rows) -> SampleRows:
        """Return some of the rows, in the order of ``rows``. Not collective."""
        ids = np.array(self.ids, dtype=object)[rows].tolist() if len(self.ids) else []
        inputs = self.inputs.take(rows) if isinstance(self.inputs, GraphArrays) else self.inputs[rows]
        return SampleRows(ids, self.targets[rows], inputs, self.auxiliary[rows], self.finite)


def no_rows(schema: Schema) -> SampleRows:
    """Return no samples, with the trailing shapes and types that samples of this schema have. Not collective."""
    target_type = np.int64 if schema.task == "classification" else np.float64
    inputs = no_graphs() if schema.representation == "graph" else np.empty((0, *schema.sample_shape))
    return SampleRows(
        [], np.empty((0, *schema.target_shape), target_type), inputs, np.empty((0, len(schema.auxiliary)))
    )


def join_rows(schema: Schema, parts: Sequence[SampleRows], room: Room | None = None) -> SampleRows:
    """Lay several stretches of samples of one schema end to end; their inputs are in ``room`` if it is given. Not collective."""
    if len(parts) < 2:
        return parts[0] if parts else no_rows(schema)
    ids = [name for part in parts for name in part.ids]
    targets = np.concatenate([part.targets for part in parts])
    auxiliary = np.concatenate([part.auxiliary for part in parts])
    finite = all(part.finite for part in parts)
    graphs = [part.inputs for part in parts if isinstance(part.inputs, GraphArrays)]
    if graphs:
        return SampleRows(ids, targets, join_graphs(graphs, room.graph_fields() if room else None), auxiliary, finite)
    inputs = room.arrays["/array/x"] if room else np.concatenate([part.inputs for part in parts])
    return SampleRows(ids, targets, inputs, auxiliary, finite)


def read_rows(
    path: Path,
    file: h5py.File,
    schema: Schema,
    start: int,
    stop: int,
    *,
    names: bool = True,
    room: Room | None = None,
) -> SampleRows:
    """Read the rows ``start`` to ``stop - 1`` of a file as hyperslabs.

    Not collective. Offsets are checked before they are followed; `check_rows` checks the values. Names are left out unless
    they are asked for. Inputs are read into ``room`` where it is given.

    Raises
    ------
    DataError
        A dataset cannot be read, or its offsets decrease or lead out of the file.
    """
    ids = read_names(path, file, start, stop) if names else []
    target_type = np.int64 if schema.task == "classification" else np.float64
    targets = _slab(path, file, "/sample/target", start, stop).astype(target_type, copy=False)
    auxiliary = NONE
    if schema.auxiliary:
        auxiliary = _slab(path, file, AUXILIARY, start, stop).astype(np.float64, copy=False)
    if schema.representation == "array":
        inputs = _slab(path, file, "/array/x", start, stop, room)
        return SampleRows(ids, targets, inputs, auxiliary, _are_finite(inputs))
    node_offset = read_offsets(path, file, "node", start, stop)
    edge_offset = read_offsets(path, file, "edge", start, stop)
    found: dict[str, np.ndarray] = {}
    finite = True
    for fields, offset in ((NODE_FIELDS, node_offset), (EDGE_FIELDS, edge_offset)):
        for name, kind in fields.items():
            if name in file["/graph"]:
                values = _slab(path, file, f"/graph/{name}", int(offset[0]), int(offset[-1]), room)
                if np.dtype(kind).kind == "f":
                    values = values.astype(kind, copy=False)
                    finite = finite and _are_finite(values)
                found[name] = values
    graphs = GraphArrays(node_offset=node_offset - node_offset[0], edge_offset=edge_offset - edge_offset[0], **found)
    return SampleRows(ids, targets, graphs, auxiliary, finite)


def read_names(path: Path, file: h5py.File, start: int, stop: int) -> list[str]:
    """Return the names of the rows ``start`` to ``stop - 1`` of a file. Not collective."""
    with reading(path, "/sample/id"):
        return file["/sample/id"].asstr(errors="replace")[start:stop].tolist()


def _slab(path: Path, file: h5py.File, name: str, start: int, stop: int, room: Room | None = None) -> np.ndarray:
    with reading(path, name):
        if room is None:
            return file[name][start:stop]
        values = room.place(name, stop - start)
        if len(values):
            file[name].read_direct(values, np.s_[start:stop])
        return values


def _are_finite(values: np.ndarray) -> bool:
    """Say whether numbers are known to be finite: a sum tells it in one pass, and without an array as long as they are."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum()))


def read_offsets(path: Path, file: h5py.File, kind: str, start: int, stop: int) -> np.ndarray:
    """Return where the nodes or edges of the rows ``start`` to ``stop - 1`` begin, and where the last ones end.

    Not collective.

    Parameters
    ----------
    kind
        ``node`` or ``edge``.

    Raises
    ------
    DataError
        They decrease or lead out of the file.
    """
    name = f"/graph/{kind}_offset"
    offset = _slab(path, file, name, start, stop + 1).astype(np.int64, copy=False)
    total = file["/graph/atomic_number" if kind == "node" else "/graph/edge_source"].shape[0]
    outside = np.flatnonzero((offset < 0) | (offset > total))
    if outside.size:
        row = start + int(outside[0])
        raise DataError(f"{path}: {name} row {row}: {offset[outside[0]]} is outside 0 to {total}; {REMEDY}")
    back = np.flatnonzero(np.diff(offset) < 0)
    if back.size:
        row = int(back[0])
        raise DataError(
            f"{path}: {name} row {start + row + 1}: offsets decrease from {offset[row]} to {offset[row + 1]}; {REMEDY}"
        )
    if start == 0 and offset[0] != 0:
        raise DataError(f"{path}: {name} row 0: {offset[0]}, offsets start at 0; {REMEDY}")
    return offset


def check_rows(source: object, schema: Schema, rows: SampleRows, numbers: np.ndarray) -> None:
    """Refuse labels out of range, numbers that are not finite, and edges that leave their graph.

    Not collective. ``source`` names the file, ``numbers`` ``(b,)`` the rows in it.

    Raises
    ------
    DataError
        With dataset, row and value.
    """
    if schema.task == "classification":
        wrong = (rows.targets < 0) | (rows.targets >= len(schema.classes))
        legal = f"label out of range, classes are 0 to {len(schema.classes) - 1}"
        _refuse(source, "/sample/target", wrong, rows.targets, numbers, legal)
    else:
        _refuse(source, "/sample/target", ~np.isfinite(rows.targets), rows.targets, numbers, "not finite")
    _refuse(source, AUXILIARY, np.isinf(rows.auxiliary), rows.auxiliary, numbers, "infinite")
    if not isinstance(rows.inputs, GraphArrays):
        if not rows.finite:
            _refuse(source, "/array/x", ~np.isfinite(rows.inputs), rows.inputs, numbers, "not finite")
        return
    graphs = rows.inputs
    if _is_sound(graphs, rows.finite):
        return
    node_row = np.repeat(numbers, np.diff(graphs.node_offset))
    edge_row = np.repeat(numbers, np.diff(graphs.edge_offset))
    empty = np.diff(graphs.node_offset) == 0
    _refuse(source, "/graph/node_offset", empty, graphs.node_offset[:-1], numbers, "graph without nodes")
    wrong = (graphs.atomic_number < 0) | (graphs.atomic_number > HEAVIEST)
    _refuse(source, "/graph/atomic_number", wrong, graphs.atomic_number, node_row, f"not 0 to {HEAVIEST}")
    nodes = np.repeat(np.diff(graphs.node_offset), np.diff(graphs.edge_offset))
    for name, ends in (("edge_source", graphs.edge_source), ("edge_target", graphs.edge_target)):
        _refuse(source, f"/graph/{name}", (ends < 0) | (ends >= nodes), ends, edge_row, "no node of its own graph")
    unknown = graphs.edge_bond >= len(BONDS)
    _refuse(source, "/graph/edge_bond", unknown, graphs.edge_bond, edge_row, f"not 0 to {len(BONDS) - 1}")
    _refuse(source, "/graph/edge_vector", ~np.isfinite(graphs.edge_vector), graphs.edge_vector, edge_row, "not finite")
    for name in ("partial_charge", "conformers"):
        values = getattr(graphs, name)
        _refuse(source, f"/graph/{name}", ~np.isfinite(values), values, node_row, "not finite")


def _is_sound(graphs: GraphArrays, finite: bool) -> bool:
    """Say whether graphs pass all checks of `check_rows`, with no array made that is as long as they are."""
    sizes, with_edges = np.diff(graphs.node_offset), np.flatnonzero(np.diff(graphs.edge_offset))
    if sizes.min(initial=1) == 0 or graphs.edge_bond.max(initial=0) >= len(BONDS):
        return False
    if not 0 <= graphs.atomic_number.min(initial=0) <= graphs.atomic_number.max(initial=0) <= HEAVIEST:
        return False
    for ends in (graphs.edge_source, graphs.edge_target) if with_edges.size else ():
        natural = ends.view(f"u{ends.itemsize}")  # what is negative becomes too large
        if (np.maximum.reduceat(natural, graphs.edge_offset[with_edges]) >= sizes[with_edges]).any():
            return False
    return finite or all(np.isfinite(v).all() for v in (graphs.edge_vector, graphs.partial_charge, graphs.conformers))


def _refuse(source: object, name: str, wrong: np.ndarray, values: np.ndarray, rows: np.ndarray, reason: str) -> None:
    """Raise for the first wrong value; ``rows`` gives the sample row of each entry of the first axis."""
    if not wrong.any():
        return
    place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    value: Any = values[place]
    total = int(wrong.sum())
    more = f" ({total} such values among the rows read)" if total > 1 else ""
    raise DataError(f"{source}: {name} row {rows[place[0]]}: {value} is {reason}{more}; {REMEDY}")
