"""Crystal graph convolutional network: explicit message passing, to compare equilibrium models with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hpcdeq.data import GraphBatch
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.elements import ElementEmbedding
from hpcdeq.models.message_passing import EdgeFeatures, GatedConvolution, GraphConfig, Readout


@dataclass(frozen=True)
class CgcnnConfig(GraphConfig):
    """Settings of the crystal graph convolutional network (Xie and Grossman 2018, arXiv 1710.10324).

    Attributes
    ----------
    depth
        Convolutions.
    """

    depth: int = 3


class Cgcnn(nn.Module):
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

    def __init__(self, config: CgcnnConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        self.element = ElementEmbedding(config.width)
        self.edges = EdgeFeatures(config.radial, config.cutoff)
        self.convolutions = nn.ModuleList(GatedConvolution(config.width, self.edges.width) for _ in range(config.depth))
        self.readout = Readout(config, config.width, self.edges.width, output_size)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(B, output_size)`` for a batch of B graphs."""
        h, edges = self.element(batch), self.edges(batch)
        for convolution in self.convolutions:
            h = convolution(h, edges, batch)
        return self.readout(h, edges, batch)


register("cgcnn", ModelKind(CgcnnConfig, "graph", Cgcnn))
