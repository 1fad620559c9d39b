"""Explicit message passing between atoms, and unrolled cells: what equilibrium models begin with, and are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hpcdeq.data import GraphBatch
from hpcdeq.data.graphs import BONDS
from hpcdeq.errors import OptionError
from hpcdeq.models.blocks import OutputScale, RadialBasis
from hpcdeq.models.descriptors import DescriptorFeatures

NONE_ALLOWED = {"least": 0}
SMALL = 1e-3  # of a dipole's length, against those of order one


def at_targets(h: Tensor, target: Tensor, degree: int) -> Tensor:
    """Return what stands at each edge's target, ``(E, d)`` from ``(n, d)``.

    Not collective.

    Parameters
    ----------
    h
        Numbers of every node.
    target, degree
        As in `hpcdeq.data.GraphBatch`: with a degree nothing is looked up, and derivatives are plain sums.
    """
    if degree:
        return h[:, None].expand(-1, degree, -1).reshape(len(target), -1)
    return h.index_select(0, target)


def sum_at_targets(weight: Tensor, message: Tensor, target: Tensor, nodes: int, degree: int) -> Tensor:
    """Return Σ weight ∘ message over the edges into each node, ``(n, d)`` from ``(E, d)``; see `at_targets`. Not collective."""
    if degree:
        shape = nodes, degree, -1
        return (weight.view(shape) * message.view(shape)).sum(dim=1)
    return message.new_zeros(nodes, message.shape[1]).index_add(0, target, weight * message)


class EdgeFeatures(nn.Module):
    """Each edge's distance in Gaussians, and its bond.

    Parameters
    ----------
    radial
        Gaussians that a distance is written in.
    cutoff
        Centre of the last of them, Å.
    """

    def __init__(self, radial: int, cutoff: float) -> None:
        super().__init__()
        self.radial = RadialBasis(radial, cutoff)
        self.width = radial + len(BONDS)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(E, width)``."""
        bonds = nn.functional.one_hot(batch.edge_bond, len(BONDS)).to(batch.edge_vector.dtype)
        return torch.cat([self.radial(batch.edge_distance), bonds], dim=1)


class GatedConvolution(nn.Module):
    """hᵢ ↦ hᵢ + N(meanⱼ sigmoid(F vᵢⱼ) ∘ silu(S vᵢⱼ)), vᵢⱼ = [hᵢ, hⱼ, eᵢⱼ] (CGCNN: Xie and Grossman 2018).

    N is a normalisation of each atom alone (Ba et al. 2016), where theirs is one over the batch: the loss of a sample does
    not depend on its batch. F hᵢ and F hⱼ are computed once an atom, not once an edge.

    Parameters
    ----------
    width
        Numbers of an atom.
    edge_width
        Numbers of an edge.
    """

    def __init__(self, width: int, edge_width: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, 2 * width)
        self.other = nn.Linear(width, 2 * width, bias=False)
        self.edge = nn.Linear(edge_width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor, edges: Tensor, batch: GraphBatch) -> Tensor:
        """Return ``(n, width)`` from ``(n, width)`` atoms and ``(E, edge_width)`` edges."""
        mixed = self.edge(edges) + self.other(h).index_select(0, batch.edge_source)
        mixed = mixed + at_targets(self.own(h), batch.edge_target, batch.degree)
        gate, core = mixed.chunk(2, dim=1)
        total = sum_at_targets(torch.sigmoid(gate), silu(core), batch.edge_target, len(h), batch.degree)
        degree = torch.bincount(batch.edge_target, minlength=len(h)).clamp(min=1)[:, None].to(h.dtype)
        return h + self.norm(total / degree)


class Unrolled(nn.Module):
    """A cell applied a fixed number of times from its initial state: the explicit twin of a fixed point.

    Parameters
    ----------
    cell
        ``cell(z, x) -> z`` with a method ``initial_state(x)``.
    steps
        How often.
    """

    def __init__(self, cell: nn.Module, steps: int) -> None:
        super().__init__()
        self.cell = cell
        self.steps = steps

    def forward(self, x: Any) -> Tensor:
        """Return the last state."""
        z: Tensor = self.cell.initial_state(x)  # type: ignore[operator]
        for _ in range(self.steps):
            z = self.cell(z, x)
        return z


