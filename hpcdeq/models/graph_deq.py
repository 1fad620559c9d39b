"""Graph DEQ: message passing between atoms as the cell, atoms and neighbour distances as its injection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcdeq.data import GraphBatch
from hpcdeq.deq import FixedPoint
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import RadialBasis, contractive_, mean_over_graphs

ELEMENTS = 119  # atomic numbers to 118, and 0 for none


@dataclass(frozen=True)
class GraphDeqConfig:
    """Settings of the graph DEQ.

    Attributes
    ----------
    width
        Numbers of an atom's state.
    radial
        Gaussians that a distance is written in.
    cutoff
        Centre of the last of them, Å.
    contraction
        Spectral norms of the two recurrent weights together at initialisation.
    """

    width: int = 32
    radial: int = 16
    cutoff: float = 6.0
    contraction: float = 0.6


@dataclass(frozen=True)
class Injection:
    """What the cell is given besides the state.

    Attributes
    ----------
    node
        ``(n, d)`` bias of each atom.
    gate
        ``(E, d)`` weight of each edge's message, in (-1, 1), divided by the number of the atom's neighbours.
    source, target
        ``(E,)`` atoms that a message goes from and to.
    node_graph
        ``(n,)`` graph of each atom.
    """

    node: Tensor
    gate: Tensor
    source: Tensor
    target: Tensor
    node_graph: Tensor


class MessageCell(nn.Module):
    """zᵢ ↦ tanh(W zᵢ + Σⱼ gᵢⱼ ∘ M zⱼ + sᵢ).

    Gates are bounded by one over the number of neighbours and tanh does not stretch: the cell contracts while the norms
    of W and of M (times the square root of an atom's largest share in other atoms' neighbourhoods) stay below one.
    """

    def __init__(self, width: int, contraction: float) -> None:
        super().__init__()
        self.own = nn.Linear(width, width, bias=False)
        self.message = nn.Linear(width, width, bias=False)
        contractive_(self.own.weight, contraction / 2)
        contractive_(self.message.weight, contraction / 2)

    def initial_state(self, injection: Injection) -> Tensor:
        """Return the zero state ``(n, d)``."""
        return torch.zeros_like(injection.node)

    def forward(self, z: Tensor, injection: Injection) -> Tensor:
        messages = self.message(z).index_select(0, injection.source) * injection.gate
        received = torch.zeros_like(z).index_add(0, injection.target, messages)
        return torch.tanh(self.own(z) + received + injection.node)


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
        self.element = nn.Embedding(ELEMENTS, d)
        self.radial = RadialBasis(config.radial, config.cutoff)
        self.distance_gate = nn.Linear(config.radial, d)
        self.source_gate = nn.Linear(d, d, bias=False)
        self.target_gate = nn.Linear(d, d, bias=False)
        self.equilibrium = FixedPoint(MessageCell(d, config.contraction), sample_index=lambda given: given.node_graph)
        self.hidden = nn.Linear(2 * d, d)
        self.head = nn.Linear(d, output_size)

    def inject(self, batch: GraphBatch) -> Injection:
        """Return what the cell needs of a batch."""
        atoms = self.element(batch.atomic_number)
        source, target = batch.edge_source, batch.edge_target
        neighbours = torch.bincount(target, minlength=len(atoms)).clamp(min=1).to(atoms.dtype)
        gate = torch.tanh(
            self.distance_gate(self.radial(batch.edge_distance))
            + self.source_gate(atoms).index_select(0, source)
            + self.target_gate(atoms).index_select(0, target)
        )
        gate = gate / neighbours.index_select(0, target)[:, None]
        return Injection(atoms, gate, source, target, batch.node_graph)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(B, output_size)`` for a batch of B graphs."""
        injection = self.inject(batch)
        z = self.equilibrium(injection)
        features = torch.cat([z, injection.node], dim=1)
        pooled = mean_over_graphs(features, batch.node_graph, batch.num_graphs)
        return self.head(torch.nn.functional.silu(self.hidden(pooled)))


register("graph_deq", ModelKind(GraphDeqConfig, "graph", GraphDeq))
