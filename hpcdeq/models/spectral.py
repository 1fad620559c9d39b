"""Convolutions by their lowest Fourier modes (Li et al. 2021, Fourier neural operator, arXiv 2010.08895), in real numbers.

The transforms are products with the few rows of the Fourier matrix that are used, one axis after the other. On grids of up
to 64 points along an axis and up to a dozen modes this takes a half to a third of the time of fast Fourier transforms with
the modes picked out, forward and backward, and needs no complex numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from hpcdeq.errors import DataError, OptionError


def spectral_linear(spectrum: Tensor, weight: Tensor) -> Tensor:
    """Multiply each mode's complex vector by a complex matrix of its own, from the right.

    Not collective. Seen by ``torch.overrides.TorchFunctionMode`` as a function of this name, as ``linear`` is.

    Parameters
    ----------
    spectrum
        ``(modes, B, 2, inputs)``: real parts, then imaginary parts.
    weight
        ``(modes, inputs, outputs, 2)``: real part and imaginary part last.

    Returns
    -------
    Tensor
        ``(modes, B, 2, outputs)``.
    """
    if has_torch_function((spectrum, weight)):
        return handle_torch_function(spectral_linear, (spectrum, weight), spectrum, weight)
    real, imaginary = weight.unbind(3)
    # (x + iy)(V + iW) = (xV - yW) + i(xW + yV)
    blocks = torch.cat([torch.cat([real, imaginary], dim=2), torch.cat([-imaginary, real], dim=2)], dim=1)
    product = torch.bmm(spectrum.flatten(2), blocks)
    return product.unflatten(2, (2, weight.shape[2]))


class FourierModes(nn.Module):
    """The lowest Fourier modes of real fields on a grid, and fields from modes.

    With K modes an axis: the wave numbers 0 to K - 1 along the last axis, and -(K - 1) to K - 1 along the first of two;
    those of the opposite sign follow, the field being real. Transforms are orthonormal.

    Parameters
    ----------
    grid
        Points along each axis, one or two.
    modes
        K.
    period
        Period of the modes, in points, along each axis; longer than the grid, the field is taken as zero on the rest.
        Default: the grid.

    Attributes
    ----------
    count
        Number of modes.
    wave_numbers
        ``(count, axes)``, in the order of the modes.

    Raises
    ------
    DataError
        The grid has not one or two axes.
    OptionError
        A period has not that many modes.
    """

    last: Tensor
    last_back: Tensor
    first: Tensor

    def __init__(self, grid: tuple[int, ...], modes: int, period: tuple[int, ...] | None = None) -> None:
        super().__init__()
        period = period or grid
        if len(grid) not in (1, 2):
            raise DataError(
                f"Fourier modes of a field of shape {grid}: give one on a grid of one or two axes, or use --model deeponet"
            )
        most = (min(period) + 1) // 2
        if not 1 <= modes <= most:
            raise OptionError(f"modes {modes}: {min(period)} points have 1 to {most} modes")
        self.grid = grid
        along = torch.arange(modes)
        self.wave_numbers = along[:, None] if len(grid) == 1 else torch.cartesian_prod(_both_signs(modes), along)
        self.count = len(self.wave_numbers)
        # Rows of the Fourier matrix: (2 K, n), real parts before imaginary ones.
        waves = _waves(along, grid[-1], period[-1])
        self.register_buffer("last", torch.cat([waves.real, waves.imag]))
        # A mode but the zeroth along the last axis stands for its complex conjugate too.
        twice = torch.where(along == 0, 1.0, 2.0).double().repeat(2)
        self.register_buffer("last_back", (self.last * twice[:, None]).T.contiguous())
        if len(grid) == 2:
            # Along the first axis numbers are complex: (2 (2 K - 1), 2 n), both sides with real parts before imaginary ones.
            waves = _waves(_both_signs(modes), grid[0], period[0])
            upper, lower = torch.cat([waves.real, -waves.imag], dim=1), torch.cat([waves.imag, waves.real], dim=1)
            self.register_buffer("first", torch.cat([upper, lower]))

    def analyse(self, field: Tensor) -> Tensor:
        """Return the spectrum ``(count, B, 2, c)`` of fields ``(B, points, c)``, real parts before imaginary parts."""
        batch, _, channels = field.shape
        if len(self.grid) == 1:
            return (self.last.to(field) @ field).view(batch, 2, self.count, channels).permute(2, 0, 1, 3)
        n, m = self.grid
        width = len(self.last) // 2 * channels
        along = (self.last.to(field) @ field.reshape(batch * n, m, channels)).view(batch, n, 2, width)
        both = self.first.to(field) @ along.transpose(1, 2).reshape(batch, 2 * n, width)
        return both.view(batch, 2, self.count, channels).permute(2, 0, 1, 3)

    def synthesise(self, spectrum: Tensor) -> Tensor:
        """Return the real fields ``(B, points, c)`` that have a spectrum ``(count, B, 2, c)``."""
        _, batch, _, channels = spectrum.shape
        parts = spectrum.permute(1, 2, 0, 3)
        if len(self.grid) == 1:
            return self.last_back.to(spectrum) @ parts.reshape(batch, 2 * self.count, channels)
        n, m = self.grid
        rows = len(self.last)
        both = parts.reshape(batch, len(self.first), rows // 2 * channels)
        along = (self.first.T.to(spectrum) @ both).view(batch, 2, n, rows // 2 * channels).transpose(1, 2)
        return (self.last_back.to(spectrum) @ along.reshape(batch * n, rows, channels)).view(batch, n * m, channels)


class SpectralConvolution(nn.Module):
    """A convolution over the period of its modes: of each mode with a complex matrix of its own, and no higher ones.

    Parameters
    ----------
    modes
        Of the grid.
    inputs, outputs
        Channels.

    Attributes
    ----------
    weight
        ``(modes, inputs, outputs, 2)``, real part and imaginary part last.
    """

    def __init__(self, modes: FourierModes, inputs: int, outputs: int) -> None:
        super().__init__()
        self.modes = modes
        # What is kept of a random field keeps its size.
        self.weight = nn.Parameter(torch.randn(modes.count, inputs, outputs, 2) / math.sqrt(2 * inputs))

    def forward(self, field: Tensor) -> Tensor:
        """Return fields ``(B, points, outputs)`` from fields ``(B, points, inputs)``."""
        return self.modes.synthesise(spectral_linear(self.modes.analyse(field), self.weight))


def padded(grid: tuple[int, ...], periodic: bool, padding: float, model: str) -> tuple[int, ...]:
    """Return the period of the modes of a field, in points: the grid of a periodic one, a longer one else.

    Not collective.

    Raises
    ------
    OptionError
        The padding, in lengths of the grid, is negative or more than 4; ``model`` says whose it is.
    """
    if not 0 <= padding <= 4:
        raise OptionError(f"model {model}: padding {padding} must lie between 0 and 4, in lengths of the grid")
    return grid if periodic else tuple(n + math.ceil(padding * n) for n in grid)


def _both_signs(modes: int) -> Tensor:
    return torch.arange(1 - modes, modes)


def _waves(numbers: Tensor, points: int, period: int) -> Tensor:
    """Return exp(-2πi k j/P)/√P, ``(len(k), points)``, j = 0, 1, ..."""
    angles = -2 * math.pi / period * numbers.double()[:, None] * torch.arange(points).double()
    return torch.polar(torch.full_like(angles, period**-0.5), angles)
