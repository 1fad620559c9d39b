"""Does a cell contract? The spectral radius and the norm of J = ∂f/∂z at one state, sample by sample.

Both come from one Krylov space for each sample, built for the whole batch at once (the samples of a batch are the
diagonal blocks of J; each has its own inner products, and the answer does not depend on its batch mates):

    spectral radius   Arnoldi on J: eigenvalues of the small Hessenberg matrix, complex pairs included (Saad 2011,
                      Numerical Methods for Large Eigenvalue Problems, chapter 6)
    contraction       Lanczos on JᵀJ, which is the same process on a symmetric matrix

At a fixed point a spectral radius below one means that plain iteration z ← f(z) converges from nearby, at that rate; a
norm below one that it does so monotonically in the 2-norm. Neither is needed for the fixed point to be found by the
SNES, or to be differentiated; both say how hard that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcdeq.deq.arguments import Cell
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.probes import entry_counts, positions, uniform
from hpcdeq.deq.samples import Samples
from hpcdeq.errors import ConvergenceError, OptionError

STEPS = 30
# A new direction this much shorter (times the unit of rounding) than the product that it came from is rounding: the
# Krylov space is invariant.
BREAKDOWN = 100.0


@dataclass(frozen=True)
class Estimate:
    """One number for each sample, and how far to trust it.

    Attributes
    ----------
    value
        ``(B,)``, in float64 on the CPU.
    residual
        ``(B,)`` absolute; what it bounds is said by the function that made it. It knows nothing of rounding, which is
        about the unit of rounding times ‖J‖; zero where the Krylov space is exhausted.
    products
        Products with J, and as many with Jᵀ in `norm_at`, that each sample took part in.
    """

    value: Tensor
    residual: Tensor
    products: int


def spectral_radius(
    cell: Cell,
    x: Any,
    z: Tensor,
    *,
    sample_index: Callable[[Any], Tensor] | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Return an estimate of the spectral radius of ∂f/∂z of each sample, ``(B,)`` in float64 on the CPU.

    Not collective. See `spectral_radius_at`, which also tells how far it has converged.

    Parameters
    ----------
    cell, x, sample_index
        As in `FixedPoint`.
    z
        The state to linearise at, usually the fixed point.
    steps, seed
        As in `spectral_radius_at`.
    """
    return spectral_radius_at(*_linearised(cell, x, z, sample_index), steps=steps, seed=seed).value


