"""Explicit message passing between atoms, and unrolled cells: what equilibrium models begin with, and are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hpcdeq.data import GraphBatch
from hpcdeq.data.graphs import BONDS
from hpcdeq.models.blocks import RadialBasis


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
        mixed = self.edge(edges)
        mixed = mixed + self.own(h).index_select(0, batch.edge_target)
        mixed = mixed + self.other(h).index_select(0, batch.edge_source)
        gate, core = mixed.chunk(2, dim=1)
        total = torch.zeros_like(h).index_add(0, batch.edge_target, torch.sigmoid(gate) * silu(core))
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
    """One vector a graph from its atoms': their mean, and their mean weighted by a learned attention.

    Parameters
    ----------
    width
        Numbers of an atom.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        """Return ``(B, 2 width)``."""
        graphs, count = batch.node_graph, batch.num_graphs
        weight = torch.sigmoid(self.score(h))
        sizes = torch.bincount(graphs, minlength=count).clamp(min=1)[:, None].to(h.dtype)
        sums = h.new_zeros(count, 2 * h.shape[1] + 1).index_add(0, graphs, torch.cat([h, weight * h, weight], dim=1))
        width = h.shape[1]
        return torch.cat([sums[:, :width] / sizes, sums[:, width : 2 * width] / (sums[:, -1:] + 1e-6)], dim=1)
