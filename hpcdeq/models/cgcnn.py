"""Crystal graph convolutional network: explicit message passing, to compare equilibrium models with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcdeq.data import GraphBatch
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.elements import ElementEmbedding
from hpcdeq.models.message_passing import EdgeFeatures, GatedConvolution, Pooling


@dataclass(frozen=True)
class CgcnnConfig:
    """Settings of the crystal graph convolutional network (Xie and Grossman 2018, arXiv 1710.10324).

    Attributes
    ----------
    width
        Numbers of an atom.
    depth
        Convolutions.
    radial
        Gaussians that a distance is written in.
    cutoff
        Centre of the last of them, Å.
    head
        Units of the hidden layer after pooling.
    """

    width: int = 64
    depth: int = 3
    radial: int = 24
    cutoff: float = 6.0
    head: int = 128


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
        self.pooling = Pooling(config.width)
        self.hidden = nn.Linear(2 * config.width, config.head)
        self.head = nn.Linear(config.head, output_size)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(B, output_size)`` for a batch of B graphs."""
        h, edges = self.element(batch.atomic_number), self.edges(batch)
        for convolution in self.convolutions:
            h = convolution(h, edges, batch)
        return self.head(torch.nn.functional.silu(self.hidden(self.pooling(h, batch))))


register("cgcnn", ModelKind(CgcnnConfig, "graph", Cgcnn))
