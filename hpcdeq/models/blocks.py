"""Parts that models share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcdeq.errors import OptionError


class BoundedWeight(nn.Module):
    """A square weight whose spectral norm stays below a bound, whatever its parameter becomes.

    With M = V Vᵀ of the parameter V, the Schatten norm s = (tr M⁸)^(1/16) lies between the spectral norm of V and
    n^(1/16) times it (1.24 for n = 32), and W = V β / (β⁴ + s⁴)^(1/4) has a spectral norm below β. Unlike a division by
    the largest singular value, this is smooth where singular values cross, so that second derivatives exist everywhere.

    Parameters
    ----------
    size
        n.
    bound
        β.
    initial
        Spectral norm at initialisation, below the bound.
    """

    def __init__(self, size: int, bound: float, initial: float) -> None:
        super().__init__()
        limit = bound * size ** (-1 / 16)
        if not 0 < initial < limit:
            raise OptionError(
                f"contraction {initial} at initialisation must lie between 0 and {limit:.3g}, which is the bound {bound}"
                f" over {size}^(1/16)"
            )
        self.bound = bound
        self.parameter = nn.Parameter(torch.empty(size, size))
        nn.init.orthogonal_(self.parameter)
        # s of an orthogonal matrix times c is c n^(1/16): the c for which W = c β / (β⁴ + s⁴)^(1/4) has norm `initial`.
        scale = initial * bound / (bound**4 - initial**4 * size**0.25) ** 0.25
        with torch.no_grad():
            self.parameter.mul_(scale)

    def forward(self) -> Tensor:
        """Return W, ``(n, n)``."""
        tiny = torch.finfo(self.parameter.dtype).tiny  # keeps the derivative of a zero parameter
        size = (self.parameter.square().sum() + tiny).sqrt()
        unit = self.parameter / size
        power = unit @ unit.T
        power = power @ power
        power = power @ power
        schatten = size * (power.square().sum() + tiny) ** (1 / 16)
        return self.parameter * (self.bound / (self.bound**4 + schatten**4) ** 0.25)


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
