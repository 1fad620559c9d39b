"""Jacobian regularisation: a differentiable estimate of ‖∂f/∂z‖²_F, to be added to a loss (Bai, Koltun, Kolter 2021).

Training without it lets the spectral radius of J at the fixed points grow, and their solves with it. For a random v with
E[v vᵀ] = I the number E ‖Jᵀ v‖² is ‖J‖²_F (Hutchinson 1990), an upper bound on the square of the spectral radius
(arXiv 2106.14342, section 4.1). Here the v are signs that depend on a seed and on positions inside the sample alone, so
that the penalty is a function of the weights and nothing else, as TAO's methods require of an objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcdeq.deq.arguments import Cell
from hpcdeq.deq.probes import entry_counts, positions, signs, uniform
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.work import Work
from hpcdeq.errors import OptionError, ShapeError

# Number of the vector that says where samples' windows begin: no probe has it.
WINDOWS = 2**31


def jacobian_penalty(
    cell: Cell,
    x: Any,
    z: Tensor,
    *,
    sample_index: Callable[[Any], Tensor] | None = None,
    probes: int | Tensor = 1,
    seed: int = 0,
) -> Tensor:
    """Return an estimate of ‖J‖²_F / n of each sample, ``(B,)``, with J = ∂f/∂z and n the sample's number of entries.

    Not collective. Differentiable with respect to z, the cell's parameters and x, to any order that the cell is, by
    ordinary autograd and by ``torch.func``. With z the output of a `FixedPoint` the derivative goes through the fixed
    point; detach z to leave that part out, as the paper's implementation does not.

    Parameters
    ----------
    cell, x, sample_index
        As in `FixedPoint`.
    z
        The state to linearise at.
    probes
        Number of probes P: the relative standard deviation of the estimate is at most √(2/P), and far less for a J of
        many comparable singular values. Or the probes themselves, ``(P, *z.shape)``, where the mean of v vᵀ is the
        identity within each sample: with √n times the n unit vectors the answer is exact.
    seed
        Of the probes' signs.
    """
    samples = Samples.of(z, None if sample_index is None else sample_index(x))
    images = transposed_products(cell, x, z, _probes(z, samples, probes, seed))
    by_row = torch.stack([samples.rows(image).square().sum(dim=1) for image in images]).mean(dim=0)
    return samples.total(by_row) / entry_counts(z, samples).clamp(min=1).to(by_row.dtype)


def transposed_products(cell: Cell, x: Any, z: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return Jᵀ v for some vectors, each in the shape of the state; differentiable as `jacobian_penalty` is.

    Not collective.

    Parameters
    ----------
    cell, x, z
        As in `jacobian_penalty`.
    vectors
        The v, each in the shape of the state.
    """
    image, pull = torch.func.vjp(lambda state: cell(state, x), z)[:2]
    if image.shape != z.shape:
        raise ShapeError(f"the cell maps a state of shape {tuple(z.shape)} to shape {tuple(image.shape)}")
    return [pull(v)[0] for v in vectors]


def sample_probes(z: Tensor, samples: Samples, probes: int, seed: int, numbers: Tensor | None = None) -> list[Tensor]:
    """Return vectors of signs in the shape of a state, the same each time for a sample.

    Not collective.

    Parameters
    ----------
    z, samples
        The state, and which of its rows belong together.
    probes
        Number of vectors.
    seed
        Those of another seed are as good as independent.
    numbers
        ``(B,)`` whole numbers that name the samples: those of different names have different vectors, and an estimate that
        is averaged over samples loses its error with their number. None: all samples have the same.
    """
    if probes < 1:
        raise OptionError(f"probes is {probes}: give 1 or more")
    at = positions(z, samples)
    if numbers is not None:
        # A window of the stream of signs that begins somewhere else for each sample.
        begin = ((uniform(numbers.to(z.device), seed, WINDOWS) + 1.0) * 2.0**31).long()
        at = at + samples.spread(begin)[:, None]
    return [signs(at, seed, number).reshape(z.shape).to(z.dtype) for number in range(probes)]


def counted(value: Tensor, work: Work, products: int) -> Tensor:
    """Return a value whose derivatives are counted as a layer's work.

    Not collective.

    Parameters
    ----------
    value
        Made of derivatives of a cell, as the products of `transposed_products` are.
    work
        The layer's counters.
    products
        Products with the cell's derivatives, in units of one sample, that differentiating the value once takes.
    """
    return _Counted.apply(value, work, products)


class _Counted(torch.autograd.Function):
    """The identity, whose reverse derivatives count as products Jᵀ u, and whose tangents as products J v."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, work: Work, products: int) -> Tensor:
        ctx.work, ctx.products = work, products
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        ctx.work.cell_vjps += ctx.products
        return _Tangent.apply(cotangent, ctx.work, ctx.products), None, None


class _Tangent(torch.autograd.Function):
    """The identity on cotangents: differentiating it is taking a tangent."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, work: Work, products: int) -> Tensor:
        ctx.work, ctx.products = work, products
        return cotangent.view_as(cotangent)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
        ctx.work.cell_jvps += ctx.products
        return _Counted.apply(tangent, ctx.work, ctx.products), None, None


def _probes(z: Tensor, samples: Samples, probes: int | Tensor, seed: int) -> list[Tensor]:
    if isinstance(probes, Tensor):
        if probes.shape[1:] != z.shape or not len(probes):
            raise ShapeError(
                f"probes have shape {tuple(probes.shape)}, the state {tuple(z.shape)}: give probes of shape (P, *z.shape)"
            )
        return list(probes.to(z))
    return sample_probes(z, samples, probes, seed)
