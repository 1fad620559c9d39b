"""A training problem as a sum of squares: residuals and their Jacobian, rows distributed like the samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.errors import OptionError
from hpcdeq.problem.linearised import Linearised
from hpcdeq.problem.training import TrainingProblem


class LeastSquares:
    """F(p) = ½‖r(p)‖², where the loss and all terms are sums of squares.

    Rows of r are distributed: first those of this rank's samples, chunk by chunk (residuals of the outputs, then features
    of the terms), then this rank's share of each weight term's. Collective on the problem's comm, every method.

    Parameters
    ----------
    problem
        Its loss and its terms have residuals.

    Raises
    ------
    OptionError
        The loss or a term is no sum of squares.
    """

    def __init__(self, problem: TrainingProblem) -> None:
        if problem.loss_function.residual_scale(torch.zeros(1, 1)) is None:
            raise OptionError(
                f"this optimiser needs a sum of squares, and the loss is {problem.loss_function.name}: use the loss mse,"
                " or another optimiser (trgn takes any loss)"
            )
        one = torch.zeros(problem.layout.count, dtype=torch.float64, device=problem.layout.device)
        bad = [term.name for term in problem.weight_terms if term.residual(one) is None]
        bad += [term.name for term in problem.sample_terms if not term.squares]
        if bad:
            raise OptionError(
                f"this optimiser needs a sum of squares, and the {bad[0]} is none: leave it out, or use another optimiser"
                " (trgn takes any term)"
            )
        self.problem = problem
        self._divisor = problem.dataset.count**0.5

    def residual(self, p: Tensor) -> np.ndarray:
        """Return this rank's rows of r (float64)."""

        def local() -> np.ndarray:
            return _joined([part for at in self.problem.linearised(p) for part in self._residual(at)])

        rows = self.problem.agreed(local)
        self.problem.accounts.own.losses += len(self.problem.dataset)
        terms = [self._share(_found(term.residual(p.double()))) for term in self.problem.weight_terms]
        return np.concatenate([rows / self._divisor, *terms])

    def jacobian_product(self, p: Tensor, v: Tensor) -> np.ndarray:
        """Return this rank's rows of (∂r/∂p) v; p and v are ``(n,)``, the same on all ranks."""
        pieces = self.problem.layout.unflatten(v)

        def local() -> np.ndarray:
            parts = []
            for at in self.problem.linearised(p):
                outputs, *features = at.jacobian_product(pieces)
                parts += [self._scale(at) * outputs, *features]
            return _joined(parts)

        rows = self.problem.agreed(local)
        self.problem.accounts.own.gauss_newton_products += len(self.problem.dataset)
        terms = [self._share(term.residual_product(p.double(), v.double())) for term in self.problem.weight_terms]
        return np.concatenate([rows / self._divisor, *terms])

    def owned_jacobian_transpose_product(self, p: Tensor, rows: np.ndarray) -> np.ndarray:
        """Return this rank's block of (∂r/∂p)ᵀ u, u given by this rank's rows."""
        layout = self.problem.layout

        def local() -> Tensor:
            u = torch.from_numpy(rows.copy()).to(layout.device)
            total = torch.zeros(layout.count, dtype=torch.float64, device=layout.device)
            place = 0
            for at in self.problem.linearised(p):
                parts = []
                for head in at.heads:
                    parts.append(u[place : place + head.numel()].reshape(head.shape).to(head) / self._divisor)
                    place += head.numel()
                parts[0] = parts[0] * self._scale(at)
                total += layout.flatten(at.jacobian_transpose_product(parts))
            for term in self.problem.weight_terms:
                whole = torch.zeros_like(_found(term.residual(p.double())))
                own = self._own(len(whole))
                whole[own] = u[place : place + own.stop - own.start]
                place += own.stop - own.start
                total += term.residual_transpose_product(p.double(), whole)
            return total

        return layout.scatter_sum(self.problem.agreed(local))

    def _residual(self, at: Linearised) -> list[Tensor]:
        return [_found(self.problem.loss_function.residual(at.outputs, at.targets)), *at.heads[1:]]

    def _scale(self, at: Linearised) -> float:
        scale = self.problem.loss_function.residual_scale(at.outputs)
        assert scale is not None
        return scale

    def _own(self, size: int) -> slice:
        return parallel.own_slice(size, self.problem.comm.rank, self.problem.comm.size)

    def _share(self, rows: Tensor) -> np.ndarray:
        return rows[self._own(len(rows))].double().cpu().numpy()


def _found(rows: Tensor | None) -> Tensor:
    assert rows is not None
    return rows


def _joined(parts: list[Tensor]) -> np.ndarray:
    if not parts:
        return np.empty(0)
    return torch.cat([part.reshape(-1) for part in parts]).double().cpu().numpy()
