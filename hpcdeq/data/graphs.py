"""Graphs of many samples as ragged numpy arrays, laid out as in the dataset file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Rows = slice | np.ndarray


NONE = np.zeros(0)  # not given
# What stands in a file and in memory with one row a node or an edge, and of which type; bonds and charges are zero where
# a file has none, and there are no conformers.
NODE_FIELDS = {
    "atomic_number": np.uint8,
    "formal_charge": np.int8,
    "partial_charge": np.float32,
    "conformers": np.float32,
}
EDGE_FIELDS = {"edge_source": np.int32, "edge_target": np.int32, "edge_vector": np.float64, "edge_bond": np.uint8}
BONDS = ("none", "single", "double", "triple", "aromatic")  # edge_bond by number


@dataclass(frozen=True)
class GraphArrays:
    """The graphs of ``b`` samples with ``n`` nodes and ``E`` edges in all, end to end.

    Edge ``e`` says that ``edge_source[e]`` (j) is a neighbour of ``edge_target[e]`` (i). Both count from zero within
    the sample's own graph. Builders write edges grouped by target, nearest first.

    Attributes
    ----------
    node_offset, edge_offset
        ``(b + 1,)`` int64, from zero: sample ``s`` owns nodes ``node_offset[s]`` to ``node_offset[s + 1] - 1``.
    atomic_number
        ``(n,)`` integers; 0: no atom, the centre of a void.
    edge_source, edge_target
        ``(E,)`` integers, numbers of nodes within the sample.
    edge_vector
        ``(E, 3)`` Å, position of the neighbour's periodic image minus position of the target.
    edge_bond
        ``(E,)`` integers, numbers in `BONDS`; by default zeros.
    formal_charge
        ``(n,)`` integers, elementary charges: of a molecule's atoms, or likely oxidation states; by default zeros.
    partial_charge
        ``(n,)`` elementary charges, of a force field; by default zeros.
    conformers
        ``(n, C, 3)`` Å, positions in C conformers of a molecule, each about its centre; by default C = 0. Edges are those of
        the first.
    """

    node_offset: np.ndarray
    atomic_number: np.ndarray
    edge_offset: np.ndarray
    edge_source: np.ndarray
    edge_target: np.ndarray
    edge_vector: np.ndarray
    edge_bond: np.ndarray = field(default_factory=lambda: NONE)
    formal_charge: np.ndarray = field(default_factory=lambda: NONE)
    partial_charge: np.ndarray = field(default_factory=lambda: NONE)
    conformers: np.ndarray = field(default_factory=lambda: NONE)

    def __post_init__(self) -> None:
        """Fill in zeros for what is not given."""
        if self.edge_bond is NONE:
            object.__setattr__(self, "edge_bond", np.zeros(len(self.edge_source), EDGE_FIELDS["edge_bond"]))
        for name in ("formal_charge", "partial_charge"):
            if getattr(self, name) is NONE:
                object.__setattr__(self, name, np.zeros(len(self.atomic_number), NODE_FIELDS[name]))
        if self.conformers is NONE:
            object.__setattr__(self, "conformers", np.zeros((len(self.atomic_number), 0, 3), NODE_FIELDS["conformers"]))

    def __len__(self) -> int:
        """Return the number of samples. Not collective."""
        return self.node_offset.size - 1

    def take(self, rows: Rows) -> GraphArrays:
        """Return the graphs of some samples, in the order of ``rows``.

        Not collective. A slice of step 1 shares memory with this object; anything else is a copy.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._range(start, max(start, stop))
            rows = np.arange(start, stop, step)
        rows = np.arange(len(self))[rows]  # negative numbers, masks and numbers out of range are numpy's to judge
        node_offset, nodes = _gather(self.node_offset, rows)
        edge_offset, edges = _gather(self.edge_offset, rows)
        return self._picked(node_offset, nodes, edge_offset, edges)

    def _range(self, start: int, stop: int) -> GraphArrays:
        node_offset = self.node_offset[start : stop + 1]
        edge_offset = self.edge_offset[start : stop + 1]
        nodes = slice(node_offset[0], node_offset[-1])
        edges = slice(edge_offset[0], edge_offset[-1])
        return self._picked(node_offset - node_offset[0], nodes, edge_offset - edge_offset[0], edges)

    def _picked(self, node_offset: np.ndarray, nodes: Rows, edge_offset: np.ndarray, edges: Rows) -> GraphArrays:
        return GraphArrays(
            node_offset=node_offset,
            edge_offset=edge_offset,
            **{name: getattr(self, name)[nodes] for name in NODE_FIELDS},
            **{name: getattr(self, name)[edges] for name in EDGE_FIELDS},
        )


