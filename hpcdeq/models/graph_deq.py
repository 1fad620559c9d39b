"""Graph DEQ: message passing between atoms as the cell, atoms and neighbour distances as its injection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpcdeq.data import GraphBatch
from hpcdeq.deq import FixedPoint
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import BoundedWeight
from hpcdeq.models.elements import ElementEmbedding
from hpcdeq.models.message_passing import (
    NONE_ALLOWED,
    EdgeFeatures,
    GatedConvolution,
    GraphConfig,
    Readout,
    Unrolled,
    at_targets,
    sum_at_targets,
)


@dataclass(frozen=True)
class GraphDeqConfig(GraphConfig):
    """Settings of the graph DEQ.

    Attributes
    ----------
    encoder
        Explicit convolutions before the equilibrium, which say what is injected.
    bound
        Bound on the spectral norms of the two recurrent weights together; below 1 every graph has its fixed point
        whatever the weights become.
    contraction
        Those norms at initialisation.
    """

    encoder: int = field(default=1, metadata=NONE_ALLOWED)
    bound: float = 0.95
    contraction: float = 0.6


@dataclass(frozen=True)
class UnrolledGraphConfig(GraphDeqConfig):
    """Settings of its explicit twin.

    Attributes
    ----------
    steps
        Times that the cell is applied.
    """

    steps: int = 10


@dataclass(frozen=True)
class Injection:
    """What the cell is given besides the state.

    Attributes
    ----------
    node
        ``(n, d)`` bias of each atom.
    gate
        ``(E, d)`` weight of each edge's message.
    source, target
        ``(E,)`` atoms that a message goes from and to.
    node_graph
        ``(n,)`` graph of each atom.
    own, message
        ``(d, d)`` recurrent weights W and M.
    degree
        Edges into every atom where that is one number, else 0; see `hpcdeq.data.GraphBatch`.
    """

    node: Tensor
    gate: Tensor
    source: Tensor
    target: Tensor
    node_graph: Tensor
    own: Tensor
    message: Tensor
    degree: int = 0


class MessageCell(nn.Module):
    """zᵢ ↦ tanh(W zᵢ + Σⱼ gᵢⱼ ∘ M zⱼ + sᵢ).

    A gate is at most one over the root of (edges into i) times (edges out of j), so that the sum over neighbours has a
    norm of at most one, and tanh does not stretch: the cell contracts by ‖W‖ + ‖M‖.
    """

    def initial_state(self, injection: Injection) -> Tensor:
        """Return the zero state ``(n, d)``."""
        return torch.zeros_like(injection.node)

    def select(self, injection: Injection, keep: Tensor) -> Injection:
        """Return the injection of some graphs, their atoms and edges in the order that they had."""
        graph = injection.node_graph
        place = graph.new_full((int(graph[-1]) + 1,), -1)
        place[keep] = torch.arange(len(keep), device=keep.device)
        new_graph = place.index_select(0, graph)
        atoms = (new_graph >= 0).nonzero().squeeze(1)
        new_atom = torch.full_like(graph, -1)
        new_atom[atoms] = torch.arange(len(atoms), device=atoms.device)
        target = new_atom.index_select(0, injection.target)
        edges = (target >= 0).nonzero().squeeze(1)
        return Injection(
            injection.node.index_select(0, atoms),
            injection.gate.index_select(0, edges),
            new_atom.index_select(0, injection.source.index_select(0, edges)),
            target.index_select(0, edges),
            new_graph.index_select(0, atoms),
            injection.own,
            injection.message,
            injection.degree,
        )

    def forward(self, z: Tensor, injection: Injection) -> Tensor:
        message = (z @ injection.message.T).index_select(0, injection.source)
        received = sum_at_targets(injection.gate, message, injection.target, len(z), injection.degree)
        return torch.tanh(torch.addmm(received + injection.node, z, injection.own.T))


class GraphDeq(nn.Module):
    """Class scores, or numbers, of a graph of atoms.

    Parameters
    ----------
    config
        Sizes.
    input_shape
        Not used: a graph has none.
    output_size
        Number of classes or of target numbers.
    """

    def __init__(self, config: GraphDeqConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        d = config.width
        self.element = ElementEmbedding(d)
        self.edges = EdgeFeatures(config.radial, config.cutoff)
        self.encoder = nn.ModuleList(GatedConvolution(d, self.edges.width) for _ in range(config.encoder))
        self.edge_gate = nn.Linear(self.edges.width, d)
        self.source_gate = nn.Linear(d, d, bias=False)
        self.target_gate = nn.Linear(d, d, bias=False)
        self.own = BoundedWeight(d, config.bound / 2, config.contraction / 2)
        self.message = BoundedWeight(d, config.bound / 2, config.contraction / 2)
        cell = MessageCell()
        self.equilibrium: nn.Module = (
            Unrolled(cell, config.steps)
            if isinstance(config, UnrolledGraphConfig)
            else FixedPoint(cell, sample_index=lambda given: given.node_graph)
        )
        self.readout = Readout(config, 2 * d, self.edges.width, output_size)

    def inject(self, batch: GraphBatch, edges: Tensor) -> Injection:
        """Return what the cell needs of a batch and its edges' features."""
        atoms = self.element(batch)
        for convolution in self.encoder:
            atoms = convolution(atoms, edges, batch)
        source, target = batch.edge_source, batch.edge_target
        into = torch.bincount(target, minlength=len(atoms)).to(atoms.dtype)
        out_of = torch.bincount(source, minlength=len(atoms)).to(atoms.dtype)
        gate = torch.tanh(
            self.edge_gate(edges)
            + self.source_gate(atoms).index_select(0, source)
            + at_targets(self.target_gate(atoms), target, batch.degree)
        )
        gate = gate / (into.index_select(0, target) * out_of.index_select(0, source)).sqrt()[:, None]
        return Injection(atoms, gate, source, target, batch.node_graph, self.own(), self.message(), batch.degree)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(B, output_size)`` for a batch of B graphs."""
        edges = self.edges(batch)
        injection = self.inject(batch, edges)
        atoms = torch.cat([self.equilibrium(injection), injection.node], dim=1)
        return self.readout(atoms, edges, batch)


register("graph_deq", ModelKind(GraphDeqConfig, "graph", GraphDeq))
register("graph_unrolled", ModelKind(UnrolledGraphConfig, "graph", GraphDeq))