class Pooling(nn.Module):
    """One vector a graph from its atoms': their mean, their mean weighted by a learned attention, least and largest numbers.

    The extremes tell what a mean dilutes: that an element is there at all, or how wide the widest void is.

    Parameters
    ----------
    width
        Numbers of an atom.
    """

    PARTS = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        """Return ``(B, PARTS width)``."""
        graphs, count = batch.node_graph, batch.num_graphs
        weight = torch.sigmoid(self.score(h))
        sizes = torch.bincount(graphs, minlength=count).clamp(min=1)[:, None].to(h.dtype)
        sums = h.new_zeros(count, 2 * h.shape[1] + 1).index_add(0, graphs, torch.cat([h, weight * h, weight], dim=1))
        width = h.shape[1]
        means = [sums[:, :width] / sizes, sums[:, width : 2 * width] / (sums[:, -1:] + 1e-6)]
        place, none = graphs[:, None].expand(-1, width), h.new_zeros(count, width)
        extremes = [none.scatter_reduce(0, place, h, kind, include_self=False) for kind in ("amin", "amax")]
        return torch.cat([*means, *extremes], dim=1)


class DipolePooling(nn.Module):
    """Lengths of vectors, one a channel, that a graph's atoms add up to: |Σ qᵢ xᵢ|.

    qᵢ is an atom's partial charge and what comes and goes along its edges, Σⱼ t(hⱼ, hᵢ, eⱼᵢ) - t(hᵢ, hⱼ, eᵢⱼ), so that the sum is a
    dipole moment: what a molecule's polarity is made of, and no pooling of numbers can find. It does not change when a molecule
    without charge is turned or moved, and it grows with the molecule. Lengths are a mean over conformers: charges are those
    of the first, places each one's own. Where atoms have no places but edges have vectors, |Σ t(hᵢ, hⱼ, eᵢⱼ) rᵢⱼ|; of a
    periodic structure that grows with the cell, which is no property of the structure.

    Parameters
    ----------
    width, edge_width
        Numbers of an atom and of an edge.
    channels
        Vectors.
    conformer_radial
        Gaussians in which distances weigh the conformers (`ConformerWeights`); 0: all count alike.
    cutoff
        Centre of the last of them, Å.
    """

    def __init__(
        self, width: int, edge_width: int, channels: int, conformer_radial: int = 0, cutoff: float = 6.0
    ) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.other = nn.Linear(width, width, bias=False)
        self.edge = nn.Linear(edge_width, width, bias=False)
        self.transfer = nn.Linear(width, channels, bias=False)
        self.weights = ConformerWeights(width, conformer_radial, cutoff) if conformer_radial else None

    def forward(self, h: Tensor, edges: Tensor, batch: GraphBatch) -> Tensor:
        """Return ``(B, channels)`` from ``(n, width)`` atoms and ``(E, edge_width)`` edges."""
        mixed = self.edge(edges) + self.other(h).index_select(0, batch.edge_source)
        mixed = silu(mixed + at_targets(self.own(h), batch.edge_target, batch.degree))
        transfer = self.transfer(mixed)
        if batch.conformers.shape[1]:
            charge = batch.partial_charge[:, None].expand(-1, transfer.shape[1])
            charge = charge.index_add(0, batch.edge_source, transfer).index_add(0, batch.edge_target, -transfer)
            moment, graph = charge[:, None, :, None] * batch.conformers[:, :, None], batch.node_graph
        else:
            moment = (transfer[:, :, None] * batch.edge_vector[:, None])[:, None]
            graph = batch.node_graph.index_select(0, batch.edge_target)
        total = moment.new_zeros(batch.num_graphs, *moment.shape[1:]).index_add(0, graph, moment)
        lengths = (total.square().sum(dim=3) + SMALL**2).sqrt()  # with derivatives at zero, too
        if self.weights is None or lengths.shape[1] == 1:
            return lengths.mean(dim=1)
        return (self.weights(mixed, batch)[:, :, None] * lengths).sum(dim=1)


class ConformerWeights(nn.Module):
    """How much each conformer of a molecule counts: softmax of -Σ Σₖ aₖ(edge) φₖ(length of the edge there), learned.

    An energy of pairs of atoms, in the form of Boltzmann weights, but of what the targets speak of: the conformer that
    a property was computed or measured of need not be that of the least energy. All count alike to begin with.

    Parameters
    ----------
    width
        Numbers that are given of an edge, of the atoms at its ends.
    radial, cutoff
        Gaussians φ, and the centre of the last one in Å.
    """

    def __init__(self, width: int, radial: int, cutoff: float) -> None:
        super().__init__()
        self.radial = RadialBasis(radial, cutoff)
        self.strength = nn.Linear(width, radial, bias=False)
        nn.init.zeros_(self.strength.weight)

    def forward(self, mixed: Tensor, batch: GraphBatch) -> Tensor:
        """Return ``(B, C)``, adding up to one over the conformers, from ``(E, width)`` edges."""
        source, target = batch.edge_source, batch.edge_target
        places = batch.conformers
        length = torch.linalg.vector_norm(places.index_select(0, source) - places.index_select(0, target), dim=2)
        wave = self.radial(length.flatten()).view(*length.shape, -1)
        energy = torch.einsum("ecr,er->ec", wave, self.strength(mixed))
        graph = batch.node_graph.index_select(0, target)
        total = energy.new_zeros(batch.num_graphs, energy.shape[1]).index_add(0, graph, energy)
        return torch.softmax(-total, dim=1)


