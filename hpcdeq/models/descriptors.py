"""Simple descriptors of a graph beside what a network makes of it: what the composition tells no pooling needs to find."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from hpcdeq.data import GraphBatch
from hpcdeq.data.batches import graph_arrays
from hpcdeq.data.descriptors import ELEMENT, graph_descriptors
from hpcdeq.data.graphs import no_graphs

FARTHEST = 5.0  # standard deviations from the mean that a descriptor may be


class DescriptorFeatures(nn.Module):
    """Learned features of a graph's descriptors (`hpcdeq.data.descriptors`), standardised by the training samples, and of which
    elements there are: what is most often zero is hardly told from little by a standardised number.

    What a graph lacks is the mean; so is what all training samples have in common. The descriptors depend on atoms and
    distances, but derivatives do not go through them.

    Parameters
    ----------
    count
        Features.
    dropout
        Part of the hidden units that is left out at random in training.
    """

    mean: Tensor
    inverse: Tensor

    def __init__(self, count: int, dropout: float) -> None:
        super().__init__()
        names = graph_descriptors(no_graphs()).names
        size = len(names)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("inverse", torch.ones(size))
        self.elements = [place for place, name in enumerate(names) if name.startswith(ELEMENT)]
        self.hidden = nn.Linear(size + len(self.elements), 2 * count)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(2 * count, count)

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        """Take over mean and standard deviation of the training samples' descriptors, ``(d,)``. Not collective."""
        known = deviation.isfinite() & (deviation > 1e-9 * (1 + mean.abs()))
        self.mean.copy_(torch.where(known, mean, 0.0))
        self.inverse.copy_(torch.where(known, 1 / deviation, 0.0))

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(B, count)`` for a batch of B graphs."""
        found = torch.from_numpy(graph_descriptors(graph_arrays(batch)).values)
        scaled = ((found.to(self.mean) - self.mean) * self.inverse).nan_to_num(0.0).clamp(-FARTHEST, FARTHEST)
        known = torch.cat([scaled, (found[:, self.elements] > 0).to(scaled)], dim=1)
        features: Tensor = self.last(self.dropout(silu(self.hidden(known))))
        return features