def _gather(offset: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of the chosen rows laid end to end, and the places of their items."""
    lengths = offset[rows + 1] - offset[rows]
    new_offset = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    items = np.repeat(offset[rows] - new_offset[:-1], lengths) + np.arange(new_offset[-1])
    return new_offset, items


def no_graphs() -> GraphArrays:
    """Return the graphs of no samples at all. Not collective."""
    zero = np.zeros(1, np.int64)
    indices = np.empty(0, np.int32)
    return GraphArrays(zero, np.empty(0, np.uint8), zero.copy(), indices, indices.copy(), np.empty((0, 3)))


def join_graphs(parts: Sequence[GraphArrays], joined: Mapping[str, np.ndarray] | None = None) -> GraphArrays:
    """Lay several sets of graphs end to end.

    Not collective. Where all arrays but the offsets lie so in memory already, ``joined`` are these, by name.
    """
    if len(parts) < 2:
        return parts[0] if parts else no_graphs()
    if joined is None:
        filled = [part for part in parts if len(part.atomic_number)] or parts[
            :1
        ]  # what is empty has no conformers either
        joined = {
            name: np.concatenate([getattr(part, name) for part in filled]) for name in (*NODE_FIELDS, *EDGE_FIELDS)
        }
    return GraphArrays(
        node_offset=_join_offsets([part.node_offset for part in parts]),
        edge_offset=_join_offsets([part.edge_offset for part in parts]),
        **joined,
    )


def _join_offsets(offsets: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.concatenate([np.diff(offset) for offset in offsets])
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def join_nodes(
    graph: GraphArrays, atomic_number: np.ndarray, source: np.ndarray, target: np.ndarray, vector: np.ndarray
) -> GraphArrays:
    """Return one graph with further nodes and the edges to them.

    Not collective.

    Parameters
    ----------
    graph
        Of a single sample.
    atomic_number
        ``(m,)`` of the new nodes.
    source, target, vector
        Of the new edges: nodes of the graph, numbers among the new nodes, Å.
    """
    nodes = len(graph.atomic_number)
    count, edges = nodes + len(atomic_number), len(graph.edge_source) + len(source)
    return GraphArrays(
        np.array([0, count]),
        np.concatenate([graph.atomic_number, atomic_number.astype(graph.atomic_number.dtype)]),
        np.array([0, edges]),
        np.concatenate([graph.edge_source, source.astype(graph.edge_source.dtype)]),
        np.concatenate([graph.edge_target, (target + nodes).astype(graph.edge_target.dtype)]),
        np.concatenate([graph.edge_vector, vector]),
        np.concatenate([graph.edge_bond, np.zeros(len(source), graph.edge_bond.dtype)]),
        np.concatenate([graph.formal_charge, np.zeros(len(atomic_number), graph.formal_charge.dtype)]),
        np.concatenate([graph.partial_charge, np.zeros(len(atomic_number), graph.partial_charge.dtype)]),
    )


def atoms_only(graphs: GraphArrays) -> GraphArrays:
    """Return graphs without the nodes that are no atoms, and without their edges. Not collective."""
    is_atom = graphs.atomic_number > 0
    if is_atom.all():
        return graphs
    before = np.concatenate([[0], np.cumsum(is_atom)])  # atoms before each node
    node_offset = before[graphs.node_offset]
    first = np.repeat(graphs.node_offset[:-1], np.diff(graphs.edge_offset))
    source, target = graphs.edge_source + first, graphs.edge_target + first
    kept = is_atom[source] & is_atom[target]
    edge_offset = np.concatenate([[0], np.cumsum(kept)])[graphs.edge_offset]
    new_first = np.repeat(node_offset[:-1], np.diff(edge_offset))
    picked = graphs._picked(node_offset, np.flatnonzero(is_atom), edge_offset, np.flatnonzero(kept))
    return replace(picked, edge_source=before[source[kept]] - new_first, edge_target=before[target[kept]] - new_first)