def contraction(
    cell: Cell,
    x: Any,
    z: Tensor,
    *,
    sample_index: Callable[[Any], Tensor] | None = None,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Return ‖∂f/∂z‖₂ of each sample, from below, ``(B,)`` in float64 on the CPU.

    Not collective. See `norm_at`, which also tells how far it has converged; arguments as in `spectral_radius`.
    """
    return norm_at(*_linearised(cell, x, z, sample_index), steps=steps, seed=seed).value


def spectral_radius_at(at: Linearisation, samples: Samples, *, steps: int = STEPS, seed: int = 0) -> Estimate:
    """Estimate the spectral radius of each sample's J.

    Not collective. The value is the largest modulus of a Ritz value, and as exact as eigenvalues are in this precision
    where a sample has no more than ``steps`` entries. Otherwise it is an estimate and no bound: it is usually too small,
    but Ritz values lie anywhere in the field of values, which is larger than the spectrum where J is not normal. The
    residual ‖J y - θ y‖ of the Ritz pair (‖y‖ = 1) is a backward error: θ is an eigenvalue of a matrix that differs from J
    by so much in the 2-norm. For a normal J some eigenvalue lies within it.

    Parameters
    ----------
    at
        The linearised cell.
    samples
        Which rows belong together.
    steps
        Dimension of the Krylov space, whose basis needs the memory of so many states.
    seed
        Of the first vector.

    Raises
    ------
    ConvergenceError
        J has entries that are not finite.
    """
    hessenberg, products = _krylov(at.jvp, at.z, samples, steps, seed)
    ritz, vectors = torch.linalg.eig(hessenberg[:, :-1])
    residuals = hessenberg[:, -1, -1:].abs() * vectors[:, -1].abs() / torch.linalg.vector_norm(vectors, dim=1)
    value, which = ritz.abs().max(dim=1)
    return Estimate(value, residuals.gather(1, which[:, None])[:, 0], products)


def norm_at(at: Linearisation, samples: Samples, *, steps: int = STEPS, seed: int = 0) -> Estimate:
    """Estimate ‖J‖₂ of each sample, the factor by which its cell contracts (or stretches) around the state.

    Not collective. The value is a lower bound, to rounding, and exact where a sample has no more than ``steps`` entries;
    in general it is short by a fraction of about (ln n / steps)² at most, far less where singular values are apart
    (Kuczyński and Woźniakowski 1992, SIAM J. Matrix Anal. Appl. 13, 1094). Some singular value lies within the residual
    of it; that this is the largest one is likely, not certain. Arguments and errors as in `spectral_radius_at`.
    """
    symmetric, products = _krylov(lambda v: at.vjp(at.jvp(v)), at.z, samples, steps, seed)
    last = symmetric[:, -1, -1].abs()
    squares, vectors = torch.linalg.eigh(0.5 * (symmetric[:, :-1] + symmetric[:, :-1].mT))
    value = squares[:, -1].clamp(min=0.0).sqrt()
    # |θ - σ²| ≤ r for a symmetric matrix, and |√θ - σ| ≤ r / √θ.
    residual = torch.where(value > 0, last * vectors[:, -1, -1].abs() / value, last.sqrt())
    return Estimate(value, residual, products)


def _linearised(
    cell: Cell, x: Any, z: Tensor, sample_index: Callable[[Any], Tensor] | None
) -> tuple[Linearisation, Samples]:
    samples = Samples.of(z, None if sample_index is None else sample_index(x))
    return Linearisation(lambda state: cell(state, x), z, ()), samples


def _krylov(
    product: Callable[[Tensor], Tensor], z: Tensor, samples: Samples, steps: int, seed: int
) -> tuple[Tensor, int]:
    """Return ``(B, m + 1, m)`` Hessenberg matrices of each sample's Arnoldi process and the number of products.

    Rows and columns past the end of a sample's Krylov space are zero: its matrix then has further eigenvalues zero, which
    change no largest one.
    """
    if steps < 1:
        raise OptionError(f"steps is {steps}: give 1 or more")
    largest = int(entry_counts(z, samples).max()) if samples.count else 0
    steps = max(1, min(steps, largest))
    hessenberg = torch.zeros(samples.count, steps + 1, steps, dtype=torch.float64, device=z.device)
    if largest == 0:
        return hessenberg.cpu(), 0
    rounding = BREAKDOWN * torch.finfo(z.dtype).eps
    start = uniform(positions(z, samples), seed).to(z.dtype)
    basis = start.new_zeros(len(start), steps + 1, start.shape[1])
    basis[:, 0] = _divided(start, samples.norms(start), samples)
    for j in range(steps):
        w = samples.rows(product(basis[:, j].reshape(z.shape)))
        size = samples.norms(w)
        known = basis[:, : j + 1]
        for _ in range(2):  # once more removes what rounding left of the others
            along = samples.total(torch.einsum("rkd,rd->rk", known, w))
            w = w - torch.einsum("rkd,rk->rd", known, samples.spread(along))
            hessenberg[:, : j + 1, j] += along
        norm = samples.norms(w)
        ended = norm <= rounding * size
        norm = torch.where(ended, 0.0, norm)
        hessenberg[:, j + 1, j] = norm
        basis[:, j + 1] = _divided(w, norm, samples)
        if bool(ended.all()):
            break
    bad = (~torch.isfinite(hessenberg).all(dim=2).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ConvergenceError(
            f"the Jacobian of sample {', '.join(map(str, bad[:5]))} has entries that are not finite: its spectrum cannot be"
            " estimated. Likely fix: look at the state, and at the weights, for NaN."
        )
    return hessenberg.cpu(), j + 1


def _divided(v: Tensor, norm: Tensor, samples: Samples) -> Tensor:
    """Return ``(rows, d)`` v over its norms ``(B,)``, zero for a sample whose norm is zero: it has come to its end."""
    factor = torch.where(norm > 0, 1.0 / norm, 0.0).to(v.dtype)
    return v * samples.spread(factor)[:, None]
