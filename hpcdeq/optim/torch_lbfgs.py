"""torch's own L-BFGS on the same problem: a reference from outside, with the counters and the history of the other methods."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcdeq.errors import ConvergenceError
from hpcdeq.optim.base import Recorder, Result
from hpcdeq.optim.stopping import ending_of, status_of, words
from hpcdeq.optim.tao import WALL, initial_gradient_error, initial_loss_error

HISTORY = 20  # as in the preset lbfgs
SEARCH = 25  # evaluations of a line search at most, torch's default
# TAO's defaults of -tao_gatol and -tao_grtol, so that both stop at the same point.
GATOL = GRTOL = 1e-8


@dataclass(frozen=True)
class _Point:
    """Loss and gradient at x, and whether a step may end there."""

    x: Tensor
    loss: float
    gradient: Tensor
    accepted: bool = True


class TorchLbfgs:
    """One minimisation by `torch.optim.LBFGS` with its strong-Wolfe line search.

    Collective on the problem's comm, every method. The state is replicated: every rank computes the same steps from the
    same gradient. One call of torch's ``step`` is one iteration; what it evaluates again at the point that its last line
    search ended at is remembered, as it would be within one long call.

    Parameters
    ----------
    recorder
        Takes the iterates, watches the clock.
    history
        Number of steps remembered.
    """

    def __init__(self, recorder: Recorder, history: int = HISTORY) -> None:
        self.recorder = recorder
        self.problem = recorder.problem
        self.history = history
        self.rejected = 0
        self.infinite = 0
        self._worst = 0.0
        self._seen: list[_Point] = []

    def minimize(self, x0: Tensor, max_iterations: int) -> Result:
        """Minimise from x0 ``(n,)`` and return the result; reports failure in its status."""
        x = x0.detach().clone()
        began = time.perf_counter()
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=1,
            max_eval=SEARCH + 1,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=self.history,
            line_search_fn="strong_wolfe",
        )
        # The first optimiser of a process imports torch's compiler: seconds that are no part of a minimisation.
        self.recorder.paused += time.perf_counter() - began

        def closure() -> float:
            point = self._evaluate(x)
            x.grad = point.gradient.clone()
            return point.loss

        reason = ""
        for iteration in range(max_iterations + 1):
            point = self._evaluate(x)
            loss, norm = point.loss, float(point.gradient.double().norm())
            self.recorder.emit(iteration, x, loss, norm, None)
            if norm <= GATOL:
                reason = "CONVERGED_GATOL"
            elif norm <= GRTOL * abs(loss):
                reason = "CONVERGED_GRTOL"
            elif self.recorder.out_of_time():
                reason = "DIVERGED_USER"
            elif iteration == max_iterations:
                reason = "DIVERGED_MAXITS"
            if reason:
                break
            before = x.clone()
            optimizer.step(closure)
            ended = self._evaluate(x)
            if torch.equal(x, before) or not ended.accepted:
                reason = "DIVERGED_LS_FAILURE"
                break
            self._seen = [ended]
        ending = ending_of(self.recorder, reason, unreached=self.rejected - self.infinite, infinite=self.infinite)
        return self.recorder.result(status_of(ending), reason, words(ending), self.rejected)

    def _evaluate(self, x: Tensor) -> _Point:
        """Return loss and gradient at a point, from memory where this iteration has been there."""
        for point in self._seen:
            if torch.equal(point.x, x):
                return point
        try:
            loss, gradient = self.problem.loss_and_gradient(x)
        except ConvergenceError:
            if not self._seen:
                raise
            self._seen.append(self._rejected(x))
            return self._seen[-1]
        if math.isfinite(loss) and bool(torch.isfinite(gradient).all()):
            self._worst = max(self._worst, loss)
            self._seen.append(_Point(x.clone(), loss, gradient))
        elif not self._seen:
            raise initial_gradient_error() if math.isfinite(loss) else initial_loss_error(loss)
        else:
            self.infinite += 1
            self._seen.append(self._rejected(x))
        return self._seen[-1]

    def _rejected(self, x: Tensor) -> _Point:
        """Return what a trial point counts as that no step may end at: a large loss, as for TAO."""
        self.rejected += 1
        return _Point(x.clone(), WALL * max(self._worst, 1e-300), torch.zeros_like(x), accepted=False)
