"""A training problem as a sum of squares: residuals and their Jacobian, rows distributed like the samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpcdeq.errors import OptionError
from hpcdeq.problem.linearised import Linearised
from hpcdeq.problem.training import TrainingProblem


class LeastSquares:
    """F(p) = ½‖r(p)‖², for losses that are sums of squares.

    Collective on the problem's comm, every method.

    Parameters
    ----------
    problem
        Its loss has a residual, and there is no weight decay.

    Raises
    ------
    OptionError
        The loss is no sum of squares, or weight decay is on.
    """

    def __init__(self, problem: TrainingProblem) -> None:
        if problem.loss_function.residual_scale(torch.zeros(1, 1)) is None:
            raise OptionError(
                f"this optimiser needs a sum of squares, and the loss is {problem.loss_function.name}: use the loss mse,"
                " or another optimiser (trgn takes any loss)"
            )
        if problem.weight_decay:
            raise OptionError("this optimiser minimises the sum of squares alone: leave --weight-decay out")
        self.problem = problem
        self._divisor = problem.dataset.count**0.5

    def residual(self, p: Tensor) -> np.ndarray:
        """Return this rank's rows of r (float64), sample by sample."""

        def local() -> np.ndarray:
            return _joined([self._residual(at) for at in self.problem.linearised(p)])

        rows = self.problem.agreed(local)
        self.problem.accounts.own.losses += len(self.problem.dataset)
        return rows / self._divisor

    def jacobian_product(self, p: Tensor, v: Tensor) -> np.ndarray:
        """Return this rank's rows of (∂r/∂p) v; p and v are ``(n,)``, the same on all ranks."""
        pieces = self.problem.layout.unflatten(v)

        def local() -> np.ndarray:
            return _joined([self._scale(at) * at.jacobian_product(pieces) for at in self.problem.linearised(p)])

        rows = self.problem.agreed(local)
        self.problem.accounts.own.gauss_newton_products += len(self.problem.dataset)
        return rows / self._divisor

    def owned_jacobian_transpose_product(self, p: Tensor, rows: np.ndarray) -> np.ndarray:
        """Return this rank's block of (∂r/∂p)ᵀ u, u given by this rank's rows."""
        layout = self.problem.layout

        def local() -> Tensor:
            u = torch.from_numpy(rows.copy())
            total = torch.zeros(layout.count, dtype=layout.dtype, device=layout.device)
            place = 0
            for at in self.problem.linearised(p):
                size = at.outputs.numel()
                part = u[place : place + size].reshape(at.outputs.shape).to(at.outputs)
                total += layout.flatten(at.jacobian_transpose_product(part * self._scale(at)))
                place += size
            return total

        return layout.scatter_sum(self.problem.agreed(local)) / self._divisor

    def _residual(self, at: Linearised) -> Tensor:
        r = self.problem.loss_function.residual(at.outputs, at.targets)
        assert r is not None
        return r

    def _scale(self, at: Linearised) -> float:
        scale = self.problem.loss_function.residual_scale(at.outputs)
        assert scale is not None
        return scale


def _joined(parts: list[Tensor]) -> np.ndarray:
    if not parts:
        return np.empty(0)
    return torch.cat([part.reshape(-1) for part in parts]).double().cpu().numpy()
