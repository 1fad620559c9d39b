"""Batches as torch tensors, and what every source of samples offers to a training problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hpcdeq.data.graphs import GraphArrays, Rows

NONE = torch.zeros(0, dtype=torch.int64)  # not given


@dataclass(frozen=True)
class GraphBatch:
    """The graphs of several samples as one disconnected graph of ``n`` nodes and ``E`` edges.

    Edge ``e`` says that ``edge_source[e]`` (j) is a neighbour of ``edge_target[e]`` (i); its vector is the position of
    the periodic image of j minus the position of i.

    Attributes
    ----------
    atomic_number
        ``(n,)`` int64; 0: no atom, the centre of a void.
    edge_source, edge_target
        ``(E,)`` int64, nodes numbered over the whole batch.
    edge_vector
        ``(E, 3)`` Å.
    node_graph
        ``(n,)`` int64, non-decreasing: the sample that each node belongs to.
    num_graphs
        Number of samples ``b``.
    edge_bond
        ``(E,)`` int64, numbers in `hpcdeq.data.graphs.BONDS`; zeros unless given.
    formal_charge
        ``(n,)`` int64; zeros unless given.
    partial_charge
        ``(n,)`` elementary charges; zeros unless given.
    conformers
        ``(n, C, 3)`` Å, positions in C conformers; C = 0 unless given.
    degree
        Edges into every node, where that is the same number for all and the edges are grouped by target; otherwise 0.
    """

    atomic_number: torch.Tensor
    edge_source: torch.Tensor
    edge_target: torch.Tensor
    edge_vector: torch.Tensor
    node_graph: torch.Tensor
    num_graphs: int
    edge_bond: torch.Tensor = NONE
    formal_charge: torch.Tensor = NONE
    partial_charge: torch.Tensor = NONE
    conformers: torch.Tensor = NONE
    degree: int = 0

    def __post_init__(self) -> None:
        """Fill in zeros for what is not given."""
        if self.edge_bond is NONE:
            object.__setattr__(self, "edge_bond", torch.zeros_like(self.edge_source))
        if self.formal_charge is NONE:
            object.__setattr__(self, "formal_charge", torch.zeros_like(self.atomic_number))
        if self.partial_charge is NONE:
            object.__setattr__(self, "partial_charge", self.edge_vector.new_zeros(len(self.atomic_number)))
        if self.conformers is NONE:
            object.__setattr__(self, "conformers", self.edge_vector.new_zeros(len(self.atomic_number), 0, 3))

    def __len__(self) -> int:
        """Return the number of samples. Not collective."""
        return self.num_graphs

    @property
    def edge_distance(self) -> torch.Tensor:
        """The length of every edge, ``(E,)`` Å."""
        return torch.linalg.vector_norm(self.edge_vector, dim=1)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> GraphBatch:
        """Return the batch in another precision or on another device.

        Not collective. Only floating tensors change their type; tensors that fit already are shared.
        """
        return GraphBatch(
            self.atomic_number.to(device=device),
            self.edge_source.to(device=device),
            self.edge_target.to(device=device),
            self.edge_vector.to(device=device, dtype=dtype),
            self.node_graph.to(device=device),
            self.num_graphs,
            self.edge_bond.to(device=device),
            self.formal_charge.to(device=device),
            self.partial_charge.to(device=device, dtype=dtype),
            self.conformers.to(device=device, dtype=dtype),
            self.degree,
        )


Inputs = torch.Tensor | GraphBatch
RowsLike = Rows | torch.Tensor


class SampleSource(Protocol):
    """What a training problem asks of a data set: this rank's samples, and their place among all.

    Attributes
    ----------
    task
        ``classification`` or ``regression``.
    count
        Number of samples on all ranks together.
    offset
        Global number of this rank's first sample.
    targets
        This rank's ``(b,)`` int64 labels, or ``(b, T)`` numbers; ``b`` may be 0.
    input_shape
        Shape of one sample's input; ``()`` for graphs.
    output_size
        Number of classes, or ``T``.
    """

    task: str
    count: int
    offset: int
    targets: torch.Tensor
    input_shape: tuple[int, ...]
    output_size: int

    def __len__(self) -> int:
        """Return the number of samples of this rank. Not collective."""
        ...

    def batch(self, rows: RowsLike) -> tuple[Inputs, torch.Tensor]:
        """Return inputs and targets of some of this rank's samples. Not collective."""
        ...