@dataclass(frozen=True)
class GraphConfig:
    """Settings that models of graphs share.

    Attributes
    ----------
    width
        Numbers of an atom.
    radial
        Gaussians that a distance is written in.
    cutoff
        Centre of the last of them, Å.
    dipole
        Vectors that the atoms add up to, whose lengths join what is pooled: for molecules with coordinates.
    conformer_radial
        Gaussians in which distances weigh a molecule's conformers for these; 0: all count alike.
    head
        Units of the hidden layer after pooling.
    descriptors
        Features of simple descriptors, such as of the composition, which join what is pooled (`DescriptorFeatures`).
    auxiliary
        Numbers that are learned beside the outputs (set by the data, see `hpcdeq.problem.auxiliary`).
    dropout
        Part of what was pooled that is left out at random in training (Srivastava et al. 2014); only for methods on
        minibatches.
    """

    width: int = 64
    radial: int = 24
    cutoff: float = 6.0
    dipole: int = field(default=0, metadata=NONE_ALLOWED)
    conformer_radial: int = field(default=0, metadata=NONE_ALLOWED)
    head: int = 128
    descriptors: int = field(default=0, metadata=NONE_ALLOWED)
    auxiliary: int = field(default=0, metadata=NONE_ALLOWED)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a dropout out of range, and weights of conformers for nothing."""
        if self.conformer_radial and not self.dipole:
            raise OptionError(
                "conformer_radial weighs conformers for the vectors of a dipole: give dipole=16, too, or leave it out"
            )
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout is {self.dropout}: give a number from 0 to below 1")


class Head(nn.Module):
    """Class scores, or numbers, from what was pooled: a hidden layer, and for numbers the scale of the training targets.

    Parameters
    ----------
    width
        Numbers that were pooled.
    hidden
        Units of the hidden layer.
    output_size
        Number of classes or of target numbers.
    auxiliary
        Further numbers that it gives behind them in training, from the same hidden layer.
    """

    def __init__(self, width: int, hidden: int, output_size: int, auxiliary: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.last = nn.Linear(hidden, output_size)
        self.scale = OutputScale(output_size)
        self.beside = nn.Linear(hidden, auxiliary) if auxiliary else None

    def forward(self, pooled: Tensor) -> Tensor:
        """Return ``(B, output_size)``, in training ``(B, output_size + auxiliary)``, from ``(B, width)``."""
        hidden = silu(self.hidden(pooled))
        outputs: Tensor = self.scale(self.last(hidden))
        if self.beside is None or not self.training:
            return outputs
        return torch.cat([outputs, self.beside(hidden)], dim=1)


class Readout(nn.Module):
    """Class scores, or numbers, of a graph from its atoms: pooling and a hidden layer.

    Parameters
    ----------
    config
        Sizes.
    width, edge_width
        Numbers of an atom and of an edge.
    output_size
        Number of classes or of target numbers.
    """

    def __init__(self, config: GraphConfig, width: int, edge_width: int, output_size: int) -> None:
        super().__init__()
        self.pooling = Pooling(width)
        self.dipole = (
            DipolePooling(width, edge_width, config.dipole, config.conformer_radial, config.cutoff)
            if config.dipole
            else None
        )
        self.descriptors = DescriptorFeatures(config.descriptors, config.dropout) if config.descriptors else None
        self.dropout = nn.Dropout(config.dropout)
        pooled = Pooling.PARTS * width + config.dipole + config.descriptors
        self.head = Head(pooled, config.head, output_size, config.auxiliary)

    def forward(self, h: Tensor, edges: Tensor, batch: GraphBatch) -> Tensor:
        """Return ``(B, output_size)`` from ``(n, width)`` atoms and ``(E, edge_width)`` edges."""
        pooled = self.pooling(h, batch)
        if self.dipole is not None:
            pooled = torch.cat([pooled, self.dipole(h, edges, batch)], dim=1)
        pooled = self.dropout(pooled)
        if self.descriptors is not None:  # which leave out some of their own
            pooled = torch.cat([pooled, self.descriptors(batch)], dim=1)
        scores: Tensor = self.head(pooled)
        return scores
