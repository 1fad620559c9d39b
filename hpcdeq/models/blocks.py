"""Parts that models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def contractive_(weight: Tensor, norm: float) -> Tensor:
    """Fill a square weight with a random orthogonal matrix times ``norm``, in place: its spectral norm is ``norm``.

    Not collective.
    """
    nn.init.orthogonal_(weight)
    with torch.no_grad():
        weight.mul_(norm)
    return weight


class RadialBasis(nn.Module):
    """Gaussians of a distance, evenly spaced from 0 to a cutoff (Schütt et al. 2018, SchNet).

    Parameters
    ----------
    count
        Number of functions.
    cutoff
        Å.
    """

    centres: Tensor

    def __init__(self, count: int, cutoff: float) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(0.0, cutoff, count))
        self.inverse_width = (count - 1) / cutoff if count > 1 else 1.0 / cutoff

    def forward(self, distance: Tensor) -> Tensor:
        """Return ``(E, count)`` from distances ``(E,)`` in Å."""
        return torch.exp(-(((distance[:, None] - self.centres) * self.inverse_width) ** 2))


def mean_over_graphs(values: Tensor, node_graph: Tensor, count: int) -> Tensor:
    """Return the mean of node values ``(n, d)`` over each of ``count`` graphs, ``(count, d)``. Not collective."""
    total = values.new_zeros(count, values.shape[1]).index_add(0, node_graph, values)
    sizes = torch.bincount(node_graph, minlength=count).clamp(min=1)
    return total / sizes[:, None].to(values.dtype)