def graph_batch(graphs: GraphArrays, rows: RowsLike, dtype: torch.dtype = torch.float64) -> GraphBatch:
    """Build a batch from some samples of ragged arrays.

    Not collective. The tensors may share memory with the arrays where ``rows`` is a slice.

    Parameters
    ----------
    graphs
        Graphs of all samples at hand.
    rows
        A slice or ``(b,)`` integers: which samples, in which order.
    dtype
        Of the edge vectors.
    """
    picked = graphs.take(numpy_rows(rows))
    nodes, edges = np.diff(picked.node_offset), np.diff(picked.edge_offset)
    first_node = np.repeat(picked.node_offset[:-1], edges)
    target = picked.edge_target + first_node
    return GraphBatch(
        torch.from_numpy(picked.atomic_number.astype(np.int64)),
        torch.from_numpy(picked.edge_source + first_node),
        torch.from_numpy(target),
        torch.from_numpy(picked.edge_vector).to(dtype),
        torch.from_numpy(np.repeat(np.arange(len(picked)), nodes)),
        len(picked),
        torch.from_numpy(picked.edge_bond.astype(np.int64)),
        torch.from_numpy(picked.formal_charge.astype(np.int64)),
        torch.from_numpy(picked.partial_charge).to(dtype),
        torch.from_numpy(picked.conformers).to(dtype),
        _degree(target, len(picked.atomic_number)),
    )


def _degree(target: np.ndarray, nodes: int) -> int:
    """Return the edges into every node, or 0 if they are not as many everywhere, or not grouped by node."""
    degree = len(target) // nodes if nodes else 0
    return degree if degree and np.array_equal(target, np.repeat(np.arange(nodes), degree)) else 0


def graph_arrays(batch: GraphBatch) -> GraphArrays:
    """Take a batch apart into ragged arrays, edges grouped by sample.

    Not collective. The inverse of `graph_batch` over all samples.
    """
    node_graph = batch.node_graph.cpu().numpy()
    source, target = batch.edge_source.cpu().numpy(), batch.edge_target.cpu().numpy()
    edge_graph = node_graph[target]
    order = np.argsort(edge_graph, kind="stable")
    bounds = np.arange(batch.num_graphs + 1)
    node_offset = np.searchsorted(node_graph, bounds)
    first_node = node_offset[edge_graph[order]]
    return GraphArrays(
        node_offset,
        batch.atomic_number.cpu().numpy(),
        np.searchsorted(edge_graph[order], bounds),
        source[order] - first_node,
        target[order] - first_node,
        batch.edge_vector.detach().cpu().numpy()[order],
        batch.edge_bond.cpu().numpy()[order],
        batch.formal_charge.cpu().numpy(),
        batch.partial_charge.detach().cpu().numpy(),
        batch.conformers.detach().cpu().numpy(),
    )


def numpy_rows(rows: RowsLike) -> Rows:
    """Return a slice as it is, and indices as a numpy array. Not collective."""
    if isinstance(rows, torch.Tensor):
        return rows.detach().cpu().numpy()
    return rows


def taken(values: torch.Tensor, rows: RowsLike) -> torch.Tensor:
    """Return some rows of a tensor: a view for a slice, a copy for indices. Not collective."""
    if isinstance(rows, slice):
        return values[rows]
    return values.index_select(0, torch.as_tensor(rows, device=values.device))  # half the time of values[rows]
