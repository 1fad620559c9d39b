"""Jacobian regularisation: a differentiable estimate of ‖∂f/∂z‖²_F, to be added to a loss (Bai, Koltun, Kolter 2021).

Training without it lets the spectral radius of J at the fixed points grow, and their solves with it. For a random v with
E[v vᵀ] = I the number E ‖Jᵀ v‖² is ‖J‖²_F (Hutchinson 1990), an upper bound on the square of the spectral radius
(arXiv 2106.14342, section 4.1). Here the v are signs that depend on a seed and on positions inside the sample alone, so
that the penalty is a function of the weights and nothing else, as TAO's methods require of an objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpcdeq.deq.arguments import Cell
from hpcdeq.deq.probes import entry_counts, positions, signs
from hpcdeq.deq.samples import Samples
from hpcdeq.errors import OptionError, ShapeError


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
    vectors = _probes(z, samples, probes, seed)
    image, pull = torch.func.vjp(lambda state: cell(state, x), z)[:2]
    if image.shape != z.shape:
        raise ShapeError(f"the cell maps a state of shape {tuple(z.shape)} to shape {tuple(image.shape)}")
    by_row = torch.stack([samples.rows(row).square().sum(dim=1) for (row,) in map(pull, vectors)]).mean(dim=0)
    return samples.total(by_row) / entry_counts(z, samples).clamp(min=1).to(by_row.dtype)


def _probes(z: Tensor, samples: Samples, probes: int | Tensor, seed: int) -> list[Tensor]:
    if isinstance(probes, Tensor):
        if probes.shape[1:] != z.shape or not len(probes):
            raise ShapeError(
                f"probes have shape {tuple(probes.shape)}, the state {tuple(z.shape)}: give probes of shape (P, *z.shape)"
            )
        return list(probes.to(z))
    if probes < 1:
        raise OptionError(f"probes is {probes}: give 1 or more")
    at = positions(z, samples)
    return [signs(at, seed, number).reshape(z.shape).to(z.dtype) for number in range(probes)]
