"""Fourier neural operator as a deep equilibrium network: one Fourier layer, iterated to its fixed point.

The layers of a network that solves a steady equation may share their weights, with the input injected at each of them:
the fixed point of one layer then does what infinitely many would (Marwah et al. 2023, arXiv 2312.00234).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdeq.deq import FixedPoint
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import spectral_bound, squeezed, unsqueezed
from hpcdeq.models.fno import Lifting, check_field
from hpcdeq.models.grids import is_periodic
from hpcdeq.models.mlp import Perceptron, activation_named
from hpcdeq.models.spectral import FourierModes, padded, spectral_linear


@dataclass(frozen=True)
class FnoDeqConfig:
    """Settings of the Fourier neural operator with a fixed point.

    Attributes
    ----------
    width, modes, projection, boundary, padding, coordinates, harmonics
        As in `FnoConfig`.
    lifting
        Units of the hidden layer between the input and what is injected at each iteration.
    activation
        Of lifting and projection: ``gelu``, ``tanh`` or ``silu``; that of the fixed point is tanh.
    bound
        Bound on the norm of the Fourier layer. Below 1 every input has its one fixed point whatever the weights become.
    contraction
        That norm at initialisation.
    """

    width: int = 12
    modes: int = 6
    lifting: int = 32
    projection: int = 32
    activation: str = "gelu"
    boundary: str = "auto"
    padding: float = 0.25
    coordinates: bool = True
    harmonics: int = 1
    bound: float = 0.95
    contraction: float = 0.5


class BoundedFourierWeights(nn.Module):
    """Weights of v ↦ W v + K v, a matrix at each point and a spectral convolution, with a norm below a bound.

    Between the 2-norms of fields on the period, the norm is max over all modes k of ‖W + Rₖ‖, with Rₖ = 0 for those that
    K leaves out: modes are orthonormal. Zeros beyond a domain that is not periodic, and leaving out the result there, do
    not stretch. Where the mode of the opposite sign has a matrix of its own (zero along the last of two axes), a real
    field sees the mean of one and the conjugate of the other, and at k = 0 the real part: neither is larger. With the
    Schatten norm s of order 32 of all of these, both weights are the parameters times β / (β⁴ + s⁴)^(1/4), as in
    `BoundedWeight`.

    Parameters
    ----------
    modes
        Number of modes of K.
    width
        Channels.
    bound
        β.
    initial
        Bound on the norm at initialisation.
    """

    def __init__(self, modes: int, width: int, bound: float, initial: float) -> None:
        super().__init__()
        self.bound = bound
        norm = unsqueezed(initial, bound, "BoundedFourierWeights")
        self.pointwise = nn.Parameter(torch.randn(width, width))
        self.spectral = nn.Parameter(torch.randn(modes, width, width, 2) / math.sqrt(2))
        with torch.no_grad():
            scale = norm / self.norm_bound()
            self.pointwise.mul_(scale)
            self.spectral.mul_(scale)

    def norm_bound(self) -> Tensor:
        """Return s, a smooth upper bound on the norm of the layer that the parameters themselves make."""
        # Modes are multiplied from the right, points by the transpose.
        rest = torch.view_as_complex(torch.stack([self.pointwise.T, torch.zeros_like(self.pointwise)], dim=2))
        kept = rest + torch.view_as_complex(self.spectral)
        return spectral_bound(torch.cat([rest[None], kept]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return W ``(width, width)`` and R ``(modes, width, width, 2)``."""
        factor = squeezed(self.norm_bound(), self.bound)
        return self.pointwise * factor, self.spectral * factor


@dataclass(frozen=True)
class Injection:
    """What the cell is given besides the state.

    Attributes
    ----------
    field
        ``(B, points, d)`` what the lifting makes of each input.
    pointwise, spectral
        Weights W and R, computed once for all iterations.
    """

    field: Tensor
    pointwise: Tensor
    spectral: Tensor


class FourierCell(nn.Module):
    """z ↦ tanh(K z + W z + s).

    Parameters
    ----------
    modes
        Of the grid.
    """

    def __init__(self, modes: FourierModes) -> None:
        super().__init__()
        self.modes = modes

    def initial_state(self, given: Injection) -> Tensor:
        """Return the zero state ``(B, points, d)``."""
        return torch.zeros_like(given.field)

    def select(self, given: Injection, keep: Tensor) -> Injection:
        """Return the input of some of the samples, numbered by keep ``(k,)``."""
        return replace(given, field=given.field.index_select(0, keep))

    def forward(self, z: Tensor, given: Injection) -> Tensor:
        convolved = self.modes.synthesise(spectral_linear(self.modes.analyse(z), given.spectral))
        return torch.tanh(convolved + functional.linear(z, given.pointwise) + given.field)


class FnoDeq(nn.Module):
    """u = Q z with z = tanh(K z + W z + P(a, x)), and perceptrons P and Q of one hidden layer at each point.

    Parameters
    ----------
    config
        Sizes, boundary and contraction.
    input_shape, output_size
        As for `Fno`.

    Raises
    ------
    DataError, OptionError
        As by `Fno`; or the contraction is not within what the bound allows.
    """

    def __init__(self, config: FnoDeqConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        check_field(input_shape, output_size, "fno_deq")
        self.activation = activation_named(config.activation, "fno_deq")
        periodic = is_periodic(config.boundary, len(input_shape), "fno_deq")
        modes = FourierModes(input_shape, config.modes, padded(input_shape, periodic, config.padding, "fno_deq"))
        self.lifting = Lifting(input_shape, config.lifting, config.coordinates, periodic, config.harmonics)
        self.injection = nn.Linear(config.lifting, config.width)
        self.recurrent = BoundedFourierWeights(modes.count, config.width, config.bound, config.contraction)
        self.equilibrium = FixedPoint(FourierCell(modes))
        self.projection = Perceptron(config.width, config.projection, 1, 1, self.activation)

    def forward(self, a: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        pointwise, spectral = self.recurrent()
        field = self.injection(self.activation(self.lifting(a)))
        z = self.equilibrium(Injection(field, pointwise, spectral))
        return self.projection(z).squeeze(2)


register("fno_deq", ModelKind(FnoDeqConfig, "array", FnoDeq))
