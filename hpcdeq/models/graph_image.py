"""Graphs as images, node x neighbour x channel, and the convolutional DEQ on them (Deep AndersoNN, arXiv 2407.19724)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, silu

from hpcdeq.data import GraphBatch
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import OptionError
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import BoundedConvolution
from hpcdeq.models.conv_deq import KERNEL, square_plus
from hpcdeq.models.elements import ElementEmbedding
from hpcdeq.models.message_passing import NONE_ALLOWED, EdgeFeatures, Head, Unrolled


@dataclass(frozen=True)
class GraphImageConfig:
    """Settings of the graph-image convolutional DEQ.

    Attributes
    ----------
    width
        Channels of the state.
    neighbours
        Columns of the image: an atom's nearest neighbours, nearest first.
    radial
        Gaussians that a distance is written in.
    cutoff
        Centre of the last of them, Å.
    head
        Units of the hidden layer after pooling.
    auxiliary
        Numbers that are learned beside the outputs (set by the data, see `hpcdeq.problem.auxiliary`).
    bound
        Bound on the product of the two convolutions' norms; below 1 every graph has its one fixed point.
    contraction
        That product at initialisation.
    """

    width: int = 48
    neighbours: int = 12
    radial: int = 24
    cutoff: float = 6.0
    head: int = 128
    auxiliary: int = field(default=0, metadata=NONE_ALLOWED)
    bound: float = 0.95
    contraction: float = 0.8


@dataclass(frozen=True)
class UnrolledGraphImageConfig(GraphImageConfig):
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
    image
        ``(B, d, N, K)`` what the stem makes of each graph image, zero outside of the graph.
    mask
        ``(B, 1, N, K)`` ones where an atom has a neighbour.
    first, second
        ``(d, d, 3, 3)`` kernels.
    """

    image: Tensor
    mask: Tensor
    first: Tensor
    second: Tensor


class GraphImageCell(nn.Module):
    """z ↦ m ∘ σ(s + K₂ ∗ (m ∘ σ(K₁ ∗ z))) with σ = `square_plus`: it contracts by ‖K₁‖ ‖K₂‖.

    The mask m keeps what is outside of the graph at zero, as the borders of an image are: how far an image is padded for the
    sake of its batch mates changes nothing.
    """

    def initial_state(self, given: Injection) -> Tensor:
        """Return the zero state ``(B, d, N, K)``."""
        return torch.zeros_like(given.image)

    def select(self, given: Injection, keep: Tensor) -> Injection:
        """Return the input of some of the graphs, numbered by keep ``(k,)``."""
        return replace(given, image=given.image.index_select(0, keep), mask=given.mask.index_select(0, keep))

    def forward(self, z: Tensor, given: Injection) -> Tensor:
        inner = given.mask * square_plus(conv2d(z, given.first, padding=KERNEL // 2))
        return given.mask * square_plus(given.image + conv2d(inner, given.second, padding=KERNEL // 2))


def slots(batch: GraphBatch, neighbours: int) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Return which edges have a place in the graph image, where it is, and the image's size.

    Not collective.

    Returns
    -------
    tuple
        ``(e,)`` edges; ``(e,)`` places in the flattened ``(B, N, K)``; B, N (atoms of the largest graph), K.
    """
    nodes = torch.bincount(batch.node_graph, minlength=batch.num_graphs)
    rows = int(nodes.max()) if len(nodes) else 0
    first_node = nodes.cumsum(0) - nodes
    # Grouped by atom, nearest first: the order in which files have edges, and any other batch need not.
    by_distance = torch.argsort(batch.edge_distance.detach(), stable=True)
    order = by_distance[torch.argsort(batch.edge_target[by_distance], stable=True)]
    target = batch.edge_target[order]
    degree = torch.bincount(target, minlength=len(batch.node_graph))
    column = torch.arange(len(order), device=order.device) - (degree.cumsum(0) - degree)[target]
    graph = batch.node_graph[target]
    row = target - first_node[graph]
    kept = column < neighbours
    place = ((graph * rows + row) * neighbours + column)[kept]
    return order[kept], place, (batch.num_graphs, rows, neighbours)


class GraphImage(nn.Module):
    """Class scores, or numbers, of a graph of atoms seen as an image.

    Parameters
    ----------
    config
        Sizes and contraction.
    input_shape
        Not used: a graph has none.
    output_size
        Number of classes or of target numbers.

    Raises
    ------
    OptionError
        The contraction is not within what the bound allows.
    """

    def __init__(self, config: GraphImageConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        if not 0 < config.contraction < config.bound:
            raise OptionError(
                f"contraction {config.contraction} at initialisation must lie between 0 and the bound {config.bound}"
            )
        d = config.width
        self.neighbours = config.neighbours
        self.element = ElementEmbedding(d)
        self.edges = EdgeFeatures(config.radial, config.cutoff)
        self.own = nn.Linear(d, d)
        self.other = nn.Linear(d, d, bias=False)
        self.edge = nn.Linear(self.edges.width, d, bias=False)
        bound, contraction = math.sqrt(config.bound), math.sqrt(config.contraction)
        self.first = BoundedConvolution(d, d, KERNEL, bound, contraction)
        self.second = BoundedConvolution(d, d, KERNEL, bound, contraction)
        cell = GraphImageCell()
        self.equilibrium: nn.Module = (
            Unrolled(cell, config.steps) if isinstance(config, UnrolledGraphImageConfig) else FixedPoint(cell)
        )
        self.head = Head(3 * d, config.head, output_size, config.auxiliary)

    def inject(self, batch: GraphBatch) -> tuple[Injection, Tensor]:
        """Return what the cell needs of a batch, and the atoms' vectors ``(n, d)``."""
        atoms = self.element(batch)
        edge, place, size = slots(batch, self.neighbours)
        pixel = self.own(atoms).index_select(0, batch.edge_target[edge])
        pixel = pixel + self.other(atoms).index_select(0, batch.edge_source[edge])
        pixel = silu(pixel + self.edge(self.edges(batch)[edge]))
        flat = pixel.new_zeros(math.prod(size), pixel.shape[1]).index_copy(0, place, pixel)
        mask = pixel.new_zeros(math.prod(size)).index_fill(0, place, 1.0)
        image = flat.view(*size, -1).permute(0, 3, 1, 2).contiguous()
        return Injection(image, mask.view(size[0], 1, *size[1:]), self.first(), self.second()), atoms

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(B, output_size)`` for a batch of B graphs."""
        injection, atoms = self.inject(batch)
        z = self.equilibrium(injection)
        count = injection.mask.sum(dim=(2, 3)).clamp(min=1.0)
        peak = z.amax(dim=(2, 3))  # square plus is positive: what is masked is never the largest
        mean = atoms.new_zeros(batch.num_graphs, atoms.shape[1]).index_add(0, batch.node_graph, atoms)
        nodes = torch.bincount(batch.node_graph, minlength=batch.num_graphs).clamp(min=1)[:, None]
        features = torch.cat([z.sum(dim=(2, 3)) / count, peak, mean / nodes], dim=1)
        scores: Tensor = self.head(features)
        return scores


register("graph_image_deq", ModelKind(GraphImageConfig, "graph", GraphImage))
register("graph_image_unrolled", ModelKind(UnrolledGraphImageConfig, "graph", GraphImage))
