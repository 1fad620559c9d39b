"""Parts that models share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hpcdeq.errors import OptionError


def spectral_bound(matrices: Tensor, order: int = 32) -> Tensor:
    """Return a smooth upper bound on the spectral norms of all matrices ``(..., r, c)`` given, a scalar.

    Not collective. It is the Schatten norm of the block-diagonal matrix that they make, (Σ σᵢᵖ)^(1/p) of all singular
    values: at most (number of them)^(1/p) times the largest. Unlike that one it is smooth where singular values cross,
    and needs products of matrices only.

    Parameters
    ----------
    matrices
        Real or complex.
    order
        p, a power of two from 4 on.
    """
    tiny = torch.finfo(matrices.dtype).tiny  # keeps the derivative at zero
    wide = matrices.shape[-1] > matrices.shape[-2]
    gram = matrices @ matrices.mH if wide else matrices.mH @ matrices
    # Any multiple of the matrices gives that multiple of the norm: the one chosen here is no variable, and keeps the powers
    # from leaving the range of numbers.
    scale = gram.detach().abs().sum(dim=-1).amax().clamp(min=tiny)
    power = gram / scale
    for _ in range(order.bit_length() - 3):
        power = power @ power
    parts = torch.view_as_real(power) if power.is_complex() else power
    return scale.sqrt() * (parts.square().sum() + tiny) ** (1 / order)


def squeezed(norm: Tensor, bound: float) -> Tensor:
    """Return the factor that takes a norm of any size to one below a bound, and leaves small ones as they are.

    Not collective. It is β / (β⁴ + s⁴)^(1/4).
    """
    return bound / (bound**4 + norm**4) ** 0.25


def unsqueezed(norm: float, bound: float, block: str) -> float:
    """Return the norm that `squeezed` takes to a given one below the bound.

    Not collective.

    Raises
    ------
    OptionError
        It is not between zero and the bound; ``block`` says whose.
    """
    if not 0 < norm < bound:
        raise OptionError(f"{block}: contraction {norm} at initialisation must lie between 0 and the bound {bound}")
    return norm * bound / (bound**4 - norm**4) ** 0.25


class BoundedWeight(nn.Module):
    """A square weight whose spectral norm stays below a bound, whatever its parameter becomes.

    With the Schatten norm s = (tr (V Vᵀ)⁸)^(1/16) of the parameter V, which lies between its spectral norm and n^(1/16)
    times that (1.24 for n = 32), W = V β / (β⁴ + s⁴)^(1/4) has a spectral norm below β. Unlike a division by the largest
    singular value, this is smooth where singular values cross, so that second derivatives exist everywhere.

    Parameters
    ----------
    size
        n.
    bound
        β.
    initial
        Spectral norm at initialisation, below the bound.
    """

    ORDER = 16

    def __init__(self, size: int, bound: float, initial: float) -> None:
        super().__init__()
        # s of an orthogonal matrix times c is c n^(1/16).
        excess = size ** (1 / self.ORDER)
        if not 0 < initial < bound / excess:
            raise OptionError(
                f"contraction {initial} at initialisation must lie between 0 and {bound / excess:.3g}, which is the bound"
                f" {bound} over {size}^(1/{self.ORDER})"
            )
        self.bound = bound
        self.parameter = nn.Parameter(torch.empty(size, size))
        nn.init.orthogonal_(self.parameter)
        with torch.no_grad():
            self.parameter.mul_(unsqueezed(initial * excess, bound, "BoundedWeight") / excess)

    def forward(self) -> Tensor:
        """Return W, ``(n, n)``."""
        return self.parameter * squeezed(spectral_bound(self.parameter, self.ORDER), self.bound)


class SpectralWeight(nn.Module):
    """A weight of a given spectral norm, whatever its parameter becomes: spectral normalisation (Miyato et al. 2018).

    W = c V / s with the Schatten norm s of order 32 in place of the largest singular value, so that the norm of W lies
    between c over min(n, m)^(1/32) (0.88 c for 64) and c. There is no power iteration, whose state would make the weight
    depend on how often it was used: W is a smooth function of V, but for V = 0.

    Parameters
    ----------
    rows, columns
        Shape of W.
    norm
        c.
    """

    def __init__(self, rows: int, columns: int, norm: float) -> None:
        super().__init__()
        if not norm > 0:
            raise OptionError(f"SpectralWeight: norm {norm} must be positive")
        self.norm = norm
        self.parameter = nn.Parameter(torch.empty(rows, columns))
        nn.init.orthogonal_(self.parameter)

    def forward(self) -> Tensor:
        """Return W, ``(rows, columns)``."""
        return self.parameter * (self.norm / spectral_bound(self.parameter))


class NormalisedWeight(nn.Module):
    """A weight of rows gᵢ vᵢ/‖vᵢ‖, lengths and directions learned apart: weight normalisation (Salimans, Kingma 2016).

    Alone it bounds nothing, since the gains g are free. With a bound β on the spectral norm, the whole is multiplied by
    β / (β⁴ + s⁴)^(1/4) as in `BoundedWeight`, with s the Schatten norm of order 32.

    Parameters
    ----------
    rows, columns
        Shape of W.
    initial
        Spectral norm at initialisation, at most (and near to it).
    bound
        β, or None.
    """

    def __init__(self, rows: int, columns: int, initial: float, bound: float | None = None) -> None:
        super().__init__()
        self.bound = bound
        norm = initial if bound is None else unsqueezed(initial, bound, "NormalisedWeight")
        self.direction = nn.Parameter(torch.empty(rows, columns))
        nn.init.normal_(self.direction)
        self.gain = nn.Parameter(torch.ones(rows))
        with torch.no_grad():
            self.gain.mul_(norm / spectral_bound(self._unbounded()))

    def _unbounded(self) -> Tensor:
        tiny = torch.finfo(self.direction.dtype).tiny
        squares = self.direction.square().sum(dim=1, keepdim=True)
        return self.direction * (self.gain[:, None] * (squares + tiny).rsqrt())

    def forward(self) -> Tensor:
        """Return W, ``(rows, columns)``."""
        weight = self._unbounded()
        return weight if self.bound is None else weight * squeezed(spectral_bound(weight), self.bound)


class BoundedConvolution(nn.Module):
    """A kernel whose convolution has a norm below a bound, whatever its parameter becomes and however large the image.

    It holds for ``conv1d``, ``conv2d`` and ``conv3d`` of unit or larger stride with zeros or a circular continuation
    outside the image, between the 2-norms of a sample's input and output. With no image but an endless grid the norm is
    max over ω of ‖K(ω)‖₂, K(ω) = Σₜ Kₜ exp(-i t·ω) (``(out, in)`` matrices); images are parts of that grid, or periodic
    ones, for which this is exact at their own frequencies (Sedghi, Gupta, Long 2019, arXiv 1805.10408). Here the maximum is
    over a grid of N = 4k frequencies along each axis of k taps. Between them a trigonometric polynomial of degree
    (k - 1)/2 exceeds its largest value on the grid by a factor 1/cos(π (k - 1)/(2N)) at most (1.035 for each axis of
    3 taps; Ehlich and Zeller 1964), whence the bound s on the norm of the parameter's convolution; the kernel is the
    parameter times β / (β⁴ + s⁴)^(1/4).

    Parameters
    ----------
    inputs, outputs
        Channels.
    taps
        k, along each axis.
    bound
        β.
    initial
        Bound on the norm at initialisation.
    axes
        1, 2 or 3.
    """

    FREQUENCIES_PER_TAP = 4

    def __init__(self, inputs: int, outputs: int, taps: int, bound: float, initial: float, axes: int = 2) -> None:
        super().__init__()
        self.bound = bound
        norm = unsqueezed(initial, bound, "BoundedConvolution")
        self.parameter = nn.Parameter(torch.empty(outputs, inputs, *(taps,) * axes))
        nn.init.normal_(self.parameter)
        with torch.no_grad():
            self.parameter.mul_(norm / self.norm_bound())

    def norm_bound(self) -> Tensor:
        """Return s, a smooth upper bound on the norm of convolving with the parameter itself."""
        taps = self.parameter.shape[2:]
        along = [self.FREQUENCIES_PER_TAP * k for k in taps]
        # Half of the frequencies: at the others stand the complex conjugates, of the same norm.
        symbol = torch.fft.rfftn(self.parameter, s=along, dim=list(range(2, 2 + len(taps))))
        between = math.prod(1.0 / math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(taps, along, strict=True))
        return between * spectral_bound(symbol.movedim((0, 1), (-2, -1)))

    def forward(self) -> Tensor:
        """Return the kernel, ``(outputs, inputs, k, ...)``."""
        return self.parameter * squeezed(self.norm_bound(), self.bound)


class MonotoneWeight(nn.Module):
    """A square weight W = (1 - m) I - Aᵀ A + B - Bᵀ, for which I - W is monotone (Winston, Kolter 2020, 2006.08591).

    ⟨v, (I - W) v⟩ = m ‖v‖² + ‖A v‖² ≥ m ‖v‖² whatever A and B become, and every W with this property can be written so.
    Then z = σ(W z + s) has one and only one solution for every s and every σ that is the proximal operator of a convex
    function, though ‖W‖ may be as large as one likes.

    Parameters
    ----------
    size
        n.
    monotonicity
        m > 0; nearer to zero the weight may feed more of a state back to itself, and solves take longer.
    initial
        Root of n times the standard deviation of the entries of A and B at initialisation; ‖A‖ is about twice this.
    """

    def __init__(self, size: int, monotonicity: float, initial: float) -> None:
        super().__init__()
        if not monotonicity > 0:
            raise OptionError(
                f"monotonicity {monotonicity} must be positive: at zero there may be no fixed point, or many"
            )
        if not initial > 0:
            raise OptionError(f"MonotoneWeight: initial {initial} must be positive, or A would never leave zero")
        self.monotonicity = monotonicity
        self.symmetric = nn.Parameter(torch.empty(size, size))
        self.skew = nn.Parameter(torch.empty(size, size))
        for parameter in (self.symmetric, self.skew):
            nn.init.normal_(parameter, std=initial / size**0.5)

    def forward(self) -> Tensor:
        """Return W, ``(n, n)``."""
        eye = torch.eye(len(self.skew), dtype=self.skew.dtype, device=self.skew.device)
        return (1 - self.monotonicity) * eye - self.symmetric.T @ self.symmetric + self.skew - self.skew.T


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


class OutputScale(nn.Module):
    """y ↦ mean + deviation y, as the training targets have them; the last step of a model of numbers.

    Parameters
    ----------
    count
        Numbers.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("deviation", torch.ones(count))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        """Take over mean and deviation, ``(count,)``; a number that is always the same keeps a deviation of 1."""
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, y: Tensor) -> Tensor:
        """Return ``(B, count)`` in the units of the targets."""
        return torch.addcmul(self.mean, self.deviation, y)
